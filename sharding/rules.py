"""Sharding rules: which logical axis of an array lies on which axis of the mesh.

A strategy is a table; changing the strategy changes the table, never the model.
"""

import dataclasses
import difflib
import functools
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias, TypeVar

import jax
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .strategies import ALL_AXES, ALL_BUT_DATA, STRATEGIES, Rules, ShardingError

log = logging.getLogger(__name__)

T = TypeVar("T")
# Nested tuples, lists, dictionaries, dataclasses and modules, as jax.tree takes them, for which Python has no type.
# What the leaves are a docstring says; a function that gives back a tree of the kind that it took has a TypeVar.
PyTree: TypeAlias = Any

# What dimensions of arrays are called: parameters', activations' and the cache's.
LOGICAL_AXES = (
    *("layers", "embed", "heads", "kv_heads", "head", "mlp", "vocab", "rank", "adapters"),
    *("batch", "length", "residual"),
    *("cache_heads", "context"),
)

# What a named strategy leaves whole, rather than refuse, where it does not divide: few key-value heads may
# serve many devices.
MAY_STAY_WHOLE = ("kv_heads", "cache_heads")


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh and its rules as one hashable value: a static argument of what is compiled for them."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, mesh: Mesh, rules: str | Rules) -> "Sharding":
        """From a key of STRATEGIES or a table of one's own.

        A strategy goes without axes that the mesh does not have.

        Raises:
          ShardingError: an unknown strategy, logical axis or mesh axis, or a mesh axis that a strategy does
            not use.
        """
        # Auto axes: the compiler places what no rule names. jax.make_mesh no longer makes them by itself.
        mesh = Mesh(mesh.devices, mesh.axis_names)
        if isinstance(rules, str):
            return cls(mesh, _strategy(rules, mesh))
        for axis, target in rules.items():
            if axis not in LOGICAL_AXES:
                near = difflib.get_close_matches(axis, LOGICAL_AXES, 1)
                there = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(LOGICAL_AXES)}"
                raise ShardingError(f"the rule {axis} -> {target}: no array has an axis {axis!r}; {there}")
            for mesh_axis in _mesh_axes(target, mesh):
                if mesh_axis not in mesh.axis_names:
                    raise ShardingError(
                        f"the rule {axis} -> {mesh_axis} names no axis of the mesh, which has {mesh.axis_names}"
                    )
        return cls(mesh, tuple(sorted((axis, _mesh_axes(target, mesh)) for axis, target in rules.items())))

    @classmethod
    def of_array(cls, x: object) -> "Sharding | None":
        """The mesh that an array lies on, and no rules: what is computed there, every device computes whole.

        It keeps kernels, which the compiler cannot divide, apart from arrays that it does. None for what lies on
        one device, and for what is being traced, which does not say where it lies.
        """
        at = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
        if not isinstance(at, NamedSharding) or at.mesh.size == 1:
            return None
        said = f"the model lies on {at.mesh.size} devices, and its `sharding` does not say how they divide the work"
        _warn_once(f"{said}: each of them does all of it")
        return cls.of(at.mesh, {})  # pyright: ignore[reportArgumentType]

    def fitted(self, sizes: Mapping[str, int]) -> "Sharding":
        """The same, but for key-value heads that the mesh does not divide: they stay whole on every device.

        Args:
          sizes: logical axis -> length.
        """
        whole = [axis for axis in MAY_STAY_WHOLE if axis in sizes and self.fitting(axis, sizes[axis]) is None]
        for axis in whole:
            parts = f"{sizes[axis]} {axis} do not divide over {self.parts(axis)} devices"
            _warn_once(f"{parts}: each device has all of them")
        return dataclasses.replace(self, rules=tuple(rule for rule in self.rules if rule[0] not in whole))

    @property
    def platform(self) -> str:
        """The platform of its devices: "cpu", "tpu" or "gpu"."""
        return self.mesh.devices.flat[0].platform

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes that a logical axis lies on."""
        return dict(self.rules).get(axis or "", ())

    def parts(self, axis: str | None) -> int:
        """How many pieces a dimension of this logical axis is cut into."""
        return math.prod(self.mesh.shape[name] for name in self.mesh_axes(axis))

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The PartitionSpec of an array whose dimensions have these logical axes (None: whole)."""
        return PartitionSpec(*(self.mesh_axes(axis) or None for axis in axes))

    def fitting(self, axis: str, length: int) -> str | None:
        """The logical axis if its pieces divide the length; else None: every device has the whole."""
        return None if length % self.parts(axis) else axis

    def row_order(self, length: int) -> np.ndarray | None:
        """Where rows are split: which token of a row each place holds, so that causal attention costs all alike."""
        shards = self.parts("length")
        return None if shards == 1 or length % shards else balanced_order(length, shards)

    def named(self, name: str, axes: tuple[str | None, ...], shape: tuple[int, ...]) -> NamedSharding:
        """Where an array lies on the mesh.

        Args:
          name: what to call it in an error.
          axes: logical axis name of each of its dimensions; None is one that is never split.

        Raises:
          ShardingError: two of its dimensions on one mesh axis, or one that its mesh axes do not divide.
        """
        taken: dict[str, str | None] = {}
        for axis, length in zip(axes, shape, strict=True):
            for mesh_axis in self.mesh_axes(axis):
                if mesh_axis in taken:
                    raise ShardingError(
                        f"{name}: {taken[mesh_axis]} and {axis} both lie on the mesh axis {mesh_axis}; "
                        f'leave one whole: {{..., "{axis}": None}}'
                    )
                taken[mesh_axis] = axis
            if length % self.parts(axis):
                parts = self.parts(axis)
                raise ShardingError(
                    f"{name}: {axis} has length {length}, which {parts} devices do not divide evenly; "
                    f"{math.gcd(length, parts)} do, or leave it whole: "
                    f'{{..., "{axis}": None}}'
                )
        return NamedSharding(self.mesh, self.spec(*axes))

    def shard_map(self, function: Callable[..., T], in_specs: PyTree, out_specs: PyTree) -> Callable[..., T]:
        """The function as every device runs it, on its own parts of the arguments."""
        # What a kernel returns carries no proof of being equal on several devices: check_vma would ask for it.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """x, laid out by the rules; a dimension that they do not divide evenly stays whole."""
        fitting = [axis and self.fitting(axis, length) for axis, length in zip(axes, x.shape, strict=True)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(*fitting)))


def balanced_order(length: int, shards: int) -> np.ndarray:
    """int [length]: of 2 x shards pieces, each device has one of the first and one of the last; if they do not
    divide the length, the plain order."""
    if length % (2 * shards):
        return np.arange(length)
    pieces = np.arange(length).reshape(2 * shards, -1)
    return np.stack([pieces[:shards], pieces[::-1][:shards]], axis=1).reshape(-1)


def platform_of(sharding: Sharding | None) -> str:
    """What a program is for: "cpu", "tpu" or "gpu".

    Without a sharding that is where JAX computes what lies nowhere yet: `jax.default_device`, which a program for the
    CPU of a machine with an accelerator is to set, or else the default backend.
    """
    if sharding is not None:
        return sharding.platform
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return jax.local_devices(backend=device)[0].platform if isinstance(device, str) else device.platform


def _strategy(name: str, mesh: Mesh) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if name not in STRATEGIES:
        raise ShardingError(f"the sharding strategy {name!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    wanted = {axis: _mesh_axes(target, mesh) for axis, target in STRATEGIES[name].items()}
    used = {mesh_axis for mesh_axes in wanted.values() for mesh_axis in mesh_axes}
    idle = [axis for axis, length in mesh.shape.items() if length > 1 and axis not in used]
    if idle and name != "single":
        raise ShardingError(
            f"the strategy {name} has no use for the mesh's axis {idle[0]!r} of {mesh.shape[idle[0]]} devices: "
            f"it lays arrays out on {', '.join(sorted(used))}"
        )
    there = {axis: tuple(a for a in mesh_axes if a in mesh.axis_names) for axis, mesh_axes in wanted.items()}
    return tuple(sorted(there.items()))


def _mesh_axes(target: str | tuple[str, ...] | None, mesh: Mesh) -> tuple[str, ...]:
    if target == ALL_BUT_DATA:
        rest = tuple(axis for axis in mesh.axis_names if axis != "data")
        # A mesh of nothing else is split all the same.
        return rest if math.prod(mesh.shape[axis] for axis in rest) > 1 else mesh.axis_names
    if target == ALL_AXES:
        return mesh.axis_names
    return (target,) if isinstance(target, str) else target or ()


@functools.cache
def _warn_once(message: str) -> None:
    """Logs what would otherwise be said for every layer and every program."""
    log.warning("%s", message)
