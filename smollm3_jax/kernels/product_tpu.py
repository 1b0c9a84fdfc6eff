"""The product of few rows with a quantized weight on a TPU: unpacked in the kernel, multiplied by the matrix unit.

Left to itself XLA for TPU multiplies a single row in the vector unit, integers one by one as float32, and copies int4
weights, transposed, before that. Here the integers go to the matrix unit as they are, which bfloat16 holds exactly.
Eight groups at a time meet the activations as eight rows of them, each of which is zero outside of one group: what
comes out are eight sums for each channel, to be multiplied with its scales. Of int4, q - 8 is multiplied, and the
minimum, with those 8, costs one number a group: sum x (s q + m) = s sum x (q - 8) + (m + 8 s) sum x.

Shapes: R rows of activations, N output channels, K inputs, G groups, B bytes of a channel, of which 8 groups have b;
P parts of an activation: the numbers in low bits and those in high bits; C channels of a block.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

# More rows are worth unpacking the weight for. With scales for groups each is eight rows of the matrix unit's.
ROWS = {True: 16, False: 128}
LANES = 128
SUBLANES = 8
BLOCKS = (256, 128)
# As many bytes of a channel go into one iteration, for the scheduler to overlap what is done with them.
BYTES = 512


def fits(channels: int, width: int, groups: int | None) -> bool:
    """Whether blocks divide a weight: its channels, bytes of a channel, and groups (None: one scale a channel)."""
    if channels % BLOCKS[-1]:
        return False
    if groups is None:
        return width % LANES == 0
    # Eight groups make whole tiles of lanes; where only four divide them, halves of groups do.
    return groups % 8 == 0 or (groups % 4 == 0 and width // groups >= 32)


def product(
    x_RK: Array,
    values_NB: Array,
    scale_NG: Array | None,
    minimum_NG: Array | None,
    cost: pl.CostEstimate | None = None,
    interpret: bool = False,
) -> Array:
    """x w^T, float32 [R, N], of a weight as QuantizedWeight has it, reshaped to matrices.

    Args:
      scale_NG: None leaves it to the caller, who has one for each channel.
    """
    from jax.experimental.pallas import tpu as pltpu

    (rows, inputs), (channels, width) = x_RK.shape, values_NB.shape
    groups, parts = 1 if scale_NG is None else scale_NG.shape[1], inputs // width
    block = next(block for block in BLOCKS if channels % block == 0)
    x = jnp.pad(x_RK, ((0, -rows % SUBLANES), (0, 0))) if scale_NG is None else x_RK
    x_PRB = x.reshape(-1, groups, parts, width // groups).transpose(2, 0, 1, 3).reshape(parts, -1, width)
    # XLA keeps the scales of groups with their channels along lanes: to turn them costs nothing.
    scales_GN = [_bits(x.T) for x in (scale_NG, minimum_NG) if x is not None]
    # Where eight do not divide the groups, halves of them are groups.
    halves = 1 if groups % SUBLANES == 0 else 2
    step = LANES if scale_NG is None else width // (groups * halves) * SUBLANES
    ahead = max(1, BYTES // step)

    def quantized_product(x_ref: jax.Ref, values_ref: jax.Ref, *refs: jax.Ref) -> None:
        stored, out_ref, scales = refs[: len(scales_GN)], refs[len(scales_GN)], refs[len(scales_GN) + 1 :]
        for ref, wide in zip(stored, scales, strict=True):
            wide[...] = jnp.repeat(_float32(ref[...]), halves, axis=0)
        row_8b = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, step), 0)
        own_8b = jax.lax.div(jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, step), 1), step // SUBLANES) == row_8b

        def add(sums: list[Array], i: Any) -> list[Array]:
            at = pl.ds(pl.multiple_of(i * step, LANES), step)
            numbers = [number.astype(x_RK.dtype) for number in _numbers(values_ref[:, at], parts)]
            if scale_NG is None:
                return [sums[0] + _dot(x_ref[0, :, at], numbers[0])]
            own = pl.ds(pl.multiple_of(i * SUBLANES, SUBLANES), SUBLANES)
            scale_8C, *minimum_8C = [wide[own] for wide in scales]
            out = []
            for r, sum_8C in enumerate(sums):
                for part, number in enumerate(numbers):
                    x_8b = jnp.where(own_8b, x_ref[part, pl.ds(r, 1), at].astype(jnp.float32), 0.0)
                    sum_8C += scale_8C * _dot(x_8b.astype(x_RK.dtype), number)
                    for minimum in minimum_8C:
                        sum_8C += (minimum + 8 * scale_8C) * x_8b.sum(axis=1, keepdims=True)
                out.append(sum_8C)
            return out

        def some(i: Any, sums: list[Array], count: int = ahead) -> list[Array]:
            for j in range(count):
                sums = add(sums, i * ahead + j)
            return sums

        steps = width // step
        zero = jnp.zeros((out_ref.shape[0] if scale_NG is None else SUBLANES, block), jnp.float32)
        sums = jax.lax.fori_loop(0, steps // ahead, some, [zero] * (1 if scale_NG is None else rows))
        sums = some(steps // ahead, sums, steps % ahead)
        if scale_NG is None:
            out_ref[...] = sums[0]
        for r in range(0 if scale_NG is None else rows):
            out_ref[pl.ds(r, 1), :] = sums[r].sum(axis=0, keepdims=True)

    def whole(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda n: (0,) * x.ndim)

    out_RN = pl.pallas_call(
        quantized_product,
        out_shape=jax.ShapeDtypeStruct((x_PRB.shape[1], channels), jnp.float32),
        grid=(channels // block,),
        in_specs=[
            whole(x_PRB),
            pl.BlockSpec((block, width), lambda n: (n, 0)),
            *[pl.BlockSpec((groups, block), lambda n: (0, n))] * len(scales_GN),
        ],
        out_specs=pl.BlockSpec((x_PRB.shape[1], block), lambda n: (0, n)),
        scratch_shapes=[pltpu.VMEM((groups * halves, block), jnp.float32)] * len(scales_GN),
        cost_estimate=cost,
        interpret=interpret,
    )(x_PRB, values_NB, *scales_GN)
    return out_RN[:rows]


def _dot(a_RK: Array, b_NK: Array) -> Array:
    # Of float32, all of it: the matrix unit's own precision is bfloat16's.
    precision = jax.lax.Precision.HIGHEST if a_RK.dtype == jnp.float32 else None
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(a_RK, b_NK, contract, precision=precision, preferred_element_type=jnp.float32)


def _numbers(bytes_: Array, parts: int) -> list[Array]:
    """float32: of int8 the number itself; of int4 q - 8 of the low and of the high bits."""
    if parts == 1:
        return [bytes_.astype(jnp.float32)]
    signed = jax.lax.bitcast_convert_type(bytes_ ^ 0x88, jnp.int8).astype(jnp.int32)
    return [((signed << 28) >> 28).astype(jnp.float32), (signed >> 4).astype(jnp.float32)]


def _bits(x: Array) -> Array:
    """float16 as int16: a TPU computes with no such floats."""
    return jax.lax.bitcast_convert_type(x, jnp.int16) if x.dtype == jnp.float16 else x


def _float32(x: Array) -> Array:
    """Of float32, or of float16's bits: 1 of sign, 5 of exponent, 10 of mantissa."""
    if x.dtype != jnp.int16:
        return x
    bits = x.astype(jnp.int32)
    # The exponent's bias is 15, and 127 in float32. Where it is 0, the mantissa counts by itself.
    normal = jax.lax.bitcast_convert_type(((bits & 0x7FFF) << 13) + (127 - 15 << 23), jnp.float32)
    size = jnp.where(bits & 0x7C00 != 0, normal, (bits & 0x3FF).astype(jnp.float32) * 2.0**-24)
    return jnp.where(bits < 0, -size, size)
