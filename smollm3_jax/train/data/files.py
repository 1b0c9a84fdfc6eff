"""The files of a corpus: which they are, what format each is of, and digests of what is in them.

Paths may be remote (gs://, s3://): `etils.epath` opens them.
"""

import dataclasses
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from ...errors import DataError, OptionError, SupportError
from ...logs import say_once
from ...paths import StrPath, is_remote
from ...support import how_to_install
from ...text_files import COMPRESSED
from ..settings import Source

log = logging.getLogger(__name__)
# The ending of a file's name in lower case -> the format.
ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
    ".txt": "text",
    ".md": "text",
    ".tokens": "tokens",
}
FORMATS = tuple(dict.fromkeys(ENDINGS.values()))
MANIFEST = "manifest.json"  # of a folder that `smollm3 tokenize` writes; it has "shards" when all are there
# Files that lie in folders of corpora and are about them.
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying)([._-].*)?|(notice|changelog|contributing|citation|authors|code_of_conduct|security)"
    r"(\.(md|txt|rst))?|dataset_(infos?|dict)\.json|state\.json",
    re.IGNORECASE,
)
# As datasets' splits are named.
_OTHER_SPLIT = re.compile(r"(^|[/_.-])(test|valid|validation|dev|eval)([/_.-]|$)", re.IGNORECASE)
_TRAIN_SPLIT = re.compile(r"(^|[/_.-])train([/_.-]|$)", re.IGNORECASE)
_POINTER = b"version https://git-lfs.github.com/spec/"
HASHED = 2**20
_ENDS = f"{', '.join(ENDINGS)} (JSON and text perhaps with {', '.join(COMPRESSED)} after that)"


@dataclasses.dataclass(frozen=True)
class OptionNames:
    """The names of a source's options, for errors. limit: the one that says how long a document may be, if any does."""

    field: str = "--field"
    format: str = "--format"
    limit: str = ""


def find_files(name: str, source: Source, options: OptionNames | None = None) -> list[epath.Path]:
    """The files of a source: the one that it names, or those in a folder, and in the folders there, whose names end as
    a format's do. Names that begin with "." or "_", READMEs and licences are left alone.

    Raises:
      DataError: there are no such files, or files of several formats, or one is not a plain file.
      SupportError: a library that the path needs is not installed.
    """
    if not source.path:  # or it would be the folder that one is in
        raise DataError("the name of a file or folder of documents is empty: give one")
    try:
        path = epath.Path(os.path.expanduser(source.path))
        if path.is_dir():
            return _in_folder(name, source, path, options or OptionNames())
        if not path.exists():
            raise DataError(f"{source.path} is neither a file nor a folder: nothing of that name is there")
        _refuse_special(path)
    except ImportError as error:
        raise SupportError(f"{source.path}: {error}; {how_to_install('remote')}") from error
    if not source.format and format_of(path) is None:
        raise DataError(
            f"the name of {path} does not say what it is: say the format, {(options or OptionNames()).format}=FORMAT, "
            f"one of {', '.join(FORMATS)}; what is none of these (CSV, Arrow, archives) has to be converted first"
        )
    return [path]


def refuse_within(target: StrPath, source: Source) -> None:
    """Refuses to write into a folder of documents: what is written would be read as documents the next time.

    Raises:
      OptionError: the target is that folder or lies in it, or its name is none.
    """
    if is_remote(target) or is_remote(source.path) or not source.path or source.format not in ("", "jsonl", "tokens"):
        return
    try:
        folder, place = (Path(os.path.realpath(os.path.expanduser(path))) for path in (source.path, target))
    except ValueError as error:  # NUL
        raise OptionError(f"{os.fspath(target)} is no name of a folder: {error}") from None
    if folder.is_dir() and place.is_relative_to(folder):
        parts = place.relative_to(folder).parts
        if not any(part.startswith((".", "_")) for part in parts):  # which is not looked into
            raise OptionError(f"{place} lies in the folder of the documents, {folder}: write to one beside it")


def _in_folder(name: str, source: Source, folder: epath.Path, options: OptionNames) -> list[epath.Path]:
    kinds = {file: format_of(file) for file in _below(folder)}
    ours = [file for file in kinds if not file.name.startswith("_") and not _ABOUT.fullmatch(file.name)]
    if source.format:
        taken = [file for file in ours if kinds[file] == source.format] or [file for file in ours if not kinds[file]]
    else:
        taken = [file for file in ours if kinds[file]]
    if any(kinds[file] != "jsonl" for file in taken):  # a file .json next to others describes them
        taken = [file for file in taken if name_ending(file) != ".json"]
    left = sorted(kinds.keys() - taken)
    found = sorted({str(kinds[file]) for file in taken})
    if len(found) > 1:
        raise DataError(
            f"{folder} holds files of several formats: {', '.join(found)}; "
            f"say which are meant: {options.format}={found[0]}"
        )
    if not taken:
        there = f"; there are {some([relative(file, folder) for file in left])}" if left else ""
        if any(file.suffix == ".arrow" for file in left):
            there += f". What the library datasets saved is read with {options.format}=hf"
        raise DataError(f"{source.path} is neither a file nor a folder with files that end in {_ENDS}{there}")
    if "tokens" in found:
        for place in {file.parent for file in taken}:
            _refuse_incomplete(place)
        left = [file for file in left if file.suffix != ".json"]
    if left or any(file.parent != folder for file in taken):
        one, other = (some([relative(file, folder) for file in files]) for files in (taken, left))
        say_once(log, logging.INFO, f"source {name}: {one}" + (f"; left alone: {other}" if left else ""))
    others = [file for file in taken if _OTHER_SPLIT.search(relative(file, folder))]
    if others and any(_TRAIN_SPLIT.search(relative(file, folder)) for file in taken):
        them = some([relative(file, folder) for file in others])
        say_once(log, logging.WARNING, f"source {name}: not only what is named train is read: {them}; move it away?")
    for file in taken:
        _refuse_special(file)
    return taken


def _below(folder: epath.Path) -> Iterator[epath.Path]:
    """The files of a folder and of those in it, in the order of their names, but for what begins with a dot."""
    queue, seen = [folder], set()
    while queue:
        path = queue.pop()
        if path != folder and ((is_remote(path) and format_of(path)) or not path.is_dir()):
            yield path
            continue
        if not is_remote(path):
            found = os.stat(path)
            if (found.st_dev, found.st_ino) in seen:
                continue  # a link that leads back
            seen.add((found.st_dev, found.st_ino))
        inside = sorted(path.iterdir(), reverse=True)
        queue += [x for x in inside if not x.name.startswith(".") and not (x.name.startswith("_") and x.is_dir())]


def format_of(file: epath.Path) -> str | None:
    """The format of a file by the end of its name; None if that is no format's. Text and JSON may be compressed."""
    kind = ENDINGS.get(name_ending(file))
    return None if kind not in ("jsonl", "text") and is_compressed(file) else kind


def name_ending(file: epath.Path) -> str:
    """The ending of a name in lower case, without that of a compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return next(iter(suffixes[-1 - is_compressed(file) :]), "")


def is_compressed(file: epath.Path) -> bool:
    return file.suffix.lower() in COMPRESSED


def stem(file: epath.Path, folder: epath.Path) -> str:
    """A file's name in its folder without the endings that say its format."""
    name = relative(file, folder)
    return name.removesuffix(file.suffix).removesuffix(file.with_suffix("").suffix if is_compressed(file) else "")


def relative(file: epath.Path, folder: epath.Path) -> str:
    """A file's path from a folder on."""
    return file.name if file == folder or file.parent == folder else str(file.relative_to(folder))


def some(names: Sequence[str]) -> str:
    """The first ten names, and how many more there are."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


def _refuse_special(file: epath.Path) -> None:
    if not is_remote(file) and file.exists() and not os.path.isfile(file):
        raise DataError(f"{file} is not a plain file")


def refuse_pointer(file: epath.Path) -> None:
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise DataError(f"{file} is a pointer of git-LFS, not the file itself: run `git lfs pull` where it is")


def _refuse_incomplete(folder: epath.Path) -> None:
    """Raises DataError if `smollm3 tokenize` has not ended in a folder. Another program's manifest does not count."""
    manifest = folder / MANIFEST
    if manifest.exists() and is_ours(content := read_manifest(manifest)) and "shards" not in content:
        raise DataError(f"{folder} is not complete: run `smollm3 tokenize` again, which goes on")


def read_manifest(manifest: epath.Path | os.PathLike[str]) -> Any:
    """What a manifest holds; None if that is no JSON."""
    try:
        return json.loads(epath.Path(manifest).read_bytes())
    except (ValueError, RecursionError):
        return None


def is_ours(manifest: object) -> bool:
    """Whether `smollm3 tokenize` writes such manifests."""
    return isinstance(manifest, dict) and isinstance(manifest.get("inputs"), dict)


def digest(file: epath.Path, whole: bool = True) -> str:
    """A SHA-256 of a file's length and contents; unless `whole`, of a long file only the beginning, middle and end."""
    size = file.stat().length
    sha = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if whole or size <= 3 * HASHED:
            while block := stream.read(2**22):
                sha.update(block)
        else:
            for start in (0, size // 2, size - HASHED):
                stream.seek(start)
                sha.update(stream.read(HASHED))
    return sha.hexdigest()
