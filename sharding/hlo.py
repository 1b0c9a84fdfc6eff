"""What a compiled program says of itself: its memory, and its operations as the compiler scheduled them.

It reads the text that `jax.stages.Compiled.as_text` gives, of any backend.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jax.stages import Compiled

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
FUSIONS = ("fusion", "fusion-start")
# Operations that only move bytes.
MOVES = ("copy", "copy-start", "transpose", "slice", "slice-start", "dynamic-slice", "reverse", "concatenate", "pad")
# What else may stand in a fusion that only moves bytes.
_NAMES = ("parameter", "constant", "bitcast", "reshape", "broadcast", "get-tuple-element", "tuple", "fusion")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. What is donated counts among arguments, outputs and `aliased`."""

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """The memory that the device needs while the program runs."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array, as one device has it. space: 0 is the main memory (HBM); a TPU's 1 is its VMEM."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Bytes, without what a tiled layout pads."""
        # The first number of a type's name is its bits: s32, bf16, f8e4m3fn.
        bits = re.search(r"\d+", self.dtype)
        count = 8 if self.dtype == "pred" else int(bits[0]) if bits else 0
        for dim in self.dims:
            count *= dim
        return -(-count // 8)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction of a compiled program.

    shapes: of the result, more than one if it is a tuple; computation: where it stands; calls: the
    computations that it names; op_name: where in the traced function it came from ("" if unknown);
    target: of a custom call; operands: names of instructions of the same computation (of a parameter its
    number, of a constant its value); attributes: the text after them; in_entry, in_loop, in_branch,
    in_fusion: whether it stands in the entry computation itself, or anywhere inside of a while loop, a
    conditional's branch or a fusion (or the function that a reduction applies).
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    computation: str
    calls: tuple[str, ...]
    op_name: str
    target: str | None
    operands: tuple[str, ...]
    attributes: str
    in_entry: bool
    in_loop: bool
    in_branch: bool
    in_fusion: bool

    @property
    def results(self) -> tuple[Shape, ...]:
        """`shapes`; of a fusion that XLA for GPU starts here and awaits later, without the operands that come first in
        them and the state that comes last."""
        return self.shapes[len(self.operands) : -1] if self.opcode == "fusion-start" else self.shapes

    @property
    def bytes(self) -> int:
        """Bytes of the result, of all parts if it is a tuple."""
        return sum(shape.bytes for shape in self.results)


def memory(compiled: Compiled) -> Memory:
    """What the compiler allocates on each device."""
    stats = compiled.memory_analysis()
    assert stats is not None
    return Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )


def operations(program: Compiled | str) -> list[Operation]:
    """Every instruction of every computation, in the order of the text.

    Args:
      program: compiled, or its text.
    """
    text = program if isinstance(program, str) else program.as_text()
    assert text is not None
    found: list[tuple[str, bool, str, str, str, str]] = []
    computation, entry = "", False
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computation, entry = head["name"], head["entry"] is not None
        elif instruction := _INSTRUCTION.match(line):
            shape, rest = _split_shape(instruction["rest"])
            if opcode := re.match(r"([a-z][\w-]*)\(", rest):
                found.append((computation, entry, instruction["name"], shape, opcode[1], rest))
    # Computation -> what it is inside of: the callee's own kind, and that of all its callers.
    edges = [(at, *call) for at, _, _, _, opcode, rest in found for call in _called(opcode, rest)]
    inside = {kind: _reached([c for _, k, c in edges if k == kind], edges) for kind in ("loop", "branch", "fusion")}
    return [
        Operation(
            name=name,
            opcode=opcode,
            shapes=tuple(_shapes(shape)),
            computation=at,
            calls=tuple(callee for _, callee in _called(opcode, rest)),
            op_name=_first(_OP_NAME, rest) or "",
            target=_first(_TARGET, rest),
            **_operands(rest),
            in_entry=in_entry,
            in_loop=at in inside["loop"],
            in_branch=at in inside["branch"],
            in_fusion=at in inside["fusion"],
        )
        for at, in_entry, name, shape, opcode, rest in found
    ]


def collectives(program: Sequence[Operation]) -> list[Operation]:
    """What devices do together, each once. Those in branches may not run."""
    kinds = (*COLLECTIVES, *(f"{kind}-start" for kind in COLLECTIVES))
    # XLA for TPU spreads an asynchronous one over several fusions, and it is in all of them.
    first = {op.computation for op in program if op.target == "AsyncCollectiveStart"}
    return [op for op in program if op.opcode in kinds and (not op.in_fusion or op.computation in first)]


def moves(program: Sequence[Operation], at_least: int) -> list[Operation]:
    """What writes at least this many bytes of main memory and only moves them.

    That is copies, transposes and slices, and fusions of nothing else. Updates in place are none, and
    neither is what is fetched into a TPU's VMEM ahead of its use.
    """
    bodies: dict[str, list[Operation]] = {}
    for op in program:
        bodies.setdefault(op.computation, []).append(op)
    return [
        op
        for op in program
        if not op.in_fusion
        and all(shape.space == 0 and shape.bytes >= at_least for shape in _moved(op))
        and (op.opcode in MOVES or (op.opcode in FUSIONS and _only_moves(op, bodies)))
    ]


def _moved(op: Operation) -> tuple[Shape, ...]:
    """What an operation reads, if it says so, and writes."""
    return op.shapes[:2] if op.opcode.endswith("-start") and op.opcode not in FUSIONS else op.results


def _only_moves(fusion: Operation, bodies: Mapping[str, list[Operation]]) -> bool:
    body = [op for name in fusion.calls for op in bodies[name]]
    if not any(op.opcode == "parameter" for op in body):
        return False  # it makes its array of a constant
    return any(op.opcode in (*MOVES, "fusion") for op in body) and all(
        op.opcode in (*MOVES, *_NAMES) and (op.opcode != "fusion" or _only_moves(op, bodies)) for op in body
    )


_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<rest>.*)")
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_SPACE = re.compile(r"S\((\d+)\)")
# Not control-predecessors={...}, which names instructions.
_CALL = re.compile(r"(?<![\w-])(\w+)=(?:%([\w.-]+)|\{(%[^{}]*)\})")
# Attribute -> what the computation that it names is.
_KINDS = {
    "body": "loop",
    "condition": "loop",
    "branch_computations": "branch",
    "true_computation": "branch",
    "false_computation": "branch",
    "calls": "fusion",
    "to_apply": "fusion",
}


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    return match and match[1]


def _split_shape(text: str) -> tuple[str, str]:
    """(shape, the rest). A tuple is in parentheses, and layouts have some of their own."""
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: i + 1], text[i + 2 :]
    return text, ""


def _operands(rest: str) -> dict[str, Any]:
    inside, _, attributes = rest.partition("(")[2].partition(")")
    names = re.findall(r"%([\w.-]+)", inside)
    return {"operands": tuple(names or [inside]), "attributes": attributes}


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _ARRAY.findall(text):
        lengths = tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)
        yield Shape(dtype, lengths, int(_first(_SPACE, layout) or 0))


def _called(opcode: str, rest: str) -> Iterator[tuple[str, str]]:
    """(kind, computation) of each that an instruction names; a plain or asynchronous call is of no kind."""
    for attribute, one, several in _CALL.findall(rest):
        for callee in [one] if one else re.findall(r"%([\w.-]+)", several):
            kind = _KINDS.get(attribute, "")
            yield "" if opcode in ("call", "async-start") else kind, callee


def _reached(start: Iterable[str], edges: Sequence[tuple[str, str, str]]) -> set[str]:
    reached, waiting = set(), list(start)
    callees: dict[str, list[str]] = {}
    for caller, _, callee in edges:
        callees.setdefault(caller, []).append(callee)
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += callees.get(name, [])
    return reached
