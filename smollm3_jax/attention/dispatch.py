"""What computes attention, decided when a function is traced, by the platform it is for.

The splash and paged attention kernels of JAX on TPU, cuDNN's kernels and our own for decoding on GPU, and plain XLA
elsewhere and for all that a kernel does not take.

Shapes: B batch, T query length, S key length, H query heads, K key-value heads, G = H / K, E head width.
"""

import functools
import logging
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from sharding.rules import Sharding, platform_of

from .. import nvidia, xla_cpu
from ..kv_cache import AXES, LayerCache, capacity_of, rows
from ..logs import say_once
from . import gpu
from .decode import AT_ONCE, BLOCK, cache_mix, cache_scores, decode_in_blocks, decode_over_context
from .dense import dense
from .tpu import LANES, PAGES, paged, splash, splash_kernel, splash_over_length

log = logging.getLogger(__name__)


def attention(
    q_BTHE: Array,
    k_BTKE: Array,
    v_BTKE: Array,
    *,
    segments_BT: Array | None = None,
    window: Array | None = None,
    sharding: Sharding | None = None,
) -> Array:
    """Causal attention of whole rows, within segments.

    Args:
      segments_BT: int32; 0 is padding, other values name documents. A token sees its own document only. Causality goes
        by index in the row, not by position, as positions may restart within it. None: a row is one document, and
        padding stands at its end if anywhere, where causality hides it. On GPUs documents must be whole and their ids
        go up along a row, as the packer numbers them: a row where they do not becomes NaN there.
      window: int32 scalar, how many keys back a query sees, itself included; None for all.
      sharding: where the arrays lie; None on one device. If it splits rows, their tokens are in the order
        of `sharding.row_order`.

    Returns:
      [B, T, H, E] in q's dtype. Rows of padding hold finite values without meaning.
    """
    segments = () if segments_BT is None else (segments_BT, segments_BT)
    length, heads = q_BTHE.shape[1:3]
    order = None if sharding is None else sharding.row_order(length)
    shards = 1 if order is None or sharding is None else sharding.parts("length")
    kv_axis, (k_BTKE, v_BTKE) = keys_of_heads(heads, (k_BTKE, v_BTKE), sharding, split=order is not None)
    obstacles = {
        "a window": window is not None,
        "heads and key-value heads on different axes of the mesh": not together(sharding, "heads", kv_axis),
    }
    rows = f"rows of {length} tokens on {shards} devices"
    match platform_of(sharding):
        case "tpu" if takes(
            "splash attention",
            obstacles | tpu_obstacles(q_BTHE) | {rows: shards > 1 and length % (LANES * 2 * shards) != 0},
        ):
            kernel = splash_kernel(heads // (1 if sharding is None else sharding.parts("heads")), length, shards)
            if sharding is not None and shards > 1:
                return _kept(splash_over_length(kernel, q_BTHE, k_BTKE, v_BTKE, segments, kv_axis, sharding), sharding)
            kernel = functools.partial(splash, kernel)
            return _kept(_on_own_parts(kernel, q_BTHE, (k_BTKE, v_BTKE), segments, kv_axis, sharding), sharding)
        case "gpu" if takes(
            "cuDNN attention",
            obstacles
            | {rows: shards > 1 and length % (2 * shards) != 0}
            | gpu_obstacles(q_BTHE, sharding, packed=bool(segments) or shards > 1),
        ):
            if sharding is not None and shards > 1:
                documents_BT = segments[0] if segments else jnp.ones(q_BTHE.shape[:2], jnp.int32)
                return gpu.causal_over_length(q_BTHE, k_BTKE, v_BTKE, documents_BT, kv_axis, sharding)
            return _on_own_parts(gpu.causal, q_BTHE, (k_BTKE, v_BTKE), segments, kv_axis, sharding)
        case _:
            if order is not None:
                k_BTKE, v_BTKE = (x[:, np.argsort(order)] for x in (k_BTKE, v_BTKE))
                segments = (*segments[:1], *(x[:, np.argsort(order)] for x in segments[1:]))
            return _kept(dense(q_BTHE, k_BTKE, v_BTKE, segments, window, order), sharding)


def _kept(out_BTHE: Array, sharding: Sharding | None) -> Array:
    """The output by the name that training keeps it by. (cuDNN's backward pass keeps it by itself: under a second name
    it would be there twice.)"""
    return xla_cpu.named(out_BTHE, "attention", platform_of(sharding))


def keys_of_heads(
    heads: int, arrays: tuple[Array, ...], sharding: Sharding | None, split: bool = False
) -> tuple[str, tuple[Array, ...]]:
    """The logical axis of the heads of keys and values [B, S, K, E], and these, repeated for every query head where
    each device has the keys of all heads: then it takes those of its own queries. split: rows lie on several devices.
    """
    if sharding is None or sharding.parts("heads") == 1 or sharding.parts("kv_heads") > 1:
        return "kv_heads", arrays
    axes = ("batch", "length" if split else None, "heads", None)
    return "heads", tuple(sharding.constrain(jnp.repeat(x, heads // x.shape[2], axis=2), *axes) for x in arrays)


def tpu_obstacles(q_BTHE: Array) -> dict[str, bool]:
    """What splash attention does not take."""
    width = q_BTHE.shape[-1]
    return {
        f"{q_BTHE.dtype} values": q_BTHE.dtype not in (jnp.bfloat16, jnp.float32),
        f"heads of width {width}": width % 64 != 0,
    }


def gpu_obstacles(q_BTHE: Array, sharding: Sharding | None, packed: bool = False) -> dict[str, bool]:
    """What cuDNN does not take. packed: several documents a row, or a part of one."""
    capability, width = nvidia.compute_capability(sharding), q_BTHE.shape[-1]
    devices = 1 if sharding is None else math.prod(sharding.parts(axis) for axis in ("batch", "length", "heads"))
    return {
        f"{q_BTHE.dtype} values": q_BTHE.dtype not in (jnp.bfloat16, jnp.float16),
        f"heads of width {width}": width > 128 or width % 8 != 0,
        "a device older than compute capability 8.0": capability < (8, 0),
        "documents on a device older than compute capability 9.0": packed and (8, 0) <= capability < (9, 0),
        f"documents in jax {jax.__version__}": packed and not nvidia.kernels_fit(),
        # They are found by int32 offsets.
        "documents in 2**31 values": packed and q_BTHE.size // devices >= 2**31,
    }


def _on_own_parts(
    kernel: Callable[..., Array],
    q_BTHE: Array,
    keys: tuple[Array, ...],
    by_row: tuple[Array, ...],
    kv_axis: str,
    sharding: Sharding | None,
) -> Array:
    """kernel(q, *keys, *by_row) as every device runs it, on its own rows and heads. by_row: arrays [B, ...]."""
    if sharding is None:
        return kernel(q_BTHE, *keys, *by_row)
    batch = sharding.fitting("batch", q_BTHE.shape[0])
    q_spec, kv_spec = sharding.spec(batch, None, "heads", None), sharding.spec(batch, None, kv_axis, None)
    specs = (q_spec, *[kv_spec] * len(keys), *(sharding.spec(batch, *[None] * (x.ndim - 1)) for x in by_row))
    return sharding.shard_map(kernel, specs, q_spec)(q_BTHE, *keys, *by_row)


def decode_attention(
    q_BTHE: Array,
    cache: LayerCache,
    *,
    length_B: Array,
    segments_BT: Array | None = None,
    table_BN: Array | None = None,
    window: Array | None = None,
    sharding: Sharding | None = None,
) -> Array:
    """A few new tokens against the cache that already holds them.

    Args:
      length_B: how many keys each row held before; query t sees keys up to index length + t.
      segments_BT: int32; rows that are 0 want nothing, and need not be read. None: all want something.
      table_BN: as for `KVCache`.
      window, sharding: as for `attention`.

    Returns:
      [B, T, H, E] in q's dtype.
    """
    batch, length, heads, _ = q_BTHE.shape
    page, width = cache.k.shape[2:]
    if sharding is not None and sharding.parts("context") > 1:
        return decode_over_context(q_BTHE, cache, length_B, window, sharding)
    if platform_of(sharding) == "tpu" and takes(
        "paged attention",
        {
            "a window": window is not None,
            "several tokens at a time": length > 1,
            f"a cache of {cache.k.dtype}": cache.k.dtype not in (jnp.bfloat16, jnp.int8),
            f"heads of width {width}": width % LANES != 0,
            f"{'a capacity' if table_BN is None else 'pages'} of {page}": page % PAGES[-1] != 0,
            "heads and the cache's on different axes of the mesh": not together(sharding, "heads", "cache_heads"),
        },
    ):
        if sharding is None:
            return paged(q_BTHE, cache, length_B, table_BN)
        axis = sharding.fitting("batch", batch)
        q_spec, table_spec = sharding.spec(axis, None, "heads", None), _table_spec(table_BN, axis, sharding)
        specs = (q_spec, _cache_specs(cache, axis, sharding), sharding.spec(axis), table_spec)
        return sharding.shard_map(paged, specs, q_spec)(q_BTHE, cache, length_B, table_BN)
    places = capacity_of(cache, table_BN)
    blocks = places % BLOCK == 0 if table_BN is None else page == BLOCK
    if platform_of(sharding) == "cpu" and sharding is None and places > AT_ONCE and blocks:
        wanted_B = length_B if segments_BT is None else jnp.where(segments_BT[:, 0] == 0, 0, length_B)
        return decode_in_blocks(q_BTHE, cache, wanted_B, table_BN, window)
    cache = rows(cache, None, sharding, table_BN)
    scores_KBTGS = cache_scores(q_BTHE, cache, length_B, window)
    out_BTKGE = cache_mix(jax.nn.softmax(scores_KBTGS, axis=-1), cache, q_BTHE.dtype)
    return out_BTKGE.reshape(batch, length, heads, width).astype(q_BTHE.dtype)


def decode_step(
    q_BTHE: Array,
    k_BTKE: Array,
    v_BTKE: Array,
    angles: tuple[Array, Array],
    cache: LayerCache,
    *,
    length_B: Array,
    table_BN: Array | None = None,
    window: Array | None = None,
    sharding: Sharding | None = None,
) -> tuple[Array, LayerCache] | None:
    """RoPE, the cache's write and attention of one new token a row, where one kernel does them all: on GPUs.

    Args:
      q_BTHE, k_BTKE, v_BTKE: before RoPE; angles: cos and sin, float32 [B, T, E/2] each.
      cache: as it was before these tokens.
      length_B, table_BN, window, sharding: as for `decode_attention`.

    Returns:
      What `decode_attention` returns, and the cache that holds the tokens; None where no kernel takes the call.
    """
    if platform_of(sharding) != "gpu" or not takes(
        "paged attention", {f"jax {jax.__version__}": not nvidia.kernels_fit()}
    ):
        return None
    from . import paged_gpu

    batch, length, _, width = q_BTHE.shape
    page = cache.k.shape[2]
    if not takes(
        "paged attention",
        {
            "a window": window is not None,
            "several tokens at a time": length > 1,
            f"a cache of {cache.k.dtype} for {q_BTHE.dtype} values": cache.k.dtype not in (q_BTHE.dtype, jnp.int8),
            f"heads of width {width}": width < paged_gpu.TILE or width & (width - 1) != 0,
            f"{'a capacity' if table_BN is None else 'pages'} of {page}": page % paged_gpu.BLOCKS[-1] != 0,
            "heads and the cache's on different axes of the mesh": not together(sharding, "heads", "cache_heads"),
            "a context on several devices": sharding is not None and sharding.parts("context") > 1,
            "a device older than compute capability 8.0": nvidia.compute_capability(sharding) < (8, 0),
        },
    ):
        return None
    new = (q_BTHE[:, 0], k_BTKE[:, 0], v_BTKE[:, 0])
    arguments = (*new, (angles[0][:, 0], angles[1][:, 0]), length_B, cache, table_BN)
    if sharding is None:
        out_BHE, cache = paged_gpu.step(*arguments)
        return out_BHE[:, None], cache
    axis = sharding.fitting("batch", batch)
    of_heads, of_kv_heads = (sharding.spec(axis, heads, None) for heads in ("heads", "cache_heads"))
    of_row, of_angle, of_cache = sharding.spec(axis), sharding.spec(axis, None), _cache_specs(cache, axis, sharding)
    table_spec = _table_spec(table_BN, axis, sharding)
    specs = (of_heads, of_kv_heads, of_kv_heads, (of_angle, of_angle), of_row, of_cache, table_spec)
    out_BHE, cache = sharding.shard_map(paged_gpu.step, specs, (of_heads, of_cache))(*arguments)
    return out_BHE[:, None], cache


def _cache_specs(cache: LayerCache, rows: str | None, sharding: Sharding) -> LayerCache:
    """How shard_map cuts a layer's cache; rows: the logical axis of its rows."""
    return jax.tree.map(lambda x: sharding.spec(AXES[0], rows, *AXES[2 : x.ndim]), cache)


def _table_spec(table_BN: Array | None, rows: str | None, sharding: Sharding) -> PartitionSpec | None:
    return None if table_BN is None else sharding.spec(rows, None)


def takes(kernel: str, obstacles: dict[str, bool]) -> bool:
    """Whether a kernel takes a call that has these obstacles; if not, says so, once."""
    found = tuple(what for what, there in obstacles.items() if there)
    if found:
        instead = "plain XLA computes attention, which is slower"
        say_once(log, logging.INFO, f"{kernel} does not take {' or '.join(found)}: {instead}")
    return not found


def together(sharding: Sharding | None, heads: str, kv_heads: str) -> bool:
    """Whether a device that has some query heads has their keys."""
    return sharding is None or sharding.mesh_axes(heads) == sharding.mesh_axes(kv_heads)
