"""Batches of a run: corpora mixed row by row, the same on every host, and restartable from a few numbers.

Mixing, shuffling and packing go by global indices on every host; each then takes its own rows of the finished batch.
"""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ...errors import DataError
from ..settings import Settings, Source, stage_at
from ..state import Batch
from .encode import Encode
from .files import OptionNames, find_files, stem
from .packing import Rows
from .records import grain
from .sources import Documents, open_documents

log = logging.getLogger(__name__)


class Batches:
    """The batches of a run in their order; `state` and `restore` for its checkpoints."""

    def __init__(self, settings: Settings, encode: Encode):
        """
        Args:
          encode: a document's text or token ids -> int32 ids, with the end of text.

        Raises:
          DataError: a corpus is missing or cannot be read.
        """
        data = settings.data
        self._settings = settings
        self._corpora = {
            name: open_documents(name, source, data.max_document_bytes, option_names(settings, name))
            for name, source in sources(settings).items()
        }
        self._rows = {
            name: training_rows(name, documents, encode, settings) for name, documents in self._corpora.items()
        }
        self._stage, self._mixed = -1, dict.fromkeys(self._rows, 0)

    @property
    def corpora(self) -> Mapping[str, Documents]:
        return self._corpora

    def state(self) -> dict[str, Any]:
        """Where the next batch begins, ready for JSON."""
        return {
            "files": {name: [list(file) for file in corpus.files] for name, corpus in self._corpora.items()},
            "seed": self._settings.run.seed,
            "stage": self._stage,
            "mixed": dict(self._mixed),
            "rows": {name: rows.state() for name, rows in self._rows.items()},
        }

    def restore(self, state: Mapping[str, Any], allow_changes: bool = False) -> None:
        """Goes to where a state was taken.

        Args:
          allow_changes: a corpus that it was not taken of begins from its start; the others go on.

        Raises:
          DataError: these are not the corpora that it was taken of.
        """
        self._stage, self._mixed = state["stage"], {name: state["mixed"].get(name, 0) for name in self._rows}
        for name, files in self.state()["files"].items():
            before = state["files"].get(name)
            if before == files or before == [list(file) for file in self._corpora[name].pieces]:
                if before != files:
                    log.warning("source %s: the checkpoint saw of long files only beginning, middle and end", name)
                self._rows[name].restore(state["rows"][name])
                continue
            changed = _changed(name, before, files)
            if not allow_changes:
                raise DataError(changed)
            log.warning("%s: it is read from its start", changed)

    def next(self, step: int) -> Batch:
        """The batch of a step, numpy int32 [rows, length].

        Raises:
          EndOfData: a corpus has been read as often as data.epochs says.
          DataError: too many bad records.
        """
        number, stage = stage_at(self._settings, step)
        if number != self._stage:
            self._stage, self._mixed = number, dict.fromkeys(self._rows, 0)
        rows = [self._rows[self._draw(stage.weights)].next(stage.length) for _ in range(stage.rows)]
        return Batch(*(np.stack(part) for part in zip(*rows, strict=True)))

    def _draw(self, weights: Mapping[str, float]) -> str:
        """The corpus that lacks most rows of its share."""
        total = sum(self._mixed.values()) + 1
        lacking = {name: weight * total - self._mixed[name] for name, weight in weights.items() if weight}
        name = max(lacking, key=lambda name: lacking[name])
        self._mixed[name] += 1
        return name


def expanded(settings: Settings) -> Settings:
    """The settings with the sources that data.per_file makes of a folder."""
    data = settings.data
    if not data.per_file or data.sources:
        return settings
    folder = epath.Path(os.path.expanduser(data.path))
    whole, words = Source(path=data.path, format=data.format, field=data.field), option_names(settings, "data")
    files: Sequence[Any] = find_files("data", whole, words)
    if any(
        suffix.lower() == ".json" for file in files for suffix in file.suffixes
    ):  # not all of them need be of documents
        files = open_documents("data", whole, data.max_document_bytes, words).paths
    found = {stem(file, folder): Source(path=str(file), field=data.field, format=data.format) for file in files}
    if len(found) < len(files):
        raise DataError(f"data.per_file: {data.path} holds files that differ in their endings alone")
    return dataclasses.replace(settings, data=dataclasses.replace(data, path="", sources=found))


def sources(settings: Settings) -> dict[str, Source]:
    """The corpora of a run by name; the only one is called "data"."""
    data = settings.data
    return data.sources or {"data": Source(path=data.path, field=data.field, format=data.format)}


def option_names(settings: Settings, name: str) -> OptionNames:
    """What a user calls the options of a source."""
    data = settings.data
    of = "data" if data.per_file or not data.sources else f"data.sources.{name}"
    return OptionNames(f"{of}.field", f"{of}.format", "data.max_document_bytes")


def training_rows(name: str, documents: Documents, encode: Encode, settings: Settings) -> Rows:
    """Endless rows of the documents that are not held out, shuffled anew in each epoch."""
    numbers = _Kept(len(documents), settings.data.eval_every_nth)
    if not len(numbers):
        raise DataError(
            f"source {name}: all of its documents are held out: raise data.eval_every_nth, or add documents"
        )
    order: Any = grain().MapDataset.source(numbers).seed(settings.run.seed)
    order = (order.shuffle() if settings.data.shuffle else order).repeat()
    options = {"epochs": settings.data.epochs, "bad_records": settings.data.bad_records}
    return Rows(name, documents, encode, order=order, epoch=len(numbers), **options)


def held_out_rows(settings: Settings, batches: Batches, encode: Encode) -> dict[str, Rows]:
    """The documents held out, by name, in their order and once; each call begins anew."""
    data = settings.data
    if data.eval_path:
        whole = Source(path=data.eval_path, field=data.field, format=data.eval_format)
        words = OptionNames("data.field", "data.eval_format", "data.max_document_bytes")
        corpora = {"held out": open_documents("held out", whole, data.max_document_bytes, words)}
        orders: dict[str, Any] = {name: range(len(corpus)) for name, corpus in corpora.items()}
    elif data.eval_every_nth:
        corpora = dict(batches.corpora)
        orders = {name: range(0, len(corpus), data.eval_every_nth) for name, corpus in corpora.items()}
    else:
        return {}
    return {
        name: Rows(
            name,
            corpus,
            encode,
            order=orders[name],
            epoch=len(orders[name]),
            epochs=1,
            bad_records=data.bad_records,
        )
        for name, corpus in corpora.items()
    }


class _Kept:
    """The numbers below `count`, but for every n-th (0: none is left out), as grain's source."""

    def __init__(self, count: int, nth: int):
        self._nth = nth
        self._count = count - (-(-count // nth) if nth else 0)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return index + index // (self._nth - 1) + 1 if self._nth else index

    def __repr__(self) -> str:
        return f"_Kept({self._count}, {self._nth})"


def _changed(name: str, before: Any, now: Any) -> str:
    if before is None:
        return f"source {name} is not in the checkpoint: the run began with others"
    old, new = dict(map(tuple, before)), dict(map(tuple, now))
    lines = [f"{file} is gone" for file in old if file not in new]
    lines += [f"{file} is new" for file in new if file not in old]
    lines += [f"{file} has changed" for file in old if file in new and old[file] != new[file]]
    return f"source {name} is not what the run began with: {', '.join(lines[:10]) or 'another order of files'}"
