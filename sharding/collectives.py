"""What devices send each other in a compiled program's collectives, and whether it leaves a slice."""

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from .hlo import Operation


@dataclasses.dataclass(frozen=True)
class Collective:
    """What devices do together, all of one kind and size: bytes is what each device sends (or receives) in one of
    them over a ring; hidden: whether other work goes on meanwhile; count: how often it runs; across_slices:
    whether it leaves the slice."""

    kind: str
    bytes: int
    group: int
    hidden: bool
    across_slices: bool
    count: int
    op_name: str


def sent(
    op: Operation,
    inside: Sequence[Operation],
    slice_devices: int | None,
) -> tuple[str, int, int, bool]:
    """(kind, bytes that each device sends, devices that take part, whether they are in several slices)."""
    kind = op.opcode.removesuffix("-start")
    groups = _groups(op.attributes)
    group = groups.shape[1] if groups is not None else 2
    across = bool(
        slice_devices and groups is not None and (groups // slice_devices != groups[:, :1] // slice_devices).any()
    )
    size = float(sum(shape.bytes for shape in op.shapes))
    if op.opcode in ("all-gather-start", "reduce-scatter-start"):
        size *= group / (group + 1)  # operands stand in its result too: of the two, the whole
    elif op.opcode in ("collective-permute-start", "all-to-all-start"):
        size /= 2
    elif op.opcode == "reduce-scatter":
        size *= group
    if kind == "all-reduce" and len(inside) > 1 and any(x.opcode == "dynamic-slice" for x in inside):
        kind = "reduce-scatter"  # fused with the slice that each device keeps
    around = (group - 1) / group
    factor = {"all-reduce": 2 * around, "collective-permute": 1, "collective-broadcast": 1}.get(kind, around)
    return kind, round(size * factor), group, across


def _groups(attributes: str) -> np.ndarray | None:
    """int [groups, devices] of `replica_groups`, in any of its spellings; of `source_target_pairs` too."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([\d,]*)\))? \{([^}]*)\}", attributes)
    if named:
        lengths = {name: int(length) for name, length in re.findall(r"'([^']+)'=(\d+)", named[1])}
        chosen = re.findall(r"'([^']+)'", named[3])
        ids = np.array(named[2].split(","), int) if named[2] else np.arange(math.prod(lengths.values()))
        axes = list(lengths)
        order = [axes.index(name) for name in axes if name not in chosen] + [axes.index(name) for name in chosen]
        group = math.prod(lengths[name] for name in chosen)
        return ids.reshape(list(lengths.values())).transpose(order).reshape(-1, group)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if iota:
        shape, dims, order = ([int(x) for x in part.split(",")] if part else None for part in iota.groups())
        assert shape is not None and dims is not None
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids if order is None else ids.transpose(order)).reshape(shape)
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", attributes)
    if not listed:
        return None
    rows = [[int(x) for x in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", listed[1])]
    return np.array(rows)
