"""RMSNorm, with transformers' rounding.

Shapes: B batch, T length, D width.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from sharding.rules import Sharding

from . import nvidia


def norm_for(width: int, tokens: int, platform: str, sharding: Sharding | None) -> Callable[..., Array]:
    """`rms_norm`, or its kernel: for one token on one GPU. The kernel has no gradient.

    Args:
      width: D; tokens: how many the norm is of; platform: what computes it, "cpu", "tpu" or "gpu".
    """
    alone = sharding is None or sharding.mesh.size == 1
    fits = width.bit_count() == 1
    if alone and fits and tokens == 1 and platform == "gpu" and nvidia.kernels_fit():
        from .kernels import rms_norm_gpu

        return functools.partial(rms_norm_gpu.rms_norm, sharding=sharding)
    return rms_norm


def rms_norm(x_BTD: Array, weight_D: Array, eps: float, addends: tuple[Array, ...] = ()) -> Array:
    """RMSNorm with transformers' rounding: variance in float32, cast to x's dtype, then the weight.

    addends: what x is the sum of, which only a kernel asks for.
    """
    x = x_BTD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return _scaled(x.astype(x_BTD.dtype), weight_D)


def widened(x: Array, like: Array) -> Array:
    """x with as many dimensions as `like`, the new ones in front: a caller may forbid JAX to do that by itself."""
    return jnp.expand_dims(x, tuple(range(like.ndim - x.ndim)))


@jax.custom_vjp
def _scaled(x_BTD: Array, weight_D: Array) -> Array:
    """x times the weight, whose gradient is added up over all tokens in float32."""
    return x_BTD * widened(weight_D, x_BTD)


def _scaled_forward(x_BTD: Array, weight_D: Array) -> tuple[Array, tuple[Array, Array]]:
    return x_BTD * widened(weight_D, x_BTD), (x_BTD, weight_D)


def _scaled_backward(kept: tuple[Array, Array], gradient_BTD: Array) -> tuple[Array, Array]:
    x_BTD, weight_D = kept
    by_token_BTD = gradient_BTD.astype(jnp.float32) * x_BTD.astype(jnp.float32)
    return gradient_BTD * widened(weight_D, gradient_BTD), by_token_BTD.sum(axis=(0, 1)).astype(weight_D.dtype)


_scaled.defvjp(_scaled_forward, _scaled_backward)
