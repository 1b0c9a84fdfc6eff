"""Attention of a piece of a prompt, to itself and to what its slot holds before it.

How long that past is, is known when the program runs: it goes by in blocks, so that one program serves every place of a
prompt and computes no more than there is. What a query sees in one block and in the next is put together by the
normalizers of their softmax, in float32 (as in FlashAttention, arXiv 2205.14135).

Shapes: T query length, S key length, H query heads, K key-value heads, E head width; B is 1, the one row of a piece.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from sharding.rules import PyTree, Sharding, platform_of

from .. import nvidia
from ..kv_cache import AXES, LayerCache, capacity_of, first_of, read, rows
from .dense import dense_part
from .dispatch import gpu_obstacles, keys_of_heads, takes, together, tpu_obstacles
from .gpu import cudnn_part
from .parts import Part, merge
from .tpu import LANES, splash_by, splash_kernel, splash_part, split_tables

# (q, k, v, seen, distance, window) -> what q sees of k: all of its first `seen` keys, or causally if that is None.
Kernel = Callable[[Array, Array, Array, Array | None, Array | None, Array | None], Part]
# Keys of the past that go by at a time: plain XLA has an array of their scores.
BLOCK = 2048
DENSE_BLOCK = 512
_NONE = np.int32(0)


def piece_attention(
    q_BTHE: Array,
    k_BTKE: Array,
    v_BTKE: Array,
    layer: LayerCache,
    *,
    slot: Array,
    length: Array,
    table_BN: Array | None = None,
    window: Array | None = None,
    sharding: Sharding | None = None,
) -> Array:
    """Causal attention of a piece that goes on from what its slot holds.

    Args:
      q_BTHE, k_BTKE, v_BTKE: of the piece; padding stands at its end, where causality hides it.
      layer: a cache that holds the past, and may hold the piece as well.
      slot, length: int32 scalars: the cache's row, and how many tokens of it lie before the piece; 0 costs nothing.
      table_BN: as for `KVCache`.
      window, sharding: as for `attention`.

    Returns:
      [B, T, H, E] in q's dtype. Rows of padding hold finite values without meaning.
    """
    kernel = _kernel(q_BTHE, window, sharding)
    kv_axis, own = keys_of_heads(q_BTHE.shape[2], (k_BTKE, v_BTKE), sharding)

    def of_itself(q_BTHE: Array, k_BTKE: Array, v_BTKE: Array) -> Part:
        return kernel(q_BTHE, k_BTKE, v_BTKE, None, None, window)

    if sharding is None:
        of_piece = of_itself(q_BTHE, *own)
        distance = length + jnp.arange(q_BTHE.shape[1], dtype=jnp.int32)
        seen = _with_past(kernel, of_piece, q_BTHE, layer, table_BN, slot, length, distance, window)
        return seen.out_BTHE.astype(q_BTHE.dtype)
    if kernel is not dense_part:  # which the compiler divides by itself
        q_spec, kv_spec = sharding.spec(None, None, "heads", None), sharding.spec(None, None, kv_axis, None)
        of_itself = sharding.shard_map(of_itself, (q_spec, kv_spec, kv_spec), Part(*[q_spec] * 2))  # pyright: ignore
    past = _past_on_a_mesh(kernel, q_BTHE, layer, table_BN, slot, length, window, sharding)
    return merge(of_itself(q_BTHE, *own), past).out_BTHE.astype(q_BTHE.dtype)


def _kernel(q_BTHE: Array, window: Array | None, sharding: Sharding | None) -> Kernel:
    kv_axis = "kv_heads" if sharding is None or sharding.parts("kv_heads") > 1 else "heads"
    obstacles = {
        "a window": window is not None,
        "heads and key-value heads on different axes of the mesh": not together(sharding, "heads", kv_axis),
    }
    match platform_of(sharding):
        case "tpu" if takes("splash attention", obstacles | tpu_obstacles(q_BTHE)):
            return splash_part
        case "gpu" if takes(
            "cuDNN attention",
            obstacles
            | {f"a past in jax {jax.__version__}": not nvidia.kernels_fit()}
            | gpu_obstacles(q_BTHE, sharding),
        ):
            return cudnn_part
        case _:
            return dense_part


def _past_on_a_mesh(
    kernel: Kernel,
    q_BTHE: Array,
    layer: LayerCache,
    table_BN: Array | None,
    slot: Array,
    length: Array,
    window: Array | None,
    sharding: Sharding,
) -> Part:
    """Every device looks at what it has of the slot: some heads' keys, or some of the places, or nothing."""
    row_axes, place_axes = sharding.mesh_axes("batch"), sharding.mesh_axes("context")
    # A device looks at what it has of the cache for all query heads that this is for; where it has the keys of all
    # heads, for its own query heads.
    axis = "cache_heads" if place_axes or sharding.parts("cache_heads") > 1 else "heads"
    group = q_BTHE.shape[2] // layer.k.shape[0]

    def part(
        q_BTHE: Array,
        layer: LayerCache,
        table_BN: Array | None,
        slot: Array,
        length: Array,
        window: Array | None,
    ) -> Part:
        (length_T, heads), places = q_BTHE.shape[1:3], capacity_of(layer, table_BN)
        rows = layer.k.shape[1] if table_BN is None else table_BN.shape[0]
        layer = _of_own_heads(layer, heads, group, sharding)
        row, first = slot - first_of(row_axes, rows), first_of(place_axes, places)
        mine = (row >= 0) & (row < rows)
        here = jnp.where(mine, jnp.clip(length - first, 0, places), 0)
        row = jnp.clip(row, 0, rows - 1)
        distance = length - first + jnp.arange(length_T, dtype=jnp.int32)
        past = _with_past(kernel, Part.empty(q_BTHE), q_BTHE, layer, table_BN, row, here, distance, window)
        if not row_axes and not place_axes:
            return past
        most = jax.lax.pmax(past.norm_BTH1, (*row_axes, *place_axes))
        share = jnp.exp(past.norm_BTH1 - most)
        out, total = jax.lax.psum((past.out_BTHE * share, share), (*row_axes, *place_axes))
        return Part(out / total, most + jnp.log(total))

    spec = sharding.spec(None, None, axis, None)
    of_part = Part(*[spec] * 2)  # pyright: ignore
    cache_specs = jax.tree.map(lambda x: sharding.spec(*AXES[: x.ndim]), layer)
    whole = PartitionSpec()
    specs = (spec, cache_specs, *(None if x is None else whole for x in (table_BN, slot, length, window)))
    return sharding.shard_map(part, specs, of_part)(q_BTHE, layer, table_BN, slot, length, window)


def piece_over_length(
    q_BTHE: Array,
    k_BTKE: Array,
    v_BTKE: Array,
    layer: LayerCache | None,
    *,
    slot: Array,
    length: Array,
    table_BN: Array | None = None,
    window: Array | None = None,
    sharding: Sharding,
) -> Array:
    """As `piece_attention`, where the mesh splits a piece along its length: each device has a part of the queries, and
    looks at all keys. These, which a few heads make small, every device gets whole.

    Args:
      q_BTHE: in the order of `sharding.row_order`; k_BTKE, v_BTKE: in their own, on every device.
      layer: None is no past.
    """
    kernel, (count, heads) = _kernel(q_BTHE, window, sharding), q_BTHE.shape[1:3]
    shards, order = sharding.parts("length"), jnp.array(sharding.row_order(count), jnp.int32)
    causal = None  # splash's tables for a whole piece, which are split as its queries are
    if kernel is splash_part and count % (2 * shards * LANES) == 0:
        causal = splash_kernel(heads // sharding.parts("heads"), count, shards, normalizers=True)
    # Where the mesh has a device's query heads and their keys apart, it gets the keys of all heads.
    kv_axis = "kv_heads" if together(sharding, "heads", "kv_heads") else None
    past = None if layer is None else rows(layer, slot, sharding, table_BN)
    past = jax.tree.map(lambda x: sharding.constrain(x, kv_axis, *[None] * (x.ndim - 1)), past)
    piece = LayerCache(*(x.transpose(2, 0, 1, 3) for x in (k_BTKE, v_BTKE)))
    group = heads // piece.k.shape[0]

    def part(
        q_BTHE: Array,
        index_T: Array,
        piece: LayerCache,
        past: LayerCache | None,
        length: Array,
        window: Array | None,
        causal: PyTree,
    ) -> Array:
        piece = _of_own_heads(piece, q_BTHE.shape[2], group, sharding)
        if causal is None:
            seen = _of_two(kernel, q_BTHE, index_T, piece, window)
        else:
            seen = splash_by(causal, q_BTHE, *read(piece, _NONE, _NONE, count, q_BTHE.dtype))
        if past is not None:
            past = _of_own_heads(past, q_BTHE.shape[2], group, sharding)
            seen = _with_past(kernel, seen, q_BTHE, past, None, _NONE, length, length + index_T, window)
        return seen.out_BTHE.astype(q_BTHE.dtype)

    q_spec, whole = sharding.spec(None, "length", "heads", None), PartitionSpec()
    of_keys = [jax.tree.map(lambda x: sharding.spec(kv_axis, *[None] * (x.ndim - 1)), x) for x in (piece, past)]
    specs = (q_spec, sharding.spec("length"), *of_keys, whole, None if window is None else whole)
    tables = None if causal is None else split_tables(causal, sharding)
    return sharding.shard_map(part, (*specs, tables), q_spec)(q_BTHE, order, piece, past, length, window, causal)


def _of_own_heads(layer: LayerCache, heads: int, group: int, sharding: Sharding) -> LayerCache:
    """Inside shard_map: what a device's query heads look at. Where it has the keys of all heads, and the queries of
    some, these are keys for each of its own."""
    if layer.k.shape[0] * group == heads:
        return layer
    of_heads = (first_of(sharding.mesh_axes("heads"), heads) + jnp.arange(heads, dtype=jnp.int32)) // group
    return jax.tree.map(lambda x: x[of_heads], layer)


def _of_two(kernel: Kernel, q_BTHE: Array, index_T: Array, piece: LayerCache, window: Array | None) -> Part:
    """What a device's queries see of a piece: two runs of tokens (an odd number is one), each causally of itself, and
    all of what lies before it.

    index_T: which tokens of the piece they are.
    """
    parts, runs = [], 2 - len(index_T) % 2
    for q, index in zip(jnp.split(q_BTHE, runs, axis=1), jnp.split(index_T, runs), strict=True):
        own = read(piece, _NONE, index[0], q.shape[1], q.dtype)
        before = kernel(q, *read(piece, _NONE, _NONE, piece.k.shape[2], q.dtype), index[0], index, window)
        # Of no keys a kernel may say anything.
        before = jax.tree.map(lambda x, none: jnp.where(index[0] > 0, x, none), before, Part.empty(q))  # noqa: B023
        parts.append(merge(kernel(q, *own, None, None, window), before))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *parts)


def _with_past(
    kernel: Kernel,
    seen: Part,
    q_BTHE: Array,
    layer: LayerCache,
    table_BN: Array | None,
    row: Array | np.int32,
    here: Array,
    distance: Array,
    window: Array | None,
) -> Part:
    """What was seen, and the first `here` places of a row. distance: int32 [T], from the first place to each query."""
    size = math.gcd(DENSE_BLOCK if kernel is dense_part else BLOCK, capacity_of(layer, table_BN))
    if size % (page := layer.k.shape[2]):
        size = math.gcd(size, page)

    def block(state: tuple[Array, Part]) -> tuple[Array, Part]:
        start, before = state
        k_BSKE, v_BSKE = read(layer, row, start, size, q_BTHE.dtype, table_BN)
        return start + size, merge(before, kernel(q_BTHE, k_BSKE, v_BSKE, here - start, distance - start, window))

    return jax.lax.while_loop(lambda state: state[0] < here, block, (jnp.array(0, jnp.int32), seen))[1]
