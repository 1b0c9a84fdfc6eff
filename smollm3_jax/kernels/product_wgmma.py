"""The product of up to 64 rows with a grouped weight on a Hopper GPU: unpacked in registers, for the tensor cores.

A warpgroup takes 64 output channels and, of each, four groups at a time. A lane loads one group of two channels, 16
bytes at a time, and what it unpacks is what the tensor cores' instruction wants of it: its numbers are columns of a
left operand in an order of their own, into which the activations are put before. The weight is rounded to bfloat16,
as it is where it is unpacked to memory. Groups are spread over warpgroups, and where channels are few over programs
too, whose sums XLA adds up.

Shapes: R rows of activations, padded to eights, N output channels, K inputs, G groups, B bytes of a channel;
C = 64 channels of a program, S parts of the sums.
"""

import functools
import operator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from .product_gpu import PROGRAMS, Layout, kernel_of, store

if TYPE_CHECKING:
    from jax.extend.mlir import ir

ROWS = 64
CHANNELS = 64
# Of a warpgroup's step, and of programs for the same channels.
GROUPS, WARPGROUPS, SHARES = 4, 4, 4
# Of a channel, in 16 bytes, on their way to a lane's registers, and of activations in shared memory.
VECTORS = 2
BUFFER_BYTES = 2**17


def fits(channels: int, groups: int) -> bool:
    return channels % CHANNELS == 0 and groups >= GROUPS


def product(
    x_RK: Array,
    values_NB: Array,
    scale_NG: Array,
    minimum_NG: Array | None,
    cost: pl.CostEstimate | None = None,
    interpret: object = None,
) -> Array:
    """x w^T, float32 [R, N], of bfloat16 activations and a weight as QuantizedWeight has it, reshaped to matrices.

    Args:
      interpret: plgpu.InterpretGPUParams() to run it on a CPU.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (rows, inputs), (channels, groups) = x_RK.shape, scale_NG.shape
    padded, width = rows + -rows % 8, GROUPS * inputs // groups
    halves = width // 128  # of a group: 32 numbers, which are columns of the operand for each of its four lanes
    tiles = -(-groups // GROUPS)
    if groups % GROUPS:  # the last tile is the last four groups, some of which the one before it has
        x_RK = jnp.concatenate([x_RK[:, : (tiles - 1) * width], x_RK[:, -width:]], axis=1)
    x = jnp.pad(x_RK, ((0, padded - rows), (0, 0))).reshape(padded, tiles, GROUPS, halves, 16, 2)
    x_RK = x.transpose(0, 1, 3, 4, 2, 5).reshape(padded, tiles * width)
    values_NGb = values_NB.reshape(channels, groups, -1)
    vectors = values_NGb.shape[2] // 16
    shares = 1 if channels // CHANNELS >= PROGRAMS else SHARES
    steps = -(-tiles // (WARPGROUPS * shares))  # of each warpgroup
    most = min(VECTORS // vectors, BUFFER_BYTES // (WARPGROUPS * padded * width * 2))
    ahead = next(n for n in range(max(1, most), 0, -1) if steps % n == 0)
    layout_CL16 = layout()
    unpack = functools.partial(_unpack_interpreted if interpret else _unpack, layout_CL16)
    load: Any = functools.partial(plgpu.load, optimized=False)

    def quantized_product(x_ref: jax.Ref, values_ref: jax.Ref, scale_ref: jax.Ref, *rest: Any) -> None:
        minimum_ref = None if minimum_NG is None else rest[0]
        out_ref, x_smem, sums_smem, arrived, done, *interpreted = rest if minimum_NG is None else rest[1:]
        group, share = jax.lax.axis_index("warpgroup"), jax.lax.axis_index("share")
        mine = pl.ds(jax.lax.axis_index("program") * CHANNELS, CHANNELS)
        first = (share * WARPGROUPS + group) * steps

        def fetch(i: Array, j: int) -> tuple:
            """Fetches step i into buffer j. What lies past the last group is moved back, and what was there before does
            not count."""
            tile, start = jnp.minimum(first + i, tiles - 1), jnp.minimum((first + i) * GROUPS, groups - GROUPS)
            at = pl.ds(start, GROUPS)
            plgpu.copy_gmem_to_smem(
                x_ref.at[:, pl.ds(tile * width, width)], x_smem.at[group, j], arrived.at[group * ahead + j]
            )
            weight = [load(values_ref.at[mine, at, pl.ds(16 * v, 16)], layout=layout_CL16) for v in range(vectors)]
            scales = [ref for ref in (scale_ref, minimum_ref) if ref is not None]
            return (
                (first + i) * GROUPS - start,
                weight,
                [load(ref.at[mine, at], layout=layout_CL16.reduce((2,))) for ref in scales],
            )

        def accumulate(sums_ref: Any) -> None:
            index_CL = plgpu.broadcasted_iota(jnp.int32, (CHANNELS, GROUPS), 1, layout=layout_CL16.reduce((2,)))

            @pl.loop(0, steps // ahead)
            def _(i: Array) -> None:
                fetched = [fetch(i * ahead + j, j) for j in range(ahead)]
                for j, (past, weight, scales) in enumerate(fetched):
                    counts_CL = index_CL >= past
                    scales = [jnp.where(counts_CL, scale.astype(jnp.float32), 0.0) for scale in scales]
                    unpacked = unpack(weight, scales)
                    plgpu.barrier_wait(arrived.at[group * ahead + j])
                    for half, w_C128 in enumerate(unpacked):
                        x_tile = x_smem.at[group, j, :, pl.ds(half * 128, 128)]
                        for w_smem in interpreted:  # where operands are in memory only
                            w_smem[group] = w_C128
                            w_C128 = w_smem.at[group]
                        plgpu.wgmma(sums_ref, w_C128, x_tile.transpose((1, 0)))
                    plgpu.wgmma_wait(0)

            sums_smem[group] = sums_ref[...]

        pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((CHANNELS, padded), jnp.float32))
        plgpu.commit_smem()
        plgpu.barrier_arrive(done)

        @pl.when(group == 0)
        def _() -> None:
            plgpu.barrier_wait(done)
            parts = [load(sums_smem.at[g], layout=plgpu.Layout.WGMMA) for g in range(WARPGROUPS)]
            store(out_ref.at[share, mine], functools.reduce(operator.add, parts))

    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    run = kernel_of(
        quantized_product,
        cost,
        out_type=jax.ShapeDtypeStruct((shares, channels, padded), jnp.float32),
        grid=(channels // CHANNELS, shares),
        grid_names=("program", "share"),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=(
            plgpu.SMEM((WARPGROUPS, ahead, padded, width), jnp.bfloat16, transforms=tiled),
            plgpu.SMEM((WARPGROUPS, CHANNELS, padded), jnp.float32),
            plgpu.Barrier(num_barriers=WARPGROUPS * ahead),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
            *([plgpu.SMEM((WARPGROUPS, CHANNELS, 128), jnp.bfloat16)] if interpret else []),
        ),
        interpret=interpret,
    )
    out_SNR = run(x_RK, values_NGb, scale_NG, *([] if minimum_NG is None else [minimum_NG]))
    return out_SNR.sum(axis=0).T[:rows]


def layout() -> Layout:
    """The layout of [C, 4, 16]: of each 16 channels of a warp, a lane has one group of two, 8 apart."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tiling = plgpu.Tiling(((64, 4, 16), (16, 4, 16), (8, 4, 16)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-9,), lane_dims=(-3, -2), vector_dim=-1)


def _unpack_interpreted(_: Layout, weight: list[Array], scales: list[Array]) -> list[Array]:
    """What `_unpack` computes."""
    if len(scales) == 2:
        numbers = jnp.concatenate([weight[0] & 15, weight[0] >> 4], axis=2).astype(jnp.float32)
        whole = numbers * scales[0][..., None] + scales[1][..., None]
    else:
        whole = jnp.concatenate(weight, axis=2).astype(jnp.float32) * scales[0][..., None]
    whole = whole.astype(jnp.bfloat16).reshape(CHANNELS, GROUPS, -1, 16, 2).transpose(2, 0, 3, 1, 4)
    return list(whole.reshape(-1, CHANNELS, 128))


def _unpack(layout_CL16: Layout, weight: list[Array], scales: list[Array]) -> list[Array]:
    """bfloat16 [C, 128], for every 32 numbers of a group: column 8 j + 2 l + e is number 2 j + e of lane l's group.

    Args:
      weight: [C, 4, 16] bytes, as many as a group has.
      scales: float32 [C, 4]: scales and, of int4, minima.
    """
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import arith, math, vector

    from .product_gpu import numbers_of

    int4 = len(scales) == 2
    count = len(weight) * (2 if int4 else 1) // 2
    operand = plgpu.Layout.WGMMA
    out_type = plgpu.ShapeDtypeStruct((CHANNELS, 128), jnp.bfloat16, layout=operand)
    arg_types = (*[layout_CL16] * len(weight), *[layout_CL16.reduce((2,))] * len(scales))

    @plgpu.inline_mgpu(arg_types=arg_types, return_type=(out_type,) * count)
    def inline(_: Any, *arrays: Any) -> Any:
        pair_float = ir.VectorType.get((2,), ir.F32Type.get())
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        words = ir.VectorType.get((4,), ir.IntegerType.get_signless(32))
        shape = operand.to_mgpu().registers_shape((CHANNELS, 128))
        out = [np.empty(shape, object) for _ in range(count)]
        for channel in range(2):  # of a lane: 8 apart
            scale, *minimum = [
                vector.extract(array.registers.reshape(2)[channel], [], [0]) for array in arrays[len(weight) :]
            ]
            base = [arith.subf(m, arith.mulf(scale, _float(128.0))) for m in minimum]
            found: list[ir.Value] = []
            for array in arrays[: len(weight)]:
                vector_16 = vector.bitcast(words, array.registers.reshape(2)[channel])
                by_word = [numbers_of(vector.extract(vector_16, [], [i]), int4) for i in range(4)]
                for part in range(2 if int4 else 1):
                    found += [number for word in by_word for number in word[part]]
            found = [math.fma(scale, n, base[0]) if int4 else arith.mulf(scale, n) for n in found]
            for i in range(0, len(found), 2):
                rounded = arith.truncf(pair, vector.from_elements(pair_float, found[i : i + 2]))
                out[i // 32].reshape(16, 2)[i % 32 // 2, channel] = rounded
        return tuple(mgpu.FragmentedArray(_registers=o, _layout=operand.to_mgpu(), _is_signed=None) for o in out)

    return list(inline(*weight, *scales))


def _float(x: float) -> "ir.Value":
    from jax.extend.mlir import ir
    from jax.extend.mlir.dialects import arith

    return arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), x))
