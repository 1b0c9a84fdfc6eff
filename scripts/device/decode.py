"""Decoding at full size, through the loop that `generate` calls: milliseconds a token beside the floor of its bytes."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sharding.arrays import total_bytes
from smollm3_jax import xla_cpu
from smollm3_jax.generation.device_loop import MAX_STEPS, Slots, decode
from smollm3_jax.generation.sampling import MAX_STOP_IDS, SamplingParams, SamplingState
from smollm3_jax.kv_cache import KVCache, cache_specs, empty_cache
from smollm3_jax.model import SmolLM3
from smollm3_jax.plan.decode import DecodeSetting
from smollm3_jax.plan.devices import sharding_for

from . import shape
from .modelled import say_modelled
from .run import Run, scaled, timed

# (slots, tokens that each holds, capacity)
CASES = ((1, 512, 1024), (64, 960, 1024), (1, 7936, 8192), (64, 7936, 8192))
TINY_CASES = ((1, 64, 128), (4, 64, 128))
ROUNDS = 9


def part(run: Run) -> None:
    decode_cases(run, TINY_CASES if run.tiny else CASES)


def name_of(batch: int, held: int, weights: str | None = None, note: str = "") -> str:
    """What the case is called in the results, ours and a peer's."""
    return " ".join(filter(None, [weights and f"{weights}", f"decode {batch} x {held:,}", note]))


def decode_cases(
    run: Run,
    cases: Sequence[tuple[int, int, int]],
    weights: str | None = None,
    cache_dtype: str = "bfloat16",
    stacked: bool = False,
    note: str = "",
) -> None:
    """Times each case with one model."""
    begin = time.perf_counter()
    model = shape.random_model(shape.config(run.tiny, weights=weights), stacked=stacked)
    run.say("note", "model made", seconds=time.perf_counter() - begin, bytes=shape.held_bytes(model))
    for batch, held, capacity in cases:
        case = name_of(batch, held, weights, note)
        run.attempt(case, one, run, case, model, batch, held, capacity, cache_dtype)


def one(run: Run, case: str, model: SmolLM3, batch: int, held: int, capacity: int, cache_dtype: str) -> None:
    """A case: what MAX_STEPS tokens of every slot take after `held` others."""
    begin = time.perf_counter()
    call, reset, arguments = decoder(run, model, batch, held, capacity, cache_dtype)
    call()
    first = time.perf_counter() - begin
    times = scaled(timed(call, 3 if run.tiny else ROUNDS, before=reset), 1 / MAX_STEPS)
    moved = shape.held_bytes(model) + total_bytes(cache_specs(model.config, batch, held, cache_dtype))
    read = run.ceiling("read")
    run.say(
        "speed",
        case,
        engine="ours",
        **times,
        tokens_per_second=1e3 * batch / times["ms"],
        floor_ms=None if read is None else 1e3 * moved / read,
        bytes=moved,
        capacity=capacity,
        cache=cache_dtype,
        first_seconds=first,
    )
    here = sharding_for(model.config, jax.devices()[:1], "serve_tp", None)
    setting = DecodeSetting(model.config, here, batch, capacity, cache_dtype)
    say_modelled(run, case, decode.lower(*arguments()).compile(), lambda compiled: [setting.model_of(compiled)])


def decoder(
    run: Run, model: SmolLM3, batch: int, held: int, capacity: int, cache_dtype: str = "bfloat16"
) -> tuple[Callable[[], None], Callable[[], None], Callable[[], tuple]]:
    """Three functions: decode MAX_STEPS tokens of every slot and wait; let each hold `held` tokens again; what `decode`
    takes."""
    cache = random_cache(empty_cache(model.config, batch, capacity, jnp.dtype(cache_dtype)))
    state: dict[str, Any] = {"cache": cache, "slots": active_slots(model, batch)}
    steps = jnp.int32(MAX_STEPS)
    step = run.program(decode, model, *state.values(), steps)

    def reset() -> None:
        length = jax.block_until_ready(jnp.full((batch,), held, jnp.int32))
        state["cache"] = dataclasses.replace(state["cache"], length=length)

    def call() -> None:
        state["cache"], state["slots"], chosen = step(model, state["cache"], state["slots"], steps)
        np.asarray(chosen.tokens)

    reset()
    return call, reset, lambda: (model, state["cache"], state["slots"], steps)


def random_cache(cache: KVCache) -> KVCache:
    """Keys and values as a model's: of standard deviation one, or integers with scales that make them so."""

    def filled(number: int, x: jax.Array) -> jax.Array:
        key = jax.random.key(number, impl="rbg")
        if x.dtype == jnp.int8:
            return jax.lax.bitcast_convert_type(jax.random.bits(key, x.shape, jnp.uint8), jnp.int8)
        if x.ndim == 3:
            return jnp.full_like(x, 1 / 73.9)
        return xla_cpu.as_held(jax.random.normal(key, x.shape, jnp.bfloat16), x.dtype)

    fill = jax.jit(filled, static_argnums=0, donate_argnums=1)
    flat, tree = jax.tree.flatten(cache.layers)
    return dataclasses.replace(cache, layers=jax.tree.unflatten(tree, [fill(i % 4, x) for i, x in enumerate(flat)]))


def active_slots(model: SmolLM3, batch: int) -> Slots:
    """Slots in the middle of an answer that does not end, chosen greedily."""
    fields: dict[str, Any] = dict(
        token=np.int32(3),
        active=np.bool_(True),
        generated=np.int32(0),
        limit=np.int32(2**30),
        stop_ids=np.full(MAX_STOP_IDS, -1, np.int32),
        think_ids=np.full(2, -1, np.int32),
        thinking=np.bool_(False),
        think_left=np.int32(-1),
        choice=SamplingState.of(SamplingParams(temperature=0.0), [3], 0, model.config.vocab_size),
    )
    one = Slots(**fields)
    slots = jax.device_put(jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], batch, axis=0), one))
    return dataclasses.replace(slots, token=3 + jnp.arange(batch, dtype=jnp.int32))
