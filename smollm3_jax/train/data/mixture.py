"""Batches of a run: corpora mixed row by row, the same on every host, and restartable from a few numbers.

Mixing, shuffling and packing go by global indices on every host; each then takes its own rows of the finished batch.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ...errors import DataError
from ..settings import Settings, Source, stage_at
from ..state import Batch
from .files import OptionNames, find_files, stem
from .packing import EndOfData, Numbered, Rows
from .records import grain
from .sources import Documents, open_documents
from .windows import Item, Windows

log = logging.getLogger(__name__)
ALL = "all"  # what the sources are called together, with data.concatenate


class Batches:
    """The batches of a run in their order; `state` and `restore` for its checkpoints."""

    def __init__(self, settings: Settings, encode: Callable[..., Any]):
        """
        Args:
          encode: of pretraining, a document's text or token ids -> int32 ids, with the end of text (encode.py); else
            what `Windows` takes.

        Raises:
          DataError: a corpus is missing or cannot be read.
        """
        data = settings.data
        self._settings = settings
        self._corpora = {
            name: open_documents(name, source, data.max_document_bytes, option_names(settings, name))
            for name, source in sources(settings).items()
        }
        self._rows = training_rows(settings, self._corpora, encode)
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
        unchanged = set()
        for name, files in self.state()["files"].items():
            before = state["files"].get(name)
            if before == files or before == [list(file) for file in self._corpora[name].pieces]:
                if before != files:
                    log.warning("source %s: the checkpoint saw of long files only beginning, middle and end", name)
                unchanged.add(name)
                continue
            changed = _changed(name, before, files)
            if not allow_changes:
                raise DataError(changed)
            log.warning("%s: it is read from its start", changed)
        for name, rows in self._rows.items():
            if unchanged >= ({name} if name in self._corpora else self._corpora.keys()):
                rows.restore(state["rows"][name])

    def next(self, step: int) -> Batch:
        """The batch of a step, numpy [rows, length].

        Raises:
          EndOfData: a corpus has been read as often as data.epochs says.
          DataError: too many bad records.
        """
        number, stage = stage_at(self._settings, step)
        if number != self._stage:
            self._stage, self._mixed = number, dict.fromkeys(self._rows, 0)
        rows: list[Item] = []
        try:
            while len(rows) < stage.rows:
                rows.append(self._rows[self._draw(stage.weights)].next(stage.length))
        except EndOfData:
            if not rows or len(self._rows) > 1 or self._settings.objective.kind == "pretrain":
                raise
            # Whole conversations: the last of them are worth a batch, in which empty rows count for nothing.
            rows += [tuple(np.zeros_like(column) for column in rows[0])] * (stage.rows - len(rows))
        return Batch(*(np.stack(part) for part in zip(*rows, strict=True)))  # pyright: ignore[reportArgumentType]

    def _draw(self, weights: Mapping[str, float]) -> str:
        """The corpus that lacks most rows of its share."""
        if self._settings.data.concatenate:
            weights = {ALL: 1.0}
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
    """The corpora of a run by name; the only one is called "data". Those of conversations have no field: their records
    are read whole."""
    data = settings.data
    found = data.sources or {"data": Source(path=data.path, field=data.field, format=data.format)}
    if settings.objective.kind == "pretrain":
        return found
    return {name: dataclasses.replace(source, field="") for name, source in found.items()}


def option_names(settings: Settings, name: str) -> OptionNames:
    """What a user calls the options of a source."""
    data = settings.data
    of = "data" if data.per_file or not data.sources else f"data.sources.{name}"
    return OptionNames(f"{of}.field", f"{of}.format", "data.max_document_bytes")


def training_rows(
    settings: Settings, corpora: Mapping[str, Documents], encode: Callable[..., Any]
) -> dict[str, Rows | Windows]:
    """Endless rows (`Rows` or `Windows`) of the documents that are not held out, shuffled anew in each epoch: by
    source, or of all sources together under the name of ALL."""
    data, nth = settings.data, settings.data.eval_every_nth
    fractions = {name: source.fraction for name, source in sources(settings).items()}
    numbers = {name: _numbers(len(corpus), nth, fractions[name]) for name, corpus in corpora.items()}
    for name, kept in numbers.items():
        if not len(kept):
            raise DataError(
                f"source {name}: all of its documents are held out: raise data.eval_every_nth, or add documents"
            )
    documents: dict[str, Documents] = dict(corpora)
    if data.concatenate:
        begins = np.cumsum([0, *(len(corpus) for corpus in corpora.values())])
        parts = [
            begin + np.fromiter(map(kept.__getitem__, range(len(kept))), np.int64, len(kept))
            for begin, kept in zip(begins[:-1], numbers.values(), strict=True)
        ]
        numbers = {ALL: _Numbers(np.concatenate(parts))}
        documents = {ALL: Documents([(len(x), x.__getitem__) for x in corpora.values()], tuple(corpora), ())}

    def order(kept: _Kept | _Numbers) -> Numbered[int]:
        drawn = grain().MapDataset.source(kept).seed(settings.run.seed)
        return (drawn.shuffle() if data.shuffle else drawn).repeat()

    seed = settings.run.seed if data.shuffle else None
    return {
        name: _rows(settings, name, documents[name], encode, order(kept), len(kept), data.epochs, seed)
        for name, kept in numbers.items()
    }


def held_out(settings: Settings, batches: Batches) -> dict[str, tuple[Documents, range]]:
    """(a corpus, the numbers of its documents that are held out), by name."""
    data = settings.data
    if data.eval_path:
        field = data.field if settings.objective.kind == "pretrain" else ""
        whole = Source(path=data.eval_path, field=field, format=data.eval_format)
        words = OptionNames("data.field", "data.eval_format", "data.max_document_bytes")
        corpus = open_documents("held out", whole, data.max_document_bytes, words)
        return {"held out": (corpus, range(len(corpus)))}
    nth = data.eval_every_nth
    return {name: (corpus, range(0, len(corpus), nth)) for name, corpus in batches.corpora.items()} if nth else {}


def held_out_rows(settings: Settings, batches: Batches, encode: Callable[..., Any]) -> dict[str, Rows | Windows]:
    """The documents held out, by name, in their order and once; each call begins anew."""
    return {
        name: _rows(settings, name, corpus, encode, order, len(order), 1, None)
        for name, (corpus, order) in held_out(settings, batches).items()
    }


def _rows(
    settings: Settings,
    name: str,
    documents: Documents,
    encode: Callable[..., Any],
    order: Numbered[int],
    epoch: int,
    epochs: int,
    seed: int | None,
) -> Rows | Windows:
    options: dict[str, Any] = {
        "order": order,
        "epoch": epoch,
        "epochs": epochs,
        "bad_records": settings.data.bad_records,
    }
    if settings.objective.kind == "pretrain":
        return Rows(name, documents, encode, **options)
    return Windows(name, documents, encode, seed=seed, **options)


def _numbers(count: int, nth: int, fraction: float) -> "_Kept | _Numbers":
    """The numbers below `count` that are trained on, but for every n-th (0: none is left out); a fraction of them is
    drawn as the datasets library shuffles, with the seed 0, so that it is the one that SmolLM3's authors drew."""
    if fraction == 1:
        return _Kept(count, nth)
    drawn = np.random.default_rng(0).permutation(count)[: int(count * fraction)]
    return _Numbers(drawn[drawn % nth != 0] if nth else drawn)


class _Numbers:
    """Numbers as grain's source."""

    def __init__(self, numbers: np.ndarray):
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> int:
        return int(self._numbers[index])

    def __repr__(self) -> str:
        return f"_Numbers({len(self._numbers)})"


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
