"""RMSNorm of one token on a GPU as one kernel, where XLA makes two, in Pallas through Triton."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from sharding.rules import Sharding


def rms_norm(
    x_11D: Array,
    weight_D: Array,
    eps: float,
    addends: tuple[Array, ...] = (),
    *,
    sharding: Sharding | None = None,
    interpret: bool = False,
) -> Array:
    """What `rms_norm.rms_norm` computes of one token; it has no gradient. D is a power of two, as Triton's widths are.

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


def _rms_norm(eps: float, weight_ref: jax.Ref, *refs: jax.Ref) -> None:
    *x_refs, out_ref = refs
    x_D = functools.reduce(jnp.add, (ref[...] for ref in x_refs))
    wide_D = x_D.astype(jnp.float32)
    wide_D = wide_D * jax.lax.rsqrt((wide_D * wide_D).sum() / wide_D.size + eps)
    out_ref[...] = wide_D.astype(x_D.dtype) * weight_ref[...]
