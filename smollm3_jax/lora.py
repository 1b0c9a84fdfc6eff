"""Low-rank adapters in the model's own tree: a weight that stays as it is, and what is learned beside it.

LoRA (Hu et al. 2021, arXiv 2106.09685) adds scale * B A to a weight; DoRA (Liu et al. 2024, arXiv 2402.09353) also
learns the length of each output channel's row.

For serving, adapters of several models lie beside one weight, and each sequence adds its own.

Shapes: r rank, N output channels, K inputs, A adapters, B sequences, T tokens of each.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from sharding.rules import Sharding

from .quantize import QuantizedWeight, Weight, dequantize, linear

T = TypeVar("T")


class LoraWeight(nnx.Module):
    """In place of a weight [*out, *in] of a layer; stacked layers have another dimension in front of each array.

    base: the weight, plain or quantized.
    a: [r, *in]; b: [*out, r].
    magnitude: DoRA's, float32 [*out]; None for LoRA.
    seed: key data, uint32 [2], of the dropout of one step; None drops nothing.
    scale: of the addition; dropout: the share of its inputs that is dropped in training.
    """

    def __init__(
        self,
        base: Weight,
        a: nnx.Param,
        b: nnx.Param,
        magnitude: nnx.Param | None = None,
        seed: nnx.Variable | None = None,
        *,
        scale: float,
        dropout: float = 0.0,
    ):
        self.base, self.a, self.b, self.magnitude, self.seed = base, a, b, magnitude, seed
        self.scale, self.dropout = scale, dropout

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this stands for."""
        return self.base.shape

    def replaced(self, **parts: object) -> "LoraWeight":
        """The same with other parts."""
        own = {name: getattr(self, name) for name in ("base", "a", "b", "magnitude", "seed", "scale", "dropout")}
        return LoraWeight(**{**own, **parts})  # pyright: ignore[reportArgumentType]


class LoraStack(nnx.Module):
    """In place of a weight [*out, *in] of one layer that several models share: each adds an adapter of its own.

    base: the weight, plain or quantized.
    a: [A, r, *in]; b: [*out, A, r], which holds the scales; all are finite. Adapters of smaller rank, or without this
      weight, are filled up with zeros.
    number: int32 [B], which adapter each sequence adds, from 1; 0 adds nothing. None: no sequence adds any.
    """

    def __init__(self, base: Weight, a: nnx.Param, b: nnx.Param, number: nnx.Variable | None = None):
        self.base, self.a, self.b, self.number = base, a, b, number

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that this stands for."""
        return self.base.shape

    def replaced(self, **parts: object) -> "LoraStack":
        """The same with other parts."""
        own = {name: getattr(self, name) for name in ("base", "a", "b", "number")}
        return LoraStack(**{**own, **parts})  # pyright: ignore[reportArgumentType]


def is_special(x: object) -> bool:
    """Whether a node of a model's tree is a weight of several arrays."""
    return isinstance(x, QuantizedWeight | LoraWeight | LoraStack)


def in_dtype(tree: T, dtype: DTypeLike) -> T:
    """A model, or a part of it, with what is not quantized in another dtype; DoRA's lengths stay float32, of which
    every number of an output is made."""

    def cast(x: object) -> object:
        if isinstance(x, LoraWeight | LoraStack):
            parts = {name: in_dtype(getattr(x, name), dtype) for name in ("base", "a", "b")}
            return x.replaced(**parts)
        return x if isinstance(x, QuantizedWeight) else x.astype(dtype)  # pyright: ignore

    return jax.tree.map(cast, tree, is_leaf=is_special)


def adapted(x: Array, weight: LoraWeight, contracted: int = 1, sharding: Sharding | None = None) -> Array:
    """As `quantize.linear`, of the weight and its adapter: float32 [..., *out], not yet rounded."""
    out = linear(x, weight.base, contracted, sharding=sharding)
    low = linear(_dropped(x, weight), weight.a, contracted, sharding=sharding, dtype=x.dtype)
    out = out + jnp.float32(weight.scale) * linear(low, weight.b, sharding=sharding)
    if weight.magnitude is None:
        return out
    # As its authors do: what divides is held fixed in the backward pass.
    length = jax.lax.stop_gradient(lengths(weight, contracted))
    ratio = weight.magnitude[...] / length
    return out * ratio.reshape((1,) * (out.ndim - ratio.ndim) + ratio.shape)


def adapted_each(x: Array, weight: LoraStack, contracted: int = 1, sharding: Sharding | None = None) -> Array:
    """As `adapted`, of x [B, T, *in], each of whose sequences adds its own adapter: float32 [B, T, *out]."""
    out = linear(x, weight.base, contracted, sharding=sharding)
    if weight.number is None:
        return out
    number_B, a, b = weight.number[...], weight.a[...], weight.b[...]
    if len(number_B) == 1:
        at = jnp.maximum(number_B[0] - 1, 0)
        a, b = a[at][None], jnp.take(b, at[None], axis=-2)
        own_B1A1 = (number_B > 0).reshape(1, 1, 1, 1)
    else:
        # All adapters at once, and what is another's made 0: so they are read once. Gathered for each sequence, they
        # would be read and written as often as there are sequences.
        own_B1A1 = (number_B[:, None] == 1 + jnp.arange(len(a), dtype=jnp.int32)[None]).reshape(-1, 1, len(a), 1)
    low_BTAr = linear(x, nnx.Param(a), contracted, sharding=sharding, dtype=x.dtype)
    return out + linear(jnp.where(own_B1A1, low_BTAr, 0), nnx.Param(b), contracted=2, sharding=sharding)


def for_each(tree: Any, number_B: Array | None) -> Any:
    """A model, or a part of it, whose sequences add the adapters of these numbers, int32 [B]; None: none adds any."""
    if number_B is None:
        return tree
    number, stacked = nnx.Variable(number_B), lambda x: isinstance(x, LoraStack)
    return jax.tree.map(lambda x: x.replaced(number=number) if stacked(x) else x, tree, is_leaf=stacked)


def lengths(weight: LoraWeight, contracted: int = 1) -> Array:
    """float32 [*out]: the length of each row of the weight with its addition."""
    split = len(weight.shape) - contracted
    whole_NK = plain(weight.base).reshape(-1, weight.a[...].size // weight.a.shape[0])
    a_rK = weight.a[...].astype(jnp.float32).reshape(weight.a.shape[0], -1)
    b_Nr = weight.b[...].astype(jnp.float32).reshape(-1, weight.a.shape[0])
    whole_NK = whole_NK + jnp.float32(weight.scale) * (b_Nr @ a_rK)
    return jnp.linalg.norm(whole_NK, axis=1).reshape(weight.shape[:split])


def plain(weight: Weight) -> Array:
    """A weight as a float32 array."""
    if isinstance(weight, QuantizedWeight):
        parts = [None if part is None else part[...] for part in (weight.values, weight.scale, weight.minimum)]
        return dequantize(*parts).reshape(weight.shape)
    return weight[...].astype(jnp.float32)


def _dropped(x: Array, weight: LoraWeight) -> Array:
    if weight.seed is None or not weight.dropout:
        return x
    key = jax.random.wrap_key_data(weight.seed[...])
    kept = jax.random.bernoulli(key, 1 - weight.dropout, x.shape)
    return jnp.where(kept, x / (1 - weight.dropout), 0)
