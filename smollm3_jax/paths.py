"""Where files are: the package's cache folder, and whether a path is of this machine or of an object store."""

import os
from pathlib import Path

from .errors import SaveError

StrPath = str | os.PathLike[str]


def is_remote(path: StrPath) -> bool:
    """Whether a path is of an object store."""
    return "://" in os.fspath(path)


def user_path(path: StrPath) -> Path:
    """A path as a user writes it, perhaps from ~ on; where no such home is known, it stays as it is."""
    return Path(os.path.expanduser(path))


def cache_dir() -> Path:
    """The package's own cache: $SMOLLM3_JAX_CACHE, else smollm3-jax in $XDG_CACHE_HOME or ~/.cache.

    Raises:
      SaveError: no home is known of this user.
    """
    own = os.environ.get("SMOLLM3_JAX_CACHE")
    folder = user_path(own or os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if str(folder).startswith("~"):
        raise SaveError("this user has no home, and so no cache: name a folder in the variable SMOLLM3_JAX_CACHE")
    return folder if own else folder / "smollm3-jax"
