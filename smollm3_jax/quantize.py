"""The one product of activations with weights, plain or quantized."""

import jax.numpy as jnp
from flax import nnx
from jax import Array


def einsum(spec: str, x: Array, weight: nnx.Param) -> Array:
    """x times a weight, float32.

    Args:
      spec: einsum's; x's dimensions before the contracted ones are batch dimensions.
    """
    # XLA:CPU turns a whole bfloat16 matrix into float32 for a product with one row, not with two.
    alone = x.size == x.shape[-1] * (x.shape[-2] if _contracted(spec) == 2 else 1)
    if alone and x.dtype != jnp.float32:
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    out = jnp.einsum(spec, x, weight[...], preferred_element_type=jnp.float32)
    return out[:1] if alone else out


def _contracted(spec: str) -> int:
    """How many trailing dimensions of x the product sums over."""
    x, weight, _ = spec.replace("->", ",").replace("...", "").split(",")
    return len(set(x) & set(weight))
