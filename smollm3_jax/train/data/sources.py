"""Corpora as documents by number: JSON, Parquet, ArrayRecord, plain text, shards of tokens, HF datasets.

A document is its text, or its token ids if it comes from `smollm3 tokenize`. Paths may be remote (gs://, s3://):
`etils.epath` opens them. Files of text may be compressed, and in UTF-16 or UTF-32 if they say so.
"""

import bisect
import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from sharding.rules import say_once

from ...errors import DataError, SupportError
from ...files import is_remote, new_file
from ...support import how_to_install
from ...text_files import COMPRESSED, HEAD, blocks, compression_of, decode, encoding_of, refuse_utf16
from ...weights.hub import cache_dir
from ..settings import Source
from .json_records import spans

log = logging.getLogger(__name__)

# How file names end, in small letters -> the format.
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
MANIFEST = "manifest.json"  # of a folder that `smollm3 tokenize` writes; it has "shards" when all are there
# What comes with corpora and is none, in a folder.
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying)([._-].*)?|(notice|changelog|contributing|citation|authors|code_of_conduct|security)"
    r"(\.(md|txt|rst))?",
    re.IGNORECASE,
)
# As datasets' splits are named.
_OTHER_SPLIT = re.compile(r"(^|[/_.-])(test|valid|validation|dev|eval)([/_.-]|$)", re.IGNORECASE)
_TRAIN_SPLIT = re.compile(r"(^|[/_.-])train([/_.-]|$)", re.IGNORECASE)
_POINTER = b"version https://git-lfs.github.com/spec/"
# A corpus of more than WHOLE bytes, or in an object store, is compared by pieces of its long files: their length, and
# HASHED bytes at their beginning, middle and end.
WHOLE = 2**35
HASHED = 2**20
# One at least of the first LOOKED_AT records must have the field of the text.
LOOKED_AT = 100


class BadRecord(Exception):
    """A document that cannot be read; the reason."""


class NoField(BadRecord):
    """A record that does not have the field."""


@dataclasses.dataclass(frozen=True)
class Words:
    """The names of a source's options, for errors. limit: the one that says how long a document may be, if any does."""

    field: str = "--field"
    format: str = "--format"
    limit: str = ""


class Documents:
    """len(documents) of them; documents[i] is a str, or an int32 array of token ids, or raises BadRecord."""

    def __init__(
        self, parts: Sequence[tuple[int, Callable[[int], Any]]], names: Sequence[str], paths: Sequence[epath.Path | str]
    ):
        """
        Args:
          parts: of each file, how many documents it has, and what reads one.
          names: what to call the files; paths: where they are, or a digest of what is no file.
        """
        self._names, self.paths = names, paths
        self._reads = [read for _, read in parts]
        self._ends = list(itertools.accumulate(count for count, _ in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        part = bisect.bisect_right(self._ends, index)
        try:
            return self._reads[part](index - (self._ends[part - 1] if part else 0))
        except OSError as error:
            raise DataError(f"{self._names[part]} can no longer be read: {error}") from error

    @functools.cached_property
    def files(self) -> tuple[tuple[str, str], ...]:
        """(name, digest) of what they are read from: of every byte of a local corpus of up to WHOLE bytes."""
        sizes = [path.stat().length for path in self.paths if isinstance(path, epath.Path) and not is_remote(path)]
        what = f"{len(sizes):,} files of {sum(sizes) / 2**30:,.1f} GiB"
        if not (whole := sum(sizes) <= WHOLE):
            say_once(log, logging.INFO, f"{what}: a resume sees only whether length, beginning, middle or end changed")
        elif sum(sizes) > 2**30:
            say_once(log, logging.INFO, f"{what} are read, so that a resume sees whether they changed")
        return self._digests(whole)

    @property
    def pieces(self) -> tuple[tuple[str, str], ...]:
        """The same, but of long files by pieces: so were all corpora compared once."""
        return self._digests(whole=False)

    def _digests(self, whole: bool) -> tuple[tuple[str, str], ...]:
        def of(path: epath.Path | str) -> str:
            return path if isinstance(path, str) else digest(path, whole and not is_remote(path))

        try:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                return tuple(zip(self._names, pool.map(of, self.paths), strict=True))
        except OSError as error:
            raise DataError(f"{error.filename or 'a corpus'} can no longer be read: {error}") from None


def grain() -> Any:
    """The package grain, imported at its first use: nothing but corpora needs it.

    Raises:
      SupportError: it is not installed.
    """
    try:
        return importlib.import_module("grain")
    except ImportError as error:
        raise SupportError(f"corpora need the package grain ({error}): pip install 'grain>=0.2.18'") from error


def open_documents(name: str, source: Source, max_bytes: int, words: Words | None = None) -> Documents:
    """The documents of a source, in the order of its files' names.

    Args:
      name: what to call the source in errors.
      max_bytes: longer documents are bad records.
      words: what to call its options there.

    Raises:
      DataError: there are no such files, or they cannot be read at all, or none of their records has the field.
      SupportError: a library that the format needs is not installed.
    """
    words = words or Words()
    if source.format == "hf":
        return _open_hf(name, source, words)
    try:
        files = find_files(name, source, words)
        kind = source.format or format_of(files[0])
        opener, folder = _OPENERS[str(kind)], epath.Path(os.path.expanduser(source.path))
        parts, names, paths, left, reason = [], [], [], [], None
        for file in files:
            _refuse_pointer(file)
            count, read = opener(file, source.field, max_bytes, words)
            if kind in ("jsonl", "arrayrecord") and (why := _lacking(count, read)):
                beside = len(files) > 1 and _ends(file) == ".json"  # it may say something of the others
                if isinstance(why, NoField) and not beside:
                    raise DataError(str(why))
                if beside:
                    left.append(relative(file, folder))
                    reason = why
                    continue
            parts.append((count, read))
            names.append(relative(file, folder))
            paths.append(file)
        if reason and not parts:
            raise DataError(str(reason))
    except OSError as error:
        raise DataError(f"source {name}: {error.filename or source.path} cannot be read: {error}") from None
    except DataError as error:
        raise DataError(f"source {name}: {error}") from None
    if left:
        say_once(log, logging.INFO, f"source {name}: without the field {source.field!r}, and left alone: {some(left)}")
    documents = Documents(parts, names, paths)
    if not len(documents):
        raise DataError(f"source {name}: {source.path} holds no document")
    return documents


def find_files(name: str, source: Source, words: Words | None = None) -> list[epath.Path]:
    """The files of a source: the one that it names, or those in a folder, and in the folders there, whose names end as
    a format's do. Names that begin with "." or "_", READMEs and licences are left alone."""
    try:
        path = epath.Path(os.path.expanduser(source.path))
        if path.is_dir():
            return _in_folder(name, source, path, words or Words())
        if not path.exists():
            raise DataError(f"{source.path} is neither a file nor a folder: nothing of that name is there")
        _refuse_special(path)
    except ImportError as error:
        raise SupportError(f"{source.path}: {error}; {how_to_install('remote')}") from error
    if not source.format and format_of(path) is None:
        raise DataError(
            f"the name of {path} does not say what it is: say the format, {(words or Words()).format}=FORMAT, "
            f"one of {', '.join(_OPENERS)}; what is none of these (CSV, Arrow, archives) has to be converted first"
        )
    return [path]


def _in_folder(name: str, source: Source, folder: epath.Path, words: Words) -> list[epath.Path]:
    kinds = {file: format_of(file) for file in _below(folder)}
    ours = [file for file in kinds if not file.name.startswith("_") and not _ABOUT.fullmatch(file.name)]
    if source.format:
        taken = [file for file in ours if kinds[file] == source.format] or [file for file in ours if not kinds[file]]
    else:
        taken = [file for file in ours if kinds[file]]
    if any(kinds[file] != "jsonl" for file in taken):  # a file .json beside others says something of them
        taken = [file for file in taken if _ends(file) != ".json"]
    left = sorted(kinds.keys() - taken)
    found = sorted({str(kinds[file]) for file in taken})
    if len(found) > 1:
        raise DataError(
            f"{folder} holds files of several formats: {', '.join(found)}; "
            f"say which are meant: {words.format}={found[0]}"
        )
    if not taken:
        there = f"; there are {some([relative(file, folder) for file in left])}" if left else ""
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
    """By the end of its name: None if that says nothing. Text and JSON may be compressed."""
    kind = ENDINGS.get(_ends(file))
    return None if kind not in ("jsonl", "text") and _is_compressed(file) else kind


def _ends(file: epath.Path) -> str:
    """The ending of a name in small letters, without that of a compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return next(iter(suffixes[-1 - _is_compressed(file) :]), "")


def _is_compressed(file: epath.Path) -> bool:
    return file.suffix.lower() in COMPRESSED


def stem(file: epath.Path, folder: epath.Path) -> str:
    """A file's name in its folder without the endings that say its format."""
    name = relative(file, folder)
    return name.removesuffix(file.suffix).removesuffix(file.with_suffix("").suffix if _is_compressed(file) else "")


def relative(file: epath.Path, folder: epath.Path) -> str:
    return file.name if file == folder or file.parent == folder else str(file.relative_to(folder))


def some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


_ENDS = f"{', '.join(ENDINGS)} (JSON and text perhaps with {', '.join(COMPRESSED)} after that)"


def _refuse_special(file: epath.Path) -> None:
    if not is_remote(file) and file.exists() and not os.path.isfile(file):
        raise DataError(f"{file} is not a plain file")


def _refuse_pointer(file: epath.Path) -> None:
    with file.open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise DataError(f"{file} is a pointer of git-LFS, not the file itself: run `git lfs pull` where it is")


def _refuse_incomplete(folder: epath.Path) -> None:
    """Raises DataError if `smollm3 tokenize` has not ended in a folder. A manifest of somebody else says nothing."""
    manifest = folder / MANIFEST
    if manifest.exists() and is_ours(content := read_manifest(manifest)) and "shards" not in content:
        raise DataError(f"{folder} is not complete: run `smollm3 tokenize` again, which goes on")


def read_manifest(manifest: epath.Path | os.PathLike[str]) -> Any:
    """What a manifest holds; None if that is no JSON."""
    try:
        return json.loads(epath.Path(manifest).read_bytes())
    except (ValueError, RecursionError):
        return None


def is_ours(manifest: Any) -> bool:
    """Whether `smollm3 tokenize` writes such manifests."""
    return isinstance(manifest, dict) and isinstance(manifest.get("inputs"), dict)


def digest(file: epath.Path, whole: bool = True) -> str:
    """Of a file's length and contents; of a long one's beginning, middle and end alone if it is not read whole."""
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


def _readable(file: epath.Path) -> epath.Path:
    """A file of text, or a copy of it in the cache that is in UTF-8 and not compressed."""
    with file.open("rb") as stream:
        head = stream.read(HEAD)
        named = _is_compressed(file) and bool(head)
        if not named and compression_of(head) is None and encoding_of(head) in ("utf-8", "utf-8-sig"):
            return file
        copy = epath.Path(cache_dir() / "corpora" / f"{digest(file)}.txt")
        if copy.exists():
            return copy
        stream.seek(0)
        log.info("unpacking %s into %s", file, copy)
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with new_file(copy) as out:
                for block in blocks(stream, file):
                    out.write(block)
        except OSError as error:
            raise DataError(
                f"{file} is compressed or not in UTF-8, and cannot be unpacked into {copy.parent} (a folder in "
                f"$SMOLLM3_JAX_CACHE): {error}"
            ) from None
    return copy


def _lacking(count: int, read: Callable[[int], Any]) -> BadRecord | None:
    """What is wrong with the first records, if with all of them; before all else, that they lack the field."""
    reasons = []
    for index in range(min(count, LOOKED_AT)):
        try:
            read(index)
            return None
        except BadRecord as reason:
            reasons.append(reason)
    return next((reason for reason in reasons if isinstance(reason, NoField)), next(iter(reasons), None))


def _value(record: Any, field: str, where: str, words: Words) -> Any:
    if not isinstance(record, dict):
        raise NoField(f"{where}: a {type(record).__name__} where an object with {field!r} should be")
    if field in record:
        return record[field]
    texts = [key for key, value in record.items() if isinstance(value, str) and value.strip()]
    say = f"{words.field}={texts[0]}" if len(texts) == 1 else f"{words.field}=NAME"
    there = f"; it has {some(list(record))}"[:500] if record else ""
    raise NoField(f"{where}: a record without the field {field!r}{there}. Say which is the text: {say}")


def _too_long(where: str, size: int, max_bytes: int, words: Words) -> BadRecord:
    limit = f"{words.limit}={max_bytes}" if words.limit else f"the limit of {max_bytes}"
    return BadRecord(f"{where}: {size} bytes, more than {limit}")


def _open_jsonl(file: epath.Path, field: str, max_bytes: int, words: Words) -> tuple[int, Callable[[int], str]]:
    """A record a line; in files .json also an array of records, or records of several lines."""
    name, file, several = file.name, _readable(file), _ends(file) == ".json"
    try:
        with file.open("rb") as stream:
            refuse_utf16(stream.read(HEAD))
        places = spans(file, several)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from None

    def read(index: int) -> str:
        start, end = places[index]
        where = f"{name}, byte {start}"
        if end - start > max_bytes:
            raise _too_long(where, end - start, max_bytes, words)
        with file.open("rb") as stream:
            stream.seek(start)
            line = stream.read(end - start).strip()
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"{where}: not JSON: {error}"[:300]) from None
        return _text(_value(record, field, where, words), where)

    return len(places), read


def _open_text(file: epath.Path, field: str, max_bytes: int, words: Words) -> tuple[int, Callable[[int], str]]:
    """A file is a document."""
    name, file = file.name, _readable(file)

    def read(index: int) -> str:
        size = file.stat().length
        if size > max_bytes:
            raise _too_long(name, size, max_bytes, words)
        try:
            return _text(decode(file.read_bytes()), name)
        except UnicodeError as error:
            raise BadRecord(f"{name}: {error}"[:300]) from None

    return 1, read


def _open_parquet(file: epath.Path, field: str, max_bytes: int, words: Words) -> tuple[int, Callable[[int], str]]:
    try:
        import pyarrow
    except ImportError:
        raise SupportError(f"Parquet needs pyarrow: {how_to_install('parquet')}") from None
    try:
        table = _parquet(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file} is no Parquet file: {str(error).splitlines()[0]}") from None
    if field not in table.schema_arrow.names:
        there = some(table.schema_arrow.names)
        raise DataError(f"{file} has no column {field!r}; there are {there}. Say which is the text: {words.field}=NAME")
    groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    ends = list(itertools.accumulate(groups))
    table.close()

    def read(index: int) -> str:
        number = bisect.bisect_right(ends, index)
        try:
            value = _row_group(file, number, field)[index - (ends[number - 1] if number else 0)].as_py()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and (is_remote(file) or not file.exists()):
                raise  # of the network, or gone: that says nothing of a record
            raise BadRecord(f"{file.name}, row {index}: {str(error).splitlines()[0]}") from None
        where = f"{file.name}, row {index}"
        if isinstance(value, str | bytes) and len(value) > max_bytes:
            raise _too_long(where, len(value), max_bytes, words)
        return _text(value, where)

    return ends[-1] if ends else 0, read


def _parquet(file: epath.Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file.open("rb") if is_remote(file) else str(file))


@functools.lru_cache(maxsize=8)  # of all files together: a corpus may have thousands
def _row_group(file: epath.Path, number: int, field: str) -> Any:
    with _parquet(file) as table:
        return table.read_row_group(number, columns=[field]).column(0)


def _open_arrayrecord(file: epath.Path, field: str, max_bytes: int, words: Words) -> tuple[int, Callable[[int], str]]:
    """Records of UTF-8 text, or of JSON objects with the field."""
    records = _records(file)

    def read(index: int) -> str:
        where = f"{file.name}, record {index}"
        try:
            record = records[index]
            if len(record) > max_bytes:
                raise _too_long(where, len(record), max_bytes, words)
            text = record.decode()
            return _text(_value(json.loads(text), field, where, words) if text.startswith("{") else text, where)
        except (ValueError, RuntimeError, RecursionError) as error:
            raise BadRecord(f"{where}: {error!r}"[:200]) from None

    return len(records), read


def _open_tokens(file: epath.Path, field: str, max_bytes: int, words: Words) -> tuple[int, Callable[[int], np.ndarray]]:
    """ArrayRecord shards of `smollm3 tokenize`: a document's token ids, little-endian int32, a record."""
    records = _records(file)

    def read(index: int) -> np.ndarray:
        try:
            return np.frombuffer(records[index], "<i4")
        except (ValueError, RuntimeError) as error:
            raise BadRecord(f"{file.name}, record {index}: {error!r}"[:200]) from None

    return len(records), read


def _records(file: epath.Path) -> Any:
    open_records = grain().sources.ArrayRecordDataSource
    try:
        return open_records([str(file)])
    except (ValueError, RuntimeError) as error:
        raise DataError(f"{file} is no ArrayRecord file: {str(error).splitlines()[0][:200]}") from None


def _open_hf(name: str, source: Source, words: Words) -> Documents:
    """path: "repository", "repository:configuration" or "repository:configuration:split" of the hub, or a folder
    that `datasets` saved."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SupportError(f"datasets of the hub need the datasets library: {how_to_install('hf')}") from None
    repository, _, rest = source.path.partition(":")
    configuration, _, split = rest.partition(":")
    try:
        table: Any
        if epath.Path(repository).is_dir():
            table = datasets.load_from_disk(repository)
            table = table[split or "train"] if isinstance(table, dict) else table
        else:
            table = datasets.load_dataset(repository, configuration or None, split=split or "train")
    except Exception as error:
        raise DataError(f"source {name}: {source.path}: {str(error).splitlines()[0][:300]}") from None
    if source.field not in table.column_names:
        there = f"{some(table.column_names)}. Say which is the text: {words.field}=NAME"
        raise DataError(f"source {name}: no column {source.field!r}; there are {there}")
    read = lambda index: _text(table[index][source.field], name)  # noqa: E731
    return Documents([(len(table), read)], [source.path], [str(table._fingerprint)])


def _text(value: Any, where: str) -> str:
    if isinstance(value, bytes):  # a column of bytes
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise BadRecord(f"{where}: {error}"[:200]) from None
    if not isinstance(value, str):
        raise BadRecord(f"{where}: a {type(value).__name__} where text should be")
    if not value.strip():
        raise BadRecord(f"{where}: an empty document")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(f"{where}: half a surrogate pair at character {error.start}, which is no text") from None
    return value


_OPENERS: dict[str, Callable[[epath.Path, str, int, Words], tuple[int, Callable[[int], Any]]]] = {
    "jsonl": _open_jsonl,
    "parquet": _open_parquet,
    "arrayrecord": _open_arrayrecord,
    "text": _open_text,
    "tokens": _open_tokens,
}
