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
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ...errors import OptionError, TrainingError
from ...files import carry, locked, new_folder, write
from ...paths import is_remote, user_path
from ...support import SHOWN, version
from ...weights.texts import check_links, is_text_file, read_texts, with_one_template

TOKENIZER = "tokenizer"  # the folder of the model's text files there


def run_folder(path: str) -> epath.Path:
    """A run's folder by the name that a user gives it; Orbax wants it absolute. Raises OptionError for s3://."""
    if path.startswith("s3://"):
        raise OptionError(f"{path}: Orbax writes to gs:// and to file systems, not to s3://; mount the bucket")
    return epath.Path(path) if is_remote(path) else epath.Path(os.path.abspath(os.path.expanduser(path)))


def named_run(name: str) -> tuple[epath.Path, int | None] | None:
    """(the folder of a run on this machine, a step or None) that RUN@STEP or RUN names; None for any other name.

    Raises:
      OptionError: what comes after @ is no step.
    """
    for path, step in ((name, None), (name.rpartition("@")[0], name.rpartition("@")[2])):
        folder = user_path(path)
        if path and not is_remote(path) and (folder / "checkpoints").is_dir() and not (folder / "config.json").exists():
            if step is not None and not re.fullmatch("[0-9]{1,15}", step):
                raise OptionError(f"{name}: after @ comes the step of a checkpoint, a number, as in {path}@500")
            return run_folder(path), None if step is None else int(step)
    return None


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


def keep_texts(source: Path, folder: epath.Path, template: str | None = None) -> None:
    """The text files of the model, for exports; whatever else the folder holds stays in it.

    Args:
      template: the chat template that takes the place of the model's own.
    """
    if not source.is_dir():  # a .gguf
        return
    check_links(source)
    texts = read_texts(source)
    if template is not None:
        texts = with_one_template(texts, template)
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
        # A full disk is no mistake in the command.
        kind = TrainingError if error.errno in (errno.ENOSPC, errno.EDQUOT) else OptionError
        raise kind(f"run.dir: {folder} cannot be written: {error.strerror or error}") from None


def environment() -> dict[str, Any]:
    """What a run runs on."""
    return {
        "versions": {name: version(name) for name in ("python", "smollm3-jax", *SHOWN)},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }
