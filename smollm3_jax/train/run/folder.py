"""A run's folder: whose it is, the lock in it, and the model's text files that exports need.

settings.json, environment.json   what the run was told, and what it runs on
metrics.jsonl                     a line a step, and held-out losses
skipped.jsonl                     steps of which something was left out, and where their data stood
events.jsonl                      damaged checkpoints, rollbacks
checkpoints/00000500/             see checkpoint.py
tokenizer/                        the text files of the model, for exports
report.html, report.png           the curves
profile/                          of the steps that log.profile names
lock                              held by the process that trains here
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ...errors import OptionError
from ...files import carry, locked, new_folder, write
from ...paths import is_remote
from ...support import SHOWN, version
from ...weights.texts import check_links, is_text_file, read_texts

TOKENIZER = "tokenizer"  # the folder of the model's text files there


def run_folder(path: str) -> epath.Path:
    """A run's folder by the name that a user gives it; Orbax wants it absolute. Raises OptionError for s3://."""
    if path.startswith("s3://"):
        raise OptionError(f"{path}: Orbax writes to gs:// and to file systems, not to s3://; mount the bucket")
    return epath.Path(path) if is_remote(path) else epath.Path(os.path.abspath(os.path.expanduser(path)))


@contextlib.contextmanager
def only_one(folder: epath.Path) -> Iterator[None]:
    """Locks the folder against a second run; object stores know no locks."""
    if jax.process_index() != 0 or is_remote(folder):
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = locked(folder / "lock")
    except BlockingIOError:
        raise OptionError(f"another process trains in {folder}") from None
    except OSError as error:
        raise OptionError(f"run.dir={folder}: {error.strerror}: {error.filename}") from None
    try:
        yield
    finally:
        os.close(lock)


def keep_texts(source: Path, folder: epath.Path) -> None:
    """The text files of the model, for exports; whatever else the folder holds stays in it."""
    if not source.is_dir():  # a .gguf
        return
    check_links(source)
    texts = read_texts(source)
    try:
        if is_remote(folder):
            for name, content in texts.items():
                write(folder / name, content)
            return
        with new_folder(folder) as new:
            for name, content in texts.items():
                (new / name).parent.mkdir(exist_ok=True)
                write(new / name, content)
            for path in Path(folder).iterdir() if folder.is_dir() else ():
                if not is_text_file(path.name):
                    carry(path, new / path.name)
    except OSError as error:
        raise OptionError(f"run.dir: {folder} cannot be written: {error.strerror or error}") from None


def environment() -> dict[str, Any]:
    """What a run runs on."""
    return {
        "versions": {name: version(name) for name in ("python", "smollm3-jax", *SHOWN)},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }
