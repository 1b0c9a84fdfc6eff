"""Attention of new tokens to what the cache holds and to each other; it leaves them in the cache.

Shapes: B batch, T new tokens, S key length, H query heads, K key-value heads, E head width.
"""

import numpy as np
from jax import Array

from sharding.rules import Sharding

from .. import rope
from ..kv_cache import CacheView, LayerCache, rows, write
from .dispatch import attention, decode_attention, decode_step
from .piece import piece_attention, piece_over_length


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
      q_BTHE, k_BTKE, v_BTKE: before RoPE; angles: cos and sin, float32 [B, T, E/2] each. A piece of a prompt has its
        tokens in the order of `sharding.row_order`.
      layer: the cache before these tokens; view: where in it they go.
      use_rope: bool scalar, whether the layer rotates queries and keys.
      window, sharding: as for `attention`.

    Returns:
      [B, T, H, E] in q's dtype, and the cache with the new tokens.
    """
    length_B, slot, past, table_BN = view.length_B, view.slot, view.past, view.table_BN
    of_rows = {"length_B": length_B, "table_BN": table_BN}
    where = {"window": window, "sharding": sharding}
    if past is None and slot is None:
        of_layer = rope.of_layer(*angles, use_rope)
        done = decode_step(q_BTHE, k_BTKE, v_BTKE, of_layer, layer, **of_rows, **where)
        if done is not None:
            return done
    q, k, v = rope.rotate(q_BTHE, *angles, use_rope), rope.rotate(k_BTKE, *angles, use_rope), v_BTKE
    order = None if past is None or sharding is None else sharding.row_order(q.shape[1])
    if order is not None and sharding is not None:
        # Once: what is written lies otherwise than the queries, and every device looks at all of it.
        k, v = (sharding.constrain(x, None, None, "kv_heads", None)[:, np.argsort(order)] for x in (k, v))
    stored = write(layer, k, v, length_B, slot, sharding, table_BN)
    if past is None:
        if slot is None:
            return decode_attention(q, stored, segments_BT=view.segments_BT, **of_rows, **where), stored
        return decode_attention(q, rows(stored, slot, sharding, table_BN), length_B=length_B, **where), stored
    if order is None and not past:
        return attention(q, k, v, **where), stored
    # The cache that the piece was written into: the update stays in place.
    assert slot is not None
    place = {"slot": slot, "length": length_B[0], "table_BN": table_BN}
    if order is not None:
        return piece_over_length(q, k, v, stored if past else None, **place, **where), stored
    return piece_attention(q, k, v, stored, **place, **where), stored
