"""What runs on the device to generate: prefill of one slot, and decoding of all slots, several tokens a call.

A slot is a row of the cache and of everything here that has a leading B. Sequences come and go by
slot, with parameters of their own, and nothing is compiled again.

The last token of a prompt is not prefilled: it is the first that a slot feeds to the decode loop. So
there is one place where tokens are chosen, and several samples of a prompt are copies of a row.

Shapes: B slots, T tokens of a prompt's piece, N tokens a call, M stop ids, V vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from sharding.arrays import shardings, spec
from sharding.rules import PyTree, Sharding

from ..kv_cache import KVCache, copy_row
from ..lora import for_each
from ..model import SmolLM3
from .hosts import on_every_host
from .sampling import MAX_LOGPROBS, MAX_STOP_IDS, SamplingState, choose, log_probabilities

# On a GPU a call is one CUDA graph, all tokens of decoding and all of a piece's past, so that nothing of it is launched
# by the host; by default a loop is none, and every turn of it waits for the host. Only the whole list of kinds works.
# Other platforms ignore it.
COMPILER_OPTIONS: dict[str, bool | str] = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
}

# N, the most tokens that one call of `decode` chooses for a slot.
MAX_STEPS = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """The sequences being decoded.

    token: int32 [B], what each feeds next; active: bool [B]; generated, limit: int32 [B], how many tokens
    it has, and may have; stop_ids: int32 [B, M], padded with -1; think_ids: int32 [B, 2], the tokens that
    open and close thinking (-1: none); thinking: bool [B]; think_left: int32 [B], how many more tokens it
    may think (negative: any number); adapter: int32 [B], the number of the model's adapter that each has, 0 for none;
    None where the model has no adapters.
    """

    token: Array
    active: Array
    generated: Array
    limit: Array
    stop_ids: Array
    think_ids: Array
    thinking: Array
    think_left: Array
    choice: SamplingState
    adapter: Array | None = None


def slot_specs(batch: int, vocab_size: int, adapters: bool = False) -> PyTree:
    """Slots of ArraySpecs: what has an entry for each token of the vocabulary lies as the logits do.

    adapters: whether the model has any.
    """
    index, flag = spec(jnp.int32, batch=batch), spec(bool, batch=batch)
    fields: dict[str, Any] = dict(
        token=index,
        active=flag,
        generated=index,
        limit=index,
        stop_ids=spec(jnp.int32, batch=batch, stops=MAX_STOP_IDS),
        think_ids=spec(jnp.int32, batch=batch, marks=2),
        thinking=flag,
        think_left=index,
        choice=SamplingState.specs(batch, vocab_size),
        adapter=index if adapters else None,
    )
    return Slots(**fields)


def as_they_came(slots: Slots, sharding: Sharding | None) -> Slots:
    """Inside a program: left to itself the compiler spreads some of them otherwise than they came. The next call would
    be compiled anew, and what was donated not be used."""
    if sharding is None:
        return slots
    specs = slot_specs(*slots.choice.counts.shape, adapters=slots.adapter is not None)
    return jax.lax.with_sharding_constraint(slots, shardings(specs, sharding))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodedTokens:
    """What one call of `decode` chose: tokens int32 [B, N], -1 after a sequence's end; their
    log-probabilities float32 [B, N]; the likeliest ids and log-probabilities [B, N, 20] where asked for. Of drafts
    all but the tokens are None."""

    tokens: Array
    logprobs: Array
    top_ids: Array
    top_logprobs: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """Of a piece's tokens: what the model gave the token that follows each, float32 [T], and the likeliest ids and
    log-probabilities there [T, 20]."""

    next: Array
    top_ids: Array
    top: Array


@functools.partial(jax.jit, static_argnames="logprobs", donate_argnames="cache", compiler_options=COMPILER_OPTIONS)
def prefill(
    model: SmolLM3,
    cache: KVCache,
    slot: Array,
    start: Array | None,
    tokens_1T: Array,
    next_T: Array,
    count: Array,
    adapter: Array | None = None,
    *,
    logprobs: bool = False,
) -> tuple[KVCache, PromptLogprobs | None]:
    """Puts a piece of a prompt into a slot.

    Args:
      start: how many tokens of the prompt the slot holds, and keeps; None is for a prompt that goes in whole: a program
        without a past.
      tokens_1T: int32 [1, T], padded at the end.
      next_T: int32 [T], the token that follows each: what log-probabilities are of.
      count: how many tokens are real.
      adapter: int32, the number of the model's adapter that it is for, 0 for none; None where the model has none.

    Returns:
      The cache, and log-probabilities if asked for.
    """
    model = for_each(model, None if adapter is None else adapter[None])
    segments_1T = (jnp.arange(tokens_1T.shape[1], dtype=jnp.int32) < count).astype(jnp.int32)[None]
    cache = dataclasses.replace(cache, length=cache.length.at[slot].set(0 if start is None else start))
    x_1TD, cache = model.hidden(tokens_1T, segment_ids=segments_1T, cache=cache, slot=slot, past=start is not None)
    if not logprobs:
        return cache, None
    width = min(MAX_LOGPROBS, model.config.vocab_size)

    def one(x_and_next: tuple[Array, Array]) -> PromptLogprobs:  # a few rows at a time: T x V is large
        logits_V = model.unembed(x_and_next[0])
        total = jax.nn.logsumexp(logits_V)
        top, top_ids = jax.lax.top_k(logits_V, width)
        return PromptLogprobs(logits_V[x_and_next[1]] - total, top_ids, top - total)

    values = jax.lax.map(one, (x_1TD[0], next_T), batch_size=16)
    return cache, on_every_host(values, model.sharding)


@functools.partial(jax.jit, donate_argnames=("cache", "slots"))
def insert(cache: KVCache, slots: Slots, slot: Array, one: Slots, length: Array) -> tuple[KVCache, Slots]:
    """Starts a sequence in a slot whose prompt has been prefilled.

    Args:
      one: the slot's new state, without the leading B; an inactive one stops what was there.
      length: how many tokens of the prompt the cache holds: all but the last.
    """
    cache = dataclasses.replace(cache, length=cache.length.at[slot].set(length))
    return cache, jax.tree.map(lambda all, new: all.at[slot].set(new), slots, one)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="cache")
def copy(cache: KVCache, source: Array, slot: Array, *, sharding: Sharding | None = None) -> KVCache:
    """The cache with the tokens of one slot in another as well."""
    return copy_row(cache, source, slot, sharding)


@functools.partial(jax.jit, static_argnames="sharding", donate_argnames="slots")
def hold(slots: Slots, constrained_B: Array, forbidden_BW: Array, *, sharding: Sharding | None = None) -> Slots:
    """Holds back the tokens that may not come next, of each slot; see `SamplingState`.

    Args:
      forbidden_BW: int32 [B, V / 32], a bit for each token, the lowest first: an eighth of what would be sent else.
    """
    bits_BW32 = (forbidden_BW[:, :, None] >> jnp.arange(32, dtype=jnp.int32)[None, None]) & 1
    forbidden_BV = bits_BW32.reshape(len(constrained_B), -1)[:, : slots.choice.counts.shape[1]] == 1
    choice = dataclasses.replace(slots.choice, constrained=constrained_B, forbidden=forbidden_BV)
    return as_they_came(dataclasses.replace(slots, choice=choice), sharding)


@functools.partial(jax.jit, donate_argnames=("cache", "slots"), compiler_options=COMPILER_OPTIONS)
def decode(model: SmolLM3, cache: KVCache, slots: Slots, steps: Array) -> tuple[KVCache, Slots, DecodedTokens]:
    """Up to `steps` (at most MAX_STEPS) tokens for each active slot; ends early when none is left."""
    model = for_each(model, slots.adapter)
    batch = slots.token.shape[0]
    width = min(MAX_LOGPROBS, model.config.vocab_size)
    chosen = DecodedTokens(
        tokens=jnp.full((batch, MAX_STEPS), -1, jnp.int32),
        logprobs=jnp.zeros((batch, MAX_STEPS), jnp.float32),
        top_ids=jnp.zeros((batch, MAX_STEPS, width), jnp.int32),
        top_logprobs=jnp.zeros((batch, MAX_STEPS, width), jnp.float32),
    )

    def unfinished(state: tuple) -> Array:
        step, _, slots, _ = state
        return (step < steps) & slots.active.any()

    def body(state: tuple) -> tuple:
        step, cache, slots, chosen = state
        segments_B1 = slots.active.astype(jnp.int32)[:, None]
        x_B1D, cache = model.hidden(slots.token[:, None], segment_ids=segments_B1, cache=cache)
        logits_BV = model.unembed(x_B1D[:, 0])
        token_B = _close_thinking(choose(logits_BV, slots.choice, slots.generated), slots)
        logprob_B, top_ids, top_logprobs = log_probabilities(logits_BV, token_B, slots.choice.logprobs)
        # A finished slot runs along; what it says is neither kept nor fed to anyone else.
        new = DecodedTokens(jnp.where(slots.active, token_B, -1), logprob_B, top_ids, top_logprobs)
        chosen = jax.tree.map(
            lambda all, x: jax.lax.dynamic_update_slice_in_dim(all, x[:, None], step, axis=1), chosen, new
        )
        return step + 1, cache, _advance(slots, token_B), chosen

    state = jnp.array(0, jnp.int32), cache, slots, chosen
    _, cache, slots, chosen = jax.lax.while_loop(unfinished, body, state)
    return cache, as_they_came(slots, model.sharding), on_every_host(chosen, model.sharding)


def _close_thinking(token_B: Array, slots: Slots) -> Array:
    spent_B = slots.active & slots.thinking & (slots.think_left == 0)
    return jnp.where(spent_B, slots.think_ids[:, 1], token_B)


def _advance(slots: Slots, token_B: Array) -> Slots:
    """The slots after each active one has said its token."""
    was_B = slots.active
    generated_B = slots.generated + was_B.astype(jnp.int32)
    stops_B = (slots.stop_ids == token_B[:, None]).any(axis=1) | (generated_B >= slots.limit)
    opens_B, closes_B = token_B == slots.think_ids[:, 0], token_B == slots.think_ids[:, 1]
    said_BV = jnp.arange(slots.choice.counts.shape[1], dtype=jnp.int32)[None] == token_B[:, None]
    new_BV = (said_BV & was_B[:, None]).astype(jnp.int32)
    return dataclasses.replace(
        slots,
        token=jnp.where(was_B, token_B, slots.token),
        active=was_B & ~stops_B,
        generated=generated_B,
        thinking=(slots.thinking | opens_B) & ~closes_B,
        think_left=jnp.where(slots.thinking & (slots.think_left > 0), slots.think_left - 1, slots.think_left),
        # Not a scatter: for one row XLA would gather the counts from all devices for it.
        choice=dataclasses.replace(slots.choice, counts=slots.choice.counts + new_BV),
    )
