"""The loss of held-out documents."""

import contextlib
import functools

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
from ..settings import stage_at
from ..state import Batch
from .setup import Run
from .stop import Stop


def evaluate(run: Run, stop: Stop) -> None:
    """Nats a token of the held-out documents, by source, to metrics.jsonl: where a step is one of eval.every."""
    s = run.settings
    if not s.eval.every or run.progress.step % s.eval.every != 0:
        return
    _, stage = stage_at(s, max(0, run.progress.step - 1))
    found = {}
    for name, rows in held_out_rows(s, run.batches, run.encode).items():
        nats = count = 0.0
        with run.monitor.busy(f"held-out text of {name}"):
            while count < s.eval.tokens:
                if stop.agreed():
                    return
                batch = _next_batch(rows, stage.rows, stage.length)
                if batch is None:
                    break
                batch = on_mesh(batch, run.shapes.sharding)
                sums = _sums(run.progress.state.model, batch, objective=run.objective, dtype=s.model.dtype)
                nats, count = nats + float(sums["loss"]), count + float(sums["tokens"])
        if count:
            found[name] = {"nats_per_token": nats / count, "tokens": int(count)}
    if found:
        run.monitor.held_out(run.progress.step, found)


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
