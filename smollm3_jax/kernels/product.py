"""Kernels for the products of few rows with quantized weights, which they unpack in registers, never to memory.

What computes is decided when a function is traced. Left to itself XLA for GPU writes the largest grouped weights to
memory, unpacked to bfloat16, in every step; XLA for TPU multiplies single rows in the vector unit, and transposes int4
weights before. Many rows are worth that: what bounds them is the product.

Shapes: R rows of activations, N output channels, K inputs, G groups of inputs.
"""

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from sharding.rules import Sharding

from .. import nvidia
from ..logs import say_once
from . import product_gpu, product_tpu, product_wgmma

log = logging.getLogger(__name__)


class WeightSharding(NamedTuple):
    """A weight's layout: the mesh and rules, and the logical axes of its values."""

    sharding: Sharding
    axes: tuple[str, ...]


def unpacked_product(
    x_RK: Array,
    values: Array,
    scale: Array,
    minimum: Array | None,
    group: int | None,
    platform: str,
    layout: WeightSharding | None,
) -> Array | None:
    """x w^T, float32 [R, N], by a kernel; None where none takes it, which is said once if the rows are few.

    On several devices each multiplies its part of the rows, channels and inputs, and sums over inputs are added up
    in float32: XLA itself does not partition kernels.

    Args:
      values, scale, minimum: as in quantize.QuantizedWeight, of any dimensions before the contracted ones.
      group: inputs that share a scale; None: all of an output channel's do.
      platform: "gpu" and "tpu" have kernels. XLA for GPU needs none for one scale a channel.
      layout: the weight's; None on one device.
    """
    (rows, inputs), channels = x_RK.shape, scale.size // (x_RK.shape[1] // group if group else 1)
    dims: dict[str, tuple[str, ...]] = {"rows": (), "channels": (), "inputs": ()}
    split = None if layout is None or layout.sharding.mesh.size == 1 else layout
    if split is not None:
        dims = _mesh_axes(rows, channels, values, *split)
        rows, channels, inputs = (
            size // math.prod(split.sharding.mesh.shape[axis] for axis in axes)
            for size, axes in zip((rows, channels, inputs), dims.values(), strict=True)
        )
    together = [axis for axes in dims.values() for axis in axes]
    obstacles = {"two dimensions on one axis of the mesh": len(set(together)) < len(together)}
    width = inputs // (1 if minimum is None else 2)
    kernel = _kernel(rows, channels, inputs, width, x_RK.dtype, group, platform, layout, obstacles)
    if kernel is None:
        return None

    def part(x_RK: Array, *parts: Array) -> Array:
        values, scale, *rest = (x.reshape(channels, -1) for x in parts)
        cost = _cost(x_RK, values, scale, *rest)
        if group is None:
            out_RN = kernel(x_RK, values, None, None, cost) * scale[:, 0][None]
        else:
            out_RN = kernel(x_RK, values, scale, rest[0] if rest else None, cost)
        return jax.lax.psum(out_RN, dims["inputs"]) if dims["inputs"] else out_RN

    arrays = [x_RK, values, scale, *([] if minimum is None else [minimum])]
    if split is None:
        return part(*arrays)
    by_row, by_channel, by_input = (axes or None for axes in dims.values())
    specs = (PartitionSpec(by_row, by_input), *(split.sharding.spec(*split.axes[: x.ndim]) for x in arrays[1:]))
    return split.sharding.shard_map(part, specs, PartitionSpec(by_row, by_channel))(*arrays)


def _mesh_axes(
    rows: int, channels: int, values: Array, sharding: Sharding, axes: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """What splits a product's dimensions: of the weight's, the first kept and the first contracted one may be split."""
    kept = next(i for i in range(values.ndim) if math.prod(values.shape[:i]) == channels)
    return {
        "rows": sharding.mesh_axes(sharding.fitting("batch", rows)),
        "channels": sharding.mesh_axes(axes[0]),
        "inputs": sharding.mesh_axes(axes[kept]),
    }


def _kernel(
    rows: int,
    channels: int,
    inputs: int,
    width: int,
    dtype: DTypeLike,
    group: int | None,
    platform: str,
    layout: WeightSharding | None,
    obstacles: dict[str, bool],
) -> Callable[..., Array] | None:
    """The kernel for a device's part of a product; None if there is none, or one of the obstacles.

    Args:
      width: bytes of a channel.
    """
    groups = None if group is None else inputs // group
    dtypes: tuple[DTypeLike, ...] = (jnp.bfloat16, jnp.float32)
    match platform:
        case "gpu" if groups is not None and rows <= product_wgmma.ROWS:
            generation, _ = nvidia.compute_capability(layout and layout.sharding)
            if rows <= product_gpu.ROWS:
                kernel, fits = product_gpu.product, product_gpu.geometry(rows, channels, groups) is not None
                obstacles["a device before Hopper"] = generation < 9
            else:
                kernel, fits = product_wgmma.product, product_wgmma.fits(channels, groups)
                obstacles["a device other than Hopper"] = generation != 9
                dtypes = (jnp.bfloat16,)
            obstacles[f"jax {jax.__version__}"] = not nvidia.kernels_fit()
        case "tpu" if rows <= product_tpu.ROWS[groups is not None]:
            kernel, fits = product_tpu.product, product_tpu.fits(channels, width, groups)
        case _:
            return None
    obstacles[f"{rows} rows of {dtype}"] = dtype not in dtypes
    obstacles[f"{channels} output channels of {inputs} inputs"] = not fits or inputs % (group or 1) != 0
    found = tuple(what for what, there in obstacles.items() if there)
    if found:
        instead = "plain XLA computes the product, which is slower"
        say_once(log, logging.INFO, f"the kernel for quantized weights does not take {' or '.join(found)}: {instead}")
    return None if found else kernel


def _cost(x_RK: Array, values: Array, *scales: Array) -> pl.CostEstimate:
    """A product's operations, and the bytes of the activations, the weight's parts and the float32 output."""
    (rows, inputs), channels = x_RK.shape, len(values)
    moved = sum(x.size * x.dtype.itemsize for x in (x_RK, values, *scales)) + 4 * rows * channels
    return pl.CostEstimate(flops=2 * rows * inputs * channels, bytes_accessed=moved, transcendentals=0)
