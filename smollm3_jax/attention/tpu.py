"""Attention kernels for TPUs: splash attention of whole sequences, paged attention against the cache.

Shapes: B batch, T query length, S key length, H query heads, K key-value heads, G = H / K, E head width.
"""

import functools
import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding

from sharding.rules import PyTree, Sharding, balanced_order

from ..kv_cache import LayerCache, capacity_of
from .parts import Part

if TYPE_CHECKING:
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel

# A TPU's vectors are so wide: splash wants lengths that they divide.
LANES = 128
# Splash goes through queries and keys in tiles of the largest of these that divides the length.
TILES = (1024, 512, 256, 128)
QUERY_TILES = TILES[1:]
# As many keys of a dense row of the cache are one page, the largest that divides the capacity; the kernel
# fetches and multiplies a page at a time. A pool's own pages are multiples of the least.
PAGES = (512, 256, 128)


def splash(kernel: "SplashAttentionKernel", q_BTHE: Array, k_BSKE: Array, v_BSKE: Array, *segments: Array) -> PyTree:
    """JAX's splash attention kernel for TPU: no array of T x S."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel

    _, length, _, width = q_BTHE.shape

    def padded(x: Array) -> Array:
        return jnp.pad(x, [(0, -x.shape[1] % LANES if axis == 1 else 0) for axis in range(x.ndim)])

    q_BHTE = padded(q_BTHE * jnp.asarray(width**-0.5, q_BTHE.dtype)).swapaxes(1, 2)
    k_BKSE, v_BKSE = (padded(x).swapaxes(1, 2) for x in (k_BSKE, v_BSKE))
    ids = (splash_attention_kernel.SegmentIds(*map(padded, segments)),) if segments else ()
    found = jax.vmap(kernel)(q_BHTE, k_BKSE, v_BKSE, *ids)
    return jax.tree.map(lambda x_BHTx: x_BHTx.swapaxes(1, 2)[:, :length], found)


def splash_part(
    q_BTHE: Array,
    k_BSKE: Array,
    v_BSKE: Array,
    seen: Array | None,
    distance: Array | None,
    window: Array | None,
) -> Part:
    """As `dense_part`, by the splash kernel, which takes no window."""
    assert window is None
    (batch, length, heads, _), keys = q_BTHE.shape, k_BSKE.shape[1]
    kernel = splash_kernel(heads, length, past=None if seen is None else keys, normalizers=True)
    segments = ()
    if seen is not None:
        of_keys_1S = (jnp.arange(keys, dtype=jnp.int32)[None] < seen).astype(jnp.int32)
        segments = jnp.ones((batch, length), jnp.int32), jnp.broadcast_to(of_keys_1S, (batch, keys))
    return splash_by(kernel, q_BTHE, k_BSKE, v_BSKE, *segments)


def splash_by(kernel: "SplashAttentionKernel", q_BTHE: Array, k_BSKE: Array, v_BSKE: Array, *segments: Array) -> Part:
    """What a kernel finds that returns normalizers."""
    out_BTHE, (norm_BTH,) = splash(kernel, q_BTHE, k_BSKE, v_BSKE, *segments)
    return Part(out_BTHE.astype(jnp.float32), norm_BTH[..., None])


def splash_over_length(
    kernel: "SplashAttentionKernel",
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

    def part(kernel: "SplashAttentionKernel", q_BTHE: Array, k_BSKE: Array, v_BSKE: Array, *segments: Array) -> Array:
        return splash(kernel, q_BTHE, whole(k_BSKE), whole(v_BSKE), *segments[:1], *map(whole, segments[1:]))

    tables = split_tables(kernel, sharding)
    q_spec, kv_spec = (sharding.spec(batch, "length", axis, None) for axis in ("heads", kv_axis))
    specs = (tables, q_spec, kv_spec, kv_spec, *[sharding.spec(batch, "length")] * len(segments))
    return sharding.shard_map(part, specs, q_spec)(kernel, q_BTHE, k_BSKE, v_BSKE, *segments)


def split_tables(kernel: "SplashAttentionKernel", sharding: Sharding) -> PyTree:
    """How shard_map cuts the tables of a kernel whose queries lie on several devices."""
    return kernel.manual_sharding_spec(NamedSharding(sharding.mesh, sharding.spec(None, "length")))


@functools.lru_cache(maxsize=64)
def splash_kernel(
    heads: int, length: int, shards: int = 1, *, past: int | None = None, normalizers: bool = False
) -> "SplashAttentionKernel":
    """The kernel for `length` queries and their own keys, all padded to LANES, which may be on `shards` devices; or for
    `past` keys, all of which are before the queries. normalizers: it returns (out, (those of the softmax,)).

    Made once for all layers: the host looks at the mask tile by tile.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, keys = (n + -n % LANES for n in (length, length if past is None else past))
    mask = splash_attention_mask.CausalMask((length, keys))
    if past is not None:
        mask = splash_attention_mask.FullMask((length, keys))
    elif shards > 1:
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
            save_residuals=normalizers,
            # A kernel that returns them has no backward pass.
            residual_checkpoint_name=None if normalizers else "attention_residuals",
        )
    return jax.tree.map(np.asarray, kernel)


def paged(q_B1HE: Array, cache: LayerCache, length_B: Array, table_BN: Array | None = None) -> Array:
    """JAX's paged attention kernel for TPU, or ours for int8: they read what rows hold. Without a table a row's pages
    lie in order."""
    if table_BN is not None:  # a row that holds nothing may have no page
        table_BN = jnp.minimum(table_BN, cache.k.shape[1] - 1)
    if cache.k_scale is not None:
        from .paged_int8_tpu import paged_int8

        return paged_int8(q_B1HE, cache, length_B, table_BN)
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    kv_heads, batch, page, width = cache.k.shape
    capacity, together = capacity_of(cache, table_BN), 1
    if table_BN is None:
        page = next(page for page in PAGES if capacity % page == 0)
        table_BN = jnp.arange(batch * capacity // page, dtype=jnp.int32).reshape(batch, -1)
    else:  # as many keys at a time as of rows in order
        together = math.gcd(max(1, PAGES[0] // page), table_BN.shape[1])
    k_pages, v_pages = (x.reshape(kv_heads, -1, page, width) for x in (cache.k, cache.v))
    # The kernel mixes dtypes and ranks, whatever the caller forbids.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out_BHE = paged_attention(
            q_B1HE[:, 0].astype(jnp.float32) * width**-0.5,
            k_pages,
            v_pages,
            # A full row wrote nothing, and has no page after its last.
            jnp.minimum(length_B + 1, capacity),
            table_BN,
            pages_per_compute_block=together,
        )
    return out_BHE[:, None].astype(q_B1HE.dtype)
