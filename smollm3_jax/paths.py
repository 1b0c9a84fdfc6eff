"""Where files are: the package's cache folder, and whether a path is of this machine or of an object store."""

import os
from pathlib import Path

StrPath = str | os.PathLike[str]


def is_remote(path: StrPath) -> bool:
    """Whether a path is of an object store."""
    return "://" in os.fspath(path)


def cache_dir() -> Path:
    """The package's own cache: $SMOLLM3_JAX_CACHE, else smollm3-jax in $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("SMOLLM3_JAX_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "smollm3-jax"
