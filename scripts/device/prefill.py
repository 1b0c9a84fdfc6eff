"""Prefill at full size, in the pieces that `generate` makes of a prompt and in larger ones, beside the floor of its
products."""

import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.stages import Compiled

from sharding import hlo
from sharding.roofline import Roofline
from smollm3_jax.generation.device_loop import prefill
from smollm3_jax.generation.prompts import ACCELERATOR_CHUNK, piece_sizes, pieces
from smollm3_jax.kv_cache import empty_cache
from smollm3_jax.model import SmolLM3
from smollm3_jax.plan.decode import DecodeSetting
from smollm3_jax.plan.devices import sharding_for
from smollm3_jax.sizes import power_of_two_from

from . import shape
from .modelled import say_modelled
from .run import Run, timed

# (tokens of the prompt, tokens that the slot holds already)
CASES = ((8192, 0), (2048, 0), (2048, 8192))
TINY_CASES = ((128, 0), (64, 128))
# Tokens of a piece: what `generate` has now, and what the first case's prompt is cut into beside: which is best, each
# kind of machine has to say.
CHUNK, TINY_CHUNK = ACCELERATOR_CHUNK, 64
CHUNKS, TINY_CHUNKS = (2048, 4096, 8192), (32, 64, 128)


def part(run: Run) -> None:
    model = shape.random_model(shape.config(run.tiny))
    cases, own = (TINY_CASES, TINY_CHUNK) if run.tiny else (CASES, CHUNK)
    for length, past in cases:
        case = name_of(length, past)
        run.attempt(case, one, run, case, model, length, past, own)
    length, past = cases[0]
    for chunk in TINY_CHUNKS if run.tiny else CHUNKS:
        if chunk != own:
            case = f"{name_of(length, past)} in pieces of {chunk:,}"
            run.attempt(case, one, run, case, model, length, past, chunk)


def name_of(length: int, past: int) -> str:
    return f"prefill {length:,}" + (f" after {past:,}" if past else "")


def one(run: Run, case: str, model: SmolLM3, length: int, past: int, chunk: int) -> None:
    begin = time.perf_counter()
    capacity = power_of_two_from(length + past + 1)
    tokens = shape.random_tokens(model.config, 1, past + length)
    state: dict[str, Any] = {"cache": empty_cache(model.config, 1, capacity, jnp.dtype("bfloat16"))}
    # As `generate` cuts a prompt of this length, moved to after what the slot holds: the pieces are all alike.
    sizes = piece_sizes("gpu", capacity, (chunk,))
    todo = [(past + start, count, padded) for start, count, padded in pieces(length, sizes)]

    def arguments(start: int, count: int, padded: int) -> tuple[Array | None, ...]:
        """What `prefill` takes after the cache."""
        piece = jnp.zeros((1, padded), jnp.int32).at[:, :count].set(tokens[:, start : start + count])
        at = None if count == past + length else jnp.int32(start)  # a whole prompt has a program of its own
        return jnp.int32(0), at, piece, piece[0], jnp.int32(count)

    prepared = [arguments(*piece) for piece in todo]

    step = run.program(prefill, model, state["cache"], *prepared[0])

    def call() -> None:
        for rest in prepared:
            state["cache"], _ = step(model, state["cache"], *rest)
        jax.block_until_ready(state["cache"])

    call()
    first = time.perf_counter() - begin
    times = timed(call, 3 if run.tiny else 7)
    flops, product = shape.forward_flops(model.config, length, past), run.ceiling("product")
    run.say(
        "speed",
        case,
        engine="ours",
        **times,
        tokens_per_second=1e3 * length / times["ms"],
        floor_ms=None if product is None else 1e3 * flops / product,
        flops=flops,
        pieces=[padded for _, _, padded in todo],
        first_seconds=first,
    )
    compiled = prefill.lower(model, state["cache"], *prepared[-1]).compile()
    here = sharding_for(model.config, jax.devices()[:1], "serve_tp", None)
    setting = DecodeSetting(model.config, here, 1, capacity)

    def calls_of(compiled: Compiled) -> list[Roofline]:
        """Of each piece, after those before it."""
        found = hlo.operations(compiled)
        return [setting.piece_after(found, start) for start, _, _ in todo]

    say_modelled(run, case, compiled, calls_of)
