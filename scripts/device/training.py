"""The training step at full size: packed rows, on all local devices, beside the floor of its products."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from sharding import hlo
from sharding.hardware import chip_of
from sharding.mesh import make_mesh
from sharding.rules import Sharding, platform_of
from smollm3_jax.plan.devices import sharding_for
from smollm3_jax.plan.train import TrainSetting
from smollm3_jax.train.data.prefetch import on_mesh
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.options import StepOptions, compiler_options
from smollm3_jax.train.state import Batch, TrainState, init_state
from smollm3_jax.train.step import train_step

from . import shape
from .modelled import say_modelled
from .run import Run, timed

LENGTH, TINY_LENGTH = 4096, 128
ROWS, TINY_ROWS = (1, 2), (1,)  # of each device
PADDING = 8


def part(run: Run) -> None:
    for rows in TINY_ROWS if run.tiny else ROWS:
        case = name_of(run, rows)
        run.attempt(case, one, run, case, rows)


def name_of(run: Run, rows: int, note: str = "") -> str:
    length = TINY_LENGTH if run.tiny else LENGTH
    return " ".join(filter(None, [f"training {rows * jax.device_count()} x {length:,}", note]))


@dataclasses.dataclass
class Training:
    """A compiled step, its batch, and the state that goes through it."""

    compiled: Compiled
    batch: Batch
    state: Any  # a TrainState

    def step(self) -> float:
        """One step, waited for: its loss."""
        self.state, metrics = self.compiled(self.state, self.batch)
        return float(metrics["loss"])


def prepared(run: Run, rows: int, deterministic: bool = False) -> tuple[Training, Callable[[], TrainState]]:
    """The step of `rows` rows a device, compiled, and what makes its first state again: always the same one."""
    config, devices = shape.config(run.tiny), jax.device_count()
    sharding = Sharding.of(make_mesh({"fsdp": -1}), "fsdp").fitted(config.axis_sizes) if devices > 1 else None
    length, rows = TINY_LENGTH if run.tiny else LENGTH, rows * devices
    optimizer = adamw(1e-5)

    def first_state() -> TrainState:
        return init_state(shape.random_model(config, "float32", stacked=True, sharding=sharding), optimizer)

    state = first_state()
    segments = shape.packed_segments(rows, length, padding=PADDING)
    batch = on_mesh(Batch(shape.random_tokens(config, rows, length), segments), sharding)
    lowered = train_step.lower(state, batch, optimizer=optimizer, options=StepOptions())
    compiled = lowered.compile(compiler_options(platform_of(sharding), deterministic))
    return Training(compiled, batch, state), first_state


def one(run: Run, case: str, rows: int) -> None:
    begin = time.perf_counter()
    training, _ = prepared(run, rows)
    losses = [training.step()]
    first = time.perf_counter() - begin
    times = timed(lambda: losses.append(training.step()), 3 if run.tiny else 5, warm_up=1)
    say_speed(run, case, training, times, first_seconds=first, losses=losses)
    if (chip := chip_of(jax.devices()[0])) is not None:
        config, (rows, length) = training.state.model.config, training.batch.tokens.shape
        here = sharding_for(config, jax.devices(), "fsdp", None)
        setting = TrainSetting(config, chip, here, rows, length, StepOptions())
        say_modelled(run, case, training.compiled, lambda compiled: [setting.model_of(compiled)])


def say_speed(run: Run, case: str, training: Training, times: dict[str, float], **more: object) -> None:
    config, (rows, length) = training.state.model.config, training.batch.tokens.shape
    flops, product = shape.training_flops(config, rows, length) / jax.device_count(), run.ceiling("product")
    memory, chip = hlo.memory(training.compiled), chip_of(jax.devices()[0])
    # What others publish: 6 operations a parameter and token over the chip's rate on paper.
    useful = 6.0 * shape.parameters(config) * rows * length / jax.device_count()
    run.say(
        "speed",
        case,
        engine="ours",
        **times,
        tokens_per_second=1e3 * rows * length / times["ms"],
        floor_ms=None if product is None else 1e3 * flops / product,
        flops=flops,
        mfu=None if chip is None else 1e3 * useful / times["ms"] / chip.peak,
        memory_bytes=memory.total,
        temporaries=memory.temporaries,
        **more,
    )


def digest(state: TrainState) -> int:
    """A number that two states share if all their bits are equal, and by chance alone if they are not."""

    def of(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
        # By their places: an exchange of two numbers is seen too.
        return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    total = 0
    for leaf in jax.tree.leaves(state):
        total = (1_000_003 * total + int(jax.jit(of)(leaf))) % 2**64
    return total
