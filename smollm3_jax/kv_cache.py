"""The key-value cache: a plain pytree that goes into the model and comes out of it.

Shapes: L layers, B batch, S capacity, T new tokens, K key-value heads, E head width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from .config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, with the segment of each entry and the length of each row.

    k, v: [L, B, S, K, E]; segment_ids: int32 [B, S], 0 where nothing may be seen; length: int32 [B],
    where each row's next token goes.
    """

    k: Array
    v: Array
    segment_ids: Array
    length: Array


def empty_cache(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    """A cache with room for `capacity` tokens a row. Writing past it is the caller's mistake: XLA clamps silently."""
    shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
    return KVCache(
        k=jnp.zeros(shape, dtype),
        v=jnp.zeros(shape, dtype),
        segment_ids=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
    )


def append(row_BSx: Array, new_BTx: Array, length_B: Array) -> Array:
    """row with new written from index length on, row by row; the trailing dimensions are free."""
    return jax.vmap(lambda row, new, start: jax.lax.dynamic_update_slice_in_dim(row, new, start, axis=0))(
        row_BSx, new_BTx.astype(row_BSx.dtype), length_B
    )


def advance(length_B: Array, segment_ids_BT: Array) -> Array:
    """Row lengths after writing these tokens; padding at the end (segment 0) will be overwritten."""
    used_BT = jnp.where(segment_ids_BT != 0, jnp.arange(1, segment_ids_BT.shape[1] + 1), 0)
    return length_B + used_BT.max(axis=1)
