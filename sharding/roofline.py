"""What a compiled program would take at best: operations over peak, bytes over bandwidth, loop by loop.

A model, not a measurement: products run at the chip's peak for their operands' type, everything else at its memory's
bandwidth, and the two overlap inside of one instruction but not between instructions; collectives run at the bandwidth
of the links, and cost time only where the compiler did not make them asynchronous; what leaves a slice always does.
The compiler's own totals count the body of a loop once; these count it as often as it runs.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from . import collectives
from .collectives import Collective
from .hardware import Chip
from .hlo import COLLECTIVES, FUSIONS, Operation, Shape
from .products import CUBLAS, CUDNN_ATTENTION, KernelCost, attention_flops, product

# Instructions that move nothing by themselves: they name, or what they call is counted.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"),
    *("while", "call", "conditional", "optimization-barrier", "recv"),
    # What `fusion-start` starts and `fusion-done` ends is counted where it starts; a whole computation that an
    # `async-start` names, where it stands.
    *("async-start", "async-update"),
    *(f"{kind}-done" for kind in ("async", "fusion", "copy", "slice", "send", "recv", *COLLECTIVES)),
)
# Custom calls that are Pallas kernels: for a TPU; and for a GPU, where the text has no cost estimate.
_TPU_KERNEL = "tpu_custom_call"
_GPU_KERNELS = ("__gpu$xla.gpu.triton", "mosaic_gpu")
_NO_KERNELS = ("AllocateBuffer", "Sharding")
# Attention kernels reach half of the peak: assumed, as for those of TPUs.
_ATTENTION_SHARE = 0.5
# What updates its first operand in place -> which operand is new.
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Of one device and one call of the program.

    flops, bytes: of all products, and to and from memory; dot_seconds: of products at the peak; memory_seconds:
    what instructions take longer than their products, for their bytes; kernel_seconds: of custom kernels;
    exposed_seconds, hidden_seconds: of collectives; unknown_loops: loops whose trip count the compiler does not
    say; opaque: kernels whose cost nobody gave (not counted).
    launches: what a GPU is told to do, one after the other: each fusion, kernel, copy and collective, as often as it
    runs, also where a CUDA graph repeats them; loop_launches: those of them in loops, so of one round where the only
    loop is one of an unknown trip count. products, float32_products: how many the program's text has, and how many of
    them have a float32 operand, however often they run.
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
    launches: int
    loop_launches: int
    products: int
    float32_products: int

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
    unknown_trips: int = 1,
) -> Roofline:
    """The roofline of what `hlo.operations` read.

    Args:
      kernel_cost: of a custom call without a cost estimate of its own; None if unknown. A GPU's then counts as what it
        reads and writes, all of its arrays.
      slice_devices: how many devices a slice has, where there are several.
      branches: whether to count what stands in branches, as if all were taken.
      unknown_trips: how often a loop runs whose trip count the compiler does not say.
    """
    bodies: dict[str, list[Operation]] = {}
    for op in program:
        bodies.setdefault(op.computation, []).append(op)
    by_name = {(op.computation, op.name): op for op in program}
    runs, unknown = _runs(program, bodies, by_name, unknown_trips)
    # What an `async-start` does meanwhile.
    meanwhile = {name for op in program if op.opcode == "async-start" for name in op.calls}
    total = _Total(chip, bodies, by_name, meanwhile, kernel_cost, slice_devices)
    for op in program:
        times = runs.get(op.computation, 0)
        if not times or op.in_fusion or op.opcode in _FREE or (op.in_branch and not branches):
            continue
        if op.opcode != "custom-call" or op.target not in _NO_KERNELS:
            total.add(op, times)
    return total.roofline(unknown)


@dataclasses.dataclass
class _Total:
    """The sums over a program, operation by operation.

    found: (kind, bytes, group, is hidden, is across slices, name) of a collective -> how often it runs.
    """

    chip: Chip
    bodies: Mapping[str, list[Operation]]
    by_name: Mapping[tuple[str, str], Operation]
    meanwhile: set[str]
    kernel_cost: Callable[[Operation], KernelCost | None]
    slice_devices: int | None
    sums: defaultdict[str, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    found: Counter[tuple] = dataclasses.field(default_factory=Counter)
    opaque: dict[str, None] = dataclasses.field(default_factory=dict)

    def add(self, op: Operation, times: int) -> None:
        """Counts an operation that runs this many times."""
        self.sums["launches"] += times
        self.sums["loop_launches"] += times * op.in_loop
        if op.opcode == "send":
            # What XLA for TPU makes of a collective across slices, beside one inside of each: through the hosts.
            self.found["send", op.shapes[0].bytes, 2, False, True, _short(op.op_name)] += times
            self.sums["exposed"] += times * op.shapes[0].bytes / self.chip.network
            return
        inside = _inside(op, self.bodies)
        collective = next((x for x in inside if x.opcode.removesuffix("-start") in COLLECTIVES), None)
        # XLA for TPU spreads an asynchronous one over fusions, which start it, go on with it beside their own work,
        # and end it; it stands in all of them.
        going_on = any(name.startswith("async_collective_fusion") for name in op.calls)
        if collective is not None and not going_on:
            self._add_collective(op, collective, inside, times)
        if _is_kernel(op):
            self._add_kernel(op, times)
            return
        products = [x for x in (product(y, self.by_name) for y in inside) if x is not None]
        seconds = sum(x.seconds(self.chip) for x in products)
        moved = 0 if collective is not None and not going_on else _traffic(op, self.bodies, self.by_name)
        self.sums["products"] += len(products)
        self.sums["float32"] += sum(x.float32 for x in products)
        self.sums["flops"] += times * sum(x.flops for x in products)
        self.sums["bytes"] += times * moved
        self.sums["dots"] += times * seconds
        self.sums["memory"] += times * max(0.0, moved / self.chip.hbm_bandwidth - seconds)

    def _add_collective(self, op: Operation, collective: Operation, inside: list[Operation], times: int) -> None:
        asynchronous = [x.target for x in inside if x.target in ("AsyncCollectiveStart", "AsyncCollectiveDone")]
        if "AsyncCollectiveDone" in asynchronous:
            return
        kind, sent, group, across = collectives.sent(collective, inside, self.slice_devices)
        is_hidden = bool(asynchronous) or collective.opcode.endswith("-start") or op.computation in self.meanwhile
        self.found[kind, sent, group, is_hidden, across, _short(collective.op_name)] += times
        seconds = times * sent / (self.chip.network if across else self.chip.link)
        self.sums["hidden" if is_hidden else "exposed"] += seconds

    def _add_kernel(self, op: Operation, times: int) -> None:
        cost = _kernel_cost(op, self.by_name) or self.kernel_cost(op) or _by_shapes(op, self.by_name)
        if cost is None:
            self.opaque[_short(op.op_name) or op.name] = None
            return
        self.sums["flops"] += times * cost.flops
        self.sums["bytes"] += times * cost.bytes
        seconds = max(cost.flops / (self.chip.peak * cost.share), cost.bytes / self.chip.hbm_bandwidth)
        self.sums["kernels"] += times * seconds

    def roofline(self, unknown_loops: int) -> Roofline:
        largest_first = sorted(self.found.items(), key=lambda x: -x[0][1] * x[1])
        return Roofline(
            flops=self.sums["flops"],
            bytes=self.sums["bytes"],
            dot_seconds=self.sums["dots"],
            memory_seconds=self.sums["memory"],
            kernel_seconds=self.sums["kernels"],
            exposed_seconds=self.sums["exposed"],
            hidden_seconds=self.sums["hidden"],
            collectives=tuple(
                Collective(kind, sent, group, is_hidden, across, count, name)
                for (kind, sent, group, is_hidden, across, name), count in largest_first
            ),
            unknown_loops=unknown_loops,
            opaque=tuple(self.opaque),
            launches=int(self.sums["launches"]),
            loop_launches=int(self.sums["loop_launches"]),
            products=int(self.sums["products"]),
            float32_products=int(self.sums["float32"]),
        )


def _is_kernel(op: Operation) -> bool:
    target = op.target or ""
    return op.opcode == "custom-call" and (target == _TPU_KERNEL or target.startswith((*_GPU_KERNELS, CUDNN_ATTENTION)))


def _kernel_cost(op: Operation, by_name: Mapping[tuple[str, str], Operation]) -> KernelCost | None:
    """What the call itself says: a Pallas kernel's own estimate, and cuDNN's description of attention."""
    if (op.target or "").startswith(CUDNN_ATTENTION):
        return KernelCost(attention_flops(op, by_name), _arrays(op, by_name), _ATTENTION_SHARE)
    found = re.search(r'"cost_estimate":\{([^}]*)\}', op.attributes)
    if found is None:
        return None
    figures = {name: float(value) for name, value in re.findall(r'"(\w+)":"?(\d+)', found[1])}
    return KernelCost(figures.get("flops", 0.0), figures.get("bytes_accessed", 0.0))


def _by_shapes(op: Operation, by_name: Mapping[tuple[str, str], Operation]) -> KernelCost | None:
    """Of a GPU's kernel, all of its arrays; a TPU's may have them in its VMEM, or in the host's memory."""
    return None if op.target == _TPU_KERNEL else KernelCost(0.0, _arrays(op, by_name))


def _arrays(op: Operation, by_name: Mapping[tuple[str, str], Operation]) -> int:
    """Bytes of main memory of what a custom call takes and gives; what it writes in place counts once."""
    results = _results(op)
    aliasing = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", op.attributes)
    in_place = re.findall(r"\{(\d*)\}: \(", aliasing[1]) if aliasing else []
    written = [x for i, x in enumerate(results) if "" not in in_place and str(i) not in in_place]
    read = {name for name in op.operands if (op.computation, name) in by_name}
    return sum(x.bytes for x in written if x.space == 0) + sum(_main(by_name[op.computation, name]) for name in read)


def _runs(
    program: Sequence[Operation],
    bodies: Mapping[str, list[Operation]],
    by_name: Mapping[tuple[str, str], Operation],
    unknown_trips: int,
) -> tuple[dict[str, int], int]:
    """(how often each computation that is not a fusion's runs, loops whose trip count is unknown)."""
    callers: dict[str, list[tuple[str, int]]] = {}
    unknown = 0
    runs: dict[str, int] = {}
    for op in program:
        if op.in_entry:
            runs[op.computation] = 1
        if op.in_fusion or op.opcode in FUSIONS or not op.calls:
            continue
        trips, condition = 1, None
        if op.opcode == "while":
            found = _trips(op, bodies, by_name)
            trips, unknown = (unknown_trips, unknown + 1) if found is None else (found, unknown)
            # Nobody asks whether to go on where the compiler has written down how often to.
            names = _LOOP.search(op.attributes) if _KNOWN_TRIPS.search(op.attributes) else None
            condition = names and names[1]
        for callee in op.calls:
            callers.setdefault(callee, []).append((op.computation, 0 if callee == condition else trips))

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
    if op.opcode not in FUSIONS:
        return [op]
    return [x for name in op.calls for inner in bodies.get(name, []) for x in _inside(inner, bodies)]


def _traffic(op: Operation, bodies: Mapping[str, list[Operation]], by_name: Mapping[tuple[str, str], Operation]) -> int:
    """Bytes of main memory that an instruction reads and writes; of what is sliced or updated, that part."""
    if op.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _main(op)
    if op.opcode in _UPDATES:
        return 2 * _main(by_name[op.computation, op.operands[_UPDATES[op.opcode]]])
    if op.opcode.endswith("-start") and op.opcode not in FUSIONS:
        # From one memory to another, often the host's or a TPU's VMEM: what is sliced or updated, at each end in HBM.
        ends = [shape for shape in op.shapes if shape.dims][:2]
        return min(shape.bytes for shape in ends) * sum(shape.space == 0 for shape in ends) if ends else 0
    if op.opcode not in FUSIONS:
        return _main(op) + sum(_main(by_name[op.computation, x]) for x in op.operands if (op.computation, x) in by_name)
    (body,) = (bodies[name] for name in op.calls)
    written = _written(body[-1], bodies, by_name)
    total = sum(size for size, shape in zip(written, _results(op), strict=False) if shape.space == 0)
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
    return [shape.bytes for shape in _results(root)]


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
    return sum(shape.bytes for shape in _results(op) if shape.space == 0)


def _results(op: Operation) -> tuple[Shape, ...]:
    """What an instruction gives, without the workspace of a library's call, which is last."""
    library = op.target in CUBLAS or (op.target or "").startswith(CUDNN_ATTENTION)
    has_workspace = library and len(op.shapes) > 1 and op.shapes[-1].dtype in ("s8", "u8")
    return op.shapes[:-1] if has_workspace else op.results


def _short(op_name: str) -> str:
    """The end of where an operation came from, that says what it is."""
    return "/".join(op_name.split("/")[-2:])
