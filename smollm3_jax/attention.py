"""Grouped-query attention: of whole sequences, and of a few new tokens against the cache.

Shapes: B batch, T query length, S key length, H query heads, K key-value heads, G = H / K, E head width.
"""

import jax
import jax.numpy as jnp
from jax import Array

from sharding.rules import Sharding

from .kv_cache import LayerCache

# What the float32 scores of one call may take; longer sequences go through a few queries at a time.
SCORE_BYTES = 2**28


def attention(
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    *,
    q_segments_BT: Array,
    kv_segments_BS: Array,
    gap_B: Array | None = None,
    window: Array | None = None,
    sharding: Sharding | None = None,
) -> Array:
    """Causal attention within segments. The last T of the S keys are the queries' own.

    Args:
      q_segments_BT, kv_segments_BS: int32; 0 is padding, other values name documents. A token sees
        its own document only. Causality goes by index in the row, not by position, as positions may
        restart within it.
      gap_B: how many of the S - T past keys, at their end, hold nothing: they do not count as distance.
      window: int32 scalar, how many keys back a query sees, itself included; None for all.
      sharding: where the arrays lie; None on one device.

    Returns:
      [B, T, H, E] in q's dtype. Rows of padding hold finite values without meaning.
    """
    batch, length, heads, _ = q_BTHE.shape
    keys = k_BSKE.shape[1]
    past = keys - length
    kv_index_S = jnp.arange(keys)

    def some(q_BtHE: Array, segments_Bt: Array, index_t: Array) -> Array:
        distance_BtS = (index_t[:, None] - kv_index_S)[None]
        if gap_B is not None:
            distance_BtS = distance_BtS - jnp.where(kv_index_S < past, gap_B[:, None, None], 0)
        seen = (segments_Bt[:, :, None] == kv_segments_BS[:, None, :]) & (segments_Bt != 0)[:, :, None]
        seen &= (kv_index_S <= index_t[:, None])[None]
        if window is not None:
            seen &= distance_BtS < window
        return _dense(q_BtHE, k_BSKE, v_BSKE, seen)

    index_T = past + jnp.arange(length)
    step = max(1, SCORE_BYTES // (4 * batch * heads * keys))
    if length <= step:
        return some(q_BTHE, q_segments_BT, index_T)
    step = 1 << (step.bit_length() - 1)
    pad = -length % step

    def split(x: Array, axis: int) -> Array:
        x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, step, *x.shape[axis + 1 :]), axis, 0)

    pieces = jax.lax.map(
        lambda piece: some(*piece), (split(q_BTHE, 1), split(q_segments_BT, 1), split(index_T, 0))
    )
    return jnp.moveaxis(pieces, 0, 1).reshape(batch, -1, *q_BTHE.shape[2:])[:, :length]


def decode_attention(
    q_BTHE: Array,
    cache: LayerCache,
    *,
    length_B: Array,
    window: Array | None = None,
    sharding: Sharding | None = None,
) -> Array:
    """A few new tokens against the cache that already holds them.

    Args:
      length_B: how many keys each row held before; query t sees keys up to index length + t.
      window, sharding: as for `attention`.

    Returns:
      [B, T, H, E] in q's dtype.
    """
    batch, length, heads, width = q_BTHE.shape
    kv_heads, _, keys, _ = cache.k.shape
    q_BTKGE = q_BTHE.reshape(batch, length, kv_heads, -1, width)
    scores = jnp.einsum("BTKGE,KBSE->KBTGS", q_BTKGE, _values(cache.k, q_BTHE), preferred_element_type=jnp.float32)
    scores = scores * width**-0.5
    if cache.k_scale is not None:
        scores = scores * cache.k_scale[:, :, None, None, :]
    q_index_BT1 = (length_B[:, None] + jnp.arange(length))[:, :, None]
    seen_BTS = jnp.arange(keys) <= q_index_BT1
    if window is not None:
        seen_BTS &= q_index_BT1 - jnp.arange(keys) < window
    scores = jnp.where(seen_BTS[None, :, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    if cache.v_scale is not None:
        weights = weights * cache.v_scale[:, :, None, None, :]
    out = jnp.einsum(
        "KBTGS,KBSE->BTKGE",
        weights.astype(q_BTHE.dtype),
        _values(cache.v, q_BTHE),
        preferred_element_type=jnp.float32,
    )
    return out.reshape(batch, length, heads, width).astype(q_BTHE.dtype)


def _values(stored: Array, like: Array) -> Array:
    return stored.astype(like.dtype) if stored.dtype == jnp.int8 else stored


def _dense(q_BTHE: Array, k_BSKE: Array, v_BSKE: Array, mask_BTS: Array) -> Array:
    """Plain XLA: scores and softmax in float32, probabilities cast back, as transformers' eager path."""
    batch, length, heads, width = q_BTHE.shape
    q_BTKGE = q_BTHE.reshape(batch, length, k_BSKE.shape[2], -1, width)
    scores = jnp.einsum("BTKGE,BSKE->BKGTS", q_BTKGE, k_BSKE, preferred_element_type=jnp.float32) * width**-0.5
    # The lowest finite number, not -inf: a row that sees nothing must not become NaN.
    scores = jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKE.dtype)
    out = jnp.einsum("BKGTS,BSKE->BTKGE", weights, v_BSKE, preferred_element_type=jnp.float32)
    return out.reshape(batch, length, heads, width).astype(q_BTHE.dtype)
