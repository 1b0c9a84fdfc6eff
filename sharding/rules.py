"""Sharding rules: which logical axis of an array lies on which axis of the mesh.

A strategy is a table; changing the strategy changes the table, never the model.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Stands for every axis of the mesh, whatever their names.
ALL_AXES = "*"

# Strategy -> logical axis -> mesh axis. A logical axis that is not listed is replicated.
STRATEGIES: dict[str, dict[str, str]] = {
    "single": {},
    # ZeRO-3: parameters are split along the model width, which every one of them has.
    "fsdp": {"embed": ALL_AXES},
    # Serving: every head, feed-forward column and vocabulary row lives on one device of a group; groups
    # share the sequences.
    "serve_tp": {
        **{axis: "tensor" for axis in ("heads", "kv_heads", "cache_heads", "mlp", "vocab")},
        "batch": "data",
    },
    # Serving one long sequence: weights as above, the cache split along the context over every device.
    "serve_tp_long": {**{axis: "tensor" for axis in ("heads", "kv_heads", "mlp", "vocab")}, "context": ALL_AXES},
}


class ShardingError(ValueError):
    """A rule that does not fit the mesh or the array."""

    exit_code = 2


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh and its rules as one hashable value: a static argument of what is compiled for them."""

    mesh: Mesh
    rules: tuple[tuple[str, str | tuple[str, ...]], ...]

    @classmethod
    def of(cls, mesh: Mesh, rules: str | Mapping[str, str | tuple[str, ...]]) -> "Sharding":
        """From a key of STRATEGIES or a table of one's own."""
        # Auto axes: the compiler places what no rule names. jax.make_mesh no longer makes them by itself.
        return cls(Mesh(mesh.devices, mesh.axis_names), tuple(sorted(_table(rules).items())))

    @property
    def platform(self) -> str:
        """Of its devices: "cpu", "tpu" or "gpu"."""
        return self.mesh.devices.flat[0].platform

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """The mesh axes that a logical axis lies on."""
        return _mesh_axes(dict(self.rules).get(axis or ""), self.mesh)

    def parts(self, axis: str | None) -> int:
        """How many pieces a dimension of this logical axis is cut into."""
        return math.prod(self.mesh.shape[name] for name in self.mesh_axes(axis))

    def spec(self, *axes: str | None) -> PartitionSpec:
        """The PartitionSpec of an array whose dimensions have these logical axes (None: whole)."""
        return PartitionSpec(*(self.mesh_axes(axis) or None for axis in axes))

    def fitting(self, axis: str, length: int) -> str | None:
        """The logical axis if its pieces divide the length; else None: every device has the whole."""
        return None if length % self.parts(axis) else axis

    def shard_map(self, function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """The function as every device runs it, on its own parts of the arguments."""
        # What a kernel returns carries no proof of being equal on several devices: check_vma would ask for it.
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def constrain(self, x: Array, *axes: str | None) -> Array:
        """x, placed by the rules; a dimension that they do not divide evenly stays whole."""
        fitting = [axis and self.fitting(axis, length) for axis, length in zip(axes, x.shape, strict=True)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, self.spec(*fitting)))


def platform_of(sharding: Sharding | None) -> str:
    """What a program is for: "cpu", "tpu" or "gpu"."""
    return jax.default_backend() if sharding is None else sharding.platform


def named_sharding(
    name: str,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    mesh: Mesh,
    rules: str | Mapping[str, str | tuple[str, ...]] = "fsdp",
) -> NamedSharding:
    """Where an array lies on the mesh.

    Args:
      name: what to call the array in an error.
      axes: logical axis name of each of its dimensions.
      rules: a key of STRATEGIES, or a table of one's own: logical axis -> mesh axis or axes.

    Raises:
      ShardingError: an unknown strategy or mesh axis, two dimensions on one mesh axis, or a
        dimension that its mesh axes do not divide.
    """
    table = _table(rules)
    spec: list[tuple[str, ...] | None] = []
    taken: dict[str, str] = {}
    for axis, length in zip(axes, shape, strict=True):
        mesh_axes = _mesh_axes(table.get(axis), mesh)
        for mesh_axis in mesh_axes:
            if mesh_axis not in mesh.axis_names:
                raise ShardingError(
                    f"{name}: the rule {axis} -> {mesh_axis} names no axis of the mesh, which has {mesh.axis_names}"
                )
            if mesh_axis in taken:
                raise ShardingError(f"{name}: {taken[mesh_axis]} and {axis} both lie on the mesh axis {mesh_axis}")
            taken[mesh_axis] = axis
        parts = math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)
        if length % parts:
            raise ShardingError(f"{name}: {axis} has length {length}, which {parts} devices do not divide evenly")
        spec.append(tuple(mesh_axes) or None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def _table(rules: str | Mapping[str, str | tuple[str, ...]]) -> Mapping[str, str | tuple[str, ...]]:
    if not isinstance(rules, str):
        return rules
    if rules not in STRATEGIES:
        raise ShardingError(f"no sharding strategy {rules!r}; there are {', '.join(STRATEGIES)}")
    return STRATEGIES[rules]


def _mesh_axes(target: str | tuple[str, ...] | None, mesh: Mesh) -> tuple[str, ...]:
    if target == ALL_AXES:
        return mesh.axis_names
    return (target,) if isinstance(target, str) else target or ()
