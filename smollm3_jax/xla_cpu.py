"""Ways around what XLA:CPU does slowly, for programs that run there. They change no number, but the order of sums.

What they go around: XLA:CPU computes with 16-bit floats by turning whole operands into float32 first, also where an
operation reads or writes a small part of an array.

Shapes: N output channels, K inputs.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike


def named(x: Array, name: str, platform: str) -> Array:
    """`checkpoint_name`; on a CPU a policy keeps the bits (uint16) of 16-bit floats under that name.

    What a scan keeps for its backward pass is written, a layer at a time, into an array of all layers. If that holds
    bfloat16, XLA:CPU turns the whole of it into float32 and back for every layer.
    """
    return _through_bits(name, x) if keeps_bits(x, platform) else checkpoint_name(x, name)


def keeps_bits(x: Array, platform: str) -> bool:
    """Whether `named` keeps the bits of x."""
    return platform == "cpu" and x.dtype.itemsize == 2


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _through_bits(name: str, x: Array) -> Array:
    bits = checkpoint_name(_bits(x), name)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@_through_bits.defjvp
def _through_bits_jvp(name: str, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    bits = checkpoint_name(_bits(primals[0]), name)
    return jax.lax.bitcast_convert_type(bits, primals[0].dtype), tangents[0]


# Before, XLA:CPU goes through the whole of an array of 16-bit floats to write a part of it (tried: 0.10.2, 0.11.2).
WRITES_16_BITS_IN_PLACE = jax.__version_info__ >= (0, 11, 2)
# What holds the bits of a float there: which tells what they are of.
_HELD_AS = {jnp.dtype(jnp.bfloat16): jnp.dtype(jnp.uint16), jnp.dtype(jnp.float16): jnp.dtype(jnp.int16)}
_OF = {held: of for of, held in _HELD_AS.items()}


def held_as(dtype: DTypeLike, platform: str) -> np.dtype:
    """The dtype of an array that is written part by part, and holds values of `dtype`: on a CPU that would go through
    16-bit floats whole, an integer of their bits."""
    dtype = jnp.dtype(dtype)
    return dtype if platform != "cpu" or WRITES_16_BITS_IN_PLACE else _HELD_AS.get(dtype, dtype)


def as_held(x: Array, dtype: np.dtype) -> Array:
    """Values in the dtype of an array that holds them, which may be one of `held_as`."""
    of = _OF.get(dtype)
    return x.astype(dtype) if of is None else jax.lax.bitcast_convert_type(x.astype(of), dtype)


def values_of(held: Array) -> Array:
    """The floats whose bits an array holds; any other array as it is."""
    of = _OF.get(held.dtype)
    return held if of is None else jax.lax.bitcast_convert_type(held, of)


def _bits(x: Array) -> Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


@functools.cache
def processor() -> frozenset[str]:
    """What this processor has, in Linux's words ("avx512_vnni", "amx_tile"); nothing where Linux does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    flags = re.search(r"^flags\s*:(.*)", text, re.MULTILINE)
    return frozenset(flags[1].split() if flags else ())


def one_row_product(x_1K: Array, w_NK: Array) -> Array:
    """x w^T of one row of activations, float32 [1, N]. The forms differ by the rounding of float32 sums alone."""
    multiply = functools.partial(
        jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    N, K = w_NK.shape
    # With bfloat16 instructions alone it pays where a large matrix has more inputs than outputs: 2,048 x 11,008 takes
    # 1.6 ms in place of 2.8 (EPYC, jax 0.10.2; scripts/bench_products.py --as amx_tile); the demo's small ones lose.
    wide = x_1K.dtype == jnp.bfloat16 and K > N and N * K >= 2**22 and "avx512_bf16" in processor()
    if wide or "amx_tile" in processor():
        # With AMX fastest in every dtype: w x^T, of a second row as well.
        return multiply(w_NK, jnp.pad(x_1K, ((0, 1), (0, 0))))[:, 0][None]
    if x_1K.dtype == jnp.float32:
        return multiply(x_1K, w_NK)
    # For a product with one row XLA:CPU would first turn the whole matrix into float32; this goes through it once.
    w_NK, x_1K = jax.lax.optimization_barrier((w_NK, x_1K))
    return (w_NK.astype(jnp.float32) * x_1K.astype(jnp.float32)).sum(axis=1)[None]


def two_row_integer_product(x_2K: Array, w_NK: Array) -> Array:
    """x w^T of two rows of int8 with an int8 weight, int32 [2, N]: exact, and so the same in every form."""
    multiply = functools.partial(
        jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
    )
    if "amx_tile" in processor():
        # w x^T is faster; of a third row as well, or XLA, asked for its transpose, makes x w^T of it again.
        return multiply(w_NK, jnp.pad(x_2K, ((0, 1), (0, 0))))[:, :2].T
    # Larger matrices lose by it where there is no AMX (jax 0.12: 11,008 x 2,048 takes four times as long).
    small = w_NK.size <= 2**23 and "avx512_vnni" in processor()
    return multiply(w_NK, x_2K).T if small else multiply(x_2K, w_NK)


def held_until(x: Array, values: Array) -> Array:
    """The integer values, known only when x is: XLA:CPU would unpack all layers' weights ahead, and keep them."""
    never = (x[0, 0] > 1) & (x[0, 0] < -1)
    return values ^ never.astype(values.dtype)
