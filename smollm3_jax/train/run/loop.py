"""The training loop: batches in, checkpoints and metrics out, and an end that a restart goes on from.

All that a run needs to go on is in its folder:

    settings.json, environment.json   what it was told, and what it runs on
    metrics.jsonl                     a line a step; held-out losses among them
    skipped.jsonl                     steps of which something was left out, and where their data stood
    events.jsonl                      damaged checkpoints, rollbacks
    checkpoints/00000500/             see checkpoint.py
    tokenizer/                        the text files of the model, for exports
    report.html, report.png           the curves
    profile/                          of the steps that log.profile names
    lock                              held by the process that trains here
"""

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import nnx
from jax import Array

from sharding.hardware import GIB, chip_of
from sharding.mesh import DEFAULT_AXES, make_mesh, parse_axes
from sharding.rules import Sharding

from ... import compile_cache
from ...config import ModelConfig
from ...errors import DataError, OptionError, TrainingError, lacks_memory
from ...files import carry, is_remote, locked, new_folder, remove, write
from ...model import SmolLM3
from ...support import SHOWN, version
from ...tokenizer import load_tokenizer
from ...weights import demo
from ...weights.key_map import abstract_model
from ...weights.load import load, open_checkpoint, text_folder
from ...weights.texts import check_links, is_text_file, read_texts
from ..data.encode import encoder
from ..data.mixture import Batches, expanded, held_out_rows
from ..data.packing import EndOfData
from ..data.prefetch import on_mesh, prefetch
from ..optimizer import adamw, schedule
from ..settings import Settings, Stage, as_table, parse, stage_at, starts
from ..step import (
    Batch,
    StepOptions,
    TrainState,
    compiler_options,
    init_state,
    loss_sums,
    state_shardings,
    train_step,
)
from . import checkpoint as checkpoints
from .checkpoint import Checkpoints, Damaged, run_folder
from .export import TOKENIZER
from .job import agree, gathered, raise_everywhere
from .monitor import Monitor

log = logging.getLogger(__name__)

STOPPED = 75  # the exit code of a run that was told to stop, and can go on: EX_TEMPFAIL
# What may differ from what a checkpoint was made with: none of it changes what a step computes.
FREE = ("run.dir", "run.steps", "run.name", "mesh", "checkpoint", "eval", "guard", "log", "step.remat")
FREE += ("data.timeout", "data.bad_records", "data.eval_path", "data.eval_format")
# Nor where files lie: what is in them is compared by digests.
FREE += ("model.path", "model.config", "data.path")


@dataclasses.dataclass
class Progress:
    """Where a run stands: step counts updates and skipped ones; data is the place behind it."""

    state: Any = None  # a TrainState, once there is one
    step: int = 0
    stage: int = 0
    data: Any = None
    retries: int = 0


class Stop:
    """Whether a signal has asked for the end. A second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True
        log.warning("%s: stopping behind this step; once more to stop at once", signal.Signals(number).name)

    def agreed(self) -> bool:
        """Whether any process was asked."""
        return bool(gathered(self.asked).any())

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        kinds = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(kind, self) for kind in kinds]
        try:
            yield
        finally:
            for kind, handler in zip(kinds, before, strict=True):
                signal.signal(kind, handler)


def train(
    settings: Settings,
    *,
    resume: bool = False,
    allow_restart: bool = False,
    allow_changes: bool = False,
    clean: bool = False,
) -> dict[str, Any]:
    """Trains until the settings' last step, the end of the data, or a signal.

    Args:
      resume: go on from the newest sound checkpoint of the run folder; from the beginning if it has none.
      allow_restart: begin anew even where all checkpoints are damaged.
      allow_changes: go on though settings or data are not those that the checkpoint was made with.
      clean: first remove what saves left behind that were broken off, and whatever else is no checkpoint there.

    Returns:
      "step", "stopped" (by a signal), "loss" of the last step, "skipped" and "held_out", "tokens" and "seconds" of this
      call, "checkpoint" (the last step's).

    Raises:
      SmolLM3Error, ShardingError: what is wrong, and the way out.
    """
    compile_cache.enable()
    agree("settings or versions", [as_table(settings), version("smollm3-jax"), version("jax")])
    stop = Stop()
    with stop.listening(), contextlib.ExitStack() as stack:
        with raise_everywhere():
            settings = expanded(settings)
            folder = run_folder(settings.run.dir)
            stack.enter_context(_only_one(folder))
        if not resume and (folder / "checkpoints").is_dir() and checkpoints.steps(folder / "checkpoints"):
            raise OptionError(f"{folder} holds a run: --resume auto goes on with it, run.dir=FOLDER begins another")
        if clean and jax.process_index() == 0:
            for left in checkpoints.left_overs(folder / "checkpoints"):
                log.warning("removing %s", left)
                remove(left)
        return _Run(settings, stop, allow_restart, allow_changes).train()


@contextlib.contextmanager
def _only_one(folder: epath.Path) -> Iterator[None]:
    """Keeps a second run out of the folder; object stores know no locks."""
    if jax.process_index() != 0 or is_remote(folder):
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = locked(folder / "lock")
    except BlockingIOError:
        raise OptionError(f"another process trains in {folder}") from None
    except OSError as error:
        raise OptionError(f"run.dir={folder}: {error.strerror}: {error.filename}") from None
    try:
        yield
    finally:
        os.close(lock)


class _Run:
    """One call of `train`: what it sets up once, and the loop."""

    def __init__(self, settings: Settings, stop: Stop, allow_restart: bool, allow_changes: bool):
        self.settings, self.stop = settings, stop
        self.allow_restart, self.allow_changes = allow_restart, allow_changes
        self.folder = run_folder(settings.run.dir)
        with raise_everywhere():
            self.source, self.shapes, self.load, self.sharding = open_model(settings)
            self.config = self.shapes.config
            tokenizer = load_tokenizer(self.source, self.config)
            self.tokenizer_digest = hashlib.sha256((self.source / "tokenizer.json").read_bytes()).hexdigest()
            self.encode = encoder(tokenizer, self.config)
            self.batches = Batches(settings, self.encode)
        agree("models", [self.config.to_hf(), self.tokenizer_digest])
        agree("data", self.batches.state())
        self.optimizers: dict[int, tuple[optax.GradientTransformation, optax.Schedule]] = {}
        self.compiled: dict[Any, Any] = {}
        self.progress = Progress(data=self.batches.state())
        self.checkpoints = Checkpoints(
            self.folder / "checkpoints", settings.checkpoint.keep, settings.checkpoint.keep_every
        )
        self.monitor = Monitor(self.folder, settings, environment())
        self.saved, self.saved_data = -1, None

    # --- parts --------------------------------------------------------------------------------------------

    def first_state(self) -> TrainState:
        """Of the model as it is loaded. Raises TrainingError where it is not finite."""
        with raise_everywhere():
            model = self.load()
        _, finite = checkpoints.digest(checkpoints.named_arrays({"model": model}))
        if bad := [name for name, good in finite.items() if not good]:
            raise TrainingError(f"{self.settings.model.path}: not all is finite in {', '.join(bad[:10])}")
        return _placed(init_state(model, self.optimizer(0)[0]), self.sharding)

    def state_like(self, stage: Stage) -> TrainState:
        """The shapes of a state in a stage, each at its place."""
        state = jax.eval_shape(lambda model: init_state(model, self.optimizer(0)[0]), self.shapes)
        state = with_config(state, self.config_in(stage))
        if self.sharding is not None:
            places = state_shardings(state, self.sharding)
        else:
            places = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), state)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, places)

    def config_in(self, stage: Stage) -> ModelConfig:
        return dataclasses.replace(self.config, rope_theta=stage.rope_theta or self.config.rope_theta)

    def optimizer(self, stage: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
        """(AdamW, its learning rate) of a stage: where one begins with fresh moments, its schedule begins too."""
        if stage not in self.optimizers:
            o, rate = self.settings.optimizer, rate_of(self.settings, stage)
            rule = adamw(rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm)
            self.optimizers[stage] = (rule, rate)
        return self.optimizers[stage]

    def enter(self, number: int, stage: Stage) -> None:
        """Makes the state that of a stage: its theta, perhaps fresh moments."""
        progress = self.progress
        if progress.state.model.config != self.config_in(stage):
            progress.state = with_config(progress.state, self.config_in(stage))
        if number != progress.stage and stage.reset_optimizer:
            fresh = init_state(progress.state.model, self.optimizer(number)[0])
            fresh = dataclasses.replace(fresh, step=progress.state.step)
            progress.state = _placed(fresh, self.sharding)
        if number != progress.stage:
            log.info("stage %d begins at step %d", number, progress.step)
        progress.stage = number

    def step_for(self, number: int, stage: Stage, batch: Any) -> Any:
        """The compiled step of a stage."""
        key = (number, batch.tokens.shape)
        if key not in self.compiled:
            s = self.settings
            options = StepOptions(s.model.dtype, s.step.remat, stage.micro_batches, s.step.z_loss)
            lowered = train_step.lower(
                self.progress.state,
                batch,
                optimizer=self.optimizer(number)[0],
                options=options,
            )
            platform = self.sharding.platform if self.sharding else jax.default_backend()
            with self.monitor.busy("compiling the step"), _room(self.progress.state, batch):
                self.compiled[key] = lowered.compile(compiler_options(platform, s.step.deterministic))
        return self.compiled[key]

    # --- checkpoints --------------------------------------------------------------------------------------

    def save(self) -> None:
        step = self.progress.step
        if step == self.saved and self.progress.data is self.saved_data:
            return
        about = {
            "settings": as_table(self.settings),
            "stage": self.progress.stage,
            "data": self.progress.data,
            "retries": self.progress.retries,
            "tokenizer": self.tokenizer_digest,
            "config": self.progress.state.model.config.to_hf(),
            "generation_config": self.progress.state.model.generation_config.to_hf(),
        }
        with self.monitor.busy("saving"):
            self.checkpoints.save(step, self.progress.state, about)
        self.monitor.flush()
        self.saved, self.saved_data = step, self.progress.data

    def restore(self) -> bool:
        """From the newest sound checkpoint; False if there is none at all."""
        folder = self.folder / "checkpoints"
        damaged = []
        for step in reversed(checkpoints.steps(folder)):
            try:
                with raise_everywhere():
                    about = checkpoints.read_about(folder, step)
                    self.compare(about)
                self.progress.state = None  # what is to be replaced need not take memory
                like = self.state_like(stage_at(self.settings, max(0, step - 1))[1])
                self.progress.state = checkpoints.restore(folder, step, like)
            except Damaged as reason:
                log.warning("%s; trying the one before", reason)
                self.monitor.event({"event": "damaged checkpoint", "step": step, "reason": str(reason)})
                damaged.append(step)
                self.checkpoints.damaged.add(step)
                continue
            self.batches.restore(about["data"], self.allow_changes)
            self.progress.step, self.progress.stage, self.progress.data = step, about["stage"], self.batches.state()
            self.progress.retries = max(self.progress.retries, about.get("retries", 0))
            self.saved, self.saved_data = step, self.progress.data
            log.info("going on from step %d", step)
            return True
        if damaged and not self.allow_restart:
            raise TrainingError(
                f"all {len(damaged)} checkpoints of {folder} are damaged; --allow-restart begins from the start"
            )
        return False

    def compare(self, about: Mapping[str, Any]) -> None:
        """Raises TrainingError where settings, architecture or tokenizer differ: what changes what a step computes."""

        number, stage = stage_at(self.settings, max(0, about["step"] - 1))
        config = self.config_in(stage).to_hf()
        own = {**as_table(self.settings), "config.json": config, "tokenizer.json": self.tokenizer_digest}
        settings = parse(about["settings"], "the checkpoint")  # what is a setting only now had its default
        then = {**as_table(settings), "config.json": about["config"], "tokenizer.json": about["tokenizer"]}
        before, now = (_flat(json.loads(json.dumps(x))) for x in (then, own))
        differ = [
            f"{key}: {before.get(key)!r} then, {now.get(key)!r} now"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key) and not _is_free(key)
        ]
        updates = about["step"] - 1 - begin_of(settings, number)
        if updates >= 0 and rate_of(settings, number)(updates) != rate_of(self.settings, number)(updates):
            steps = f"{settings.run.steps} then, {self.settings.run.steps} now"
            differ.append(f"run.steps: {steps}, on which the learning rate of the steps so far depends")
        if not differ:
            return
        if not self.allow_changes:
            raise TrainingError(
                f"the checkpoint was made with other settings: {'; '.join(differ[:10])}; --allow-changes goes on anyway"
            )
        log.warning("going on with other settings: %s", "; ".join(differ))

    # --- the loop -----------------------------------------------------------------------------------------

    def train(self) -> dict[str, Any]:
        progress = self.progress
        ended = "done"

        def close(kind: Any, error: BaseException | None, trace: Any) -> None:
            why = "" if error is None else str(error) or type(error).__name__
            self.monitor.close(f"ended by an error: {why}" if why else ended, progress.step)

        with contextlib.ExitStack() as ends:
            ends.push(close)
            ends.callback(self.checkpoints.close)
            resumed = self.restore()
            if not resumed:
                progress.state = self.first_state()
            with raise_everywhere():
                if jax.process_index() == 0:  # not before a resume has found that the tokenizer is the same
                    _keep_texts(self.source, self.folder / TOKENIZER)
            self.monitor.begin(progress.step, resumed, self.describe())
            if not self.monitor.has_held_out(progress.step):
                self.evaluate()
            try:
                while self.stretch():
                    pass
            except DataError:
                if jax.process_count() == 1:  # in a job, others may be on their way to the next step
                    self.keep()
                raise
            self.keep()
            last = self.settings.run.steps
            stopped = self.stop.agreed() and progress.step < last
            if progress.step == 0 and not stopped:
                d = self.settings.data
                raise DataError(
                    f"data.epochs={d.epochs}: so often read, the documents do not fill a batch of data.rows={d.rows} "
                    f"rows of data.length={d.length} tokens; make it smaller, or read them without end: data.epochs=0"
                )
            if progress.step < last:
                ended = "stopped by a signal" if stopped else "done: the data ended"
        return {**self.monitor.summary(), "step": progress.step, "stopped": stopped, "checkpoint": self.saved}

    def keep(self) -> None:
        """A checkpoint of where the run stands, whole when this returns."""
        if self.progress.step > 0:
            self.save()
        self.checkpoints.wait()

    def stretch(self) -> bool:
        """Steps until the last one, the end of the data or a signal; True if a rollback asks for another stretch."""
        s, progress = self.settings, self.progress

        def asked() -> bool:
            return self.stop.asked and jax.process_count() == 1  # in a job all have to come to the same step

        with contextlib.closing(prefetch(self.batches, progress.step, s.run.steps, s.data.timeout, asked)) as came:
            begin = time.monotonic()
            for item in came:
                if self.stop.agreed() or item is None:
                    return False
                step, host_batch, behind = item
                number, stage = stage_at(s, step)
                self.enter(number, stage)
                batch = on_mesh(host_batch, self.sharding)
                programs = len(self.compiled)
                compiled = self.step_for(number, stage, batch)
                if len(self.compiled) > programs:
                    begin = time.monotonic()  # a step's time is that of its data and its products
                with self.monitor.profiled(step + 1), _room(progress.state, batch):
                    progress.state, metrics = compiled(progress.state, batch)
                    metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
                progress.step = step + 1
                line = self.line(number, metrics, time.monotonic() - begin, host_batch.tokens.size)
                trouble = self.monitor.step(line)
                if line["bad"]:
                    self.monitor.skipped({"step": progress.step, "bad": line["bad"], "data": progress.data})
                progress.data = behind
                self.checkpoints.check()
                if trouble and s.guard.policy == "ignore":
                    log.warning("step %d: %s", progress.step, trouble)
                elif trouble:
                    self.give_up(trouble)
                    return True
                if s.checkpoint.every and progress.step % s.checkpoint.every == 0:
                    self.save()
                self.evaluate()
                begin = time.monotonic()
        if progress.step < s.run.steps:
            log.warning("the data ends at step %d of %d", progress.step, s.run.steps)
        return False

    def give_up(self, trouble: str) -> None:
        """Goes back to the last checkpoint and on with the data behind the trouble, if the policy says so."""
        s, progress = self.settings, self.progress
        progress.retries += 1
        if s.guard.policy == "stop" or progress.retries > s.guard.retries:
            raise TrainingError(
                f"step {progress.step}: {trouble}; the last checkpoint is of step {self.saved}. "
                "guard.policy=rollback goes back to it and passes over the data since"
            )
        self.checkpoints.wait()
        before, data = progress.step, progress.data
        if not self.restore():
            raise TrainingError(f"step {before}: {trouble}; there is no checkpoint to go back to")
        # A new reader, as the old one's thread may be in the middle of a batch; from behind what made the trouble.
        self.batches = Batches(s, self.encode)
        self.batches.restore(data)
        progress.data = data
        log.warning("step %d: %s: back to step %d, without the data since", before, trouble, progress.step)
        self.monitor.event({"event": "rollback", "step": before, "to": progress.step, "reason": trouble})
        self.monitor.back_to(progress.step)

    def line(self, stage: int, metrics: dict[str, float], seconds: float, tokens: int) -> dict[str, Any]:
        progress = self.progress
        rate: Any = self.optimizer(stage)[1](int(metrics.pop("updates")))
        line = {"step": progress.step, "stage": stage, **metrics, "learning_rate": float(rate), "seconds": seconds}
        line["bad"] = int(line["bad"])
        line["tokens_per_second"] = tokens / seconds
        chip = chip_of(jax.devices()[0])
        if chip is not None:
            useful = 6 * sum(x.size for x in jax.tree.leaves(progress.state.model)) * tokens
            line["mfu"] = useful / seconds / (chip.peak * jax.device_count())
        return line

    # --- held-out text ------------------------------------------------------------------------------------

    def evaluate(self) -> None:
        """Nats a token of the held-out documents, by source, to metrics.jsonl: where a step is one of eval.every."""
        s = self.settings
        if not s.eval.every or self.progress.step % s.eval.every != 0:
            return
        _, stage = stage_at(s, max(0, self.progress.step - 1))
        found = {}
        for name, rows in held_out_rows(s, self.batches, self.encode).items():
            nats = count = 0.0
            with self.monitor.busy(f"held-out text of {name}"):
                while count < s.eval.tokens:
                    if self.stop.agreed():
                        return
                    pairs = []
                    with contextlib.suppress(EndOfData):
                        for _ in range(stage.rows):
                            pairs.append(rows.next(stage.length))
                    if not pairs:
                        break
                    blank = np.zeros(stage.length, np.int32)
                    pairs += [(blank, blank)] * (stage.rows - len(pairs))
                    arrays = (np.stack(part) for part in zip(*pairs, strict=True))
                    batch = on_mesh(Batch(*arrays), self.sharding)
                    sums = _held_out(self.progress.state.model, batch, dtype=s.model.dtype)
                    nats, count = nats + float(sums[0]), count + float(sums[1])
            if count:
                found[name] = {"nats_per_token": nats / count, "tokens": int(count)}
        if found:
            self.monitor.held_out(self.progress.step, found)

    def describe(self) -> dict[str, Any]:
        """What is about to run, for people."""
        s = self.settings
        _, stage = stage_at(s, self.progress.step)
        return {
            "parameters": sum(x.size for x in jax.tree.leaves(self.progress.state.model)),
            "devices": jax.device_count(),
            "mesh": dict(self.sharding.mesh.shape) if self.sharding else None,
            "tokens_per_step": stage.rows * stage.length,
            "steps": s.run.steps,
            "weights": dict(stage.weights),
            "documents": {name: len(corpus) for name, corpus in self.batches.corpora.items()},
        }


@functools.partial(jax.jit, static_argnames="dtype")
def _held_out(model: SmolLM3, batch: Batch, *, dtype: str) -> tuple[Array, Array]:
    """(nats, tokens) of a batch."""
    return loss_sums(model, batch, StepOptions(dtype=dtype))[1]


def open_model(settings: Settings) -> tuple[Path, SmolLM3, Callable[[], SmolLM3], Sharding | None]:
    """(the folder of its text files, the shapes of the float32 model, what loads it, its sharding)."""
    m = settings.model
    path = demo.model_folder(m.path or m.config)
    opened = open_checkpoint(path) if m.path else None
    texts = text_folder(path)
    found = opened.config if opened else ModelConfig.from_hf(texts)
    config, generation = adapted(found, settings), opened.generation_config if opened else None
    sharding = _sharding(settings, config)
    shapes = abstract_model(config, "float32", generation, sharding=sharding)

    def load_it() -> SmolLM3:
        if opened is not None:
            mesh, rules = (sharding.mesh, settings.mesh.rules or "fsdp") if sharding else (None, None)
            return load(dataclasses.replace(opened, config=config), "float32", mesh, rules, stacked=True)
        places = state_shardings(shapes, sharding) if sharding else None

        def fresh() -> SmolLM3:
            return SmolLM3(config, rngs=nnx.Rngs(settings.run.seed), sharding=sharding)

        return jax.jit(fresh, out_shardings=places)()

    return texts, shapes, load_it, sharding


def _keep_texts(source: Path, folder: epath.Path) -> None:
    """The text files of the model, for exports; whatever else the folder holds stays in it."""
    if not source.is_dir():  # a .gguf
        return
    check_links(source)
    texts = read_texts(source)
    try:
        if is_remote(folder):
            for name, content in texts.items():
                write(folder / name, content)
            return
        with new_folder(folder) as new:
            for name, content in texts.items():
                (new / name).parent.mkdir(exist_ok=True)
                write(new / name, content)
            for path in Path(folder).iterdir() if folder.is_dir() else ():
                if not is_text_file(path.name):
                    carry(path, new / path.name)
    except OSError as error:
        raise OptionError(f"run.dir: {folder} cannot be written: {error.strerror or error}") from None


def adapted(config: ModelConfig, settings: Settings) -> ModelConfig:
    """The config with the NoPE interval and theta of the settings."""
    m = settings.model
    if m.nope_interval >= 0:
        layers = range(1, config.num_hidden_layers + 1)
        pattern = tuple(not m.nope_interval or i % m.nope_interval != 0 for i in layers)
        config = dataclasses.replace(config, model_type="smollm3", rope_layers=pattern, layer_types=None)
    if m.rope_theta:
        config = dataclasses.replace(config, rope_theta=m.rope_theta)
    return config


def _sharding(settings: Settings, config: ModelConfig) -> Sharding | None:
    mesh = settings.mesh
    if jax.device_count() == 1 and not mesh.rules:
        return None
    rules = mesh.rules or "fsdp"
    axes = parse_axes(mesh.axes) if mesh.axes else DEFAULT_AXES.get(rules, {"data": -1})
    sharding = Sharding.of(make_mesh(axes), rules).fitted(config.axis_sizes)
    for start in starts(settings):
        stage, parts = stage_at(settings, start)[1], sharding.parts("batch")
        if stage.rows // stage.micro_batches % parts:
            raise OptionError(
                f"data.rows: {stage.rows} in {stage.micro_batches} micro-batches do not go evenly onto {parts} devices"
            )
    return sharding


def begin_of(settings: Settings, stage: int) -> int:
    """The step at which a stage's moments were fresh: there its schedule begins, too."""
    return max(x for x in _fresh(settings) if x <= starts(settings)[stage])


def rate_of(settings: Settings, stage: int) -> optax.Schedule:
    """The learning rate of a stage by the number of updates since its moments were fresh."""
    begin, o = begin_of(settings, stage), settings.optimizer
    end = min([x for x in _fresh(settings) if x > begin], default=settings.run.steps)
    return schedule(o.schedule, o.learning_rate, end - begin, o.warmup_steps, o.decay_steps, o.end)


def _fresh(settings: Settings) -> list[int]:
    return [0, *(s.start for s in settings.stages if s.reset_optimizer)]


def with_config(tree: Any, config: ModelConfig) -> Any:
    """The same arrays, in models of another config: of a state those of the optimizer too."""

    def swapped(x: Any) -> Any:
        if not isinstance(x, SmolLM3):
            return x
        out = copy.copy(x)
        out.config = config
        return out

    return jax.tree.map(swapped, tree, is_leaf=lambda x: isinstance(x, SmolLM3))


def _placed(state: TrainState, sharding: Sharding | None) -> TrainState:
    if sharding is None:
        return jax.tree.map(jnp.asarray, state)
    return jax.jit(lambda x: x, out_shardings=state_shardings(state, sharding), donate_argnums=0)(state)


@contextlib.contextmanager
def _room(state: TrainState, batch: Any) -> Iterator[None]:
    """Turns a want of memory into TrainingError: what takes it, and three ways out."""

    def share(tree: Any) -> str:
        sizes = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
        return f"{sum(sizes) / GIB:.2f} GiB"

    parts = f"parameters {share(state.model)}, optimizer {share(state.optimizer)}, batch {share(batch)}"
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        raise TrainingError(
            f"the step does not fit: {str(error).splitlines()[0][:200]}; on a device: {parts}, the rest activations. "
            "Ways out: step.remat=full; step.micro_batches=2 or more; mesh.rules=fsdp on more devices"
        ) from None


def environment() -> dict[str, Any]:
    """What a run runs on."""
    return {
        "versions": {name: version(name) for name in ("python", "smollm3-jax", *SHOWN)},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE) or bool(
        re.fullmatch(r"data\.sources\..*\.path", key)
    )


def _flat(table: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(table, dict) or not table:
        return {path: table}
    return {k: v for key, x in table.items() for k, v in _flat(x, f"{path}.{key}" if path else key).items()}
