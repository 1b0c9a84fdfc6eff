"""Ways around what XLA:CPU does slowly. They change no number; elsewhere nothing calls them.

What they go around: XLA:CPU computes with 16-bit floats by turning whole operands into float32 first, also where an
operation reads or writes a small part of an array.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name


def named_bits(x: Array, name: str) -> Array:
    """`checkpoint_name` for 16-bit floats: x, of which a policy keeps the bits (uint16) under that name.

    What a scan keeps for its backward pass is written, a layer at a time, into an array of all layers. If that holds
    bfloat16, XLA:CPU turns the whole of it into float32 and back for every layer.
    """
    return _through_bits(name, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _through_bits(name: str, x: Array) -> Array:
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@_through_bits.defjvp
def _through_bits_jvp(name: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    bits = checkpoint_name(jax.lax.bitcast_convert_type(primals[0], jnp.uint16), name)
    return jax.lax.bitcast_convert_type(bits, primals[0].dtype), tangents[0]
