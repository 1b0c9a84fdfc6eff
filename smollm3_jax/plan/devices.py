"""Devices that are not there: their topologies, meshes of them, and programs compiled for them."""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.stages import Compiled, Wrapped

from sharding import hlo
from sharding.hardware import CHIPS, CUDNN_VERSION, GIB, GPU_TARGETS, Chip, chip_of
from sharding.mesh import DEFAULT_AXES, make_mesh
from sharding.rules import Sharding

from ..config import ModelConfig
from ..errors import OptionError, SupportError
from ..progress import busy
from ..support import how_to_install


class DoesNotFit(Exception):
    """A program is too large: `needed` and `limit` in bytes of one device's memory."""

    def __init__(self, needed: float, limit: float):
        super().__init__(f"{needed / GIB:.2f} GiB of {limit / GIB:.2f}")
        self.needed, self.limit = needed, limit


def topology(name: str, slices: int = 1) -> tuple[Chip, list[Any]]:
    """The chip and the devices of a topology such as "v5e:4x4", perhaps several slices of it; "h100:8" and "h200:8" are
    one host.

    Raises:
      OptionError: the topology is unknown.
      SupportError: the compiler for it is not installed.
    """
    kind = name.split(":")[0]
    if kind not in CHIPS or not re.fullmatch(r"\w+:0*[1-9]\d{0,5}(x0*[1-9]\d{0,5})*", name, re.ASCII):
        raise OptionError(
            f"the topology {name!r} is unknown; it reads CHIP:SHAPE, such as v5e:4x4 or h100:8, with a chip of "
            f"{', '.join(CHIPS)}"
        )
    if kind in GPU_TARGETS:
        if slices > 1:
            raise OptionError(f"--slices is {slices}, but {name} is one host; only TPUs have slices: leave it out")
        return CHIPS[kind], _gpus(name)
    _use_libtpu()
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if math.prod(int(x) for x in name.split(":")[1].split("x")) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:
        raise OptionError(f"libtpu knows no topology {name!r}: {str(error).splitlines()[0][:200]}") from error
    return CHIPS[kind], list(devices)


MOST_GPUS = 1024


def _gpus(name: str) -> list[Any]:
    from jax.experimental import topologies

    if importlib.util.find_spec("jax_plugins") is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise SupportError(f"the compiler for NVIDIA GPUs is not installed: {how_to_install('plan-cuda')}")
    kind, _, shape = name.partition(":")
    if (count := math.prod(int(x) for x in shape.split("x"))) > MOST_GPUS:
        raise OptionError(f"the topology {name!r} has {count:,} GPUs; a plan is of {MOST_GPUS} at most")
    described = topologies.get_topology_desc(
        platform="cuda", topology_name=kind, topology=f"1x1x{count}", target_config=GPU_TARGETS[kind]
    )
    return list(described.devices)


def _use_libtpu() -> None:
    if importlib.util.find_spec("libtpu") is None:
        raise SupportError(f"the TPU compiler, libtpu, is not installed: {how_to_install('plan')}")
    # Neither a metadata server to ask nor a TPU to lock: another process may have it.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # What libtpu looks for on a TPU's host, and warns of at length where it is not: any answer does.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def sharding_for(
    config: ModelConfig, devices: Sequence[Any], rules: str, axes: Mapping[str, int] | None, slices: int = 1
) -> Sharding:
    """The strategy on a mesh of these devices; without `axes` the strategy's usual one, slices along `data`."""
    if rules not in DEFAULT_AXES:
        Sharding.of(make_mesh({"data": -1}, devices), rules)  # its error names the strategies
    if axes is None:
        axes = DEFAULT_AXES[rules]
        if slices > 1:
            axes = {"data": slices, **axes} if "data" not in axes else axes
        if "tensor" in axes and axes["tensor"] > len(devices):
            axes = {**axes, "tensor": len(devices)}
    return Sharding.of(make_mesh(axes, devices), rules).fitted(config.axis_sizes)


def compile_for(
    function: Wrapped,
    *arguments: Any,
    sharding: Sharding,
    compiler_options: Mapping[str, bool | str] | None = None,
    what: str = "compiling",
    **more: Any,
) -> Compiled:
    """A jitted function, compiled for the devices of a mesh that are not there.

    Args:
      arguments: shapes with their shardings; more: keyword arguments of the function.
      sharding: whose mesh the devices are.
      what: shown meanwhile.

    Raises:
      DoesNotFit: the device has not enough memory for it.
    """
    with busy(what), _described(sharding):
        platforms = ("cuda",) if sharding.platform == "gpu" else None
        lowered = function.trace(*arguments, **more).lower(lowering_platforms=platforms)
        try:
            compiled = lowered.compile(compiler_options=dict(compiler_options) if compiler_options else None)
        except Exception as error:
            found = _REFUSAL.search(str(error))
            if found is None:
                raise
            needed, limit = (
                float(size) * 1024 ** "BKMGT".index(unit) for size, unit in re.findall(r"([\d.]+)([KMGT])", found[0])
            )
            raise DoesNotFit(needed, limit) from None
    chip = chip_of(sharding.mesh.devices.flat[0])
    # The compiler for GPUs refuses nothing by itself; the one for TPUs lets a program pass that takes a little more, by
    # its own report, than there is (15.82 GiB of 15.75, seen of an adapter's step).
    if chip is not None and (needed := hlo.memory(compiled).total) > chip.hbm:
        raise DoesNotFit(needed, chip.hbm)
    return compiled


_REFUSAL = re.compile(r"Used [\d.]+[KMGT] of [\d.]+[KMGT] hbm|\([\d.]+[KMGT]\) exceeds available HBM \([\d.]+[KMGT]\)")


@contextlib.contextmanager
def _described(sharding: Sharding) -> Iterator[None]:
    """While a function is lowered for GPUs that are not there: Pallas asks the current mesh which they are, and jax's
    checks before cuDNN's attention, which ask CUDA, get the answers of those GPUs."""
    if sharding.platform != "gpu":
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # asks CUDA itself, whatever device is lowered for

    def capability(text: str) -> tuple[int, ...]:
        return tuple(int(x) for x in text.split("."))

    own = capability(sharding.mesh.devices.flat[0].compute_capability)
    answers = {
        "check_cudnn_version": lambda: CUDNN_VERSION,
        "check_compute_capability": lambda least: own >= capability(least),
        "is_cuda_compute_capability_equal": lambda wanted: own == capability(wanted),
    }
    asked = {name: getattr(cudnn, name) for name in answers}
    for name, answer in answers.items():
        setattr(cudnn, name, answer)
    try:
        with jax.sharding.use_abstract_mesh(sharding.mesh.abstract_mesh):
            yield
    finally:
        for name, function in asked.items():
            setattr(cudnn, name, function)
