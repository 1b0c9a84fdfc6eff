"""Prompt-lookup decoding: drafts copied from the text itself, verified in one forward pass.

Where the last few tokens have occurred before, what followed them then is likely to follow now: in
summaries, code edits and answers from documents. A pass over the current token and the draft tells
what greedy decoding would have said after each; the part of the draft that agrees is kept, and one
token more. So the text is that of greedy decoding, and bad drafts cost a slightly larger pass.

Shapes: B slots, S capacity, N-gram of NGRAM tokens, D drafted tokens.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from ..kv_cache import KVCache
from ..lora import for_each
from ..model import SmolLM3
from .device_loop import COMPILER_OPTIONS, MAX_STEPS, Slots, as_they_came
from .hosts import on_every_host
from .sampling import SamplingParams

# So many tokens must have occurred before, in the same order.
NGRAM = 3


# The most tokens that may be drafted at a time.
MAX_DRAFT = 64


def can_draft(params: SamplingParams) -> bool:
    """Whether verification equals decoding: greedy choice of unchanged logits, token by token."""
    plain = SamplingParams(temperature=params.temperature)
    penalties = ("repetition_penalty", "presence_penalty", "frequency_penalty")
    fields = ("temperature", *penalties, "logit_bias", "suppress_tokens")
    unchanged = all(getattr(params, field) == getattr(plain, field) for field in fields)
    return params.temperature == 0 and unchanged and params.logprobs is None and params.max_thinking_tokens is None


@functools.partial(jax.jit, donate_argnames="history_BS")
def remember(history_BS: Array, slot: Array, tokens_S: Array) -> Array:
    """Starts a slot's history with its prompt, padded with -1."""
    return history_BS.at[slot].set(tokens_S)


@functools.partial(
    jax.jit,
    static_argnames="draft",
    donate_argnames=("cache", "slots", "history_BS"),
    compiler_options=COMPILER_OPTIONS,
)
def decode_lookup(
    model: SmolLM3,
    cache: KVCache,
    slots: Slots,
    history_BS: Array,
    steps: Array,
    *,
    draft: int,
) -> tuple[KVCache, Slots, Array, Array, Array]:
    """As `device_loop.decode`, for greedy slots, until one of them has `steps` new tokens.

    Args:
      history_BS: int32, every token of each slot by its place, its current one included. Prompt and
        generated tokens must leave room for `draft` more in cache and history.
      draft: D, how many tokens to draft at a time.

    Returns:
      cache, slots and history; the new tokens int32 [B, MAX_STEPS + D], -1 after the last of each; and
      int32 [2]: how many tokens were drafted, and how many of them accepted.
    """
    model = for_each(model, slots.adapter)
    batch = slots.token.shape[0]
    rows_B1 = jnp.arange(batch, dtype=jnp.int32)[:, None]
    places_1T = jnp.arange(draft + 1, dtype=jnp.int32)[None]

    def unfinished(state: tuple) -> Array:
        _, slots, _, _, count_B, _ = state
        return (count_B.max() < steps) & slots.active.any()

    def body(state: tuple) -> tuple:
        cache, slots, history_BS, new_BN, count_B, tally_2 = state
        length_B = cache.length
        draft_BD = jax.vmap(functools.partial(_draft, count=draft))(history_BS, length_B)
        tokens_BT = jnp.concatenate([slots.token[:, None], jnp.maximum(draft_BD, 0)], axis=1)
        x_BTD, cache = model.hidden(tokens_BT, cache=cache)
        said_BT = jnp.argmax(model.unembed(x_BTD), axis=-1).astype(jnp.int32)
        agrees_BD = jnp.cumprod(said_BT[:, :-1] == draft_BD, axis=1, dtype=jnp.int32)
        # A sequence ends at its limit, or with the first stop token.
        stops_BT = (said_BT[:, :, None] == slots.stop_ids[:, None, :]).any(axis=2)
        stops_BT |= slots.generated[:, None] + places_1T + 1 >= slots.limit[:, None]
        open_BT = jnp.pad(~stops_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        open_BT = jnp.cumprod(open_BT, axis=1, dtype=jnp.int32)
        kept_BT = jnp.pad(agrees_BD, ((0, 0), (1, 0)), constant_values=1) * open_BT
        kept_BT = kept_BT * slots.active[:, None].astype(jnp.int32)
        kept_B = kept_BT.sum(axis=1, dtype=jnp.int32)
        kept_BT = kept_BT.astype(bool)

        new_at_BT = jnp.where(kept_BT, count_B[:, None] + places_1T, new_BN.shape[1])
        new_BN = new_BN.at[rows_B1, new_at_BT].set(said_BT, mode="drop")
        told_at_BT = jnp.where(kept_BT, length_B[:, None] + 1 + places_1T, history_BS.shape[1])
        history_BS = history_BS.at[rows_B1, told_at_BT].set(said_BT, mode="drop")
        last_B = jnp.take_along_axis(said_BT, jnp.maximum(kept_B - 1, 0)[:, None], axis=1)[:, 0]
        ended_B = (kept_BT & stops_BT).any(axis=1)
        tried = ((draft_BD >= 0) & slots.active[:, None]).sum(dtype=jnp.int32)
        tally_2 = tally_2 + jnp.stack([tried, jnp.maximum(kept_B - 1, 0).sum(dtype=jnp.int32)])
        slots = dataclasses.replace(
            slots,
            token=jnp.where(slots.active, last_B, slots.token),
            generated=slots.generated + kept_B,
            active=slots.active & ~ended_B,
        )
        cache = dataclasses.replace(cache, length=length_B + kept_B)
        return cache, slots, history_BS, new_BN, count_B + kept_B, tally_2

    state = (
        cache,
        slots,
        history_BS,
        jnp.full((batch, MAX_STEPS + draft), -1, jnp.int32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(2, jnp.int32),
    )
    cache, slots, history_BS, new_BN, _, tally_2 = jax.lax.while_loop(unfinished, body, state)
    slots = as_they_came(slots, model.sharding)
    if model.sharding is not None:
        history_BS = model.sharding.constrain(history_BS, "batch", None)
    return cache, slots, history_BS, *on_every_host((new_BN, tally_2), model.sharding)


def _draft(history_S: Array, length: Array, count: int) -> Array:
    """What followed the latest earlier occurrence of the last NGRAM tokens, int32 [count]; -1 where nothing did.

    Args:
      length: the place of the last token.
    """
    places_S = jnp.arange(history_S.shape[0], dtype=jnp.int32)
    same_S = jnp.ones(history_S.shape, bool)
    for back in range(NGRAM):
        same_S &= jnp.roll(history_S, back) == history_S[length - back]
    # The earlier occurrence must lie in the row, and have something after it.
    same_S &= (places_S >= NGRAM - 1) & (places_S < length)
    found = jnp.max(jnp.where(same_S, places_S, -1))
    wanted = found + 1 + jnp.arange(count, dtype=jnp.int32)
    usable = (found >= 0) & (wanted <= length) & (length >= NGRAM - 1)
    return jnp.where(usable, history_S.at[wanted].get(mode="clip"), -1)
