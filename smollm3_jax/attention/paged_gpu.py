"""A decoding step's attention on a GPU, in Pallas through Triton: one new token a row against the cache.

One kernel turns query and key by RoPE, writes key and value into the cache, and attends to what the row held and to
them. It reads the tokens that a row holds, not its capacity, and finds them through a page table. Where there are few
rows the keys of each are split over several programs (flash-decoding), and a second small kernel adds their parts up.

Shapes: B rows, H query heads, K key-value heads, G = H / K, X = G padded to a tile, E head width, e = E / 2, P pages
in the pool, N pages of a row, S keys of a block, C splits.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from ..kv_cache import LayerCache

# A program goes through its keys in blocks of the largest of these that divides a page.
BLOCKS = (64, 32, 16)
# Keys are split until there are about so many programs: two for each of an H100's 132 multiprocessors.
PROGRAMS = 256
# The fewest rows that a product on tensor cores has.
TILE = 16
# Stands for minus infinity, as differences of it are still numbers.
LOWEST = -1e38
# To add it and take it away rounds a small float32 to a whole number, halves to even: 1.5 x 2**23.
ROUNDER = 12582912.0


def step(
    q_BHE: Array,
    k_BKE: Array,
    v_BKE: Array,
    angles: tuple[Array, Array],
    length_B: Array,
    cache: LayerCache,
    table_BN: Array | None = None,
    *,
    interpret: bool = False,
) -> tuple[Array, LayerCache]:
    """Attention of each row's new token, and the cache that holds it.

    Args:
      q_BHE, k_BKE, v_BKE: before RoPE.
      angles: cos and sin, float32 [B, e] each.
      length_B: int32, how many tokens each row held before: where the new one goes. A row that is full writes
        nothing, and looks at what it has.
      cache: a pool of pages: [K, P, page, E] in q's dtype, or int8 with float32 scales [K, P, page].
      table_BN: int32, the pages of each row in their order; None if row b is page b.

    Returns:
      [B, H, E] in q's dtype, and the cache, updated in place where the caller gives it away.
    """
    batch, heads, width = q_BHE.shape
    kv_heads, _, page, _ = cache.k.shape
    tiles = Tiles.of(batch * kv_heads, heads // kv_heads, page, 1 if table_BN is None else table_BN.shape[1])
    angles = (angles[0].astype(q_BHE.dtype), angles[1].astype(q_BHE.dtype))
    inputs = (q_BHE, k_BKE, v_BKE, angles, length_B, table_BN)
    if tiles.splits == 1:
        parts = (jax.ShapeDtypeStruct(q_BHE.shape, q_BHE.dtype),)
    else:
        sums = (batch, heads, tiles.splits)
        parts = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*sums, width), sums, sums))
    first = len(jax.tree.leaves(inputs))
    with jax.named_scope("paged_attention"):
        parts, cache = pl.pallas_call(
            functools.partial(_attend, tiles),
            grid=(batch, kv_heads, tiles.splits),
            out_shape=(parts, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)),
            input_output_aliases={first + i: len(parts) + i for i in range(len(jax.tree.leaves(cache)))},
            cost_estimate=_cost(batch, heads, tiles.capacity, cache),
            interpret=interpret,
            **_compiled_with(num_warps=4, num_stages=3),
        )(*inputs, cache)
        if tiles.splits == 1:
            return parts[0], cache
        merged_BHE = pl.pallas_call(
            functools.partial(_merge, tiles),
            grid=(batch, heads),
            out_shape=jax.ShapeDtypeStruct(q_BHE.shape, q_BHE.dtype),
            interpret=interpret,
            **_compiled_with(num_warps=4, num_stages=1),
        )(length_B, parts)
    return merged_BHE, cache


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut: `block` keys at a time, a row's blocks dealt out to `splits` programs, a power of two."""

    group: int
    page: int
    capacity: int
    block: int
    splits: int

    @classmethod
    def of(cls, rows: int, group: int, page: int, pages: int) -> "Tiles":
        """For so many pairs of a row and a key-value head; `takes_page` says which pages there may be."""
        block = next(block for block in BLOCKS if page % block == 0)
        capacity = page * pages
        splits = 1 << (max(1, min(PROGRAMS // rows, capacity // block)).bit_length() - 1)
        return cls(group, page, capacity, block, splits)

    def held(self, length_ref: Any, row: Any) -> tuple[Any, Any, Any]:
        """How many tokens a row held, whether there is a place for the new one, and how many splits have work."""
        length = jnp.minimum(length_ref[row], self.capacity)
        return length, length < self.capacity, jnp.clip(pl.cdiv(length, self.block), 1, self.splits)


def takes_page(page: int) -> bool:
    return page % BLOCKS[-1] == 0


def _attend(
    tiles: Tiles,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    angles: tuple[Any, Any],
    length_ref: Any,
    table_ref: Any,
    old: LayerCache,
    parts: tuple[Any, ...],
    new: LayerCache,
) -> None:
    """The program of a row, a key-value head and a split: blocks split, split + C, split + 2 C and so on.

    The new token is the first split's, which has it in its registers: nothing waits for what was written.
    """
    row, head, split = (pl.program_id(i) for i in range(3))
    length, fits, working = tiles.held(length_ref, row)
    width = q_ref.shape[-1]
    dtype = q_ref.dtype
    group_X = jnp.arange(max(TILE, pl.next_power_of_2(tiles.group)))
    # Heads behind the group's last repeat it, and are not stored.
    head_X = head * tiles.group + jnp.minimum(group_X, tiles.group - 1)
    q_XE = _turned(q_ref, row, head_X, angles)

    def found(index: Any) -> tuple[Any, Any]:
        """The page of a row's key, and its place there."""
        page = row if table_ref is None else table_ref[row, index // tiles.page]
        return page, index % tiles.page

    k_E = _turned(k_ref, row, head, angles)
    v_E = v_ref[row, head]
    writes = fits & (split == 0)
    page, at = found(jnp.minimum(length, tiles.capacity - 1))
    k_E = _put(k_E, new.k, new.k_scale, (head, page, at), writes)
    v_E = _put(v_E, new.v, new.v_scale, (head, page, at), writes)

    # Scores, their maximum and the sums of what has been seen: for the first split the new token.
    score_X = (q_XE.astype(jnp.float32) * k_E[None, :]).sum(axis=1) * width**-0.5
    most_X = jnp.where(writes, score_X, LOWEST)
    total_X = jnp.where(writes, jnp.ones_like(score_X), 0.0)
    out_XE = jnp.where(writes, jnp.broadcast_to(v_E[None, :], q_XE.shape), 0.0)

    def body(i: Any, sums: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        most_X, total_X, out_XE = sums
        start = (split + i * tiles.splits) * tiles.block
        page, at = found(start)
        places = (head, page, pl.ds(pl.multiple_of(at, tiles.block), tiles.block))
        seen_S = start + jnp.arange(tiles.block) < length
        scores_XS = _dot(q_XE, _load(old.k, places, seen_S).astype(dtype), 1) * width**-0.5
        if old.k_scale is not None:
            scores_XS *= _load(old.k_scale, places, seen_S)[None, :]
        scores_XS = jnp.where(seen_S[None, :], scores_XS, LOWEST)
        new_most_X = jnp.maximum(most_X, scores_XS.max(axis=1))
        weights_XS = jnp.exp(scores_XS - new_most_X[:, None])
        share_X = jnp.exp(most_X - new_most_X)
        total_X = total_X * share_X + weights_XS.sum(axis=1)
        if old.v_scale is not None:
            weights_XS *= _load(old.v_scale, places, seen_S)[None, :]
        mixed_XE = _dot(weights_XS.astype(dtype), _load(old.v, places, seen_S).astype(dtype), 0)
        return new_most_X, total_X, out_XE * share_X[:, None] + mixed_XE

    blocks = pl.cdiv(jnp.maximum(pl.cdiv(length, tiles.block) - split, 0), tiles.splits)
    most_X, total_X, out_XE = jax.lax.fori_loop(0, blocks, body, (most_X, total_X, out_XE))
    heads = pl.ds(head * tiles.group, head_X.shape[0])
    if tiles.splits == 1:
        results, place = (out_XE / total_X[:, None],), (row, heads)
    else:
        results, place = (out_XE, most_X, total_X), (row, heads, split)
    for ref, result in zip(parts, results, strict=True):
        _store(ref, place, result.astype(ref.dtype), (group_X < tiles.group) & (split < working))


def _merge(tiles: Tiles, length_ref: Any, parts: tuple[Any, ...], out_ref: Any) -> None:
    """The program of a row and a head: the softmax over the splits that had work."""
    row, head = pl.program_id(0), pl.program_id(1)
    part_ref, most_ref, total_ref = parts
    splits_C = jnp.arange(tiles.splits)
    there_C = splits_C < tiles.held(length_ref, row)[2]
    all_C = pl.ds(0, tiles.splits)
    most_C = jnp.where(there_C, _load(most_ref, (row, head, all_C), there_C), LOWEST)
    share_C = jnp.where(there_C, jnp.exp(most_C - most_C.max()), 0.0)
    total = (_load(total_ref, (row, head, all_C), there_C) * share_C).sum()
    out_E = (_load(part_ref, (row, head, all_C), there_C) * share_C[:, None]).sum(axis=0)
    out_ref[row, head] = (out_E / total).astype(out_ref.dtype)


def _turned(ref: Any, row: Any, head: Any, angles: tuple[Any, Any]) -> Array:
    """RoPE, as `rope.rotate` computes it, of one head [E] or several [X, E], read twice instead of cut in halves."""
    width = ref.shape[-1]
    lane_E = jnp.arange(width)
    left_E = lane_E < width // 2
    cos_E, sin_E = (x[row, lane_E % (width // 2)] for x in angles)
    heads = jnp.asarray(head)[..., None]
    own, other = (
        ref[row, *jnp.broadcast_arrays(heads, lane_E)]
        for lane_E in (lane_E, jnp.where(left_E, lane_E + width // 2, lane_E - width // 2))
    )
    return own * cos_E + other * jnp.where(left_E, -sin_E, sin_E)


def _put(x_E: Array, ref: Any, scale_ref: Any, place: tuple[Any, Any, Any], writes: Any) -> Array:
    """Stores a key or value where `writes`; returns it as the cache has it, in float32."""
    lanes = pl.ds(0, x_E.shape[0])
    if scale_ref is None:
        _store(ref, (*place, lanes), x_E, writes)
        return x_E.astype(jnp.float32)
    # As kv_cache.quantize_rows does; Triton has no rounding to even, but float32 has, at this size.
    scale = jnp.max(jnp.abs(x_E.astype(jnp.float32))) / 127
    whole_E = x_E.astype(jnp.float32) / jnp.where(scale == 0, 1, scale) + ROUNDER - ROUNDER
    _store(ref, (*place, lanes), whole_E.astype(jnp.int8), writes)
    _store(scale_ref, place, scale, writes)
    return whole_E * scale


def _dot(x: Array, y: Array, contracted: int) -> Array:
    """float32 sums; float32 factors are not rounded to TF32."""
    dims = (((1,), (contracted,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _load(ref: Any, place: tuple[Any, ...], there: Any) -> Array:
    """A block whose first dimension is masked by `there`: zeros elsewhere, where memory may hold anything."""
    from jax.experimental.pallas import triton

    view = ref.at[place]
    return triton.load(view, mask=_wide(there, view.shape), other=0)


def _store(ref: Any, place: tuple[Any, ...], values: Array, there: Any) -> None:
    from jax.experimental.pallas import triton

    triton.store(ref.at[place], values, mask=_wide(there, values.shape))


def _wide(mask: Any, shape: tuple[int, ...]) -> Array:
    """A mask of the leading dimensions, over all."""
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)


def _compiled_with(num_warps: int, num_stages: int) -> dict[str, Any]:
    from jax.experimental.pallas import triton

    return {"compiler_params": triton.CompilerParams(num_warps=num_warps, num_stages=num_stages)}


def _cost(batch: int, heads: int, capacity: int, cache: LayerCache) -> pl.CostEstimate:
    """Of full rows: what the kernel reads, and multiplies, at most."""
    bytes_of_cache = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    products = batch * heads * capacity
    return pl.CostEstimate(
        flops=4 * products * cache.k.shape[-1], transcendentals=products, bytes_accessed=bytes_of_cache
    )
