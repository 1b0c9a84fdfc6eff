"""The one product of activations with weights, plain or quantized."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


def linear(x: Array, weight: nnx.Param, contracted: int = 1) -> Array:
    """Sums over the last `contracted` dimensions of x and of the weight: float32 [..., *out]."""
    w = weight[...]
    split = w.ndim - contracted
    x2 = x.reshape(-1, math.prod(w.shape[split:]))
    w2 = w.reshape(-1, x2.shape[1])
    rows = x2.shape[0]
    # XLA:CPU turns a whole bfloat16 matrix into float32 for a product with one row, not with two.
    if rows == 1 and x.dtype != jnp.float32:
        x2 = jnp.concatenate([x2, jnp.zeros_like(x2)])
    out = jax.lax.dot_general(x2, w2, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return out[:rows].reshape(*x.shape[: x.ndim - contracted], *w.shape[:split])
