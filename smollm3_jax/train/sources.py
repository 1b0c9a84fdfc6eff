"""Corpora as documents by number: JSON lines, Parquet, ArrayRecord, plain text, shards of tokens, HF datasets.

A document is its text, or its token ids if it comes from `smollm3 tokenize`. Paths may be remote (gs://, s3://):
`etils.epath` opens them.
"""

import bisect
import functools
import hashlib
import importlib
import itertools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from ..errors import DataError, SupportError
from ..files import is_remote
from ..support import how_to_install
from .settings import Source

# How file names end -> the format.
ENDINGS = {
    ".jsonl": "jsonl",
    ".parquet": "parquet",
    ".arrayrecord": "arrayrecord",
    ".array_record": "arrayrecord",
    ".txt": "text",
    ".md": "text",
    ".tokens": "tokens",
}
MANIFEST = "manifest.json"  # of a folder that `smollm3 tokenize` writes; it has "shards" when all are there
# What is hashed of a long file: its length, and so many bytes at its beginning, middle and end.
HASHED = 2**20


class BadRecord(Exception):
    """A document that cannot be read; the reason."""


class Documents:
    """len(documents) of them; documents[i] is a str, or an int32 array of token ids, or raises BadRecord.

    files: (name, digest) of what they are read from.
    """

    def __init__(self, parts: Sequence[tuple[int, Callable[[int], Any]]], files: Sequence[tuple[str, str]]):
        self.files = tuple(files)
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
            raise DataError(f"{self.files[part][0]} can no longer be read: {error}") from error


def grain() -> Any:
    """The package grain, imported at its first use: nothing but corpora needs it.

    Raises:
      SupportError: it is not installed.
    """
    try:
        return importlib.import_module("grain")
    except ImportError as error:
        raise SupportError(f"corpora need the package grain ({error}): pip install 'grain>=0.2.18'") from error


def open_documents(name: str, source: Source, max_bytes: int) -> Documents:
    """The documents of a source, in the order of its files' names.

    Args:
      name: what to call the source in errors.
      max_bytes: longer documents are bad records.

    Raises:
      DataError: there are no such files, or they cannot be read at all.
      SupportError: a library that the format needs is not installed.
    """
    if source.format == "hf":
        return _open_hf(name, source)
    files = find_files(name, source)
    kinds = {source.format or ENDINGS[file.suffix] for file in files}
    if len(kinds) > 1:
        raise DataError(f"source {name}: {source.path} holds files of several formats: {', '.join(sorted(kinds))}")
    opener = _OPENERS[kinds.pop()]
    try:
        parts = [opener(file, source.field, max_bytes) for file in files]
        documents = Documents(parts, [(file.name, digest(file)) for file in files])
    except OSError as error:
        raise DataError(f"source {name}: {error.filename or source.path} cannot be read: {error}") from None
    if not len(documents):
        raise DataError(f"source {name}: {source.path} holds no document")
    return documents


def find_files(name: str, source: Source) -> list[epath.Path]:
    """The files of a source: the one that it names, or those of a folder whose names end as a format's do."""
    try:
        path = epath.Path(source.path)
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix in ENDINGS)
            if source.format:
                found = [file for file in found if ENDINGS[file.suffix] == source.format]
        else:
            found = [path] if path.exists() else []
            if found and not is_remote(path) and not os.path.isfile(path):
                raise DataError(f"source {name}: {path} is not a plain file")
    except ImportError as error:
        raise SupportError(f"{source.path}: {error}; {how_to_install('remote')}") from error
    if found and (manifest := path / MANIFEST).exists() and "shards" not in json.loads(manifest.read_text()):
        raise DataError(f"source {name}: {path} is not complete: run `smollm3 tokenize` again, which goes on")
    if not found:
        raise DataError(
            f"source {name}: {source.path} is neither a file nor a folder with files that end in {', '.join(ENDINGS)}"
        )
    if not source.format and found[0].suffix not in ENDINGS:
        raise DataError(f"source {name}: say the format of {found[0]}: data.sources.{name}.format")
    return found


def digest(file: epath.Path) -> str:
    """Of a file's length and contents; of a long one's beginning, middle and end alone."""
    size = file.stat().length
    sha = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if size <= 3 * HASHED:
            sha.update(stream.read())
        else:
            for start in (0, size // 2, size - HASHED):
                stream.seek(start)
                sha.update(stream.read(HASHED))
    return sha.hexdigest()


def _open_jsonl(file: epath.Path, field: str, max_bytes: int) -> tuple[int, Callable[[int], str]]:
    starts, end = _line_starts(file)

    def read(index: int) -> str:
        start = starts[index]
        size = int((starts[index + 1] if index + 1 < len(starts) else end) - start)
        if size > max_bytes:
            raise BadRecord(f"{file.name}: a line of {size} bytes")
        with file.open("rb") as stream:
            stream.seek(int(start))
            line = stream.read(size)
        try:
            text = json.loads(line.decode())[field]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadRecord(f"{file.name}, byte {start}: {error!r}"[:200]) from None
        return _text(text, file.name)

    return len(starts), read


def _line_starts(file: epath.Path) -> tuple[np.ndarray, int]:
    """(where each line that is not empty begins, the file's length)."""
    ends, position, last = [], 0, b"\n"
    with file.open("rb") as stream:
        while block := stream.read(2**24):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position)
            position, last = position + len(block), block[-1:]
    if last != b"\n":
        ends.append(np.array([position]))
    after = np.concatenate([[-1], *ends]).astype(np.int64)
    filled = np.diff(after) > 1
    return after[:-1][filled] + 1, position


def _open_text(file: epath.Path, field: str, max_bytes: int) -> tuple[int, Callable[[int], str]]:
    """A file is a document."""

    def read(index: int) -> str:
        size = file.stat().length
        if size > max_bytes:
            raise BadRecord(f"{file.name}: {size} bytes")
        try:
            return _text(file.read_bytes().decode(), file.name)
        except UnicodeDecodeError as error:
            raise BadRecord(f"{file.name}: {error}") from None

    return 1, read


def _open_parquet(file: epath.Path, field: str, max_bytes: int) -> tuple[int, Callable[[int], str]]:
    try:
        import pyarrow
    except ImportError:
        raise SupportError(f"Parquet needs pyarrow: {how_to_install('parquet')}") from None
    try:
        table = _parquet(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file} is no Parquet file: {str(error).splitlines()[0]}") from None
    if field not in table.schema_arrow.names:
        raise DataError(f"{file} has no column {field!r}; there are {', '.join(table.schema_arrow.names)}")
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
        if isinstance(value, str) and len(value) > max_bytes:
            raise BadRecord(f"{file.name}, row {index}: {len(value)} characters")
        return _text(value, file.name)

    return ends[-1] if ends else 0, read


def _parquet(file: epath.Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file.open("rb") if is_remote(file) else str(file))


@functools.lru_cache(maxsize=8)  # of all files together: a corpus may have thousands
def _row_group(file: epath.Path, number: int, field: str) -> Any:
    with _parquet(file) as table:
        return table.read_row_group(number, columns=[field]).column(0)


def _open_arrayrecord(file: epath.Path, field: str, max_bytes: int) -> tuple[int, Callable[[int], str]]:
    """Records of UTF-8 text, or of JSON objects with the field."""
    records = _records(file)

    def read(index: int) -> str:
        try:
            record = records[index]
            if len(record) > max_bytes:
                raise BadRecord(f"{file.name}, record {index}: {len(record)} bytes")
            text = record.decode()
            return _text(json.loads(text)[field] if text.startswith("{") else text, file.name)
        except (ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
            raise BadRecord(f"{file.name}, record {index}: {error!r}"[:200]) from None

    return len(records), read


def _open_tokens(file: epath.Path, field: str, max_bytes: int) -> tuple[int, Callable[[int], np.ndarray]]:
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


def _open_hf(name: str, source: Source) -> Documents:
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
        raise DataError(f"source {name}: no column {source.field!r}; there are {', '.join(table.column_names)}")
    read = lambda index: _text(table[index][source.field], name)  # noqa: E731
    return Documents([(len(table), read)], [(source.path, str(table._fingerprint))])


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{where}: a {type(value).__name__} where text should be")
    if not value.strip():
        raise BadRecord(f"{where}: an empty document")
    return value


_OPENERS: dict[str, Callable[[epath.Path, str, int], tuple[int, Callable[[int], Any]]]] = {
    "jsonl": _open_jsonl,
    "parquet": _open_parquet,
    "arrayrecord": _open_arrayrecord,
    "text": _open_text,
    "tokens": _open_tokens,
}
