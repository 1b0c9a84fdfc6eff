"""Arrays described before they exist: from one description come where they lie, their bytes, empty ones, and the shapes
to compile for."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .rules import LOGICAL_AXES, PyTree, Sharding


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """An array's shape, dtype, and the logical axis of each of its dimensions; None is one that is never split."""

    shape: tuple[int, ...]
    dtype: DTypeLike
    axes: tuple[str | None, ...]

    @property
    def nbytes(self) -> int:
        """Of the whole array."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def spec(dtype: DTypeLike, **axes: int) -> ArraySpec:
    """From lengths by logical axis; a name that is no logical axis is a dimension that is never split."""
    names = tuple(name if name in LOGICAL_AXES else None for name in axes)
    return ArraySpec(tuple(axes.values()), jnp.dtype(dtype), names)


def specs_of(tree: PyTree) -> PyTree:
    """ArraySpecs of a tree of parameters, or of an optimizer's state; what is no parameter is never split."""

    def described(x: nnx.Variable | jax.ShapeDtypeStruct) -> nnx.Variable | ArraySpec:
        if not isinstance(x, nnx.Variable):
            return ArraySpec(x.shape, x.dtype, (None,) * len(x.shape))
        value = x.get_value()
        if value is None:  # of another part of the model
            return x
        return x.replace(ArraySpec(value.shape, value.dtype, x.get_metadata("axes")))

    return jax.tree.map(described, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def shardings(specs: PyTree, sharding: Sharding) -> PyTree:
    """A tree of NamedShardings.

    Raises:
      ShardingError: the rules do not fit an array; by its name in the tree.
    """
    return _each(lambda name, x: sharding.named(name, x.axes, x.shape), specs)


def shapes(specs: PyTree, sharding: Sharding) -> PyTree:
    """A tree of ShapeDtypeStructs, with their shardings: what a program can be compiled for."""

    def shape(name: str, x: ArraySpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.named(name, x.axes, x.shape))

    return _each(shape, specs)


def zeros(specs: PyTree, sharding: Sharding | None) -> PyTree:
    """A tree of arrays of zeros, each made where it lies; None is the default device."""
    leaves, tree = jax.tree.flatten(specs)
    out = None if sharding is None else tuple(jax.tree.leaves(shardings(specs, sharding)))
    return jax.tree.unflatten(tree, jax.jit(_zeros, static_argnums=0, out_shardings=out)(tuple(leaves)))


def _zeros(specs: tuple[ArraySpec, ...]) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros(x.shape, x.dtype) for x in specs)


def total_bytes(specs: PyTree) -> int:
    """Of all arrays of a tree, each counted once however many devices have it."""
    return sum(x.nbytes for x in jax.tree.leaves(specs))


def _each(function: Callable[[str, ArraySpec], object], specs: PyTree) -> PyTree:
    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return jax.tree_util.tree_map_with_path(lambda path, x: function(name(path), x), specs)
