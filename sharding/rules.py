"""Sharding rules: which logical axis of an array lies on which axis of the mesh.

A strategy is a table; changing the strategy changes the table, never the model.
"""

import math
from collections.abc import Mapping

from jax.sharding import Mesh, NamedSharding, PartitionSpec

# Stands for every axis of the mesh, whatever their names.
ALL_AXES = "*"

# Strategy -> logical axis -> mesh axis. A logical axis that is not listed is replicated.
STRATEGIES: dict[str, dict[str, str]] = {
    "single": {},
    # ZeRO-3: parameters are split along the model width, which every one of them has.
    "fsdp": {"embed": ALL_AXES},
}


class ShardingError(ValueError):
    """A rule that does not fit the mesh or the array."""

    exit_code = 2


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
    if isinstance(rules, str) and rules not in STRATEGIES:
        raise ShardingError(f"no sharding strategy {rules!r}; there are {', '.join(STRATEGIES)}")
    table = STRATEGIES[rules] if isinstance(rules, str) else rules
    spec: list[tuple[str, ...] | None] = []
    taken: dict[str, str] = {}
    for axis, length in zip(axes, shape, strict=True):
        target = table.get(axis)
        mesh_axes = mesh.axis_names if target == ALL_AXES else (target,) if isinstance(target, str) else target or ()
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
