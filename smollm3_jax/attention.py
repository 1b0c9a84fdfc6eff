"""Grouped-query attention behind one entry point; every mask comes from segment ids and row indices.

Shapes: B batch, T query length, S key length, H query heads, K key-value heads, G = H / K, E head width.
"""

import jax
import jax.numpy as jnp
from jax import Array


def attention(
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    *,
    q_segments_BT: Array,
    kv_segments_BS: Array,
    q_index_BT: Array,
    window: Array | None = None,
) -> Array:
    """Causal attention within segments.

    Args:
      q_segments_BT, kv_segments_BS: int32; 0 is padding, other values name documents. A token sees
        its own document only.
      q_index_BT: int32, where each query stands among the S keys. Causality goes by this index, not
        by position, as positions may restart within a row.
      window: int32 scalar, how many keys back a query sees, itself included; None for all.

    Returns:
      [B, T, H, E] in q's dtype. Rows of padding hold finite values without meaning.
    """
    mask_BTS = _mask(q_segments_BT, kv_segments_BS, q_index_BT, window)
    return _dense(q_BTHE, k_BSKE, v_BSKE, mask_BTS)


def _mask(q_segments_BT: Array, kv_segments_BS: Array, q_index_BT: Array, window: Array | None) -> Array:
    q_segment, q_index = q_segments_BT[:, :, None], q_index_BT[:, :, None]
    kv_index = jnp.arange(kv_segments_BS.shape[1])[None, None, :]
    seen = (q_segment == kv_segments_BS[:, None, :]) & (q_segment != 0) & (kv_index <= q_index)
    # Subtracting is safe against overflow: an unlimited window is the largest int32.
    return seen if window is None else seen & (q_index - kv_index < window)


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
