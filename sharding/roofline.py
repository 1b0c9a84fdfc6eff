"""What a compiled program would take at best: operations over peak, bytes over bandwidth, loop by loop.

A model, not a measurement: products run at the chip's peak, everything else at its memory's bandwidth, and the
two overlap inside of one instruction but not between instructions; collectives run at the bandwidth of the links,
and cost time only where the compiler did not make them asynchronous; what leaves a slice always does. The compiler's
own totals count the body of a loop once; these count it as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .hardware import Chip
from .hlo import COLLECTIVES, Operation

# Instructions that move nothing by themselves: they name, or what they call is counted.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "call", "conditional", "optimization-barrier", "copy-done", "slice-done", "async-done", "async-update"),
    *(f"{kind}-done" for kind in COLLECTIVES),
    *("send-done", "recv", "recv-done"),
)
# What updates its first operand in place -> which operand is new.
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")


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


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """What one call of a custom kernel does: operations, bytes, and the share of the peak that it reaches."""

    flops: float
    bytes: float
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Of one device and one call of the program.

    flops, bytes: of all products, and to and from memory; dot_seconds: of products at the peak; memory_seconds:
    what instructions take longer than their products, for their bytes; kernel_seconds: of custom kernels;
    exposed_seconds, hidden_seconds: of collectives; unknown_loops: loops whose trip count the compiler does not
    say (counted once); opaque: kernels whose cost nobody gave (not counted).
    """

    flops: float
    bytes: float
    dot_seconds: float
    memory_seconds: float
    kernel_seconds: float
    exposed_seconds: float
    hidden_seconds: float
    collectives: tuple[Collective, ...]
    unknown_loops: int
    opaque: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """The modelled time of a call."""
        return self.dot_seconds + self.memory_seconds + self.kernel_seconds + self.exposed_seconds


def roofline(
    program: Sequence[Operation],
    chip: Chip,
    kernel_cost: Callable[[Operation], KernelCost | None] = lambda _: None,
    slice_devices: int | None = None,
    branches: bool = True,
) -> Roofline:
    """The roofline of what `hlo.operations` read.

    Args:
      kernel_cost: of a custom call without a cost estimate of its own; None if unknown.
      slice_devices: how many devices a slice has, where there are several.
      branches: whether to count what stands in branches, as if all were taken.
    """
    bodies: dict[str, list[Operation]] = {}
    for op in program:
        bodies.setdefault(op.computation, []).append(op)
    by_name = {(op.computation, op.name): op for op in program}
    runs, unknown = _runs(program, bodies, by_name)
    flops = total_bytes = dots = memory = kernels = exposed = hidden = 0.0
    found: dict[tuple, int] = {}
    opaque: dict[str, None] = {}
    for op in program:
        times = runs.get(op.computation, 0)
        if not times or op.in_fusion or op.opcode in _FREE or (op.in_branch and not branches):
            continue
        if op.opcode == "send":
            # What XLA for TPU makes of a collective across slices, beside one inside of each: through the hosts.
            key = ("send", op.shapes[0].bytes, 2, False, True, _short(op.op_name))
            found[key] = found.get(key, 0) + times
            exposed += times * op.shapes[0].bytes / chip.network
            continue
        inside = _inside(op, bodies)
        collective = next((x for x in inside if x.opcode.removesuffix("-start") in COLLECTIVES), None)
        asynchronous = [x.target for x in inside if x.target in ("AsyncCollectiveStart", "AsyncCollectiveDone")]
        # XLA for TPU spreads an asynchronous one over fusions, which start it, go on with it beside their own work,
        # and end it; it stands in all of them.
        going_on = any(name.startswith("async_collective_fusion") for name in op.calls)
        if collective is not None and "AsyncCollectiveDone" not in asynchronous and not going_on:
            kind, sent, group, across = _collective(collective, inside, slice_devices)
            is_hidden = bool(asynchronous) or collective.opcode.endswith("-start")
            key = (kind, sent, group, is_hidden, across, _short(collective.op_name))
            found[key] = found.get(key, 0) + times
            seconds = times * sent / (chip.network if across else chip.link)
            hidden, exposed = hidden + seconds * is_hidden, exposed + seconds * (not is_hidden)
        if op.opcode == "custom-call" and op.target == "tpu_custom_call":
            cost = _estimate(op) or kernel_cost(op)
            if cost is None:
                opaque[_short(op.op_name) or op.name] = None
            else:
                flops, total_bytes = flops + times * cost.flops, total_bytes + times * cost.bytes
                kernels += times * max(cost.flops / (chip.peak * cost.share), cost.bytes / chip.hbm_bandwidth)
            continue
        if op.opcode == "custom-call" and op.target in ("AllocateBuffer", "Sharding"):
            continue
        own = sum(_dot_flops(x, by_name) for x in inside)
        moved = 0 if collective is not None and not going_on else _traffic(op, bodies, by_name)
        flops, total_bytes = flops + times * own, total_bytes + times * moved
        dots += times * own / chip.peak
        memory += times * max(0.0, moved / chip.hbm_bandwidth - own / chip.peak)
    collectives = tuple(
        Collective(kind, sent, group, is_hidden, across, count, name)
        for (kind, sent, group, is_hidden, across, name), count in sorted(found.items(), key=lambda x: -x[0][1] * x[1])
    )
    return Roofline(flops, total_bytes, dots, memory, kernels, exposed, hidden, collectives, unknown, tuple(opaque))


def _runs(
    program: Sequence[Operation],
    bodies: Mapping[str, list[Operation]],
    by_name: Mapping[tuple[str, str], Operation],
) -> tuple[dict[str, int], int]:
    """(how often each computation that is not a fusion's runs, loops whose trip count is unknown)."""
    callers: dict[str, list[tuple[str, int]]] = {}
    unknown = 0
    runs: dict[str, int] = {}
    for op in program:
        if op.in_entry:
            runs[op.computation] = 1
        if op.in_fusion or op.opcode == "fusion" or not op.calls:
            continue
        trips = 1
        if op.opcode == "while":
            found = _trips(op, bodies, by_name)
            trips, unknown = (1, unknown + 1) if found is None else (found, unknown)
        for callee in op.calls:
            callers.setdefault(callee, []).append((op.computation, trips))

    def count(computation: str) -> int:
        if computation not in runs:
            runs[computation] = sum(count(caller) * trips for caller, trips in callers.get(computation, []))
        return runs[computation]

    for op in program:
        count(op.computation)
    return runs, unknown


def _trips(
    loop: Operation, bodies: Mapping[str, list[Operation]], by_name: Mapping[tuple[str, str], Operation]
) -> int | None:
    """How often a while loop runs: a counter that goes from one constant to another by a third; else None."""
    if known := _KNOWN_TRIPS.search(loop.attributes):
        return int(known[1])
    names = _LOOP.search(loop.attributes)
    if names is None:
        return None
    condition, body = (bodies[name] for name in names.groups())
    test = condition[-1]
    if test.opcode == "fusion" and test.calls:
        test = _as_called(test, bodies)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.attributes:
        return None
    counter = by_name.get((test.computation, test.operands[0]))
    while counter is not None and counter.opcode in ("copy", "bitcast", "convert"):
        counter = by_name.get((counter.computation, counter.operands[0]))
    stop = _constant(test.computation, test.operands[1], by_name)
    if counter is None or counter.opcode != "get-tuple-element" or stop is None:
        return None
    index = int(re.search(r"index=(\d+)", counter.attributes)[1])  # pyright: ignore[reportOptionalSubscript]
    initial = by_name.get((loop.computation, loop.operands[0]))
    start = _constant(loop.computation, initial.operands[index], by_name) if initial and initial.operands else None
    new = by_name.get((body[-1].computation, body[-1].operands[index])) if body[-1].opcode == "tuple" else None
    step = _constant(new.computation, new.operands[1], by_name) if new and new.opcode == "add" else None
    # What the compiler moved into a fusion or copied is a counter from 0 by 1, as scans make them.
    return max(0, -(-(stop - (start or 0)) // (step or 1)))


def _as_called(fusion: Operation, bodies: Mapping[str, list[Operation]]) -> Operation | None:
    """The root of a fusion with its parameters replaced by what it is called with."""
    body = bodies[fusion.calls[0]]
    number = {x.name: int(x.operands[0]) for x in body if x.opcode == "parameter"}
    root = body[-1]
    if any(name not in number for name in root.operands):
        return None
    operands = tuple(fusion.operands[number[name]] for name in root.operands)
    return dataclasses.replace(root, operands=operands, computation=fusion.computation)


def _constant(computation: str, name: str, by_name: Mapping[tuple[str, str], Operation]) -> int | None:
    op = by_name.get((computation, name))
    while op is not None and op.opcode in ("copy", "bitcast", "convert"):
        op = by_name.get((computation, op.operands[0]))
    if op is None or op.opcode != "constant" or not re.fullmatch(r"-?\d+", op.operands[0]):
        return None
    return int(op.operands[0])


def _inside(op: Operation, bodies: Mapping[str, list[Operation]]) -> list[Operation]:
    """The instruction itself, or all that a fusion does."""
    if op.opcode not in ("fusion", "async-start"):
        return [op]
    return [x for name in op.calls for inner in bodies.get(name, []) for x in _inside(inner, bodies)]


def _dot_flops(op: Operation, by_name: Mapping[tuple[str, str], Operation]) -> int:
    """Multiplications and additions of one product (XLA for TPU writes them as convolutions)."""
    if op.opcode not in ("dot", "convolution"):
        return 0
    sizes = [by_name[op.computation, name].shapes[0].dims for name in op.operands[:2]]
    out = op.shapes[0].dims
    if op.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        lengths = [sizes[0][int(i)] for i in contracted[1].split(",") if i] if contracted else []
        return 2 * math.prod(out) * math.prod(lengths)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", op.attributes)
    assert labels is not None
    lhs, rhs, result = ([*x] for x in labels.groups())
    window = {key: value.split("x") for key, value in re.findall(r"(\w+)=([\d_x]+)", _window(op.attributes))}
    # Features and batch: full products. In space, where batch dimensions hide: only pairs that meet.
    total = 2 * sizes[1][rhs.index("i")] * out[result.index("f")] * out[result.index("b")]
    for i in range(len(lhs) - 2):
        place = str(i)
        total *= _meeting(
            sizes[0][lhs.index(place)],
            sizes[1][rhs.index(place)],
            out[result.index(place)],
            int(window["stride"][i]) if "stride" in window else 1,
            int(window["pad"][i].split("_")[0]) if "pad" in window else 0,
            int(window["lhs_dilate"][i]) if "lhs_dilate" in window else 1,
            int(window["rhs_dilate"][i]) if "rhs_dilate" in window else 1,
        )
    return total


def _window(attributes: str) -> str:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    return found[1] if found else ""


def _meeting(length: int, kernel: int, out: int, stride: int, pad: int, dilate: int, kernel_dilate: int) -> int:
    """How many pairs of a place of the output and one of the kernel meet an element of the input."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel) * kernel_dilate - pad
    return int(((at >= 0) & (at % dilate == 0) & (at < (length - 1) * dilate + 1)).sum())


def _traffic(op: Operation, bodies: Mapping[str, list[Operation]], by_name: Mapping[tuple[str, str], Operation]) -> int:
    """Bytes of main memory that an instruction reads and writes; of what is sliced or updated, that part."""
    if op.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _main(op)
    if op.opcode in _UPDATES:
        return 2 * _main(by_name[op.computation, op.operands[_UPDATES[op.opcode]]])
    if op.opcode.endswith("-start"):
        # From one memory to another, often the host's or a TPU's VMEM: what is sliced or updated, at each end in HBM.
        ends = [shape for shape in op.shapes if shape.dims][:2]
        return min(shape.bytes for shape in ends) * sum(shape.space == 0 for shape in ends) if ends else 0
    if op.opcode != "fusion":
        return _main(op) + sum(_main(by_name[op.computation, x]) for x in op.operands if (op.computation, x) in by_name)
    (body,) = (bodies[name] for name in op.calls)
    written = _written(body[-1], bodies, by_name)
    total = sum(size for size, shape in zip(written, op.shapes, strict=False) if shape.space == 0)
    for parameter in (x for x in body if x.opcode == "parameter"):
        size = _main(by_name[op.computation, op.operands[int(parameter.operands[0])]])
        total += min(size, _read(parameter, size, bodies)) if size else 0
    return total


def _written(
    root: Operation, bodies: Mapping[str, list[Operation]], by_name: Mapping[tuple[str, str], Operation]
) -> list[int]:
    """Bytes of each result of a fusion that are new: of what is updated in place, the update."""
    if root.opcode == "tuple":
        return [_written(by_name[root.computation, name], bodies, by_name)[0] for name in root.operands]
    while root.opcode in ("bitcast", "reshape"):
        root = by_name[root.computation, root.operands[0]]
    if root.opcode == "parameter" or root.opcode in COLLECTIVES:
        return [0] * max(1, len(root.shapes))
    if root.opcode in _UPDATES:
        update = by_name[root.computation, root.operands[_UPDATES[root.opcode]]]
        return [sum(shape.bytes for shape in update.shapes)]
    if root.opcode == "fusion":
        return _written(bodies[root.calls[0]][-1], bodies, by_name)
    return [shape.bytes for shape in root.shapes]


def _read(value: Operation, size: int, bodies: Mapping[str, list[Operation]]) -> int:
    """Bytes of a fusion's parameter that it reads, at most its size: of what is sliced, the slices."""
    total = 0
    for use in (x for x in bodies[value.computation] if value.name in x.operands):
        if use.opcode in ("dynamic-slice", "slice", "gather"):
            total += sum(shape.bytes for shape in use.shapes)
        elif use.opcode in ("bitcast", "reshape"):
            total += _read(use, size, bodies)
        elif use.opcode == "fusion":
            inner = bodies[use.calls[0]]
            numbers = [str(i) for i, name in enumerate(use.operands) if name == value.name]
            total += sum(_read(x, size, bodies) for x in inner if x.opcode == "parameter" and x.operands[0] in numbers)
        elif use.opcode == "tuple" or use.opcode in COLLECTIVES:
            continue  # handed on, or counted elsewhere
        elif use.opcode not in _UPDATES or use.operands[0] != value.name:
            return size
    return min(total, size)


def _main(op: Operation) -> int:
    return sum(shape.bytes for shape in op.shapes if shape.space == 0)


def _collective(
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
    elif op.opcode == "collective-permute-start":
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


def _estimate(op: Operation) -> KernelCost | None:
    """What a Pallas kernel's own cost estimate says."""
    found = re.search(r'"cost_estimate":\{([^}]*)\}', op.attributes)
    if found is None:
        return None
    figures = {name: float(value) for name, value in re.findall(r'"(\w+)":"?(\d+)', found[1])}
    return KernelCost(figures.get("flops", 0.0), figures.get("bytes_accessed", 0.0))


def _short(op_name: str) -> str:
    """The end of where an operation came from, that says what it is."""
    return "/".join(op_name.split("/")[-2:])
