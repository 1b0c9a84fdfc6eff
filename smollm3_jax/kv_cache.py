"""The key-value cache: a plain pytree that goes into the model and comes out of it, updated in place.

One array a layer, never a stack of layers: a stacked cache that passes through a scan exists twice.
Heads come first, so that a row's keys of one head lie together and the whole is, without a copy, a
page table's [K, pages, page, E] in which every row owns its pages in order.

So the cache is either dense rows [K, B, S, E], which nothing gathers, or a pool of pages [K, P, page, E] with a table
that says which of them are whose. Two rows may share pages that neither writes into.

Shapes: B rows (slots), S capacity, T new tokens, K key-value heads, E head width, P pages of the pool, N of a row.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from sharding.arrays import spec, zeros
from sharding.rules import PyTree, Sharding, platform_of

from . import xla_cpu
from .config import ModelConfig

# Logical axes of the cache's arrays, for the rules table.
AXES = ("cache_heads", "batch", "context", "head")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerCache:
    """One layer's keys and values [K, B, S, E]; in an int8 cache with float32 scales [K, B, S], else None. In a pool
    [K, P, page, E] and [K, P, page]. Of 16-bit floats it holds the bits where `xla_cpu.held_as` says so."""

    k: Array
    v: Array
    k_scale: Array | None = None
    v_scale: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Every layer's cache, and how many tokens each row holds (int32 [B]): where its next one goes.

    table: int32 [B, N], the pages of each row in their order; P stands for none: what a row writes there is lost, and
      what it reads there is some other page. None is the identity: row b is page b.
    """

    layers: tuple[LayerCache, ...]
    length: Array
    table: Array | None = None

    @property
    def capacity(self) -> int:
        """S: how many tokens a row has room for."""
        return capacity_of(self.layers[0], self.table)


def capacity_of(layer: LayerCache, table_BN: Array | None) -> int:
    """S: how many tokens a row has room for."""
    return layer.k.shape[2] * (1 if table_BN is None else table_BN.shape[1])


@dataclasses.dataclass(frozen=True)
class CacheView:
    """Where the new tokens of a call go in the cache, and what they see of it.

    length_B: int32, how many tokens each row of the call holds before; [1] with a slot.
    segments_BT: int32, 1, and 0 for the padding at the end of a row; None is no padding.
    slot: the cache's row that the call's one row continues; None: row i of the call continues row i.
    past: for many new tokens, a piece of a prompt: whether (static) the slot may hold tokens before them. None is for a
      few new tokens.
    table_BN: as in the cache. A piece of a prompt then lies in one page: no piece is longer, and none goes across.
    """

    length_B: Array
    segments_BT: Array | None = None
    slot: Array | None = None
    past: bool | None = None
    table_BN: Array | None = None

    @classmethod
    def of(cls, cache: KVCache, segments_BT: Array | None, slot: Array | None, past: bool | None) -> "CacheView":
        """Of a call that continues the rows of `cache`."""
        length_B = cache.length if slot is None else cache.length[slot][None]
        return cls(length_B, segments_BT, slot, past, cache.table)

    def with_tokens(self, cache: KVCache, layers: tuple[LayerCache, ...], shape: tuple[int, ...]) -> KVCache:
        """The cache with its layers replaced and the lengths after `shape` [B, T] new tokens."""
        segments_BT = jnp.ones(shape, jnp.int32) if self.segments_BT is None else self.segments_BT
        length_B = advance(self.length_B, segments_BT)
        length_B = length_B if self.slot is None else cache.length.at[self.slot].set(length_B[0])
        return KVCache(layers, length_B, cache.table)


def cache_specs(
    config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike, pool: tuple[int, int] | None = None
) -> PyTree:
    """A KVCache of ArraySpecs: `capacity` tokens in each of `batch` rows; dtype int8 stores it quantized.

    Args:
      pool: how many pages the rows share, and the tokens of each, which divide the capacity; None is dense rows. Only
        heads may be split over devices then.
    """
    rows, length = pool or (batch, capacity)
    lengths = {"cache_heads": config.num_key_value_heads, "batch": rows, "context": length}
    values, scales = spec(dtype, **lengths, head=config.head_dim), None
    if jnp.dtype(dtype) == jnp.int8:
        scales = spec(jnp.float32, **lengths)
    layer = LayerCache(values, values, scales, scales)  # pyright: ignore[reportArgumentType]
    table = None if pool is None else spec(jnp.int32, batch=batch, pages=capacity // length)
    return KVCache((layer,) * config.num_hidden_layers, spec(jnp.int32, batch=batch), table)  # pyright: ignore[reportArgumentType]


def empty_cache(
    config: ModelConfig, batch: int, capacity: int, dtype: DTypeLike, sharding: Sharding | None = None
) -> KVCache:
    """A cache of dense rows without a token.

    Writing past the capacity is the caller's mistake: XLA cannot raise.
    """
    held = xla_cpu.held_as(dtype, platform_of(sharding))
    return zeros(cache_specs(config, batch, capacity, held), sharding)


def write(
    layer: LayerCache,
    k_BTKE: Array,
    v_BTKE: Array,
    length_B: Array,
    slot: Array | None,
    sharding: Sharding | None = None,
    table_BN: Array | None = None,
) -> LayerCache:
    """The layer with new tokens after what each row holds.

    Args:
      length_B: where each row's first new token goes; [1] with a slot.
      slot: the row of the cache that the one row of new tokens belongs to; None if rows are rows. With a table its new
        tokens lie in one page.
    """
    if table_BN is not None and slot is not None:
        page = layer.k.shape[2]
        assert k_BTKE.shape[1] <= page, "a piece of a prompt lies in one page"
        slot, length_B, table_BN = table_BN[slot, length_B[0] // page], length_B % page, None

    def put(values: Array, scale: Array | None, new_BTKE: Array) -> tuple[Array, Array | None]:
        new_scale = None
        if scale is not None:
            new_BTKE, new_scale_BTK = quantize_rows(new_BTKE)
            new_scale = _put(scale, new_scale_BTK.transpose(2, 0, 1), length_B, slot, sharding, table_BN)
        new_KBTE = xla_cpu.as_held(new_BTKE.transpose(2, 0, 1, 3), values.dtype)
        return _put(values, new_KBTE, length_B, slot, sharding, table_BN), new_scale

    # Whoever has the row next looks past what a sequence has left there, but no weight times NaN is NaN. Keys may be
    # anything: scores that do not count are replaced.
    v_BTKE = jnp.where(jnp.isfinite(v_BTKE), v_BTKE, jnp.zeros((), v_BTKE.dtype))
    if sharding is not None:  # each device looks at its own: not the question and the values go to all of them
        v_BTKE = sharding.constrain(v_BTKE, None if slot is not None else "batch", None, "kv_heads", None)
    k, k_scale = put(layer.k, layer.k_scale, k_BTKE)
    v, v_scale = put(layer.v, layer.v_scale, v_BTKE)
    return LayerCache(k, v, k_scale, v_scale)


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """(int8 [..., E], float32 scales [...]): each token's head by its own largest magnitude."""
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1) / 127
    # A head of zeros has scale 0 and stays zeros.
    return jnp.round(x / jnp.where(scale == 0, 1, scale)[..., None]).astype(jnp.int8), scale


def _put(
    old_KBSx: Array,
    new_KBTx: Array,
    length_B: Array,
    slot: Array | None,
    sharding: Sharding | None,
    table_BN: Array | None,
) -> Array:
    """old with new written row by row from index length on; the trailing dimension, if any, is free."""
    if table_BN is not None:
        return _put_rows(old_KBSx, new_KBTx, length_B, table_BN)
    one_row = slot is not None or new_KBTx.shape[1] == old_KBSx.shape[1] == 1
    if sharding is None or sharding.parts("batch") * sharding.parts("context") == 1:
        # A token's slice, which is kept and read, XLA:CPU writes twice, each time into a copy of the whole array.
        if slot is not None or (one_row and (sharding is not None or platform_of(None) != "cpu")):
            start = _place(0 if slot is None else slot, length_B[0], old_KBSx.ndim)
            return jax.lax.dynamic_update_slice(old_KBSx, new_KBTx, start)
        return _put_rows(old_KBSx, new_KBTx, length_B)

    heads, batch, context, *rest = AXES[: old_KBSx.ndim]
    row_axes, context_axes = sharding.mesh_axes(batch), sharding.mesh_axes(context)

    def part(old_KBSx: Array, new_KBTx: Array, length_B: Array, slot: Array | None) -> Array:
        length_B = length_B - first_of(context_axes, old_KBSx.shape[2])
        if not one_row:
            return _put_rows(old_KBSx, new_KBTx, length_B)
        row = 0 if slot is None else slot - first_of(row_axes, old_KBSx.shape[1])
        return _put_part(old_KBSx, new_KBTx, row, length_B[0])

    old_spec = sharding.spec(heads, batch, context, *rest)
    new_spec = sharding.spec(heads, None if one_row else batch, None, *rest)
    length_spec = sharding.spec(None if one_row else batch)
    specs = (old_spec, new_spec, length_spec, None if slot is None else sharding.spec())
    return sharding.shard_map(part, specs, old_spec)(old_KBSx, new_KBTx, length_B, slot)


def _place(row: Array | int | np.int32, token: Array | int | np.int32, ndim: int) -> tuple[Array | np.int32, ...]:
    """Where a slice of one row begins; of one dtype, whatever JAX makes of a Python number."""
    none = np.int32(0)
    place = [np.int32(x) if isinstance(x, int) else x.astype(jnp.int32) for x in (row, token)]
    return (none, *place, none)[:ndim]


def first_of(mesh_axes: tuple[str, ...], length: int) -> Array | int:
    """Inside shard_map: the global index of the first of this device's `length` places."""
    return jax.lax.axis_index(mesh_axes) * length if mesh_axes else 0


def _put_rows(old_KBSx: Array, new_KBTx: Array, start_B: Array, table_BN: Array | None = None) -> Array:
    """Every row's new tokens from its start on, which may lie before or after this part of the context."""
    (heads, rows, steps), (pages, capacity) = new_KBTx.shape[:3], old_KBSx.shape[1:3]
    step_1T = jnp.arange(steps, dtype=jnp.int32)[None]
    index_BT = start_B[:, None] + step_1T
    # Heads are named one by one: for a write to all at once XLA for TPU would want them together in memory,
    # and copy the whole cache for it.
    head_K11 = jnp.arange(heads, dtype=jnp.int32)[:, None, None]
    # A row that is full writes nothing: its padding has nowhere to go.
    if table_BN is None:
        row_1B1 = jnp.arange(rows, dtype=jnp.int32)[None, :, None]
        # Negative indices would count from the end.
        index_BT = jnp.where(index_BT < 0, capacity + step_1T, index_BT)
    else:
        of_row_BT = jnp.minimum(index_BT // capacity, table_BN.shape[1] - 1)
        page_BT = jnp.take_along_axis(table_BN, of_row_BT, axis=1)
        row_1B1 = jnp.where(index_BT < capacity * table_BN.shape[1], page_BT, pages)[None]
        index_BT = index_BT % capacity
    return old_KBSx.at[head_K11, row_1B1, index_BT[None]].set(new_KBTx, mode="drop", unique_indices=True)


def _put_part(old_KBSx: Array, new_K1Tx: Array, row: Array | int, start: Array) -> Array:
    """One row's new tokens where old, a part of the cache, has the row and their places; else old as it is.

    It rewrites a window of old with what is new in it or was there before: no copy, no pass over old.
    """
    (rows, capacity), steps = old_KBSx.shape[1:3], new_K1Tx.shape[2]
    size = min(steps, capacity)
    at = jnp.clip(start, 0, capacity - size)
    token = at - start  # of the new ones, which is for the window's first place
    new_x = jnp.moveaxis(new_K1Tx, 2, 0)
    padded_x = jnp.pad(new_x, [(size, size)] + [(0, 0)] * (new_x.ndim - 1))
    window_x = jax.lax.dynamic_slice_in_dim(padded_x, jnp.clip(token, -size, steps) + size, size)
    mine = (row >= 0) & (row < rows)
    index = token + jnp.arange(size, dtype=jnp.int32)
    written = ((index >= 0) & (index < steps) & mine).reshape(1, 1, size, *[1] * (old_KBSx.ndim - 3))
    place = _place(jnp.clip(row, 0, rows - 1), at, old_KBSx.ndim)
    before = jax.lax.dynamic_slice(old_KBSx, place, (old_KBSx.shape[0], 1, size, *old_KBSx.shape[3:]))
    new_KBSx = jax.lax.dynamic_update_slice(old_KBSx, jnp.where(written, jnp.moveaxis(window_x, 0, 2), before), place)
    # Left to itself XLA for TPU keeps the heads of a place together in its loop, and copies the whole cache for it.
    return with_layout_constraint(new_KBSx, Layout(major_to_minor=tuple(range(new_KBSx.ndim))))


def read(
    layer: LayerCache,
    row: Array | np.int32,
    start: Array | np.int32,
    length: int,
    dtype: jnp.dtype,
    table_BN: Array | None = None,
) -> tuple[Array, Array]:
    """Keys and values [1, length, K, E] of a row's places from `start` on; inside of shard_map of the device's part.

    With a table `start` is a multiple of the length, and one of length and page is a multiple of the other.
    """
    page = layer.k.shape[2]

    def found(x: Array) -> Array:
        if table_BN is None:
            out = _row(x, row, length, start)
        else:  # page by page: nothing but these slices is near the pool
            first, size = start // page, min(length, page)
            parts = [_row(x, table_BN[row, first + i], size, start % page) for i in range(length // size)]
            out = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
        # Left to itself XLA for GPU copies the whole cache into the order that the row is wanted in.
        return with_layout_constraint(out, Layout(major_to_minor=tuple(range(out.ndim)))) if out.ndim == 4 else out

    def part(values: Array, scale: Array | None) -> Array:
        out = xla_cpu.values_of(found(values))
        out = out if scale is None else out.astype(scale.dtype) * found(scale)[..., None]
        return out.transpose(1, 2, 0, 3).astype(dtype)

    return part(layer.k, layer.k_scale), part(layer.v, layer.v_scale)


def rows(
    layer: LayerCache, slot: Array | None, sharding: Sharding | None = None, table_BN: Array | None = None
) -> LayerCache:
    """The one row that a slot names as a cache of its own; everything without one. With a table it is gathered."""
    if table_BN is not None:
        of_rows = table_BN if slot is None else table_BN[slot][None]
        return jax.tree.map(lambda x: _gathered(x, of_rows), layer)
    return layer if slot is None else jax.tree.map(lambda x: _whole_row(x, slot, sharding), layer)


def _gathered(x_KPSx: Array, table_BN: Array) -> Array:
    """Dense rows [K, B, N page, ...]."""
    x_KBNSx = jnp.take(x_KPSx, table_BN, axis=1, mode="clip")
    return x_KBNSx.reshape(*x_KBNSx.shape[:2], -1, *x_KBNSx.shape[4:])


def _whole_row(x_KBSx: Array, slot: Array, sharding: Sharding | None) -> Array:
    length = x_KBSx.shape[2]
    if sharding is None or sharding.parts("batch") == 1:
        return _row(x_KBSx, slot, length)
    heads, batch, _, *rest = AXES[: x_KBSx.ndim]
    axes = sharding.mesh_axes(batch)
    specs = (sharding.spec(heads, batch, None, *rest), sharding.spec())
    get = sharding.shard_map(
        lambda x, slot: _row_of_all(x, slot, length, axes), specs, sharding.spec(heads, None, None, *rest)
    )
    return get(x_KBSx, slot)


def _row(x_KBSx: Array, index: Array | np.int32, length: int, start: Array | int | np.int32 = 0) -> Array:
    sizes = (x_KBSx.shape[0], 1, length, *x_KBSx.shape[3:])
    return jax.lax.dynamic_slice(x_KBSx, _place(index, start, x_KBSx.ndim), sizes)


def _row_of_all(x_KBSx: Array, slot: Array, length: int, mesh_axes: tuple[str, ...], start: Array | int = 0) -> Array:
    """Inside shard_map over the rows: a row's places, for everyone, from the device that has it."""
    index = slot - first_of(mesh_axes, x_KBSx.shape[1])
    mine = (index >= 0) & (index < x_KBSx.shape[1])
    return jax.lax.psum(jnp.where(mine, _row(x_KBSx, index, length, start), 0), mesh_axes)


def copy_row(cache: KVCache, source: Array, target: Array, sharding: Sharding | None = None) -> KVCache:
    """Row `target` becomes what row `source` is: several samples from one prefill. With a table they are two pages, and
    no length changes."""
    none, length = np.int32(0), cache.layers[0].k.shape[2]
    cache = copy_places(cache, cache, (source, none), (target, none), length, sharding)
    if cache.table is not None:
        return cache
    return dataclasses.replace(cache, length=cache.length.at[target].set(cache.length[source]))


def copy_places(
    source: KVCache,
    target: KVCache,
    taken: tuple[Array, Array | np.int32],
    put: tuple[Array, Array | np.int32],
    length: int,
    sharding: Sharding | None = None,
) -> KVCache:
    """The target with `length` places of the source in it; what it says of lengths stays.

    Args:
      taken, put: the row and the first place in it, int32 scalars, of source and target. Where a row's places lie on
        several devices they are whole rows.
    """
    (row, start), (to, place) = taken, put

    def copied(x: Array, y: Array) -> Array:
        return jax.lax.dynamic_update_slice(y, _row(x, row, length, start), _place(to, place, y.ndim))

    def copied_across(x: Array, y: Array, row: Array, start: Array, to: Array, place: Array) -> Array:
        # (A whole row is as long as the device's part of it.)
        found = _row_of_all(x, row, min(length, x.shape[2]), axes, start)
        return _put_part(y, found, to - first_of(axes, y.shape[1]), place)

    if sharding is None or sharding.parts("batch") == 1:
        layers = jax.tree.map(copied, source.layers, target.layers)
    else:
        axes = sharding.mesh_axes("batch")

        def mapped(x: Array, y: Array) -> Array:
            spec = sharding.spec(*AXES[: x.ndim])
            specs = (spec, spec, *[sharding.spec()] * 4)
            return sharding.shard_map(copied_across, specs, spec)(x, y, row, start, to, place)

        layers = jax.tree.map(mapped, source.layers, target.layers)
    return dataclasses.replace(target, layers=layers)


def advance(length_B: Array, segment_ids_BT: Array) -> Array:
    """Row lengths after writing these tokens; padding at the end (segment 0) will be overwritten."""
    count_1T = jnp.arange(1, segment_ids_BT.shape[1] + 1, dtype=jnp.int32)[None]
    used_BT = jnp.where(segment_ids_BT != 0, count_1T, 0)
    return length_B + used_BT.max(axis=1)
