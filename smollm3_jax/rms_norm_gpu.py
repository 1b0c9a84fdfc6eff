"""RMSNorm of one token on a GPU as one kernel, where XLA makes two, in Pallas through Triton."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from sharding.rules import Sharding

from .attention.paged_gpu import FIRST_JAX


def is_there(sharding: Sharding | None) -> bool:
    """Whether the kernel can be compiled for these devices: several of them would have to be told how to share it."""
    return (sharding is None or sharding.mesh.size == 1) and jax.__version_info__ >= FIRST_JAX


def rms_norm(
    x_11D: Array,
    weight_D: Array,
    eps: float,
    addends: tuple[Array, ...] = (),
    *,
    sharding: Sharding | None = None,
    interpret: bool = False,
) -> Array:
    """What `model._rms_norm` computes of one token; it has no gradient.

    addends: what x is the sum of, each of x's shape: they are added up here, so that no other kernel has to.
    """
    arrays = (weight_D, *(x.reshape(-1) for x in addends or (x_11D,)))
    kernel = pl.pallas_call(
        functools.partial(_rms_norm, eps),
        out_shape=jax.ShapeDtypeStruct(weight_D.shape, x_11D.dtype),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=4 * x_11D.size, transcendentals=1, bytes_accessed=(len(arrays) + 1) * x_11D.nbytes
        ),
        interpret=interpret,
    )
    if sharding is not None:
        kernel = sharding.shard_map(kernel, (sharding.spec(),) * len(arrays), sharding.spec())
    return kernel(*arrays).reshape(x_11D.shape)


def _rms_norm(eps: float, weight_ref: Any, *refs: Any) -> None:
    *x_refs, out_ref = refs
    (width,) = out_ref.shape
    tile = pl.next_power_of_2(width)
    lanes, there_D = pl.ds(0, tile), jnp.arange(tile) < width
    weight_D, *addends = (triton.load(ref.at[lanes], mask=there_D, other=0) for ref in (weight_ref, *x_refs))
    x_D = functools.reduce(jnp.add, addends)
    wide_D = x_D.astype(jnp.float32)
    wide_D = wide_D * jax.lax.rsqrt((wide_D * wide_D).sum() / width + eps)
    triton.store(out_ref.at[lanes], wide_D.astype(x_D.dtype) * weight_D, mask=there_D)
