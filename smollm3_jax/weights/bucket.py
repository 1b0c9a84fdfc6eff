"""Models in object stores (gs://, s3://), copied to this machine once."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import HubError, SupportError
from ..files import locked, new_file, write
from ..progress import progress
from ..support import how_to_install

COPIED = ".copied"  # what the local files are copies of: name -> fsspec's key of its contents


def copy_of(folder: str, into: Path, endings: tuple[str, ...]) -> Path:
    """The local copy, somewhere in `into`, of a model folder in an object store: files whose names end so.

    What has changed there since is copied again.

    Raises:
      HubError: there is no such folder, or it cannot be read.
      SupportError: the library for this kind of store is not installed.
    """
    from fsspec.core import url_to_fs

    local = into / hashlib.sha256(folder.rstrip("/").encode()).hexdigest()[:16]
    try:
        store: Any
        store, path = url_to_fs(folder, use_listings_cache=False)
        files = {Path(x["name"]).name: x for x in store.ls(path, detail=True) if x["type"] == "file"}
        files = {name: x for name, x in files.items() if name.endswith(endings)}
        if "config.json" not in files:
            raise HubError(f"{folder} holds no config.json: give the folder of a model")
        local.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = locked(local / ".lock", wait=True)  # of several processes one copies
        try:
            _copy(store, files, local, folder)
        finally:
            os.close(lock)
    except ImportError as error:
        raise SupportError(f"{folder}: {error}; {how_to_install('remote')}") from None
    except HubError:
        raise
    except (OSError, ValueError) as error:
        raise HubError(f"{folder} cannot be read: {error}") from None
    return local


def _copy(store: Any, files: Mapping[str, Any], local: Path, folder: str) -> None:
    note = local / COPIED
    try:
        copied = json.loads(note.read_bytes())
        copied = copied if isinstance(copied, dict) else {}
    except (OSError, ValueError, RecursionError):  # then all is copied again
        copied = {}
    keys = {name: store.ukey(x["name"]) for name, x in files.items()}
    wanted = [name for name, key in keys.items() if copied.get(name) != key or not (local / name).exists()]
    for name in {*copied, *wanted}:  # none of them is whole, until the note says so
        if keys.get(name) != copied.get(name):
            (local / name).unlink(missing_ok=True)
    with progress(f"fetching {folder}", sum(files[name]["size"] for name in wanted)) as report:
        for name in wanted:
            with store.open(files[name]["name"], "rb") as source, new_file(local / name) as target:
                while block := source.read(2**24):
                    target.write(block)
                    report(len(block))
                if target.tell() != files[name]["size"]:
                    raise HubError(f"{folder}: {name} ended after {target.tell()} of {files[name]['size']} bytes")
    write(note, json.dumps(keys))
