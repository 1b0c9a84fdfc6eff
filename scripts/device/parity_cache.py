"""Whether decoding reads what the cache holds: an int8 one by its scales, and a pool of pages by its table."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from smollm3_jax.generation.places import empty
from smollm3_jax.generation.prompts import pieces
from smollm3_jax.kv_cache import KVCache, empty_cache
from smollm3_jax.model import SmolLM3

from . import shape
from .parity import BFLOAT16, STEPS, exact_logits, filled, following, widened
from .run import Run, relative

# Tokens that the slots hold, each in several pages, before decoding; the last slot is empty, and has no page.
HELD, TINY_HELD = (261, 700, 0), (37, 70, 0)
CAPACITY, TINY_CAPACITY = 1024, 128
PAGE, TINY_PAGE = 256, 32
SPARE = 3  # pages that are nobody's
# Two float32 computations part by 1e-6 or a few, and so some keys and values round to the integer beside. On a CPU, at
# this size, weights changed by 2e-6 change the logits by 5.5e-5 after the same prompts in the cache, and by 4.4e-4 with
# their own. Scales a tenth too large, of keys or of values, change them by 0.13 or 0.06; a tiny model's pages in
# another order by 0.8.
ROUNDED_OTHERWISE = 2e-3


def part(run: Run) -> None:
    model = shape.random_model(shape.config(run.tiny, shape.FEW_LAYERS))
    exact = widened(model)
    run.attempt("int8 cache", int8_cache, run, model, exact)
    run.attempt("pages", pages, run, model, exact)


def int8_cache(run: Run, model: SmolLM3, exact: SmolLM3) -> None:
    """The same integers and scales, read by this device in float32 and bfloat16, and by the CPU."""
    tokens, held = prompts(run, exact)
    cache = in_rows(run, exact, tokens, "int8")
    here, there = exactly(exact, cache, tokens, held), by_cpu(exact, cache, tokens, held)
    whole = whole_rows(exact, tokens, held)
    case = "decoding with an int8 cache"
    run.check(f"{case}, float32: device against CPU", relative(here, there), ROUNDED_OTHERWISE)
    run.check(f"{case}, float32: against whole rows", relative(here, whole), BFLOAT16)
    found = said(following(model, cache, tokens, held), held)
    run.check(f"{case}, bfloat16: against float32", relative(found, here), BFLOAT16)


def pages(run: Run, model: SmolLM3, exact: SmolLM3) -> None:
    """Prompts written into pages that lie in no order, and decoding that reads them there."""
    tokens, held = prompts(run, exact)
    rows, pool = (exactly(exact, make(run, exact, tokens, "int8"), tokens, held) for make in (in_rows, in_pages))
    case = "decoding through a table of pages"
    run.check(f"{case}, int8 cache, float32: against rows", relative(pool, rows), ROUNDED_OTHERWISE)
    found = said(following(model, in_pages(run, model, tokens, "bfloat16"), tokens, held), held)
    error = relative(found, whole_rows(exact, tokens, held))
    run.check(f"{case}, bfloat16: against whole rows in float32", error, BFLOAT16)


def prompts(run: Run, model: SmolLM3) -> tuple[Array, tuple[int, ...]]:
    """Tokens of every slot, those that follow too, and how many of them it holds before."""
    held = TINY_HELD if run.tiny else HELD
    return shape.random_tokens(model.config, len(held), max(held) + STEPS), held


def in_rows(run: Run, model: SmolLM3, tokens: Array, dtype: DTypeLike) -> KVCache:
    """A cache of dense rows that holds the prompts."""
    return with_prompts(run, model, empty_cache(model.config, len(tokens), size(run)[0], dtype), tokens)


def in_pages(run: Run, model: SmolLM3, tokens: Array, dtype: DTypeLike) -> KVCache:
    """A pool that holds them, of whose pages each row has those that it needs."""
    (capacity, page), (_, held) = size(run), prompts(run, model)
    width = capacity // page
    count = len(held) * width + SPARE
    order = np.random.RandomState(0).permutation(count)[: len(held) * width].reshape(-1, width)
    needed = [[-(-(length + STEPS) // page) if length else 0] for length in held]
    table = jnp.asarray(np.where(np.arange(width)[None] < np.array(needed), order, count), jnp.int32)
    cache, _, _ = empty(model, len(held), capacity, dtype, (count, page))
    return with_prompts(run, model, dataclasses.replace(cache, table=table), tokens)


def size(run: Run) -> tuple[int, int]:
    """The capacity of a slot, and the tokens of a page."""
    return (TINY_CAPACITY, TINY_PAGE) if run.tiny else (CAPACITY, PAGE)


def with_prompts(run: Run, model: SmolLM3, cache: KVCache, tokens: Array) -> KVCache:
    """In pieces of a page, rows and pool by the same program but for the table."""
    _, held = prompts(run, model)
    with jax.default_matmul_precision("highest"):
        for slot, length in enumerate(held):
            cache = filled(model, cache, slot, tokens[slot], pieces(length, (size(run)[1],)))
    return cache


def said(logits: Array, held: tuple[int, ...]) -> Array:
    """Without what the empty slot says."""
    return logits[np.array(held) > 0]


def exactly(model: SmolLM3, cache: KVCache, tokens: Array, held: tuple[int, ...]) -> Array:
    with jax.default_matmul_precision("highest"):
        return said(following(model, cache, tokens, held), held)


def by_cpu(model: SmolLM3, cache: KVCache, tokens: Array, held: tuple[int, ...]) -> np.ndarray:
    cpu = jax.devices("cpu")[0]
    model, cache, tokens = jax.device_put((model, cache, tokens), cpu)
    with jax.default_device(cpu):
        return np.asarray(exactly(model, cache, tokens, held))


def whole_rows(model: SmolLM3, tokens: Array, held: tuple[int, ...]) -> Array:
    """The same logits without a cache."""
    logits = exact_logits(model, tokens)
    return jnp.stack([logits[slot, length : length + STEPS] for slot, length in enumerate(held) if length])
