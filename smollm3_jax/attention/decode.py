"""A few new tokens against the cache, in plain XLA.

Shapes: B batch, T query length, S key length, H query heads, K key-value heads, G = H / K, E head width.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sharding.rules import Sharding

from .. import xla_cpu
from ..kv_cache import AXES, LayerCache

# Places that a CPU reads at a time, and the capacity up to which it reads all of them at once. Each block is copied, so
# that blocks are faster only while rows are less than half full (9 rows of 8,192 in float32, two cores with AVX-512:
# 15 ms a layer at once; in blocks 2, 13 and 26 ms where all rows hold 500, 4,000 and 8,000, and 4 ms where one holds
# 7,000 and the others 300).
BLOCK, AT_ONCE = 256, 2048


def decode_in_blocks(
    q_BTHE: Array, cache: LayerCache, length_B: Array, table_BN: Array | None, window: Array | None
) -> Array:
    """Reads each row to its end and no further; a block of places after the other, whose parts of the softmax are put
    together as in FlashAttention (arXiv 2205.14135)."""
    batch, length, heads, width = q_BTHE.shape
    kv_heads = cache.k.shape[0]
    zero_KBTG = jnp.zeros((kv_heads, 1, length, heads // kv_heads), jnp.float32)
    nothing = jnp.zeros((1, length, kv_heads, heads // kv_heads, width), jnp.float32)

    def of_row(row: Array) -> Array:
        """[T, H, E]; in here B is 1."""
        own_BTHE, own_B = (jax.lax.dynamic_slice_in_dim(x, row, 1) for x in (q_BTHE, length_B))

        def block(state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            start, most_KBTG, total_KBTG, out_BTKGE = state
            part = _block(cache, row, start, table_BN)
            scores_KBTGS = cache_scores(own_BTHE, part, own_B - start, window)
            new_KBTG = jnp.maximum(most_KBTG, scores_KBTGS.max(axis=-1))
            # Without a key to see the maximum is the lowest float, and the first key takes back what is added now.
            weights_KBTGS, before_KBTG = jnp.exp(scores_KBTGS - new_KBTG[..., None]), jnp.exp(most_KBTG - new_KBTG)
            mixed_BTKGE = cache_mix(weights_KBTGS, part, q_BTHE.dtype)
            total_KBTG = total_KBTG * before_KBTG + weights_KBTGS.sum(axis=-1)
            return start + BLOCK, new_KBTG, total_KBTG, out_BTKGE * _to_front(before_KBTG) + mixed_BTKGE

        first = (jnp.int32(0), zero_KBTG + jnp.finfo(jnp.float32).min, zero_KBTG, nothing)
        end = own_B[0] + length
        _, _, total_KBTG, out_BTKGE = jax.lax.while_loop(lambda state: state[0] < end, block, first)
        return (out_BTKGE / _to_front(total_KBTG)).reshape(length, heads, width)

    return jax.lax.map(of_row, jnp.arange(batch, dtype=jnp.int32)).astype(q_BTHE.dtype)


def _block(layer: LayerCache, row: Array, start: Array, table_BN: Array | None) -> LayerCache:
    """The places of a row from `start` on, as a cache of its own; with a table, one page."""
    zero = jnp.int32(0)
    at = (row, start) if table_BN is None else (table_BN[row, start // BLOCK], zero)

    def part(x: Array) -> Array:
        return jax.lax.dynamic_slice(x, (zero, *at, zero)[: x.ndim], (len(x), 1, BLOCK, *x.shape[3:]))

    return jax.tree.map(part, layer)


def decode_over_context(
    q_BTHE: Array, cache: LayerCache, length_B: Array, window: Array | None, sharding: Sharding
) -> Array:
    """Each device looks at its own part of the context; the parts of the softmax are put together after."""
    mesh_axes = sharding.mesh_axes("context")

    def part(q_BTHE: Array, cache: LayerCache, length_B: Array, window: Array | None) -> Array:
        first = jax.lax.axis_index(mesh_axes) * cache.k.shape[2]
        scores_KBTGS = cache_scores(q_BTHE, cache, length_B - first, window)
        most_KBTG = scores_KBTGS.max(axis=-1)
        weights_KBTGS = jnp.exp(scores_KBTGS - most_KBTG[..., None])
        total_KBTG = weights_KBTGS.sum(axis=-1)
        out_BTKGE = cache_mix(weights_KBTGS, cache, q_BTHE.dtype)
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


def cache_scores(q_BTHE: Array, cache: LayerCache, length_B: Array, window: Array | None) -> Array:
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
    q_index_BT1 = (length_B[:, None] + jnp.arange(length, dtype=jnp.int32)[None])[:, :, None]
    kv_index_11S = jnp.arange(keys, dtype=jnp.int32)[None, None]
    seen_BTS = kv_index_11S <= q_index_BT1
    if window is not None:
        seen_BTS &= q_index_BT1 - kv_index_11S < window
    return jnp.where(seen_BTS[None, :, :, None], scores, jnp.finfo(jnp.float32).min)


def cache_mix(weights_KBTGS: Array, cache: LayerCache, dtype: DTypeLike) -> Array:
    """The sum of the cache's values by weight, float32 [B, T, K, G, E]."""
    if cache.v_scale is not None:
        weights_KBTGS = weights_KBTGS * cache.v_scale[:, :, None, None, :]
    kv_heads, batch, length, group, keys = weights_KBTGS.shape
    weights_KBXS = weights_KBTGS.astype(dtype).reshape(kv_heads, batch, -1, keys)
    contract_keys = (((3,), (2,)), ((0, 1), (0, 1)))
    out = jax.lax.dot_general(weights_KBXS, _values(cache.v, dtype), contract_keys, preferred_element_type=jnp.float32)
    return out.reshape(kv_heads, batch, length, group, -1).transpose(1, 2, 0, 3, 4)


def _values(stored: Array, dtype: DTypeLike) -> Array:
    return stored.astype(dtype) if stored.dtype == jnp.int8 else xla_cpu.values_of(stored)
