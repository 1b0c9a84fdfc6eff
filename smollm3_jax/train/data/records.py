"""The records of one file, by number: JSON, plain text, Parquet, ArrayRecord, shards of tokens.

Files of text may be compressed, and in UTF-16 or UTF-32 if they begin with a byte order mark.
"""

import bisect
import codecs
import functools
import importlib
import itertools
import json
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from etils import epath

from ...errors import DataError, SupportError
from ...files import new_file
from ...paths import cache_dir, is_remote
from ...support import how_to_install
from ...text_files import HEAD, blocks, compression_of, decode, encoding_of, refuse_utf16
from .files import OptionNames, digest, is_compressed, name_ending, some
from .json_records import spans

log = logging.getLogger(__name__)
# A document is its text, or its token ids (int32), or a whole record, where the field of the text is ""; of a file, how
# many it has, and what reads one by its number.
Document = str | np.ndarray | dict[str, Any]
Records = tuple[int, Callable[[int], Document]]

# One at least of the first LOOKED_AT records must have the field of the text.
LOOKED_AT = 100


class BadRecord(Exception):
    """A document that cannot be read. Its text is the reason."""


class NoField(BadRecord):
    """A record that does not have the field."""


def grain() -> ModuleType:
    """The package grain, imported at its first use: nothing but corpora needs it.

    Raises:
      SupportError: it is not installed.
    """
    try:
        return importlib.import_module("grain")
    except ImportError as error:
        raise SupportError(f"corpora need the package grain ({error}): pip install 'grain>=0.2.18'") from error


def _readable(file: epath.Path) -> epath.Path:
    """A file of text, or a copy of it in the cache that is in UTF-8 and not compressed."""
    with file.open("rb") as stream:
        head = stream.read(HEAD)
        named = is_compressed(file) and bool(head)
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
                os.fchmod(out.fileno(), 0o600)  # the corpus may be for nobody else to read
                for block in blocks(stream, file):
                    out.write(block)
        except OSError as error:
            raise DataError(
                f"{file} is compressed or not in UTF-8, and cannot be unpacked into {copy.parent} (a folder in "
                f"$SMOLLM3_JAX_CACHE): {error}"
            ) from None
    return copy


def lacking(count: int, read: Callable[[int], Document]) -> BadRecord | None:
    """What is wrong with the first records if none can be read; that they lack the field goes before other reasons."""
    reasons = []
    for index in range(min(count, LOOKED_AT)):
        try:
            read(index)
            return None
        except BadRecord as reason:
            reasons.append(reason)
    return next((reason for reason in reasons if isinstance(reason, NoField)), next(iter(reasons), None))


def _value(record: object, field: str, where: str, options: OptionNames) -> Any:
    if not isinstance(record, dict):
        raise NoField(f"{where}: a {type(record).__name__} where an object with {field!r} should be")
    if field in record:
        return record[field]
    texts = [key for key, value in record.items() if isinstance(value, str) and value.strip()]
    say = f"{options.field}={texts[0]}" if len(texts) == 1 else f"{options.field}=NAME"
    there = f"; it has {some(list(record))}"[:500] if record else ""
    raise NoField(f"{where}: a record without the field {field!r}{there}. Say which is the text: {say}")


def _document(record: Any, field: str, where: str, options: OptionNames) -> Document:
    """The text of a record's field; without a field the record."""
    if field:
        return text_of(_value(record, field, where, options), where)
    if not isinstance(record, dict):
        raise BadRecord(f"{where}: a {type(record).__name__} where an object should be")
    return record


def _too_long(where: str, size: int, max_bytes: int, options: OptionNames) -> BadRecord:
    limit = f"{options.limit}={max_bytes}" if options.limit else f"the limit of {max_bytes}"
    return BadRecord(f"{where}: {size} bytes, more than {limit}")


def _open_jsonl(file: epath.Path, field: str, max_bytes: int, options: OptionNames) -> Records:
    """A record a line; in files .json also an array of records, or records of several lines."""
    name, file, several = file.name, _readable(file), name_ending(file) == ".json"
    try:
        with file.open("rb") as stream:
            refuse_utf16(stream.read(HEAD))
        places = spans(file, several)
    except ValueError as error:
        raise DataError(f"{name}: {error}") from None

    def read(index: int) -> Document:
        start, end = places[index]
        where = f"{name}, byte {start}"
        if end - start > max_bytes:
            raise _too_long(where, end - start, max_bytes, options)
        with file.open("rb") as stream:
            stream.seek(start)
            line = stream.read(end - start).strip().removeprefix(codecs.BOM_UTF8)  # of files that were joined
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"{where}: not JSON: {error}"[:300]) from None
        return _document(record, field, where, options)

    return len(places), read


def _open_text(file: epath.Path, field: str, max_bytes: int, options: OptionNames) -> Records:
    """A file is a document."""
    name, file = file.name, _readable(file)

    def read(index: int) -> str:
        size = file.stat().length
        if size > max_bytes:
            raise _too_long(name, size, max_bytes, options)
        try:
            return text_of(decode(file.read_bytes()), name)
        except UnicodeError as error:
            raise BadRecord(f"{name}: {error}"[:300]) from None

    return 1, read


def _open_parquet(file: epath.Path, field: str, max_bytes: int, options: OptionNames) -> Records:
    try:
        import pyarrow
    except ImportError:
        raise SupportError(f"Parquet needs pyarrow: {how_to_install('parquet')}") from None
    try:
        table = _parquet(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file} is no Parquet file: {str(error).splitlines()[0]}") from None
    if field and field not in table.schema_arrow.names:
        there = some(table.schema_arrow.names)
        raise DataError(
            f"{file} has no column {field!r}; there are {there}. Say which is the text: {options.field}=NAME"
        )
    groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
    ends = list(itertools.accumulate(groups))
    table.close()

    def read(index: int) -> Document:
        number = bisect.bisect_right(ends, index)
        try:
            rows, inside = _row_group(file, number, field), index - (ends[number - 1] if number else 0)
            value: Any = rows.column(0)[inside].as_py() if field else rows.slice(inside, 1).to_pylist()[0]
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and (is_remote(file) or not file.exists()):
                raise  # of the network, or gone: that says nothing of a record
            raise BadRecord(f"{file.name}, row {index}: {str(error).splitlines()[0]}") from None
        if not field:
            return value
        where = f"{file.name}, row {index}"
        if isinstance(value, str | bytes) and len(value) > max_bytes:
            raise _too_long(where, len(value), max_bytes, options)
        return text_of(value, where)

    return ends[-1] if ends else 0, read


def _parquet(file: epath.Path) -> Any:
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file.open("rb") if is_remote(file) else str(file))


@functools.lru_cache(maxsize=8)  # of all files together: a corpus may have thousands
def _row_group(file: epath.Path, number: int, field: str) -> Any:
    with _parquet(file) as table:
        return table.read_row_group(number, columns=[field] if field else None)


def _open_arrayrecord(file: epath.Path, field: str, max_bytes: int, options: OptionNames) -> Records:
    """Records of UTF-8 text, or of JSON objects with the field."""
    records = _records(file)

    def read(index: int) -> Document:
        where = f"{file.name}, record {index}"
        try:
            record = records[index]
            if len(record) > max_bytes:
                raise _too_long(where, len(record), max_bytes, options)
            text = record.decode()
            if text.startswith("{") or not field:
                return _document(json.loads(text), field, where, options)
            return text_of(text, where)
        except (ValueError, RuntimeError, RecursionError) as error:
            raise BadRecord(f"{where}: {error!r}"[:200]) from None

    return len(records), read


def _open_tokens(file: epath.Path, field: str, max_bytes: int, options: OptionNames) -> Records:
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


def text_of(value: object, where: str) -> str:
    """A document's text. Raises BadRecord if it is none, or blank; where: the record, for the reason."""
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


# Format -> opens a file; the arguments are the file, the field of the text ("": whole records), the most bytes of a
# document, and what to call the options in errors.
OPENERS: dict[str, Callable[[epath.Path, str, int, OptionNames], Records]] = {
    "jsonl": _open_jsonl,
    "parquet": _open_parquet,
    "arrayrecord": _open_arrayrecord,
    "text": _open_text,
    "tokens": _open_tokens,
}
