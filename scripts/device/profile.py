"""The dearest kernels of a few calls, from JAX's profiler."""

import gzip
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax

from smollm3_jax.files import new_file

from .run import Run

TOP = 25
MOST_BYTES = 15 * 2**20  # a larger trace is left there


def profile(run: Run, case: str, call: Callable[[], object], calls: int) -> None:
    """Says which kernels took longest in one `call`, in microseconds, and keeps the trace beside the results.

    Args:
      calls: by how many to divide: the tokens, say, that it decodes.
    """
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level, options.python_tracer_level = 1, 0
    with tempfile.TemporaryDirectory(prefix="profile-") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            call()
        trace = next(Path(folder).rglob("*.xplane.pb"))
        times = kernel_times(trace)
        kept = run.out / f"{run.part}.xplane.pb.gz"
        with trace.open("rb") as source, new_file(kept) as file, gzip.open(file, "wb") as target:
            shutil.copyfileobj(source, target)
    if kept.stat().st_size > MOST_BYTES:
        kept.unlink()
    top = sorted(times.items(), key=lambda item: -item[1][1])[:TOP]
    run.say(
        "profile",
        case,
        launches=sum(count for count, _ in times.values()) / calls,
        microseconds=sum(taken for _, taken in times.values()) / calls,
        kernels=[
            {"name": name, "launches": count / calls, "microseconds": taken / calls} for name, (count, taken) in top
        ],
    )


def kernel_times(trace: Path) -> dict[str, tuple[int, float]]:
    """Name of a kernel -> (how often it ran, microseconds in all), of a device's streams, or of a CPU's threads."""
    planes = list(jax.profiler.ProfileData.from_file(str(trace)).planes)
    devices = [plane for plane in planes if plane.name.startswith(("/device:GPU", "/device:TPU"))]
    times: dict[str, tuple[int, float]] = {}
    for plane in devices or [plane for plane in planes if "CPU" in plane.name]:
        for line in plane.lines:
            # A TPU's plane has its operations in one line, a GPU's its kernels in one a stream; others sum them up.
            if devices and not line.name.startswith(("Stream", "XLA Ops")):
                continue
            for event in line.events:
                count, taken = times.get(event.name[:90], (0, 0.0))
                times[event.name[:90]] = count + 1, taken + event.duration_ns / 1e3
    return times
