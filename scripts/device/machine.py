"""The machine: what it is, and what its memory and its products do at most."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from sharding.hardware import chip_of
from smollm3_jax.support import version

from .run import Run, timed

PACKAGES = ("jax", "jaxlib", "flax", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin", "torch", "triton")
PACKAGES += ("transformers", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-cublas", "nvidia-cublas-cu12", "numpy")
SMI = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,mig.mode.current"


def part(run: Run) -> None:
    run.attempt("machine", lambda: run.say("machine", "machine", **describe()))
    run.attempt("ceilings", ceilings, run)


def describe() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "chip": getattr(chip_of(device), "name", None),
        "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "runtime": " ".join(str(getattr(device.client, "platform_version", "")).split()),
        "host": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := version(name)) is not None},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "gpus_as_found": _output(["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"]),
        "commit": _output(["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]),
    }


def _output(command: list[str]) -> str | None:
    """What a command prints; None where there is no such command or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def ceilings(run: Run) -> None:
    """Copy and read in bytes/s, of random bits that no cache holds; product in operations/s, bfloat16."""
    count = 2**18 if run.tiny else 2**30
    bits = jax.random.bits(jax.random.key(0, impl="rbg"), (count,), jnp.uint16)
    copy, read = jax.jit(lambda x: x ^ 1), jax.jit(jnp.max)
    width = 256 if run.tiny else 8192
    a, b = (jax.random.normal(jax.random.key(i, impl="rbg"), (width, width), jnp.bfloat16) for i in (1, 2))
    product = jax.jit(lambda a, b: a @ b)
    for name, function, amount, unit in (
        ("copy", lambda: copy(bits), 2 * bits.nbytes, "bytes/s"),
        ("read", lambda: read(bits), bits.nbytes, "bytes/s"),
        ("product", lambda: product(a, b), 2 * width**3, "operations/s"),
    ):
        times = timed(lambda function=function: jax.block_until_ready(function()), rounds=9)
        run.say("ceiling", name, value=1e3 * amount / times["ms"], unit=unit, **times)
