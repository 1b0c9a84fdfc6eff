"""Quantized weights, and the one product of activations with weights, plain or quantized.

Schemes (config.WEIGHT_SCHEMES):
  int8: one scale for each output channel.
  int8-g64, int8-g32: one scale for each 64 or 32 numbers along the input.
  int4: a scale and a minimum for each 32 numbers along the input, as GGUF's Q4_1 has them. The embedding
    and the head are int8 then: what is looked up, and what the logits are made of, is worth the byte.

Shapes: R rows of activations, N output channels, K inputs, G inputs that share a scale.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from sharding.rules import Sharding, platform_of

from . import xla_cpu
from .config import WEIGHT_SCHEMES
from .kernels.product import WeightSharding, unpacked_product

# On CPU, at most this many rows of activations are multiplied as integers; for more, unpacking the weight pays.
INTEGER_ROWS = 128


class QuantizedWeight(nnx.Module):
    """A weight [*out, *in] whose last dimensions are the contracted ones, in place of an nnx.Param.

    values: int8 [*out, *in]; for int4 uint8 [*out, *in / 2], byte j of a group holding its numbers j (low
      bits) and j + 16 (high bits).
    scale: float32 [*out] for int8; [*out, *in / G] for groups, float16 for int4.
    minimum: what int4 adds, like the scale; else None.
    """

    def __init__(self, scheme: str, values: nnx.Param, scale: nnx.Param, minimum: nnx.Param | None = None):
        self.scheme = scheme
        self.values, self.scale, self.minimum = values, scale, minimum

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this stands for."""
        shape = self.values.shape
        return (*shape[:-1], 2 * shape[-1]) if self.minimum is not None else shape


Weight = nnx.Param | QuantizedWeight


def linear(
    x: Array,
    weight: Weight,
    contracted: int = 1,
    platform: str | None = None,
    sharding: Sharding | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Array:
    """Sums over the last `contracted` dimensions of x and of the weight: [..., *out] in `dtype`.

    Products have operands in x's dtype and sums in float32, forward and backward: the output's gradient is rounded
    to x's dtype before its two products, and each of their results once, to the dtype of what it is the gradient of.
    The gradient of x is that of the dequantized weight also where the forward product rounds the activations. So are
    those of a quantized weight's scale and minimum; its integers have none.

    Args:
      platform: what this will run on; None is where the weight lies.
      sharding: where the weight lies; None on one device.
      dtype: what the float32 sums are rounded to.
    """
    split = len(weight.shape) - contracted
    x_RK = x.reshape(-1, math.prod(weight.shape[split:]))
    platform = platform or platform_of(sharding)
    if isinstance(weight, QuantizedWeight):
        values, scale = weight.values[...], weight.scale[...]
        minimum = None if weight.minimum is None else weight.minimum[...]
        layout = None
        if sharding is not None:
            # The axes of a layer in a stack are those of the stack, without its first.
            layout = WeightSharding(sharding, weight.values.get_metadata("axes")[-values.ndim :])
        out_RN: Array = _quantized_product(weight.scheme, platform, layout, x_RK, values, scale, minimum)
    else:
        out_RN = _product(platform, x_RK, weight[...].reshape(-1, x_RK.shape[1]), dtype)
    return out_RN.reshape(*x.shape[: x.ndim - contracted], *weight.shape[:split]).astype(dtype)


def _dot(a: Array, b: Array, contract_a: int, contract_b: int, written: DTypeLike = jnp.float32) -> Array:
    """The product of two matrices, added up in float32 and written in another dtype."""
    return jax.lax.dot_general(a, b, (((contract_a,), (contract_b,)), ((), ())), preferred_element_type=written)


def _written(platform: str, dtype: DTypeLike) -> DTypeLike:
    """What a product is written in that is to be rounded to a dtype. A GPU's kernels add up in float32 and round what
    they write; else the sums would go through memory. On a CPU a product of bfloat16 sums is slower, or rounds more."""
    return dtype if platform == "gpu" else jnp.float32


def _product(platform: str, x_RK: Array, w_NK: Array, dtype: DTypeLike = jnp.float32) -> Array:
    """x w^T, [R, N], added up in float32; rounded to dtype where that costs nothing."""
    return _product_of(platform, jnp.dtype(_written(platform, dtype)), x_RK, w_NK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product_of(platform: str, written: DTypeLike, x_RK: Array, w_NK: Array) -> Array:
    """Left to itself, autodiff would widen x and w to meet a float32 output's gradient."""
    return _plain_product(platform, x_RK, w_NK, written)


def _plain_product(platform: str, x_RK: Array, w_NK: Array, written: DTypeLike = jnp.float32) -> Array:
    if platform == "cpu" and x_RK.shape[0] == 1:
        return xla_cpu.one_row_product(x_RK, w_NK)
    return _dot(x_RK, w_NK, 1, 1, written)


def _product_forward(platform: str, written: DTypeLike, x_RK: Array, w_NK: Array) -> tuple[Array, tuple[Array, Array]]:
    return _plain_product(platform, x_RK, w_NK, written), (x_RK, w_NK)


def _product_backward(
    platform: str, _: DTypeLike, kept: tuple[Array, Array], gradient_RN: Array
) -> tuple[Array, Array]:
    x_RK, w_NK = kept
    gradient_RN = gradient_RN.astype(x_RK.dtype)
    w_gradient_NK = _dot(gradient_RN, x_RK, 0, 0, _written(platform, w_NK.dtype)).astype(w_NK.dtype)
    if platform == "gpu":
        # Where the inputs lie on several devices the sum over them comes in columns, and would go on so: then the
        # optimizer could not update its arrays in place, and each was copied.
        w_gradient_NK = with_layout_constraint(w_gradient_NK, Layout(major_to_minor=(0, 1)))
    x_gradient_RK = _dot(gradient_RN, w_NK, 1, 0, _written(platform, x_RK.dtype)).astype(x_RK.dtype)
    return x_gradient_RK, w_gradient_NK


_product_of.defvjp(_product_forward, _product_backward)


def kernel(scheme: str | None, rows: int, platform: str) -> str:
    """How this many rows of activations are multiplied with a weight.

    "plain", for one that is not quantized; "integer": the activations are quantized too; "weight-only": the
    integers are converted for the product, and what comes out is scaled; "dequantized": the weight is.
    """
    if scheme is None:
        return "plain"
    if WEIGHT_SCHEMES[scheme] is not None:
        return "dequantized"
    return "integer" if platform == "cpu" and rows <= INTEGER_ROWS else "weight-only"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _quantized_product(
    scheme: str,
    platform: str,
    layout: WeightSharding | None,
    x_RK: Array,
    values: Array,
    scale: Array,
    minimum: Array | None,
) -> Array:
    """x w^T in float32, [R, N], of what the weight's parts stand for."""
    out_RN = unpacked_product(x_RK, values, scale, minimum, WEIGHT_SCHEMES[scheme], platform, layout)
    if out_RN is not None:
        return out_RN
    by = kernel(scheme, x_RK.shape[0], platform)
    if by == "integer":
        return _integer_product(x_RK, values.reshape(-1, x_RK.shape[1])) * scale.reshape(1, -1)
    if platform == "cpu":
        values = xla_cpu.held_until(x_RK, values)
    if by == "weight-only":
        w_NK = values.astype(x_RK.dtype).reshape(-1, x_RK.shape[1])
        return _plain_product(platform, x_RK, w_NK) * scale.reshape(1, -1)
    w_NK = dequantize(values, scale, minimum).astype(x_RK.dtype).reshape(-1, x_RK.shape[1])
    return _plain_product(platform, x_RK, w_NK)


def _quantized_forward(
    scheme: str, platform: str, layout: WeightSharding | None, *arrays: Array
) -> tuple[Array, tuple]:
    return _quantized_product(scheme, platform, layout, *arrays), arrays


def _quantized_backward(scheme: str, platform: str, _: WeightSharding | None, kept: tuple, gradient_RN: Array) -> tuple:
    x_RK, values, scale, minimum = kept
    w_NK = values.reshape(gradient_RN.shape[1], -1)
    if platform == "cpu":
        w_NK = xla_cpu.held_until(gradient_RN, w_NK)
    scale_Nx, minimum_Nx = (None if x is None else x.reshape(len(w_NK), -1) for x in (scale, minimum))
    if WEIGHT_SCHEMES[scheme] is None:
        # The integers are exact in every dtype; the scale, one for each output channel, joins the gradient.
        scaled_RN = (gradient_RN * scale.reshape(1, -1)).astype(x_RK.dtype)
        into_x_RK = _dot(scaled_RN, w_NK.astype(x_RK.dtype), 1, 0)
    else:
        whole_NK = dequantize(w_NK, scale_Nx, minimum_Nx).astype(x_RK.dtype)
        into_x_RK = _dot(gradient_RN.astype(x_RK.dtype), whole_NK, 1, 0)
    # What only training of the scales would ask for; otherwise nothing uses it, and the compiler drops it.
    into_w_NK = _dot(gradient_RN.astype(x_RK.dtype), x_RK, 0, 0)
    into_parts = jax.vjp(lambda *parts: dequantize(w_NK, *parts), scale_Nx, minimum_Nx)[1](into_w_NK)
    into_scale, into_minimum = (
        None if x is None else y.reshape(x.shape) for x, y in zip((scale, minimum), into_parts, strict=True)
    )
    return into_x_RK.astype(x_RK.dtype), np.zeros(values.shape, jax.dtypes.float0), into_scale, into_minimum


_quantized_product.defvjp(_quantized_forward, _quantized_backward)


def _integer_product(x_RK: Array, w_NK: Array) -> Array:
    """x w^T, float32 [R, N], of an int8 w: x as two int8 rows, the second the remainder of the first.

    Together they hold nearly 16 bits of each activation relative to the row's largest. One row becomes
    two, which is also the fewest that XLA:CPU multiplies fast.
    """
    x = x_RK.astype(jnp.float32)
    step_R1 = jnp.max(jnp.abs(x), axis=1, keepdims=True) / 127
    x = x / jnp.where(step_R1 == 0, 1, step_R1)
    high = jnp.round(x)
    rows_2RK = jnp.concatenate([high, jnp.round((x - high) * 254)]).astype(jnp.int8)
    if len(rows_2RK) == 2:
        out_2RN = xla_cpu.two_row_integer_product(rows_2RK, w_NK)
    else:
        out_2RN = jax.lax.dot_general(rows_2RK, w_NK, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    high_RN, low_RN = jnp.split(out_2RN.astype(jnp.float32), 2)
    return (high_RN + low_RN / 254) * step_R1


def lookup(table: Weight, index: Array, dtype: DTypeLike, platform: str | None = None) -> Array:
    """Rows of a weight [N, K]: [*index.shape, K] in dtype; platform as for `linear`."""
    platform = platform or jax.default_backend()
    if platform != "cpu" and index.size == 1:
        # One row would be a slice, for which XLA for TPU first copies a quantized table, and XLA for GPU gathers from
        # all devices one that they share; two rows are looked up where they lie.
        return lookup(table, jnp.repeat(index.reshape(1), 2), dtype, platform)[:1].reshape(*index.shape, -1)
    if not isinstance(table, QuantizedWeight):
        if platform != "cpu":
            return table[...][index]
        # Always so, but known only when the program runs: inside a condition XLA:CPU looks up the rows it is
        # asked for, where in a loop it would turn the whole table into float32 ahead, and keep it.
        nothing = jnp.zeros((*index.shape, table.shape[1]), table.dtype)
        return jax.lax.cond(index.min() >= 0, lambda: table[...][index], lambda: nothing)
    # The barrier keeps XLA:CPU from turning the whole table into floats before it looks up a few rows.
    parts = [part if part is None else part[...][index] for part in (table.values, table.scale, table.minimum)]
    return dequantize(*jax.lax.optimization_barrier(parts)).astype(dtype)


def dequantize(values: Any, scale: Any, minimum: Any = None) -> Any:
    """The weight in float32, of numpy's arrays or JAX's; shapes as in QuantizedWeight, with any leading dimensions."""
    xp = np if isinstance(values, np.ndarray) else jnp
    if scale.ndim < values.ndim:
        return values.astype(np.float32) * scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))
    grouped = values.reshape(*scale.shape, -1)
    if minimum is not None:
        grouped = xp.concatenate([grouped & 15, grouped >> 4], axis=-1)
    out = grouped.astype(np.float32) * scale[..., None].astype(np.float32)
    if minimum is not None:
        out = out + minimum[..., None].astype(np.float32)
    return out.reshape(*scale.shape[:-1], -1)


def scheme_of(param: str, scheme: str) -> str:
    """How a model of this scheme stores one of its weights ("embed", "head", "layers.q", ...)."""
    return "int8" if scheme == "int4" and param in ("embed", "head") else scheme


def quantize_weight(weight: nnx.Param, scheme: str, contracted: int = 1) -> QuantizedWeight:
    """A parameter quantized on the device, by its range alone: for models that are not loaded."""
    w, axes = weight[...], weight.get_metadata("axes")
    w_NK = w.reshape(-1, math.prod(w.shape[w.ndim - contracted :]))
    scale, minimum = range_scales(w_NK, scheme)
    values = to_integers(w_NK, scale, minimum)

    def param(array: Array, by_channel: bool = False) -> nnx.Param:
        kept = w.ndim - contracted
        shape = w.shape[:kept] if by_channel else (*w.shape[:-1], w.shape[-1] * array.shape[-1] // w_NK.shape[-1])
        return nnx.Param(array.reshape(shape), axes=axes[: len(shape)])

    scale = param(scale, WEIGHT_SCHEMES[scheme] is None)
    return QuantizedWeight(scheme, param(values), scale, None if minimum is None else param(minimum))


def range_scales(w_NK: Any, scheme: str) -> tuple[Any, Any]:
    """(scale, minimum or None) that just span the numbers; shapes as in QuantizedWeight."""
    xp, group = np if isinstance(w_NK, np.ndarray) else jnp, WEIGHT_SCHEMES[scheme]
    if group is None:
        return xp.abs(w_NK).max(axis=-1).astype(np.float32) / 127, None
    grouped = w_NK.reshape(w_NK.shape[0], -1, group).astype(np.float32)
    if scheme != "int4":
        return xp.abs(grouped).max(axis=-1) / 127, None
    low, high = grouped.min(axis=-1), grouped.max(axis=-1)
    return ((high - low) / 15).astype(np.float16), low.astype(np.float16)


def best_scales(w_NK: np.ndarray, scheme: str) -> tuple[np.ndarray, np.ndarray | None]:
    """As `range_scales`, but for int4 those that lose least, on the host.

    Numbers that come from such a scale and minimum in float16, as all of Q4_1 do, are met again exactly.
    """
    scale, minimum = range_scales(w_NK, scheme)
    if minimum is None:
        return scale, None
    w_MG = w_NK.reshape(scale.size, -1).astype(np.float32)
    found = np.stack([scale, minimum]).reshape(2, -1).astype(np.float32)
    bound_M = 2.0**-22 * np.abs(w_MG).max(axis=-1)
    on_grid = np.abs(_rounded(w_MG, *found)[1]).max(axis=-1) <= bound_M
    rest = np.flatnonzero(~on_grid)
    some = rest[:32]  # by chance no group is on a grid: where none of these is, none will be
    if rest.size and _grid(w_MG[some], found[:, some], bound_M[some])[1].any():
        found[:, rest], on_grid[rest] = _grid(w_MG[rest], found[:, rest], bound_M[rest])
        rest = np.flatnonzero(~on_grid)
    if rest.size:
        found[:, rest] = _least_squares(w_MG[rest], found[:, rest])
    scale, minimum = found.astype(np.float16).reshape(2, *scale.shape)
    return scale, minimum


def _rounded(w_MG: np.ndarray, scale_M: np.ndarray, minimum_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(steps 0 to 15 that come closest to w, what remains)."""
    scale_M1, minimum_M1 = scale_M[:, None], minimum_M[:, None]
    steps_MG = np.clip(np.rint((w_MG - minimum_M1) / np.where(scale_M1 == 0, np.float32(1), scale_M1)), 0, 15)
    return steps_MG, steps_MG * scale_M1 + minimum_M1 - w_MG


def _half(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


def _grid(w_MG: np.ndarray, found: np.ndarray, bound_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and minima [2, M] for groups that do not use the whole range of steps, and where they were found."""
    found, done_M = found.copy(), np.zeros(len(w_MG), bool)
    low_M, high_M = w_MG.min(axis=-1), w_MG.max(axis=-1)
    for span in range(14, 0, -1):
        scale_M = _half((high_M - low_M) / span)
        fits_M = ~done_M & (np.abs(_rounded(w_MG, scale_M, low_M)[1]).max(axis=-1) <= bound_M)
        for first in range(16 - span if fits_M.any() else 0):  # the step that the lowest number is on
            minimum_M = _half(low_M - first * scale_M)
            hits_M = fits_M & ~done_M & (np.abs(minimum_M + first * scale_M - low_M) <= bound_M)
            found[:, hits_M] = scale_M[hits_M], minimum_M[hits_M]
            done_M |= hits_M
    return found, done_M


def _least_squares(w_MG: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Scales and minima [2, M]: the line through steps and numbers, and the steps closest to it, in turns."""
    start, found = found, found.copy()
    error_M = np.square(_rounded(w_MG, *found)[1]).sum(axis=-1)
    mean_M1 = w_MG.mean(axis=-1, keepdims=True)
    for shrink in (1.0, 0.9):  # of the range; what lies outside is clipped
        scale_M, minimum_M = start[0] * shrink, start[1] + start[0] * (15 * (1 - shrink) / 2)
        steps_MG = _rounded(w_MG, scale_M, minimum_M)[0]
        for _ in range(3):
            middle_M1 = steps_MG.mean(axis=-1, keepdims=True)
            steps_MG = steps_MG - middle_M1
            variance_M = np.square(steps_MG).sum(axis=-1)
            slope_M = (steps_MG * (w_MG - mean_M1)).sum(axis=-1) / np.where(variance_M == 0, np.float32(1), variance_M)
            scale_M = _half(slope_M)
            minimum_M = _half(mean_M1[:, 0] - scale_M * middle_M1[:, 0])
            steps_MG, rest_MG = _rounded(w_MG, scale_M, minimum_M)
            new_M = np.square(rest_MG).sum(axis=-1)
            better_M = new_M < error_M
            found[:, better_M] = scale_M[better_M], minimum_M[better_M]
            error_M = np.where(better_M, new_M, error_M)
    return found


def to_integers(w_NK: Any, scale: Any, minimum: Any = None) -> Any:
    """The values, int8 [N, K] or uint8 [N, K / 2], that come closest to w with these scales."""
    xp = np if isinstance(w_NK, np.ndarray) else jnp
    grouped = w_NK.reshape(w_NK.shape[0], 1 if scale.ndim == 1 else scale.shape[1], -1).astype(np.float32)
    scale = scale.reshape(grouped.shape[:2])[..., None].astype(np.float32)
    if minimum is not None:
        grouped = grouped - minimum[..., None].astype(np.float32)
    steps = xp.rint(grouped / xp.where(scale == 0, np.float32(1), scale))
    if minimum is None:
        return xp.clip(steps, -127, 127).astype(np.int8).reshape(w_NK.shape)
    steps = xp.clip(steps, 0, 15).astype(np.uint8)
    half = steps.shape[-1] // 2
    return (steps[..., :half] | steps[..., half:] << 4).reshape(w_NK.shape[0], -1)
