"""The key-value cache: a plain pytree that goes into the model and comes out of it, updated in place.

One array a layer, never a stack of layers: a stacked cache that passes through a scan exists twice.
Heads come first, so that a row's keys of one head lie together and the whole is, without a copy, a
page table's [K, pages, page, E] in which every row owns its pages in order.

Shapes: B rows (slots), S capacity, T new tokens, K key-value heads, E head width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding

from sharding.rules import Sharding

from .config import ModelConfig

# Logical axes of the cache's arrays, for the rules table.
AXES = ("cache_heads", "batch", "context", "head")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values [K, B, S, E]; in an int8 cache with float32 scales [K, B, S], else None."""

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Every layer's cache, and how many tokens each row holds (int32 [B]): where its next one goes."""

    layers: tuple[LayerCache, ...]
    length: Array

    @property
    def capacity(self) -> int:
        """S: how many tokens a row has room for."""
        return self.layers[0].k.shape[2]


def empty_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype, sharding: Sharding | None = None
) -> KVCache:
    """A cache with room for `capacity` tokens in each of `batch` rows; dtype int8 stores it quantized.

    Writing past the capacity is the caller's mistake: XLA cannot raise.
    """
    make = jax.jit(_empty, static_argnums=(0, 1, 2, 3), out_shardings=cache_shardings(config, dtype, sharding))
    return make(config, batch, capacity, jnp.dtype(dtype))


def _empty(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> KVCache:
    shape = (config.num_key_value_heads, batch, capacity, config.head_dim)

    def layer() -> LayerCache:
        scales = (jnp.zeros(shape[:3]), jnp.zeros(shape[:3])) if dtype == jnp.int8 else (None, None)
        return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales)

    return KVCache(tuple(layer() for _ in range(config.num_hidden_layers)), jnp.zeros((batch,), jnp.int32))


def cache_shardings(config: ModelConfig, dtype: jnp.dtype, sharding: Sharding | None) -> KVCache | None:
    """A KVCache of NamedShardings, one for each array; None on one device."""
    if sharding is None:
        return None
    values = NamedSharding(sharding.mesh, sharding.spec(*AXES))
    scales = NamedSharding(sharding.mesh, sharding.spec(*AXES[:3])) if jnp.dtype(dtype) == jnp.int8 else None
    layer = LayerCache(values, values, scales, scales)  # pyright: ignore[reportArgumentType]
    length = NamedSharding(sharding.mesh, sharding.spec("batch"))
    return KVCache((layer,) * config.num_hidden_layers, length)  # pyright: ignore[reportArgumentType]


def cache_bytes(config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype) -> int:
    """What `empty_cache` allocates, over all devices."""
    shapes = jax.eval_shape(lambda: _empty(config, batch, capacity, jnp.dtype(dtype)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def write(
    layer: LayerCache,
    k_BTKE: Array,
    v_BTKE: Array,
    length_B: Array,
    slot: Array | None,
    sharding: Sharding | None = None,
) -> LayerCache:
    """The layer with new tokens behind what each row holds.

    Args:
      length_B: where each row's first new token goes; [1] with a slot.
      slot: the row of the cache that the one row of new tokens belongs to; None if rows are rows.
    """
    if layer.k_scale is None:
        pairs = [(layer.k, k_BTKE, None), (layer.v, v_BTKE, None)]
    else:
        pairs = [(layer.k, *quantize_rows(k_BTKE)), (layer.v, *quantize_rows(v_BTKE))]
    k, v = (_put(old, new.transpose(2, 0, 1, 3), length_B, slot, sharding) for old, new, _ in pairs)
    if layer.k_scale is None:
        return LayerCache(k, v)
    scales = (
        _put(old, scale.transpose(2, 0, 1), length_B, slot, sharding)
        for old, (_, _, scale) in zip((layer.k_scale, layer.v_scale), pairs, strict=True)
    )
    return LayerCache(k, v, *scales)


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """(int8 [..., E], float32 scales [...]): each token's head by its own largest magnitude."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    # A head of zeros has scale 0 and stays zeros.
    return jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8), scale


def _put(old_KBSx: Array, new_KBTx: Array, length_B: Array, slot: Array | None, sharding: Sharding | None) -> Array:
    """old with new written row by row from index length on; the trailing dimension, if any, is free."""
    new_KBTx = new_KBTx.astype(old_KBSx.dtype)
    if slot is not None or new_KBTx.shape[1] == old_KBSx.shape[1] == 1:
        start = (0, 0 if slot is None else slot, length_B[0], 0)
        return jax.lax.dynamic_update_slice(old_KBSx, new_KBTx, start[: old_KBSx.ndim])
    rows, steps = new_KBTx.shape[1:3]
    row_BT = jnp.arange(rows)[:, None]
    index_BT = length_B[:, None] + jnp.arange(steps)
    # A row that is full writes nothing: its padding has nowhere to go.
    return old_KBSx.at[:, row_BT, index_BT].set(new_KBTx, mode="drop", unique_indices=True)


def read(layer: LayerCache, slot: Array | None, length: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Keys and values [B, length, K, E] of the first `length` places of one row, or of all."""

    def part(values: Array, scale: Array | None) -> Array:
        out = _rows(values, slot)[:, :, :length]
        out = out if scale is None else out * _rows(scale, slot)[:, :, :length, None]
        return out.transpose(1, 2, 0, 3).astype(dtype)

    return part(layer.k, layer.k_scale), part(layer.v, layer.v_scale)


def rows(layer: LayerCache, slot: Array | None) -> LayerCache:
    """The one row that a slot names as a cache of its own; everything without one."""
    return jax.tree.map(lambda x: _rows(x, slot), layer)


def _rows(x: Array, slot: Array | None) -> Array:
    return x if slot is None else jax.lax.dynamic_slice_in_dim(x, slot, 1, axis=1)


def copy_row(cache: KVCache, source: Array, target: Array) -> KVCache:
    """Row `target` becomes what row `source` is: several samples from one prefill."""

    def copied(x: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, _rows(x, source), target, axis=1)

    return KVCache(jax.tree.map(copied, cache.layers), cache.length.at[target].set(cache.length[source]))


def advance(length_B: Array, segment_ids_BT: Array) -> Array:
    """Row lengths after writing these tokens; padding at the end (segment 0) will be overwritten."""
    used_BT = jnp.where(segment_ids_BT != 0, jnp.arange(1, segment_ids_BT.shape[1] + 1), 0)
    return length_B + used_BT.max(axis=1)
