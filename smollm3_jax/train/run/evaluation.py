"""The loss of held-out documents, and the rewards of held-out pairs."""

import contextlib
import functools
from collections.abc import Iterator

import jax
import numpy as np
from jax import Array

from ...model import SmolLM3
from ..data.mixture import held_out_rows
from ..data.packing import EndOfData, Rows
from ..data.prefetch import on_mesh
from ..data.windows import Windows
from ..objectives import Objective
from ..options import StepOptions
from ..settings import Stage, stage_at
from ..state import Batch
from .setup import Run
from .stop import Stop


def evaluate(run: Run, stop: Stop) -> None:
    """Nats a token of the held-out documents, or the loss and rewards of held-out pairs, by source, to metrics.jsonl:
    where a step is one of eval.every."""
    s = run.settings
    if not s.eval.every or run.progress.step % s.eval.every != 0:
        return
    _, stage = stage_at(s, max(0, run.progress.step - 1))
    found = {}
    for name, rows in held_out_rows(s, run.batches, run.encode).items():
        total: dict[str, float] = {}
        with run.monitor.busy(f"held-out text of {name}"):
            for host_batch in held_out_batches(rows, stage, s.eval.tokens):
                if stop.agreed():
                    return
                if run.reference is not None:
                    host_batch = run.reference.filled(host_batch)
                batch = on_mesh(host_batch, run.shapes.sharding)
                sums = _sums(run.progress.state.model, batch, objective=run.objective, dtype=s.model.dtype)
                total = {key: total.get(key, 0.0) + float(x) for key, x in sums.items()}
        if total.get("tokens"):
            found[name] = _means(total)
    if found:
        run.monitor.held_out(run.progress.step, found)


def _means(total: dict[str, float]) -> dict[str, float]:
    """Of sums over batches: nats a token, or of preferences each metric's mean over the pairs; and the counts."""
    tokens, pairs = int(total.pop("tokens")), total.pop("pairs", 0.0)
    if pairs:
        return {**{key: x / pairs for key, x in total.items()}, "pairs": int(pairs), "tokens": tokens}
    return {"nats_per_token": total["loss"] / tokens, "tokens": tokens}


def held_out_batches(rows: Rows | Windows, stage: Stage, tokens: int) -> Iterator[Batch]:
    """The batches of a source that a stage's evaluation sees, numpy [rows, length]: until `tokens` are predicted."""
    count = 0.0
    while count < tokens and (batch := _next_batch(rows, stage.rows, stage.length)) is not None:
        yield batch
        segments = np.asarray(batch.segment_ids)
        predicted = (segments[:, :-1] == segments[:, 1:]) & (segments[:, 1:] != 0)
        count += float((predicted if batch.weights is None else predicted * batch.weights[:, :-1]).sum())


def _next_batch(rows: Rows | Windows, count: int, length: int) -> Batch | None:
    """The next `count` rows, the last of them blank where the documents end; None after that."""
    found = []
    with contextlib.suppress(EndOfData):
        for _ in range(count):
            found.append(rows.next(length))
    if not found:
        return None
    found += [tuple(map(np.zeros_like, found[0]))] * (count - len(found))
    return Batch(*(np.stack(part) for part in zip(*found, strict=True)))  # pyright: ignore[reportArgumentType]


@functools.partial(jax.jit, static_argnames=("objective", "dtype"))
def _sums(model: SmolLM3, batch: Batch, *, objective: Objective, dtype: str) -> dict[str, Array]:
    return objective(model, batch, StepOptions(dtype=dtype))[1]
