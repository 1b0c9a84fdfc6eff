"""Grouped-query attention: of whole sequences, and of a few new tokens against the cache.

What computes it is decided when a function is traced, by the platform it is for: the splash and paged
attention kernels of JAX on TPU, cuDNN's kernel on GPU, and plain XLA elsewhere and for all that a kernel
does not take.

Shapes: B batch, T query length, S key length, H query heads, K key-value heads, G = H / K, E head width.
"""

import functools
import itertools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding

from sharding.rules import Sharding, balanced_order, platform_of, say_once

from .kv_cache import AXES, LayerCache

log = logging.getLogger(__name__)

# What the float32 scores of one call may take; longer sequences go through a few queries at a time.
SCORE_BYTES = 2**28
# A row is cut into so many pieces, of at least so many queries; a piece looks at no key behind its end.
PIECES = 8
PIECE_QUERIES = 64
# A TPU's vectors are so wide: splash wants lengths that they divide.
LANES = 128
# Splash goes through queries and keys in tiles of the largest of these that divides the length.
TILES = (1024, 512, 256, 128)
QUERY_TILES = TILES[1:]
# As many keys of a row of the cache are one page, the largest that divides the capacity; the kernel
# fetches and multiplies a page at a time.
PAGES = (512, 256, 128)


def attention(
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    *,
    q_segments_BT: Array | None = None,
    kv_segments_BS: Array | None = None,
    gap_B: Array | None = None,
    window: Array | None = None,
    sharding: Sharding | None = None,
) -> Array:
    """Causal attention within segments. The last T of the S keys are the queries' own.

    Args:
      q_segments_BT, kv_segments_BS: int32; 0 is padding, other values name documents. A token sees
        its own document only. Causality goes by index in the row, not by position, as positions may
        restart within it. None (both): a row is one document, and padding stands at its end if anywhere,
        where causality hides it.
      gap_B: how many of the S - T past keys, at their end, hold nothing: they do not count as distance.
      window: int32 scalar, how many keys back a query sees, itself included; None for all.
      sharding: where the arrays lie; None on one device. If it splits rows, their tokens are in the order
        of `sharding.row_order`.

    Returns:
      [B, T, H, E] in q's dtype. Rows of padding hold finite values without meaning.
    """
    assert (q_segments_BT is None) == (kv_segments_BS is None)
    segments = () if q_segments_BT is None or kv_segments_BS is None else (q_segments_BT, kv_segments_BS)
    length, heads, width = q_BTHE.shape[1:]
    past = k_BSKE.shape[1] - length
    order = None if sharding is None else sharding.row_order(length)
    shards = 1 if order is None or sharding is None else sharding.parts("length")
    assert order is None or past == 0
    kv_axis = "kv_heads"
    if sharding is not None and sharding.parts("heads") > 1 == sharding.parts("kv_heads"):
        # Each device has the keys of all heads, and takes those of its own queries.
        kv_axis, kv_length = "heads", None if order is None else "length"
        k_BSKE, v_BSKE = (
            sharding.constrain(jnp.repeat(x, heads // x.shape[2], axis=2), "batch", kv_length, "heads", None)
            for x in (k_BSKE, v_BSKE)
        )
    obstacles = {
        "a window": window is not None,
        "heads and key-value heads on different axes of the mesh": not _together(sharding, "heads", kv_axis),
        f"rows of {length} tokens on {shards} devices": shards > 1 and length % (LANES * 2 * shards) != 0,
    }
    match platform_of(sharding):
        case "tpu" if _takes(
            "splash attention",
            obstacles
            | {
                f"{q_BTHE.dtype} values": q_BTHE.dtype not in (jnp.bfloat16, jnp.float32),
                f"heads of width {width}": width % 64 != 0,
            },
        ):
            kernel = _splash_kernel(heads // (1 if sharding is None else sharding.parts("heads")), length, past, shards)
            if sharding is not None and shards > 1:
                return _splash_over_length(kernel, q_BTHE, k_BSKE, v_BSKE, segments, kv_axis, sharding)
            kernel = functools.partial(_splash, kernel)
        case "gpu" if _takes(
            "cuDNN attention",
            obstacles
            | {
                f"{q_BTHE.dtype} values": q_BTHE.dtype not in (jnp.bfloat16, jnp.float16),
                f"heads of width {width}": width > 128 or width % 8 != 0,
                "segments": bool(segments),
                "queries with a past": past > 0,
                "rows on several devices": shards > 1,
                "a device older than compute capability 8.0": not _is_ampere_or_later(sharding),
            },
        ):
            kernel = _cudnn
        case _:
            if order is not None:
                k_BSKE, v_BSKE = (x[:, np.argsort(order)] for x in (k_BSKE, v_BSKE))
                segments = (*segments[:1], *(x[:, np.argsort(order)] for x in segments[1:]))
            return _dense(q_BTHE, k_BSKE, v_BSKE, segments, gap_B, window, order)
    if sharding is None:
        return kernel(q_BTHE, k_BSKE, v_BSKE, *segments)
    batch = sharding.fitting("batch", q_BTHE.shape[0])
    q_spec, kv_spec = sharding.spec(batch, None, "heads", None), sharding.spec(batch, None, kv_axis, None)
    specs = (q_spec, kv_spec, kv_spec, *[sharding.spec(batch, None)] * len(segments))
    return sharding.shard_map(kernel, specs, q_spec)(q_BTHE, k_BSKE, v_BSKE, *segments)


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
    batch, length, heads, _ = q_BTHE.shape
    capacity, width = cache.k.shape[2:]
    if sharding is not None and sharding.parts("context") > 1:
        return _decode_over_context(q_BTHE, cache, length_B, window, sharding)
    if platform_of(sharding) == "tpu" and _takes(
        "paged attention",
        {
            "a window": window is not None,
            "several tokens at a time": length > 1,
            f"a cache of {cache.k.dtype}": cache.k.dtype != jnp.bfloat16,
            f"heads of width {width}": width % LANES != 0,
            f"a capacity of {capacity}": capacity % PAGES[-1] != 0,
            "heads and the cache's on different axes of the mesh": not _together(sharding, "heads", "cache_heads"),
        },
    ):
        if sharding is None:
            return _paged(q_BTHE, cache.k, cache.v, length_B)
        axes = (AXES[0], sharding.fitting("batch", batch), *AXES[2:])
        q_spec, kv_spec = sharding.spec(axes[1], None, "heads", None), sharding.spec(*axes)
        specs = (q_spec, kv_spec, kv_spec, sharding.spec(axes[1]))
        return sharding.shard_map(_paged, specs, q_spec)(q_BTHE, cache.k, cache.v, length_B)
    scores_KBTGS = _cache_scores(q_BTHE, cache, length_B, window)
    out_BTKGE = _cache_mix(jax.nn.softmax(scores_KBTGS, axis=-1), cache, q_BTHE.dtype)
    return out_BTKGE.reshape(batch, length, heads, width).astype(q_BTHE.dtype)


def _takes(kernel: str, obstacles: dict[str, bool]) -> bool:
    """Whether a kernel takes a call that has these obstacles; if not, says so, once."""
    found = tuple(what for what, there in obstacles.items() if there)
    if found:
        instead = "plain XLA computes attention, which is slower"
        say_once(log, logging.INFO, f"{kernel} does not take {' or '.join(found)}: {instead}")
    return not found


def _together(sharding: Sharding | None, heads: str, kv_heads: str) -> bool:
    """Whether a device that has some query heads has their keys."""
    return sharding is None or sharding.mesh_axes(heads) == sharding.mesh_axes(kv_heads)


def _is_ampere_or_later(sharding: Sharding | None) -> bool:
    device = jax.devices()[0] if sharding is None else sharding.mesh.devices.flat[0]
    major = str(getattr(device, "compute_capability", "")).split(".")[0]
    return major.isdecimal() and int(major) >= 8  # AMD's say gfx...


def _splash(kernel: Any, q_BTHE: Array, k_BSKE: Array, v_BSKE: Array, *segments: Array) -> Array:
    """JAX's splash attention kernel for TPU: no array of T x S."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    _, length, _, width = q_BTHE.shape
    query_pad, key_pad = _padding(length, k_BSKE.shape[1] - length)

    def padded(x: Array, pad: int) -> Array:
        return jnp.pad(x, [(0, pad if axis == 1 else 0) for axis in range(x.ndim)])

    q_BHTE = padded(q_BTHE * jnp.asarray(width**-0.5, q_BTHE.dtype), query_pad).swapaxes(1, 2)
    k_BKSE, v_BKSE = (padded(x, key_pad).swapaxes(1, 2) for x in (k_BSKE, v_BSKE))
    if segments:
        ids = splash_attention_kernel.SegmentIds(padded(segments[0], query_pad), padded(segments[1], key_pad))
        out_BHTE = jax.vmap(kernel)(q_BHTE, k_BKSE, v_BKSE, ids)
    else:
        out_BHTE = jax.vmap(kernel)(q_BHTE, k_BKSE, v_BKSE)
    return out_BHTE.swapaxes(1, 2)[:, :length]


def _splash_over_length(
    kernel: Any,
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    segments: tuple[Array, ...],
    kv_axis: str,
    sharding: Sharding,
) -> Array:
    """Each device its own part of the queries, against all keys: the kernel's tables are split as the queries are.

    The keys, which a few heads make small, are gathered and put in order again; their gradients are scattered.
    """
    batch = sharding.fitting("batch", q_BTHE.shape[0])
    order = sharding.row_order(q_BTHE.shape[1])
    assert order is not None

    def whole(x: Array) -> Array:
        return jax.lax.all_gather(x, sharding.mesh_axes("length"), axis=1, tiled=True)[:, np.argsort(order)]

    def part(kernel: Any, q_BTHE: Array, k_BSKE: Array, v_BSKE: Array, *segments: Array) -> Array:
        return _splash(kernel, q_BTHE, whole(k_BSKE), whole(v_BSKE), *segments[:1], *map(whole, segments[1:]))

    tables = kernel.manual_sharding_spec(NamedSharding(sharding.mesh, sharding.spec(None, "length")))
    q_spec, kv_spec = (sharding.spec(batch, "length", axis, None) for axis in ("heads", kv_axis))
    specs = (tables, q_spec, kv_spec, kv_spec, *[sharding.spec(batch, "length")] * len(segments))
    return sharding.shard_map(part, specs, q_spec)(kernel, q_BTHE, k_BSKE, v_BSKE, *segments)


def _padding(length: int, past: int) -> tuple[int, int]:
    """What queries and keys lack. A padding query sees at least its own key: its softmax is over something."""
    query_pad = -length % LANES
    return query_pad, query_pad + -(past + length + query_pad) % LANES


@functools.lru_cache(maxsize=64)
def _splash_kernel(heads: int, length: int, past: int, shards: int = 1) -> Any:
    """The kernel for `length` queries whose own keys follow `past` others, all padded; or that are on `shards` devices.

    Made once for all layers: the host looks at the mask tile by tile.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    query_pad, key_pad = _padding(length, past)
    length, keys = length + query_pad, past + length + key_pad
    mask = splash_attention_mask.CausalMask((length, keys), offset=past)
    if shards > 1:
        mask.q_sequence = balanced_order(length, shards).astype(np.int32)
    # No tile of queries spans two pieces of a row.
    tile_q = next(tile for tile in QUERY_TILES if (length // (2 * shards if shards > 1 else 1)) % tile == 0)
    tile_kv = next(tile for tile in TILES if keys % tile == 0)
    tiles = splash_attention_kernel.BlockSizes(
        block_q=tile_q,
        block_kv=tile_kv,
        block_kv_compute=min(tile_kv, 512),
        block_q_dkv=tile_q,
        block_kv_dkv=tile_kv,
        block_kv_dkv_compute=min(tile_kv, 512),
        block_q_dq=tile_q,
        block_kv_dq=min(tile_kv, 512),
    )
    # Tables of which tiles to visit: plain constants, whatever is being traced when they are made.
    with jax.ensure_compile_time_eval():
        kernel = splash_attention_kernel.make_splash_mha(
            splash_attention_mask.MultiHeadMask([mask] * heads),
            block_sizes=tiles,
            head_shards=1,
            q_seq_shards=shards,
            residual_checkpoint_name="attention_residuals",
        )
    return jax.tree.map(np.asarray, kernel)


def _cudnn(q_BTHE: Array, k_BSKE: Array, v_BSKE: Array) -> Array:
    return jax.nn.dot_product_attention(q_BTHE, k_BSKE, v_BSKE, is_causal=True, implementation="cudnn")


def _paged(q_B1HE: Array, k_KBSE: Array, v_KBSE: Array, length_B: Array) -> Array:
    """JAX's paged attention kernel for TPU, on pages that lie in order: it reads what each row holds, no more."""
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    kv_heads, batch, capacity, width = k_KBSE.shape
    page = next(page for page in PAGES if capacity % page == 0)
    k_pages, v_pages = (x.reshape(kv_heads, -1, page, width) for x in (k_KBSE, v_KBSE))
    out_BHE = paged_attention(
        q_B1HE[:, 0].astype(jnp.float32) * width**-0.5,
        k_pages,
        v_pages,
        # A full row wrote nothing, and has no page behind its last.
        jnp.minimum(length_B + 1, capacity),
        jnp.arange(k_pages.shape[1], dtype=jnp.int32).reshape(batch, -1),
        pages_per_compute_block=1,
    )
    return out_BHE[:, None].astype(q_B1HE.dtype)


def _decode_over_context(
    q_BTHE: Array, cache: LayerCache, length_B: Array, window: Array | None, sharding: Sharding
) -> Array:
    """Each device looks at its own part of the context; the parts of the softmax are put together after."""
    mesh_axes = sharding.mesh_axes("context")

    def part(q_BTHE: Array, cache: LayerCache, length_B: Array, window: Array | None) -> Array:
        first = jax.lax.axis_index(mesh_axes) * cache.k.shape[2]
        scores_KBTGS = _cache_scores(q_BTHE, cache, length_B - first, window)
        most_KBTG = scores_KBTGS.max(axis=-1)
        weights_KBTGS = jnp.exp(scores_KBTGS - most_KBTG[..., None])
        total_KBTG = weights_KBTGS.sum(axis=-1)
        out_BTKGE = _cache_mix(weights_KBTGS, cache, q_BTHE.dtype)
        # A device without a key to see has the lowest float as its maximum, and no weight.
        share_KBTG = jnp.exp(most_KBTG - jax.lax.pmax(most_KBTG, mesh_axes))
        out_BTKGE, total_KBTG = jax.lax.psum((out_BTKGE * _to_front(share_KBTG), total_KBTG * share_KBTG), mesh_axes)
        return (out_BTKGE / _to_front(total_KBTG)).reshape(q_BTHE.shape).astype(q_BTHE.dtype)

    batch = sharding.fitting("batch", q_BTHE.shape[0])
    # Every device has all query heads that a key-value head of its part of the cache is for.
    q_spec = sharding.spec(batch, None, "cache_heads", None)
    kv_spec, scale_spec = (sharding.spec(AXES[0], batch, *axes) for axes in (AXES[2:], AXES[2:3]))
    cache_specs = jax.tree.map(lambda x: kv_spec if x.ndim == 4 else scale_spec, cache)
    specs = (q_spec, cache_specs, sharding.spec(batch), None if window is None else sharding.spec())
    return sharding.shard_map(part, specs, q_spec)(q_BTHE, cache, length_B, window)


def _to_front(x_KBTG: Array) -> Array:
    return x_KBTG.transpose(1, 2, 0, 3)[..., None]


def _cache_scores(q_BTHE: Array, cache: LayerCache, length_B: Array, window: Array | None) -> Array:
    """float32 [K, B, T, G, S], the lowest float where a query does not see a key."""
    batch, length, _, width = q_BTHE.shape
    kv_heads, _, keys, _ = cache.k.shape
    q_KBXE = q_BTHE.reshape(batch, length, kv_heads, -1, width).transpose(2, 0, 1, 3, 4)
    q_KBXE = q_KBXE.reshape(kv_heads, batch, -1, width)
    k_KBSE = _values(cache.k, q_BTHE.dtype)
    # Keys on the left: the other way round XLA:CPU copies them all, transposed.
    contract_width = (((3,), (3,)), ((0, 1), (0, 1)))
    scores = jax.lax.dot_general(k_KBSE, q_KBXE, contract_width, preferred_element_type=jnp.float32) * width**-0.5
    scores = scores.transpose(0, 1, 3, 2).reshape(kv_heads, batch, length, -1, keys)
    if cache.k_scale is not None:
        scores = scores * cache.k_scale[:, :, None, None, :]
    q_index_BT1 = (length_B[:, None] + jnp.arange(length))[:, :, None]
    seen_BTS = jnp.arange(keys) <= q_index_BT1
    if window is not None:
        seen_BTS &= q_index_BT1 - jnp.arange(keys) < window
    return jnp.where(seen_BTS[None, :, :, None], scores, jnp.finfo(jnp.float32).min)


def _cache_mix(weights_KBTGS: Array, cache: LayerCache, dtype: Any) -> Array:
    """The sum of the cache's values by weight, float32 [B, T, K, G, E]."""
    if cache.v_scale is not None:
        weights_KBTGS = weights_KBTGS * cache.v_scale[:, :, None, None, :]
    kv_heads, batch, length, group, keys = weights_KBTGS.shape
    weights_KBXS = weights_KBTGS.astype(dtype).reshape(kv_heads, batch, -1, keys)
    contract_keys = (((3,), (2,)), ((0, 1), (0, 1)))
    out = jax.lax.dot_general(weights_KBXS, _values(cache.v, dtype), contract_keys, preferred_element_type=jnp.float32)
    return out.reshape(kv_heads, batch, length, group, -1).transpose(1, 2, 0, 3, 4)


def _values(stored: Array, dtype: Any) -> Array:
    return stored.astype(dtype) if stored.dtype == jnp.int8 else stored


def _dense(
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    segments: tuple[Array, ...],
    gap_B: Array | None,
    window: Array | None,
    order: np.ndarray | None,
) -> Array:
    """Plain XLA; `attention` without its kernels. order: which token of the row each query is."""
    batch, length, heads, width = q_BTHE.shape
    kv_heads = k_BSKE.shape[2]
    past = k_BSKE.shape[1] - length
    q_BKGTE = q_BTHE.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    k_BKSE, v_BKSE = (x.swapaxes(1, 2) for x in (k_BSKE, v_BSKE))

    def some(keys: int, q_BKGtE: Array, index_t: Array, *q_segments_Bt: Array) -> Array:
        kv_index_S = jnp.arange(keys)
        seen_BtS = (kv_index_S <= index_t[:, None])[None]
        for segments_Bt in q_segments_Bt:
            own_BtS = segments_Bt[:, :, None] == segments[1][:, None, :keys]
            seen_BtS &= own_BtS & (segments_Bt != 0)[:, :, None]
        if window is not None:
            distance_BtS = (index_t[:, None] - kv_index_S)[None]
            if gap_B is not None:
                distance_BtS = distance_BtS - jnp.where(kv_index_S < past, gap_B[:, None, None], 0)
            seen_BtS &= distance_BtS < window
        return _softmax_mix(q_BKGtE, k_BKSE[:, :, :keys], v_BKSE[:, :, :keys], seen_BtS)

    def piece(first: int, end: int) -> Array:
        """Of the queries of a piece of the row: as few at a time as their scores allow."""
        # What comes behind a piece's end is hidden from it. Where queries lie in another order, they see any key.
        keys = past + (end if order is None else length)
        index_T = past + (jnp.arange(first, end) if order is None else jnp.array(order[first:end]))
        parts = (q_BKGTE[:, :, :, first:end], index_T, *(x[:, first:end] for x in segments[:1]))
        axes = (3, 0, 1)[: len(parts)]
        count = end - first
        step = max(1, SCORE_BYTES // (4 * batch * heads * keys))
        if count <= step:
            return some(keys, *parts)
        step = 1 << (step.bit_length() - 1)
        pad = -count % step

        def split(x: Array, axis: int) -> Array:
            x = jnp.pad(x, [(0, pad if i == axis else 0) for i in range(x.ndim)])
            return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, step, *x.shape[axis + 1 :]), axis, 0)

        split_up = tuple(split(x, axis) for x, axis in zip(parts, axes, strict=True))
        out = jax.lax.map(lambda x: some(keys, *x), split_up)
        return jnp.moveaxis(out, 0, 3).reshape(batch, kv_heads, -1, count + pad, width)[:, :, :, :count]

    ends = np.linspace(0, length, max(1, min(PIECES, length // PIECE_QUERIES)) + 1).astype(int).tolist()
    pieces = [piece(first, end) for first, end in itertools.pairwise(ends)]
    return jnp.concatenate(pieces, axis=3).transpose(0, 3, 1, 2, 4).reshape(q_BTHE.shape)


@jax.custom_vjp
def _softmax_mix(q_BKGTE: Array, k_BKSE: Array, v_BKSE: Array, mask_BTS: Array) -> Array:
    """Scores and softmax in float32, probabilities cast back, as transformers' eager path.

    The backward pass keeps each query's normalizer and computes the scores again (FlashAttention, arXiv
    2205.14135): nothing of their size is kept, and a recomputed layer does not go through the softmax twice.
    """
    return _mix(q_BKGTE, k_BKSE, v_BKSE, mask_BTS)[0]


def _mix(q_BKGTE: Array, k_BKSE: Array, v_BKSE: Array, mask_BTS: Array) -> tuple[Array, Array]:
    """The output, and the log of what each query's exponentials add up to."""
    scores_BKGTS = _scores(q_BKGTE, k_BKSE, mask_BTS)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BKSE.dtype)
    out = _batched(_flat(weights_BKGTS), v_BKSE, 3, 2).reshape(q_BKGTE.shape).astype(q_BKGTE.dtype)
    return out, jax.nn.logsumexp(scores_BKGTS, axis=-1, keepdims=True)


def _mix_forward(*arrays: Array) -> tuple[Array, tuple]:
    out, normalizer_BKGT1 = _mix(*arrays)
    return out, (*arrays, checkpoint_name(normalizer_BKGT1, "attention_residuals"))


def _mix_backward(kept: tuple, gradient_BKGTE: Array) -> tuple:
    q_BKGTE, k_BKSE, v_BKSE, mask_BTS, normalizer_BKGT1 = kept
    weights_BKGTS = jnp.exp(_scores(q_BKGTE, k_BKSE, mask_BTS) - normalizer_BKGT1)
    weights_BKGTS = jnp.where(mask_BTS[:, None, None], weights_BKGTS, 0)  # also of a query that sees nothing
    gradient_BKXE = _flat(gradient_BKGTE)
    into_weights_BKGTS = _batched(gradient_BKXE, v_BKSE, 3, 3).reshape(weights_BKGTS.shape)
    mean_BKGT1 = (weights_BKGTS * into_weights_BKGTS).sum(axis=-1, keepdims=True)
    into_scores_BKGTS = weights_BKGTS * (into_weights_BKGTS - mean_BKGT1) * q_BKGTE.shape[-1] ** -0.5
    into_scores_BKXS = _flat(into_scores_BKGTS.astype(q_BKGTE.dtype))
    q_gradient = _batched(into_scores_BKXS, k_BKSE, 3, 2).reshape(q_BKGTE.shape)
    k_gradient = _batched(into_scores_BKXS, _flat(q_BKGTE), 2, 2)
    v_gradient = _batched(_flat(weights_BKGTS.astype(v_BKSE.dtype)), gradient_BKXE, 2, 2)
    return *(x.astype(q_BKGTE.dtype) for x in (q_gradient, k_gradient, v_gradient)), None


_softmax_mix.defvjp(_mix_forward, _mix_backward)


def _scores(q_BKGTE: Array, k_BKSE: Array, mask_BTS: Array) -> Array:
    *heads, width = q_BKGTE.shape
    scores = (_batched(_flat(q_BKGTE), k_BKSE, 3, 3) * width**-0.5).reshape(*heads, -1)
    # The lowest finite number, not -inf: a row that sees nothing must not become NaN.
    return jnp.where(mask_BTS[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _flat(x_BKGTE: Array) -> Array:
    """All query heads of a key head as rows of one product: nothing of the scores' size is transposed."""
    batch, kv_heads, group, length, width = x_BKGTE.shape
    return x_BKGTE.reshape(batch, kv_heads, group * length, width)


def _batched(a: Array, b: Array, contract_a: int, contract_b: int) -> Array:
    """A product of matrices for each row and key head, added up in float32."""
    return jax.lax.dot_general(
        a, b, (((contract_a,), (contract_b,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32
    )
