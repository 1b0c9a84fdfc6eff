"""Low-rank adapters in the model's own tree: a weight that stays as it is, and what is learned beside it.

LoRA (Hu et al. 2021, arXiv 2106.09685) adds scale * B A to a weight; DoRA (Liu et al. 2024, arXiv 2402.09353) also
learns the length of each output channel's row.

Shapes: r rank, N output channels, K inputs.
"""

from typing import TypeVar

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


def is_special(x: object) -> bool:
    """Whether a node of a model's tree is a weight of several arrays."""
    return isinstance(x, QuantizedWeight | LoraWeight)


def in_dtype(tree: T, dtype: DTypeLike) -> T:
    """A model, or a part of it, with what is not quantized in another dtype; DoRA's lengths stay float32, of which
    every number of an output is made."""

    def cast(x: object) -> object:
        if isinstance(x, LoraWeight):
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
