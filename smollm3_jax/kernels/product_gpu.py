"""The product of one or two rows with a grouped weight on an NVIDIA GPU: unpacked in registers, never to memory.

A lane takes the same group of a few output channels, 16 bytes of each at a time, and a warp neighbouring groups: what
it loads together is up to 512 bytes long. A channel's groups are spread over the lanes of a warp and, where there are
many, over warpgroups; they meet at the end. Bytes become float32 by a byte permutation: q below 128 in the third byte
of 128.0 makes 128 + q. (Conversions of integers run at half the rate of other instructions, or less.) Of int4 the
minimum, and with it those 128, cost one number a group: sum x (s q + m) = s sum x (128 + q) + (m - 128 s) sum x.

In Pallas for Mosaic GPU (that for Triton is deprecated). What is written in MLIR is the inner product of 16 bytes.

Shapes: R rows of activations, N output channels, K inputs, G groups; C channels of a program, L lanes along groups.
"""

import functools
import operator
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from ..sizes import power_of_two_up_to

if TYPE_CHECKING:
    from jax.extend.mlir import ir

# Takes cost estimates, and has `store`, for which plain assignments to memory stand before.
NEW = jax.__version_info__ >= (0, 12)
# More rows want more registers than there are.
ROWS = 2
# An H100 has 132 multiprocessors: fewer programs would leave some of them idle.
PROGRAMS = 128
WARPS, LANES = 4, 32
# A warpgroup goes through fewer tiles of a channel's groups than this; where there are more, two or four share them.
SHARED_TILES = 4
# As many vectors of 16 bytes may be on their way to a lane's registers.
VECTORS = 16

# How Mosaic lays an array out over a warpgroup's registers; the class of layouts with parameters is not public.
Layout: TypeAlias = Any


def geometry(rows: int, channels: int, groups: int) -> tuple[int, int, int] | None:
    """(lanes along groups, channels of each lane, warpgroups that share a channel); None if channels do not divide."""
    lanes = min(LANES, power_of_two_up_to(groups))
    blocks, rest = divmod(channels, WARPS * LANES // lanes)
    if rest:
        return None
    own = next(n for n in (8, 4, 2, 1) if n == 1 or (n * rows <= 8 and blocks % n == 0 and blocks // n >= PROGRAMS))
    tiles = groups // lanes
    return lanes, own, 4 if tiles >= 2 * SHARED_TILES else 2 if tiles >= SHARED_TILES else 1


def product(
    x_RK: Array,
    values_NB: Array,
    scale_NG: Array,
    minimum_NG: Array | None,
    cost: pl.CostEstimate | None = None,
    interpret: object = None,
) -> Array:
    """x w^T, float32 [R, N], of a weight as QuantizedWeight has it, reshaped to matrices; B bytes a channel.

    Args:
      interpret: plgpu.InterpretGPUParams() to run it on a CPU.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, (channels, groups) = len(x_RK), scale_NG.shape
    found = geometry(rows, channels, groups)
    assert found is not None
    lanes, own, sharing = found
    tile = own * WARPS * LANES // lanes
    layout_CL16 = _layout(lanes)
    layout_CL, layout_L16, layout_C = (layout_CL16.reduce(axes) for axes in ((2,), (0,), (1, 2)))
    x_RGP16, values_NGb = x_RK.reshape(rows, groups, -1, 16), values_NB.reshape(channels, groups, -1)
    vectors, parts = values_NGb.shape[2] // 16, x_RGP16.shape[2]
    dot = functools.partial(_dot_interpreted if interpret else _dot, layout_CL16)
    load: Any = functools.partial(plgpu.load, optimized=False)
    tiles = -(-groups // (lanes * sharing))  # of each warpgroup
    ahead = max(1, min(tiles, VECTORS // (own * vectors * rows)))

    def quantized_product(x_ref: jax.Ref, values_ref: jax.Ref, scale_ref: jax.Ref, *rest: Any) -> None:
        minimum_ref = None if minimum_NG is None else rest[0]
        out_ref, *shared = rest if minimum_NG is None else rest[1:]
        group = jax.lax.axis_index("warpgroup")
        mine = pl.ds(jax.lax.axis_index("program") * tile, tile)

        def fetch(i: Array | int) -> tuple:
            """The i-th tile of this warpgroup. What lies past the last group is moved back, and does not count."""
            first = (group * tiles + i) * lanes
            at = pl.ds(jnp.minimum(first, groups - lanes), lanes)
            weight = [load(values_ref.at[mine, at, pl.ds(16 * j, 16)], layout=layout_CL16) for j in range(vectors)]
            scales = [load(ref.at[mine, at], layout=layout_CL) for ref in (scale_ref, minimum_ref) if ref is not None]
            return first, at, weight, scales

        def add(sums: tuple, first: Array, at: pl.Slice, weight: list, scales: list) -> tuple:
            scales = [scale.astype(jnp.float32) for scale in scales]
            if groups % (lanes * sharing):
                index_CL = plgpu.broadcasted_iota(jnp.int32, (tile, lanes), 1, layout=layout_CL)
                counts_CL = index_CL >= first - jnp.minimum(first, groups - lanes)
                scales = [jnp.where(counts_CL, scale, 0.0) for scale in scales]
            out = []
            for r in range(rows):
                x = [load(x_ref.at[r, at, p], layout=layout_L16).astype(jnp.float32) for p in range(parts)]
                if minimum_NG is None:
                    products_CL = _sum(dot(bytes_, [part]) for bytes_, part in zip(weight, x, strict=True))
                    out.append(sums[r] + scales[0] * products_CL)
                    continue
                total_L = (x[0] + x[1]).sum(axis=1)
                total_CL = plgpu.layout_cast(jax.lax.broadcast_in_dim(total_L, (tile, lanes), (1,)), layout_CL)
                out.append(sums[r] + scales[0] * dot(weight[0], x) + (scales[1] - 128 * scales[0]) * total_CL)
            return tuple(out)

        def some(i: Array | int, sums: tuple, count: int = ahead) -> tuple:
            for fetched in [fetch(i * ahead + j) for j in range(count)]:
                sums = add(sums, *fetched)
            return sums

        zero_CL = plgpu.layout_cast(jnp.zeros((tile, lanes), jnp.float32), layout_CL)
        sums = jax.lax.fori_loop(0, tiles // ahead, some, (zero_CL,) * rows)
        if tiles % ahead:
            sums = some(tiles // ahead, sums, tiles % ahead)
        if sharing == 1:
            for r in range(rows):
                store(out_ref.at[r, mine], sums[r].sum(axis=1))
            return
        parts_ref, barrier = shared
        for r in range(rows):
            store(parts_ref.at[group, r], sums[r].sum(axis=1))
        plgpu.barrier_arrive(barrier)

        @pl.when(group == 0)
        def _() -> None:
            plgpu.barrier_wait(barrier)
            for r in range(rows):
                store(out_ref.at[r, mine], _sum(load(parts_ref.at[i, r], layout=layout_C) for i in range(sharing)))

    scratch = (plgpu.SMEM((sharing, rows, tile), jnp.float32), plgpu.Barrier(num_arrivals=sharing))
    run = kernel_of(
        quantized_product,
        cost,
        out_type=jax.ShapeDtypeStruct((rows, channels), jnp.float32),
        grid=(channels // tile,),
        grid_names=("program",),
        num_threads=sharing,
        thread_name="warpgroup",
        scratch_types=scratch if sharing > 1 else (),
        interpret=interpret,
    )
    return run(x_RGP16, values_NGb, scale_NG, *([] if minimum_NG is None else [minimum_NG]))


def _sum(arrays: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, arrays)


def kernel_of(body: Callable[..., None], cost: pl.CostEstimate | None, **how: Any) -> Callable[..., Array]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if NEW:
        how["cost_estimate"] = cost
    return plgpu.kernel(body, **how)


def store(ref: jax.Ref, value: Array) -> None:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if NEW:
        plgpu.store(ref, value, optimized=False)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        ref[...] = value


def _layout(lanes: int) -> Layout:
    """The layout of [C, L, 16]: a lane has 16 bytes, `lanes` of a warp lie along groups, the rest along channels."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    channels = LANES // lanes
    if channels == 1:
        return plgpu.Layout.TILED(plgpu.Tiling(((WARPS, LANES, 16),)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
    tiling = plgpu.Tiling(((WARPS * channels, lanes, 16), (channels, lanes, 16)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-6,), lane_dims=(-3, -2), vector_dim=-1)


def _dot_interpreted(_: Layout, bytes_CL16: Array, x: list[Array]) -> Array:
    """What `_dot` computes."""
    if len(x) == 1:
        return (x[0][None] * bytes_CL16.astype(jnp.float32)).sum(axis=2)
    halves = (bytes_CL16 & 15, bytes_CL16 >> 4)
    numbers = (128 + half.astype(jnp.float32) for half in halves)
    return _sum((part[None] * number).sum(axis=2) for part, number in zip(x, numbers, strict=True))


def _dot(layout_CL16: Layout, bytes_CL16: Array, x: list[Array]) -> Array:
    """Inner products of each 16 bytes with activations, float32 [C, L].

    One [L, 16] of activations: bytes are int8. Two: bytes hold two numbers q of four bits, the low ones for the first
    and the high ones for the second, and count as 128 + q.
    """
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import arith, math, vector

    layout_CL, layout_L16 = layout_CL16.reduce((2,)), layout_CL16.reduce((0,))
    out_type = plgpu.ShapeDtypeStruct(bytes_CL16.shape[:2], jnp.float32, layout=layout_CL)

    @plgpu.inline_mgpu(arg_types=(layout_CL16, *[layout_L16] * len(x)), return_type=out_type)
    def inline(_: Any, bytes_: Any, *parts: Any) -> Any:
        four_words = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
        x = [[vector.extract(part.registers.item(), [], [i]) for i in range(16)] for part in parts]

        def products(vector_16: "ir.Value") -> "ir.Value":
            words = vector.bitcast(four_words, vector_16)
            sums: list[Any] = [None] * 4
            for j in range(4):
                numbers = numbers_of(vector.extract(words, [], [j]), len(x) == 2)
                for part, four in zip(x, numbers, strict=True):
                    for i, number in enumerate(four):
                        factor = part[4 * j + i]
                        sums[i] = arith.mulf(number, factor) if sums[i] is None else math.fma(number, factor, sums[i])
            return arith.addf(arith.addf(sums[0], sums[1]), arith.addf(sums[2], sums[3]))

        layout = layout_CL.to_mgpu()
        one_float = ir.VectorType.get((1,), ir.F32Type.get())
        out = np.empty(layout.registers_shape(bytes_CL16.shape[:2]), object)
        for i, register in enumerate(bytes_.registers.flat):
            out.flat[i] = vector.broadcast(one_float, products(register))
        return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=None)

    return inline(bytes_CL16, *x)


def numbers_of(word: "ir.Value", int4: bool) -> "list[list[ir.Value]]":
    """In MLIR, what the four bytes of a word hold, as float32: int8; or 128 + q of their low and of their high bits."""
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import arith, vector

    int32, float32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    one_word, one_float = (ir.VectorType.get((1,), dtype) for dtype in (int32, float32))
    four_bytes = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))

    def constant(bits: int) -> "ir.Value":
        return arith.constant(int32, ir.IntegerAttr.get(int32, bits - (bits >> 31 << 32)))

    def as_bytes(word: "ir.Value") -> "ir.Value":
        return vector.bitcast(four_bytes, vector.broadcast(one_word, word))

    # int4: 128 + q, which is 0x4300 0000 | q << 16. int8: 32768 + 128 + q, which is 0x4700 0000 | 128 + q << 8,
    # and the subtraction is exact.
    base, place = (0x43000000, 2) if int4 else (0x47000000, 1)
    bias = arith.constant(float32, ir.FloatAttr.get(float32, 32768.0 + 128.0))
    fields = [arith.xori(word, constant(0x80808080))]
    if int4:
        fields = [arith.andi(half, constant(0x0F0F0F0F)) for half in (word, arith.shrui(word, constant(4)))]
    found = []
    for field in fields:
        chosen = [[i if byte == place else 4 + byte for byte in range(4)] for i in range(4)]
        four = [
            vector.shuffle(as_bytes(field), as_bytes(constant(base)), ir.DenseI64ArrayAttr.get(mask)) for mask in chosen
        ]
        four = [vector.extract(vector.bitcast(one_float, number), [], [0]) for number in four]
        found.append(four if int4 else [arith.subf(number, bias) for number in four])
    return found
