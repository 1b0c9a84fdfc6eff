"""Whether this device computes what it should: logits of whole rows, of decoding, and of prompts in pieces.

Errors are ||found - expected|| / ||expected||. A float32 product at the highest precision keeps them near 1e-6, at
TF32's near 3e-4; bfloat16's rounding of activations makes them 1.4e-2 in four layers of a width of 1,536 on a CPU, and
a little more at SmolLM3-3B's, whatever the kernel.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import smollm3_jax as s3
from smollm3_jax import xla_cpu
from smollm3_jax.generation.device_loop import prefill
from smollm3_jax.generation.prompts import pieces
from smollm3_jax.kv_cache import KVCache, empty_cache
from smollm3_jax.model import SmolLM3

from . import shape
from .run import Run, relative

FLOAT32, BFLOAT16 = 1e-4, 3e-2
LENGTH, TINY_LENGTH = 512, 64
# Tokens that the slots hold before decoding; the last slot is empty, and stays so.
HELD, TINY_HELD = (5, 130, 700, 0), (5, 17, 33, 0)
STEPS = 6


def part(run: Run) -> None:
    config = shape.config(run.tiny, shape.PARITY_LAYERS)
    model = shape.random_model(config)
    exact = widened(model)
    run.attempt("float32", float32, run, exact)
    run.attempt("bfloat16", bfloat16, run, model, exact)
    run.attempt("batch", batch_against_single, run, model, exact)
    run.attempt("pieces", pieces_against_whole, run, model)
    run.attempt("greedy", greedy, run, exact)


def widened(model: SmolLM3) -> SmolLM3:
    """The same numbers in float32: a reference whose weights are not rounded otherwise."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, model)


def exact_logits(model: SmolLM3, tokens: Array, segments: Array | None = None) -> Array:
    """Of a float32 model, by products that are float32's."""
    with jax.default_matmul_precision("highest"):
        return model(tokens, segment_ids=segments)


def cpu_logits(model: SmolLM3, tokens: Array, segments: Array | None = None) -> np.ndarray:
    """The same by this machine's CPU."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return np.asarray(exact_logits(*jax.device_put((model, tokens, segments), cpu)))


def float32(run: Run, exact: SmolLM3) -> None:
    tokens, segments = shape.random_tokens(exact.config, 2, 96), shape.packed_segments(2, 96, 3, padding=6)
    here, there = exact_logits(exact, tokens, segments), cpu_logits(exact, tokens, segments)
    real = np.asarray(segments) != 0
    run.check("float32 logits, documents: device against CPU", relative(np.asarray(here)[real], there[real]), FLOAT32)


def bfloat16(run: Run, model: SmolLM3, exact: SmolLM3) -> None:
    length = TINY_LENGTH if run.tiny else LENGTH
    tokens, documents = shape.random_tokens(exact.config, 2, length), shape.packed_segments(2, length, padding=5)
    for name, segments in (("one document", None), ("documents", documents)):
        ids = jnp.ones_like(tokens) if segments is None else segments
        logits = model(tokens, segment_ids=segments), exact_logits(exact, tokens, ids)
        found, expected = (jnp.where(ids[..., None] != 0, x, 0) for x in logits)
        run.check(f"bfloat16 logits, {name}: against float32", relative(found, expected), BFLOAT16)


def batch_against_single(run: Run, model: SmolLM3, exact: SmolLM3) -> None:
    """Slots that hold different lengths, decoded together, each alone, and as whole rows in float32."""
    held, capacity = (TINY_HELD, 128) if run.tiny else (HELD, 1024)
    tokens = shape.random_tokens(model.config, len(held), max(held) + STEPS)
    together, whole = decoded(model, tokens, held, capacity), exact_logits(exact, tokens)
    for slot, length in enumerate(held):
        if not length:
            continue
        alone = decoded(model, tokens[slot : slot + 1], (length,), capacity)[0]
        expected, found = whole[slot, length : length + STEPS], together[slot]
        run.check(f"decoding after {length}: batch of {len(held)} against single", relative(found, alone), BFLOAT16)
        run.check(f"decoding after {length}: against whole rows in float32", relative(found, expected), BFLOAT16)


def decoded(model: SmolLM3, tokens: Array, held: tuple[int, ...], capacity: int) -> Array:
    """float32 [B, STEPS, V]: what each slot says after each of the STEPS tokens that follow the first `held` ones."""
    cache = empty_cache(model.config, len(held), capacity, model.dtype)
    for slot, length in enumerate(held):
        whole = [(0, length, capacity)] if length else []
        cache = filled(model, cache, slot, tokens[slot], whole)
    return following(model, cache, tokens, held)


def following(model: SmolLM3, cache: KVCache, tokens: Array, held: tuple[int, ...]) -> Array:
    """The same from a cache that holds the first `held` tokens of each row, and stays as it is."""
    active = (jnp.array(held) > 0).astype(jnp.int32)[:, None]
    logits = []
    for step in range(STEPS):
        token = jnp.stack([tokens[slot, length + step] for slot, length in enumerate(held)])[:, None]
        out, cache = model(token, segment_ids=active, cache=cache)
        logits.append(out[:, 0])
    return jnp.stack(logits, axis=1)


def filled(model: SmolLM3, cache: KVCache, slot: int, tokens: Array, cut: Iterable[tuple[int, int, int]]) -> KVCache:
    """The cache after a prompt's tokens went into a slot, cut as `prompts.pieces` does."""
    cut = list(cut)
    for start, count, padded in cut:
        piece = jnp.zeros((1, padded), jnp.int32).at[0, :count].set(tokens[start : start + count])
        at = None if len(cut) == 1 else jnp.int32(start)  # a prompt that goes in whole has a program of its own
        cache, _ = prefill(model, cache, jnp.int32(slot), at, piece, piece[0], jnp.int32(count))
    return cache


def pieces_against_whole(run: Run, model: SmolLM3) -> None:
    """What a slot says after a prompt that went in whole, and in pieces, the last of them short; and its keys."""
    length, chunk, capacity = (100, 32, 128) if run.tiny else (2900, 1024, 4096)
    tokens = shape.random_tokens(model.config, 1, length + STEPS)
    said, keys = [], []
    for size in (capacity, chunk):
        cache = empty_cache(model.config, 1, capacity, model.dtype)
        cache = filled(model, cache, 0, tokens[0], pieces(length, (size,)))
        keys.append(jnp.stack([xla_cpu.values_of(layer.k[:, 0, :length]) for layer in cache.layers]))
        out = []
        for step in range(STEPS):
            logits, cache = model(tokens[:, length + step][:, None], cache=cache)
            out.append(logits[0, 0])
        said.append(jnp.stack(out))
    case = f"prompt of {length:,} in pieces of {chunk:,}"
    run.check(f"{case}: logits after it, against whole", relative(said[1], said[0]), BFLOAT16)
    run.check(f"{case}: all keys, against whole", relative(keys[1], keys[0]), BFLOAT16)


def greedy(run: Run, exact: SmolLM3) -> None:
    """The whole of `generate`, in float32, where rounding turns no choice over."""
    params = s3.SamplingParams(max_new_tokens=20, temperature=0.0, ignore_eos=True)
    prompts = [shape.random_tokens(exact.config, 1, n, seed=n)[0].tolist() for n in (5, 9, 16)]
    with jax.default_matmul_precision("highest"):
        together = s3.generate(exact, prompts, params)
        alone = [s3.generate(exact, [prompt], params)[0] for prompt in prompts]
    differ = sum(a != b for one, other in zip(together, alone, strict=True) for a, b in zip(one, other, strict=True))
    run.check("greedy tokens, float32: batch of three against single, tokens that differ", float(differ), 0.0)
