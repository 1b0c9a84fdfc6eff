"""Attention of new tokens to what the cache holds and to each other; it leaves them in the cache.

Shapes: B batch, T new tokens, S key length, H query heads, K key-value heads, E head width.
"""

import jax.numpy as jnp
from jax import Array

from sharding.rules import Sharding

from .. import rope
from ..kv_cache import CacheView, LayerCache, read, rows, write
from .dispatch import attention, attention_after, decode_attention, decode_step


def cached_attention(
    q_BTHE: Array,
    k_BTKE: Array,
    v_BTKE: Array,
    angles: tuple[Array, Array],
    layer: LayerCache,
    view: CacheView,
    *,
    use_rope: Array,
    window: Array | None = None,
    sharding: Sharding | None = None,
) -> tuple[Array, LayerCache]:
    """Causal attention in one layer.

    Args:
      q_BTHE, k_BTKE, v_BTKE: before RoPE; angles: cos and sin, float32 [B, T, E/2] each.
      layer: the cache before these tokens; view: where in it they go.
      use_rope: bool scalar, whether the layer rotates queries and keys.
      window, sharding: as for `attention`.

    Returns:
      [B, T, H, E] in q's dtype, and the cache with the new tokens.
    """
    length_B, slot, past = view.length_B, view.slot, view.past
    if past is None and slot is None:
        of_layer, where = rope.of_layer(*angles, use_rope), {"length_B": length_B, "window": window}
        done = decode_step(q_BTHE, k_BTKE, v_BTKE, of_layer, layer, **where, sharding=sharding)
        if done is not None:
            return done
    q, k = rope.rotate(q_BTHE, *angles, use_rope), rope.rotate(k_BTKE, *angles, use_rope)
    stored = write(layer, k, v_BTKE, length_B, slot, sharding)
    if past is None:
        of_rows = rows(stored, slot, sharding)
        return decode_attention(q, of_rows, length_B=length_B, window=window, sharding=sharding), stored
    if past == 0:
        return attention(q, k, v_BTKE, window=window, sharding=sharding), stored
    # Read from what was just written, so that the update stays in place; what lies at the length or after it is not
    # the past.
    past_k, past_v = read(stored, slot, past, k.dtype, sharding)
    segments_BT = jnp.ones(k.shape[:2], jnp.int32) if view.segments_BT is None else view.segments_BT
    of_past = {"length_B": length_B, "segments_BT": segments_BT, "window": window}
    return attention_after(q, k, v_BTKE, past_k, past_v, **of_past, sharding=sharding), stored
