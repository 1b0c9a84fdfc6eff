"""A decoding step's attention against an int8 cache on a TPU, in Pallas.

JAX's paged attention kernel takes int8 pages too, but wants a float32 scale for each number instead of one for each
token and head: five times the bytes. This one reads what a row holds, block by block, with the scales as they are.

Shapes: B rows, T = 1, H query heads, K key-value heads, G = H / K, E head width, S keys of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from ..kv_cache import LayerCache, capacity_of

# A step of the kernel takes the keys of all heads in blocks of the largest of these that divides a page.
BLOCKS = (1024, 512, 256, 128)
# The scales of this number of pages lie together in memory, and are read together.
SUBLANES = 8


def paged_int8(
    q_B1HE: Array,
    cache: LayerCache,
    length_B: Array,
    table_BN: Array | None = None,
    *,
    interpret: bool | pltpu.InterpretParams = False,
) -> Array:
    """Attention of one new token a row, which the cache holds already: [B, 1, H, E] in q's dtype.

    Args:
      cache: int8 with scales.
      length_B: int32, how many tokens each row held before. A full row looks at what it has.
      table_BN: int32, the pages of each row in their order, all of which are in the pool; None if row b is page b.
    """
    batch, _, heads, width = q_B1HE.shape
    kv_heads, pages, page, _ = cache.k.shape
    capacity = capacity_of(cache, table_BN)
    block = next(block for block in BLOCKS if page % block == 0)
    sublanes, table = min(SUBLANES, pages), () if table_BN is None else (table_BN,)
    q_BKGE = q_B1HE.reshape(batch, kv_heads, -1, width).astype(jnp.float32)
    # A full row wrote nothing, and has no block after its last.
    seen_B = jnp.minimum(length_B + 1, capacity)

    def of_row(row: Array, step: Array, *refs: jax.Ref) -> tuple[Array | int, ...]:
        return row, 0, 0, 0

    def of_block(row: Array, step: Array, *refs: jax.Ref) -> tuple[Array | int, ...]:
        # After a row's last block the same is named again, which fetches nothing.
        found, place = _found(block, page, row, step, *refs)
        return 0, found, place, 0

    def of_scales(row: Array, step: Array, *refs: jax.Ref) -> tuple[Array | int, ...]:
        found, place = _found(block, page, row, step, *refs)
        return 0, jax.lax.div(found, sublanes), place

    q_spec = pl.BlockSpec((1, kv_heads, heads // kv_heads, width), of_row)
    values = pl.BlockSpec((kv_heads, 1, block, width), of_block)
    scales = pl.BlockSpec((kv_heads, sublanes, block), of_scales)
    sums = pltpu.VMEM((kv_heads, heads // kv_heads, width), jnp.float32)
    out_BKGE = pl.pallas_call(
        functools.partial(_kernel, block, page, sublanes, jnp.promote_types(q_B1HE.dtype, jnp.bfloat16)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(table),
            grid=(batch, pl.cdiv(seen_B.max(), block)),
            in_specs=[q_spec, values, values, scales, scales],
            out_specs=q_spec,
            scratch_shapes=[sums, sums, sums],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, kv_heads, heads // kv_heads, width), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=4 * batch * heads * capacity * width,
            transcendentals=batch * heads * capacity,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
        ),
        interpret=interpret,
        name="paged_attention_int8",
    )(seen_B, *table, q_BKGE, cache.k, cache.v, cache.k_scale, cache.v_scale)
    return out_BKGE.reshape(q_B1HE.shape).astype(q_B1HE.dtype)


def _found(block: int, page: int, row: Array, step: Array, seen_ref: jax.Ref, *table: jax.Ref) -> tuple[Array, Array]:
    """The page that a step's block of a row lies in, and which of its blocks that is."""
    number = jnp.minimum(step, jax.lax.div(seen_ref[row] - 1, block))
    if not table:
        return row, number
    return table[0][row, jax.lax.div(number, page // block)], jax.lax.rem(number, page // block)


def _kernel(block: int, page: int, sublanes: int, dtype: DTypeLike, *refs: jax.Ref) -> None:
    """One block of a row, all heads: the softmax goes on from the block before.

    Args:
      refs: how much is seen of each row; the table, if there is one; q, k, v, the scales, the output; most, total and
        sum [K, G, E]: the largest score so far and the weights' sum, in all lanes, and that of the values.
    """
    *scalars, q_ref, k_ref, v_ref, k_scale_ref, v_scale_ref, out_ref, most_ref, total_ref, sum_ref = refs
    row, step = pl.program_id(0), pl.program_id(1)
    seen, sublane = scalars[0][row], jax.lax.rem(_found(block, page, row, step, *scalars)[0], sublanes)

    @pl.when(step == 0)
    def start() -> None:
        most_ref[...] = jnp.full(most_ref.shape, jnp.finfo(jnp.float32).min, jnp.float32)
        total_ref[...] = jnp.zeros(total_ref.shape, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

    @pl.when(step * block < seen)
    def go_on() -> None:
        for head in range(k_ref.shape[0]):
            scale_1S, v_scale_1S = (ref[head, pl.ds(sublane, 1), :] for ref in (k_scale_ref, v_scale_ref))
            k_SE, v_SE = (ref[head, 0].astype(jnp.float32).astype(dtype) for ref in (k_ref, v_ref))
            scores_GS = _dot(q_ref[0, head].astype(dtype), k_SE, 1) * (scale_1S * k_SE.shape[1] ** -0.5)
            index_GS = step * block + jax.lax.broadcasted_iota(jnp.int32, scores_GS.shape, 1)
            scores_GS = jnp.where(index_GS < seen, scores_GS, jnp.finfo(jnp.float32).min)
            most_GE, total_GE = most_ref[head], total_ref[head]
            new_most_GE = jnp.maximum(most_GE, scores_GS.max(axis=1, keepdims=True))
            share_GE = jnp.exp(most_GE - new_most_GE)
            weights_GS = jnp.exp(scores_GS - new_most_GE[:, :1])
            total_ref[head] = total_GE * share_GE + weights_GS.sum(axis=1, keepdims=True)
            mixed_GE = _dot((weights_GS * v_scale_1S).astype(dtype), v_SE, 0)
            sum_ref[head] = sum_ref[head] * share_GE + mixed_GE
            most_ref[head] = new_most_GE

    @pl.when(step == pl.num_programs(1) - 1)
    def end() -> None:
        out_ref[0] = sum_ref[...] / total_ref[...]


def _dot(x: Array, y: Array, contracted: int) -> Array:
    return jax.lax.dot_general(x, y, (((1,), (contracted,)), ((), ())), preferred_element_type=jnp.float32)
