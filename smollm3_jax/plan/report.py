"""What the reports on training and on decoding have in common: the parts that say what a program takes."""

from typing import Any

from sharding.roofline import Roofline
from sharding.rules import Sharding

ASSUMPTIONS = (
    "modelled, not measured: compiled for this topology, run nowhere",
    "products at the chip's peak for their operands' type, everything else at its memory's bandwidth",
    "attention kernels at half of the peak",
    "collectives over rings at the links' bandwidth; those that the compiler made asynchronous are hidden, "
    "what leaves a slice is not",
    "what goes to the host's memory and back is hidden",
)
OF_GPUS = ("kernels other than attention: all of their arrays at the bandwidth", "launches cost no time")


def assumptions(sharding: Sharding) -> list[str]:
    """What the modelled times of a program for these devices rest on."""
    return [*ASSUMPTIONS, *(OF_GPUS if sharding.platform == "gpu" else ())]


def times(model: Roofline) -> dict[str, float]:
    """The modelled seconds of a program, and what they go to."""
    return {
        "step_seconds": model.seconds,
        "dot_seconds": model.dot_seconds,
        "memory_seconds": model.memory_seconds,
        "kernel_seconds": model.kernel_seconds,
        "exposed_collective_seconds": model.exposed_seconds,
        "hidden_collective_seconds": model.hidden_seconds,
    }


def bound_by(model: Roofline) -> str:
    """What takes the most of a program's time."""
    parts = {
        "products": model.dot_seconds,
        "memory": model.memory_seconds,
        "attention": model.kernel_seconds,
        "collectives": model.exposed_seconds,
    }
    return max(parts, key=lambda name: parts[name])


def program(model: Roofline, sharding: Sharding, a_round: bool = False) -> dict[str, Any]:
    """What a device does in one call, or in one round of its loop. launches: of a GPU, each fusion, kernel, copy and
    collective that it is told to do, also where a CUDA graph repeats them."""
    counts = {
        "flops": model.flops,
        "bytes_moved": model.bytes,
        "products": model.products,
        "float32_products": model.float32_products,
    }
    launches = model.loop_launches if a_round else model.launches
    return {**counts, "launches": launches} if sharding.platform == "gpu" else counts


def collectives(model: Roofline) -> list[dict[str, Any]]:
    """By kind, and whether hidden: how many run in a step, and the bytes that a device sends for them."""
    rows: dict[tuple[str, bool], dict[str, Any]] = {}
    for c in model.collectives:
        row = rows.setdefault(
            (c.kind, c.hidden), {"kind": c.kind, "hidden": c.hidden, "count": 0, "bytes": 0, "bytes_across_slices": 0}
        )
        row["count"] += c.count
        row["bytes"] += c.count * c.bytes
        row["bytes_across_slices"] += c.count * c.bytes * c.across_slices
    return sorted(rows.values(), key=lambda row: -row["bytes"])
