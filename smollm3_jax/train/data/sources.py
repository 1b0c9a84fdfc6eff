"""Corpora as documents by number, from files of any format or datasets of the Hugging Face hub.

A document is its text, or its token ids if it comes from `smollm3 tokenize`; or, of a source without a field for the
text, a whole record: conversations.
"""

import bisect
import concurrent.futures
import functools
import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from ...errors import DataError, SupportError
from ...file_kind import what_it_is
from ...logs import say_once
from ...paths import is_remote
from ...support import how_to_install
from ..settings import Source
from .files import OptionNames, digest, find_files, format_of, name_ending, refuse_pointer, relative, some
from .records import OPENERS, Document, NoField, Records, lacking, text_of

log = logging.getLogger(__name__)
# A corpus of more than WHOLE bytes, or in an object store, is compared by pieces of its long files: their length, and
# HASHED bytes at their beginning, middle and end.
WHOLE = 2**35


class Documents:
    """len(documents) of them; documents[i] is a str, an int32 array of token ids, or a record; or raises BadRecord."""

    def __init__(self, parts: Sequence[Records], names: Sequence[str], paths: Sequence[epath.Path | str]):
        """
        Args:
          parts: of each file, how many documents it has, and what reads one by its number.
          names: what to call the files; paths: where they are, or a digest of what is no file.
        """
        self._names, self.paths = names, paths
        self._reads = [read for _, read in parts]
        self._ends = list(itertools.accumulate(count for count, _ in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
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
        """The same, but of long files by pieces, as older checkpoints compared all corpora."""
        return self._digests(whole=False)

    def _digests(self, whole: bool) -> tuple[tuple[str, str], ...]:
        def of(path: epath.Path | str) -> str:
            return path if isinstance(path, str) else digest(path, whole and not is_remote(path))

        try:
            with concurrent.futures.ThreadPoolExecutor() as pool:
                return tuple(zip(self._names, pool.map(of, self.paths), strict=True))
        except OSError as error:
            raise DataError(f"{error.filename or 'a corpus'} can no longer be read: {error}") from None


def open_documents(name: str, source: Source, max_bytes: int, options: OptionNames | None = None) -> Documents:
    """The documents of a source, in the order of its files' names.

    Args:
      name: what to call the source in errors.
      max_bytes: longer documents are bad records.
      options: what to call its options there.

    Raises:
      DataError: there are no such files, or they cannot be read at all, or none of their records has the field.
      SupportError: a library that the format needs is not installed.
    """
    options = options or OptionNames()
    if source.format == "hf":
        return _open_hf(name, source, options)
    try:
        files = find_files(name, source, options)
        kind = source.format or format_of(files[0])
        if not source.field and kind in ("text", "tokens"):
            raise DataError(
                f"{source.path} is of the format {kind}, and conversations are records of fields: JSON lines"
            )
        opener, folder = OPENERS[str(kind)], epath.Path(os.path.expanduser(source.path))
        parts, names, paths, left, reason = [], [], [], [], None
        for file in files:
            refuse_pointer(file)
            if kind == "jsonl" and not is_remote(file) and (what := what_it_is(str(file))):
                raise DataError(f"{file} holds no lines of JSON: {what}")
            count, read = opener(file, source.field, max_bytes, options)
            if kind in ("jsonl", "arrayrecord") and (why := lacking(count, read)):
                beside = len(files) > 1 and name_ending(file) == ".json"  # it may describe the others
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


def _open_hf(name: str, source: Source, options: OptionNames) -> Documents:
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
    if source.field and source.field not in table.column_names:
        there = f"{some(table.column_names)}. Say which is the text: {options.field}=NAME"
        raise DataError(f"source {name}: no column {source.field!r}; there are {there}")

    def read(index: int) -> Document:
        return text_of(table[index][source.field], name) if source.field else table[index]

    return Documents([(len(table), read)], [source.path], [str(table._fingerprint)])
