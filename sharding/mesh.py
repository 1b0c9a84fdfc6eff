"""Device meshes, and the start of a program on several hosts."""

import contextlib
import logging
import math
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from .rules import PyTree
from .strategies import AXES, STRATEGIES, ShardingError

log = logging.getLogger(__name__)

# What a strategy's mesh is, unless it is told; -1 takes the devices that are left.
DEFAULT_AXES: dict[str, dict[str, int]] = {
    "single": {},
    "dp": {"data": -1},
    "fsdp": {"fsdp": -1},
    "tp": {"tensor": -1},
    "fsdp_tp": {"fsdp": -1, "tensor": 4},
    "fsdp_tp_cp": {"fsdp": -1, "context": 4, "tensor": 4},
    "serve_tp": {"data": -1, "tensor": 4},
    "serve_tp_long": {"tensor": -1},
    "serve_cp": {"context": -1},
}
assert set(DEFAULT_AXES) == set(STRATEGIES)


def parse_axes(text: str) -> dict[str, int]:
    """{"fsdp": -1, "tensor": 4} of "fsdp=-1,tensor=4".

    Raises:
      ShardingError: anything else, an axis that is not in AXES or occurs twice.
    """
    axes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-1|[1-9]\d{0,8})\s*", part)
        if match is None:
            raise ShardingError(
                f"mesh {text!r}: {part!r} is not AXIS=LENGTH, a length being -1 (what is left) or above 0"
            )
        if match[1] not in AXES:
            raise ShardingError(f"mesh {text!r}: the axis {match[1]!r} is unknown; choose one of {', '.join(AXES)}")
        if match[1] in axes:
            raise ShardingError(f"mesh {text!r}: {match[1]} is given twice")
        axes[match[1]] = int(match[2])
    return axes


def filled(axes: Mapping[str, int], devices: int) -> dict[str, int]:
    """The lengths of all AXES, in order, whose product is the number of devices; -1 takes what is left.

    Raises:
      ShardingError: it cannot be.
    """
    shape = {axis: axes.get(axis, 1) for axis in AXES}
    open_axes = [axis for axis, length in shape.items() if length == -1]
    known = math.prod(length for length in shape.values() if length != -1)
    said = ", ".join(f"{axis}={length}" for axis, length in axes.items()) or "of one device"
    if len(open_axes) > 1:
        raise ShardingError(f"mesh {said}: only one axis can take what is left, not {' and '.join(open_axes)}")
    if open_axes and devices % known == 0:
        shape[open_axes[0]] = devices // known
    elif open_axes or known != devices:
        raise ShardingError(
            f"mesh {said}: {known} devices{' for the given axes do not divide' if open_axes else ', but there are'} "
            f"{devices}; give lengths whose product is {devices}, one of them -1 to fill"
        )
    return shape


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all AXES, those that are not named of length 1.

    Devices of several slices (`slice_index`) lie along `data`, so that only what crosses `data` goes through the
    network between slices; inside a slice the axes follow its torus.

    Args:
      axes: axis -> length over all slices; one may be -1.
      devices: default: all of `jax.devices()`.

    Raises:
      ShardingError: the lengths do not fit the devices, or the slices do not divide `data`.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    shape = filled(axes, len(devices))
    if len(slices) == 1:
        lengths = tuple(shape.values())
        if devices[0].platform == "tpu":
            # Where a torus has no such shape, physical axes are split.
            return Mesh(mesh_utils.create_device_mesh(lengths, devices, allow_split_physical_axes=True), AXES)
        return Mesh(np.array(devices).reshape(lengths), AXES)
    if shape["data"] % len(slices):
        raise ShardingError(
            f"{len(slices)} slices do not divide the mesh axis data of {shape['data']}: only data may span slices; "
            f"let it be {len(slices)} or a multiple"
        )
    inside = (shape["data"] // len(slices), *list(shape.values())[1:])
    across = (len(slices), *(1 for _ in AXES[1:]))
    return Mesh(mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True), AXES)


def start(
    address: str | None = None,
    processes: int | None = None,
    index: int | None = None,
    timeout: int = 300,
    heartbeat: int = 100,
) -> None:
    """Joins the processes of a job; call it before anything else touches a device. Does nothing in a job of one.

    Cloud TPU, Slurm, Open MPI and Kubernetes are recognised by jax.distributed; elsewhere give all three.

    Args:
      address: host:port of process 0.
      processes, index: how many there are, and which this is.
      timeout: seconds to wait for the others.
      heartbeat: seconds of silence after which another process counts as lost, and every other ends.

    Raises:
      ShardingError: only some of the three are given, somebody is missing, or this is one host of a pod slice
        on its own.
    """
    given = [value is not None for value in (address, processes, index)]
    if any(given) and not all(given):
        raise ShardingError("give address, processes and index of a job together, or none of them")
    if not any(given) and not _in_a_job():
        return
    if jax.distributed.is_initialized():
        return
    if jax.config.jax_platforms == "cpu":  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if address is not None and processes is not None and index is not None:
        _meet(address, processes, index, timeout)
    try:
        jax.distributed.initialize(
            address, processes, index, initialization_timeout=timeout, heartbeat_timeout_seconds=heartbeat
        )
    except ValueError as error:  # somebody's environment that looks like a job and says too little
        raise ShardingError(f"{str(error).rstrip('.')}; give address, processes and index of the job") from None
    refuse_alone()
    log.info("%s", "\n".join(process_map()))


def _meet(address: str, processes: int, index: int, timeout: float) -> None:
    """Waits until everyone has called; JAX itself ends a program that waits too long, and does not say for whom.

    Process 0 listens where JAX's own service will, and tells everyone who is missing.
    """
    host, _, port = address.rpartition(":")
    end = time.monotonic() + timeout
    missing: set[int] = set()
    if index == 0:
        present: dict[int, socket.socket] = {}
        with socket.create_server((host, int(port))) as server:
            while len(present) < processes - 1 and (left := end - time.monotonic()) > 0:
                server.settimeout(left)
                with contextlib.suppress(OSError):
                    caller, _ = server.accept()
                    caller.settimeout(5)
                    present[int(caller.makefile().readline())] = caller
        missing = set(range(1, processes)) - set(present)
        for caller in present.values():
            with contextlib.suppress(OSError), caller:
                caller.sendall((",".join(map(str, sorted(missing))) + "\n").encode())
    else:
        answer = ""
        while not answer and time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 5) as zero:
                zero.sendall(f"{index}\n".encode())
                zero.settimeout(max(1.0, end + 5 - time.monotonic()))
                answer = zero.makefile().readline()
            time.sleep(0.1)
        missing = {int(part) for part in answer.strip().split(",") if part} if answer else {0}
    if missing:
        who = ", ".join(map(str, sorted(missing)))
        raise ShardingError(
            f"process {who} of {processes} did not come to {address} within {timeout:g} s (this is {index}): "
            "is it running, and can it reach that address?"
        )


def process_map() -> list[str]:
    """One line a process: its index and its devices; this one is marked."""
    of_process: dict[int, list[str]] = {}
    for device in jax.devices():
        of_process.setdefault(device.process_index, []).append(str(device.id))
    kind = jax.devices()[0].device_kind
    return [
        f"process {index}{' (this)' if index == jax.process_index() else ''}: {kind} {' '.join(ids)}"
        for index, ids in sorted(of_process.items())
    ]


def refuse_alone() -> None:
    """Raises ShardingError on a host of a pod slice whose others are not in this job: its TPU would wait for ever."""
    hosts = [host for host in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    if len(hosts) > 1 and jax.process_count() == 1:
        raise ShardingError(
            f"this host is one of the {len(hosts)} of a pod slice ({', '.join(hosts[:4])}...), but the job has one "
            "process: run the same command on all of them, or take a slice of one host"
        )


def _in_a_job() -> bool:
    """Whether the environment says that there are other processes."""
    counts = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    if any(os.environ.get(name, "1").isdecimal() and int(os.environ.get(name, "1")) > 1 for name in counts):
        return True
    # The first is of an indexed job of Kubernetes, the last of Cloud TPU's slices.
    named = ("JOB_COMPLETION_INDEX", "MEGASCALE_COORDINATOR_ADDRESS")
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or any(os.environ.get(name) for name in named)


def device_bytes(tree: PyTree) -> int:
    """Bytes of a tree of arrays, or of shapes with shardings, on one of their devices."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
