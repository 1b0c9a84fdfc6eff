"""A decoding step's attention on a GPU, in Pallas through Triton: one new token a row against the cache.

One kernel turns query and key by RoPE, writes key and value into the cache, and attends to what the row held and to
them. It reads the tokens that a row holds, not its capacity, and finds them through a page table. Where there are few
rows, the keys of each are split over several programs (flash-decoding), and a second small kernel adds their parts up.

Shapes: B rows, H query heads, K key-value heads, G = H / K, X = G padded to a tile, E head width, e = E / 2, P pages
in the pool, N pages of a row, S keys of a block, C splits.
"""

import dataclasses
import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ..kv_cache import LayerCache

# A program goes through its keys in blocks of the largest of these that divides a page.
BLOCKS = (64, 32, 16)
# Keys are split until there are about this many programs: two for each of an H100's 132 multiprocessors.
PROGRAMS = 256
# The fewest rows that a product on tensor cores has.
TILE = 16
# Stands for minus infinity: differences of it are numbers.
LOWEST = -1e38

# A jax.Ref, also where one of a LayerCache of refs is, whose fields say Array.
Ref: TypeAlias = Any


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
      cache: a pool of pages, [K, P, page, E] in q's dtype or int8 with float32 scales [K, P, page]. A page is a
        multiple of 16 tokens.
      table_BN: int32, the pages of each row in their order; P is none, into which nothing is written; None if row b is
        page b.

    Returns:
      [B, H, E] in q's dtype, and the cache, updated in place where the caller gives it away.
    """
    batch, heads, width = q_BHE.shape
    kv_heads, _, page, _ = cache.k.shape
    pages = 1 if table_BN is None else table_BN.shape[1]
    tiles = Tiles.of(batch * kv_heads, heads // kv_heads, page, pages)
    angles = (angles[0].astype(q_BHE.dtype), angles[1].astype(q_BHE.dtype))
    inputs = (q_BHE, k_BKE, v_BKE, angles, length_B, table_BN)
    out = jax.ShapeDtypeStruct(q_BHE.shape, q_BHE.dtype)
    sums = (batch, heads, tiles.splits)
    partial = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((*sums, width), sums, sums))
    results = (out,) if tiles.splits == 1 else partial
    arrays, first = len(jax.tree.leaves(cache)), len(jax.tree.leaves(inputs))
    with jax.named_scope("paged_attention"):  # what plan.py knows its cost by
        parts, cache = pl.pallas_call(
            functools.partial(_paged_attention, tiles),
            grid=(batch, kv_heads, tiles.splits),
            out_shape=(results, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), cache)),
            input_output_aliases={first + i: len(results) + i for i in range(arrays)},
            # Of full rows: what is read and multiplied at most.
            cost_estimate=pl.CostEstimate(
                flops=4 * batch * heads * tiles.capacity * width,
                transcendentals=batch * heads * tiles.capacity,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)),
            ),
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
            interpret=interpret,
        )(*inputs, cache)
    if tiles.splits == 1:
        return parts[0], cache
    merged_BHE = pl.pallas_call(
        functools.partial(_merge, tiles),
        grid=(batch, heads),
        out_shape=out,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
    )(length_B, parts)
    return merged_BHE, cache


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut: blocks of `block` keys, of which a row's are dealt out to `splits` (C) programs.

    group: G; page: tokens of one; capacity: tokens of a row.
    """

    group: int
    page: int
    capacity: int
    block: int
    splits: int

    @classmethod
    def of(cls, heads: int, group: int, page: int, pages: int) -> "Tiles":
        """heads: key-value heads of all rows; pages: of a row."""
        block = next(block for block in BLOCKS if page % block == 0)
        splits = max(1, min(PROGRAMS // heads, page * pages // block))
        # A power of two, as the merge takes them all at once.
        return cls(group, page, page * pages, block, 1 << (splits.bit_length() - 1))

    def held(self, length_ref: Ref, row: Array) -> tuple[Array, Array, Array]:
        """How many tokens a row held, whether there is a place for the new one, and how many splits have work."""
        length = jnp.minimum(length_ref[row], self.capacity)
        return length, length < self.capacity, jnp.clip(pl.cdiv(length, self.block), 1, self.splits)


def _paged_attention(
    tiles: Tiles,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    angles: tuple[Ref, Ref],
    length_ref: Ref,
    table_ref: Ref | None,
    old: LayerCache,
    parts: tuple[Ref, ...],
    new: LayerCache,
) -> None:
    """The program of a row, a key-value head and a split, which has the blocks split, split + C, split + 2 C, ...

    The new token is the first split's, which has it in registers: no program reads what another writes.
    """
    row, head, split = (pl.program_id(i) for i in range(3))
    length, fits, working = tiles.held(length_ref, row)
    dtype, scaling, pages = q_ref.dtype, q_ref.shape[-1] ** -0.5, old.k.shape[1]
    group_X = jnp.arange(max(TILE, pl.next_power_of_2(tiles.group)))

    def found(index: Array) -> tuple[Array, Array, Array]:
        """Where the row's token of this index lies."""
        page = row if table_ref is None else table_ref[row, index // tiles.page]
        return head, page, index % tiles.page

    # Heads after the group's last repeat it, and are not stored.
    q_XE = _turned(q_ref, row, head * tiles.group + jnp.minimum(group_X, tiles.group - 1), angles)
    place = found(jnp.minimum(length, tiles.capacity - 1))
    writes = fits & (split == 0) if table_ref is None else fits & (split == 0) & (place[1] < pages)
    k_E = _put(_turned(k_ref, row, head, angles), new.k, new.k_scale, place, writes)
    v_E = _put(v_ref[row, head], new.v, new.v_scale, place, writes)
    # The softmax so far: the largest score, the weights' sum and that of the values. The first split begins with the
    # new token, the others with nothing.
    score_X = (q_XE.astype(jnp.float32) * k_E[None, :]).sum(axis=1) * scaling
    most_X = jnp.where(writes, score_X, LOWEST)
    total_X = jnp.where(writes, jnp.ones_like(score_X), 0.0)
    out_XE = jnp.where(writes, jnp.broadcast_to(v_E[None, :], q_XE.shape), 0.0)

    def body(i: Array, so_far: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        most_X, total_X, out_XE = so_far
        start = (split + i * tiles.splits) * tiles.block
        head, page, at = found(start)
        # A slot in which nothing decodes may say that it holds what it has no page for any more.
        page = page if table_ref is None else jnp.minimum(page, pages - 1)
        block = head, page, pl.ds(pl.multiple_of(at, tiles.block), tiles.block)
        seen_S = start + jnp.arange(tiles.block) < length
        scores_XS = _dot(q_XE, _load(old.k, block, seen_S).astype(dtype), 1) * scaling
        if old.k_scale is not None:
            scores_XS *= _load(old.k_scale, block, seen_S)[None, :]
        scores_XS = jnp.where(seen_S[None, :], scores_XS, LOWEST)
        new_most_X = jnp.maximum(most_X, scores_XS.max(axis=1))
        weights_XS, share_X = jnp.exp(scores_XS - new_most_X[:, None]), jnp.exp(most_X - new_most_X)
        total_X = total_X * share_X + weights_XS.sum(axis=1)
        if old.v_scale is not None:
            weights_XS *= _load(old.v_scale, block, seen_S)[None, :]
        mixed_XE = _dot(weights_XS.astype(dtype), _load(old.v, block, seen_S).astype(dtype), 0)
        return new_most_X, total_X, out_XE * share_X[:, None] + mixed_XE

    blocks = pl.cdiv(jnp.maximum(pl.cdiv(length, tiles.block) - split, 0), tiles.splits)
    most_X, total_X, out_XE = jax.lax.fori_loop(0, blocks, body, (most_X, total_X, out_XE))
    heads = pl.ds(head * tiles.group, group_X.shape[0])
    if tiles.splits == 1:
        results, at = (out_XE / total_X[:, None],), (row, heads)
    else:
        results, at = (out_XE, most_X, total_X), (row, heads, split)
    for ref, result in zip(parts, results, strict=True):
        _store(ref, at, result.astype(ref.dtype), (group_X < tiles.group) & (split < working))


def _merge(tiles: Tiles, length_ref: Ref, parts: tuple[Ref, Ref, Ref], out_ref: Ref) -> None:
    """The program of a row and a head: one softmax of what the splits with work found."""
    row, head = pl.program_id(0), pl.program_id(1)
    there_C = jnp.arange(tiles.splits) < tiles.held(length_ref, row)[2]
    part_CE, most_C, total_C = (_load(ref, (row, head, pl.ds(0, tiles.splits)), there_C) for ref in parts)
    most_C = jnp.where(there_C, most_C, LOWEST)
    share_C = jnp.where(there_C, jnp.exp(most_C - most_C.max()), 0.0)
    out_E = (part_CE * share_C[:, None]).sum(axis=0) / (total_C * share_C).sum()
    out_ref[row, head] = out_E.astype(out_ref.dtype)


def _turned(ref: Ref, row: Array, head: Array, angles: tuple[Ref, Ref]) -> Array:
    """RoPE, as `rope.rotate` computes it, of one head [E] or several [X, E]: read twice instead of cut in halves."""
    half = ref.shape[-1] // 2
    lane_E = jnp.arange(2 * half)
    left_E = lane_E < half
    cos_E, sin_E = (x[row, jnp.where(left_E, lane_E, lane_E - half)] for x in angles)
    own, other = (
        ref[row, *jnp.broadcast_arrays(jnp.asarray(head)[..., None], lanes_E)]
        for lanes_E in (lane_E, jnp.where(left_E, lane_E + half, lane_E - half))
    )
    cos, sin = (jnp.broadcast_to(x_E, own.shape) for x_E in (cos_E, jnp.where(left_E, -sin_E, sin_E)))
    return own * cos + other * sin


def _put(x_E: Array, ref: Ref, scale_ref: Ref | None, place: tuple[Array, Array, Array], writes: Array) -> Array:
    """Stores a key or value where `writes`; returns it as the cache has it, in float32."""
    lanes = pl.ds(0, x_E.shape[0])
    wide_E = x_E.astype(jnp.float32)
    if scale_ref is None:
        _store(ref, (*place, lanes), x_E, writes)
        return wide_E
    # As kv_cache.quantize_rows does it.
    scale = jnp.max(jnp.abs(wide_E)) / 127
    whole_E = _rounded(wide_E / jnp.where(scale == 0, 1, scale))
    _store(ref, (*place, lanes), whole_E.astype(jnp.int8), writes)
    _store(scale_ref, place, scale, writes)
    return whole_E * scale


def _rounded(x: Array) -> Array:
    """To whole numbers, halves to even, which Triton has no operation for."""
    low = jnp.floor(x)
    odd = low - 2 * jnp.floor(low / 2)
    return low + jnp.where(x - low == 0.5, odd, (x - low > 0.5).astype(x.dtype))


def _dot(x: Array, y: Array, contracted: int) -> Array:
    """float32 sums over x's last dimension and that of y; float32 factors are not rounded to TF32."""
    dims = (((1,), (contracted,)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _load(ref: Ref, place: tuple[Array | slice | pl.Slice, ...], there: Array) -> Array:
    """A block whose first dimension `there` masks: zeros elsewhere, where memory may hold anything."""
    view = ref.at[place]
    return triton.load(view, mask=_over_all(there, view.shape), other=0)


def _store(ref: Ref, place: tuple[Array | slice | pl.Slice, ...], values: Array, there: Array) -> None:
    triton.store(ref.at[place], values, mask=_over_all(there, values.shape))


def _over_all(mask: Array, shape: tuple[int, ...]) -> Array:
    """A mask of the leading dimensions, or of none, over all of them."""
    return jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim)), shape)
