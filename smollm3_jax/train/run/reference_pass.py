"""The pass over a run's preferences that computes the reference's sums, before the first step.

It reads the rows that the run's first epoch trains on, as the step does a micro-batch, so that what differs between the
two is the model alone; and those of held-out pairs. What an earlier call has computed is not computed again.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec
from jax.stages import Compiled

from ...errors import OptionError, TrainingError
from ...job import agree, raise_everywhere
from ...model import SmolLM3
from ...tokenizer import load_tokenizer
from ..data.conversations import read_template
from ..data.mixture import held_out, held_out_rows, training_rows
from ..data.packing import EndOfData, Rows
from ..data.prefetch import on_mesh
from ..data.windows import Item, Windows
from ..objectives.preference import completion_sums
from ..options import StepOptions, compiler_options
from ..reference import Sums, keys_of
from ..settings import Settings, Stage, stage_at, starts
from ..state import Batch
from .checkpoint import digest, named_arrays
from .evaluation import held_out_batches
from .setup import Run, open_model
from .stop import Stop

log = logging.getLogger(__name__)

# The sums are written in pieces: one after BATCHES batches, or after SECONDS.
BATCHES, SECONDS = 16, 10.0


def reference_sums(run: Run, stop: Stop) -> Sums | None:
    """The sums of all completions that the run needs, computed as far as the run's folder has them not; None where a
    signal asked to stop.

    Raises:
      TrainingError: the folder has those of another reference, or a sum is not finite.
      OptionError: the reference has another tokenizer.
    """
    s = run.settings
    _, stage = stage_at(s, 0)
    with raise_everywhere():
        texts = run.texts
        if s.objective.reference:
            texts, _, _ = open_model(_of_reference(run))
            if hashlib.sha256((texts / "tokenizer.json").read_bytes()).hexdigest() != run.tokenizer_digest:
                raise OptionError(f"objective.reference={s.objective.reference}: its tokenizer.json is not the model's")
        tokenizer = load_tokenizer(run.texts, run.shapes.config)
        templates = [tokenizer.chat_template, tokenizer.templates]
        template = read_template(s.data.template) if s.data.template else json.dumps(templates)
        about = {
            "reference": s.objective.reference,
            "tokenizer": run.tokenizer_digest,
            "template": hashlib.sha256(template.encode()).hexdigest(),
            "length": stage.length,
            "positions": s.data.positions,
            "dtype": s.model.dtype,
        }
        sums = Sums(run.folder / "reference", about, writes=jax.process_index() == 0)
        needed = _needed(run)
        done = sums.is_done(needed)
    if not done:
        with run.monitor.busy("the reference's sums"):
            if not _compute(run, stop, sums):
                return None
        sums.done(needed)
    agree("sums of the reference", sums.digest())
    return sums


def _of_reference(run: Run) -> Settings:
    s = run.settings
    model = dataclasses.replace(s.model, path=s.objective.reference, config="")
    return dataclasses.replace(s, model=model)


def _compute(run: Run, stop: Stop, sums: Sums) -> bool:
    """Whether it came to the end."""
    s, (_, stage) = run.settings, stage_at(run.settings, 0)
    with raise_everywhere():
        model = (open_model(_of_reference(run))[2] if s.objective.reference else run.load)()
        sums.belong_to(digest(named_arrays({"model": model}))[0])
    options = StepOptions(s.model.dtype, s.step.remat)
    program: Compiled | None = None
    new: dict[int, np.float32] = {}  # since the last piece
    batches, began = 0, time.monotonic()

    def keep() -> None:
        if new:
            sums.add(np.array(list(new), np.int64), np.array(list(new.values()), np.float32))
            log.info("the reference's sums of %d completions", len(sums.known))

    for host in _batches(run, stage.rows // stage.micro_batches):
        if stop.agreed():
            return False
        found, at = keys_of(host)
        _, first = np.unique(found, return_index=True)
        wanted = [i for i in sorted(first) if int(found[i]) not in sums.known and int(found[i]) not in new]
        if not wanted:
            continue
        batch = on_mesh(dataclasses.replace(host, reference=None), run.shapes.sharding)
        if program is None:
            devices = 1 if model.sharding is None else model.sharding.mesh.size
            compile_with = compiler_options(model.platform, s.step.deterministic, devices)
            how = {"options": options, "by_document": s.data.positions == "document"}
            program = _sums.lower(model, batch, **how).compile(compile_with)
        got = np.asarray(program(model, batch)).reshape(len(host.tokens), -1)[at[wanted, 0], at[wanted, 1]]
        if not np.isfinite(got).all():
            raise TrainingError("a completion's log-probability under the reference is not finite: is it sound?")
        new.update(zip(found[wanted].tolist(), got, strict=True))
        batches += 1
        if batches == BATCHES or time.monotonic() - began > SECONDS:
            keep()
            new.clear()
            batches, began = 0, time.monotonic()
    keep()
    return True


@functools.partial(jax.jit, static_argnames=("options", "by_document"))
def _sums(model: SmolLM3, batch: Batch, *, options: StepOptions, by_document: bool) -> Array:
    """`completion_sums`, on every host."""
    sums = completion_sums(model, batch, options, by_document)
    if model.sharding is None:
        return sums
    return jax.lax.with_sharding_constraint(sums, NamedSharding(model.sharding.mesh, PartitionSpec()))


def _batches(run: Run, rows: int) -> Iterator[Batch]:
    """Batches of `rows` rows with what the run reads of each source, an epoch at most, and with what is held out. The
    last batch of a source is filled with rows of zeros."""
    for source in (*_trained(run), *_held_out(run)):
        while part := list(itertools.islice(source, rows)):
            part += [tuple(map(np.zeros_like, part[0]))] * (rows - len(part))
            yield Batch(*map(np.stack, zip(*part, strict=True)))  # pyright: ignore[reportArgumentType]


def _trained(run: Run) -> Iterator[Iterator[Item]]:
    """The rows of each source."""
    once = dataclasses.replace(run.settings, data=dataclasses.replace(run.settings.data, epochs=1))
    needed, length = _rows_needed(run), stage_at(run.settings, 0)[1].length
    for name, source in training_rows(once, run.batches.corpora, run.encode).items():

        def read(source: Rows | Windows = source) -> Iterator[Item]:
            try:
                while True:
                    yield source.next(length)
            except EndOfData:
                return

        yield itertools.islice(read(), needed[name])


def _held_out(run: Run) -> Iterator[Iterator[Item]]:
    """The held-out rows of each source, as many as the evaluations of any stage see."""
    s = run.settings
    for stage in _evaluated(s):
        for source in held_out_rows(s, run.batches, run.encode).values():
            batches = held_out_batches(source, stage, s.eval.tokens)
            yield (row for x in batches for row in zip(x.tokens, x.segment_ids, x.weights, x.reference, strict=True))


def _evaluated(s: Settings) -> list[Stage]:
    """Stages, one of each number of rows; none where nothing is evaluated."""
    stages = {stage.rows: stage for stage in (stage_at(s, start)[1] for start in starts(s))}
    return list(stages.values()) if s.eval.every else []


def _needed(run: Run) -> dict[str, Any]:
    """What the sums have to be of, ready for JSON."""
    s, needed = run.settings, {"files": run.batches.state()["files"], "rows": _rows_needed(run)}
    if s.eval.every and (found := held_out(s, run.batches)):
        files = {name: [list(file) for file in corpus.files] for name, (corpus, _) in found.items()}
        rows = [stage.rows for stage in _evaluated(s)]
        needed["held_out"] = {"files": files, "nth": s.data.eval_every_nth, "tokens": s.eval.tokens, "rows": rows}
    return needed


def _rows_needed(run: Run) -> dict[str, int]:
    """How many rows the run takes of each source at most, the last few that the rounding of shares may add among them:
    more than an epoch has, if it is long."""
    s = run.settings
    names = list(run.batches.state()["rows"])
    counts = dict.fromkeys(names, 0.0)
    for begin, end in itertools.pairwise([*starts(s), s.run.steps]):
        _, stage = stage_at(s, begin)
        for name in names:
            counts[name] += (end - begin) * stage.rows * (stage.weights.get(name, 0.0) if len(names) > 1 else 1.0)
    return {name: math.ceil(count) + len(names) * len(starts(s)) for name, count in counts.items()}
