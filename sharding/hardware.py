"""Chips that programs are planned for: what each has, and where the figure is from.

Sources: [1] cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}: peak, HBM bandwidth, network; HBM is what libtpu 0.0.42's
compiler lets a program have, as its refusals say (v5e: 15.75 of 16 GiB);
[2] "How to Scale Your Model", jax-ml.github.io/scaling-book/tpus: bandwidth between chips as reached, in both
directions of one torus axis, and a chip's share of the network between slices; [3] NVIDIA H100 and H200 data sheets
(SXM, nvidia.com/en-us/data-center/h100 and h200; without sparsity: half of what they give for TF32 and BFLOAT16) and
DGX H100 and H200 user guides (one 400 Gb/s adapter a GPU). TPU7x's figures between chips are v5p's: [1] gives both the
same. A TPU multiplies float32 in passes of bfloat16: one by default, six at the highest precision (jax.lax.Precision);
an H100 or H200 in TF32 by default and in FP32, without its tensor cores, at the highest.
"""

import dataclasses
import re
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """peak, float32, exact: operations/s of dense products of bfloat16, of float32 at the default precision, and of
    float32 at the highest; hbm: bytes; the rest bytes/s of one chip: to its memory, to its neighbours in a collective
    over one mesh axis (`link`), and to other slices (`network`)."""

    name: str
    peak: float
    float32: float
    exact: float
    hbm: int
    hbm_bandwidth: float
    link: float
    network: float


def _tpu(name: str, peak: float, hbm: int, hbm_bandwidth: float, link: float, network: float) -> Chip:
    return Chip(name, peak, peak, peak / 6, hbm, hbm_bandwidth, link, network)


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v5e", 197e12, int(15.75 * GIB), 819e9, 90e9, 3.1e9),
        _tpu("v5p", 459e12, int(95.74 * GIB), 2765e9, 180e9, 6.25e9),
        _tpu("v6e", 918e12, int(31.25 * GIB), 1638e9, 180e9, 12.5e9),
        # A chip of TPU7x is two devices to JAX; this is one of them.
        _tpu("tpu7x", 2307e12 / 2, int(94.75 * GIB), 7380e9 / 2, 90e9, 6.25e9),
        Chip("h100", 989e12, 494.5e12, 67e12, 80 * 10**9, 3350e9, 450e9, 50e9),
        Chip("h200", 989e12, 494.5e12, 67e12, 141 * 10**9, 4800e9, 450e9, 50e9),
    )
}

# What XLA wants to know of a GPU to compile for one that is not there (stream_executor.GpuTargetConfigProto): of an
# H100 or H200 (SXM), by [3] and CUDA's device properties. Without the driver's version XLA takes it for one that is
# too old for CUDA graphs.
_HOPPER = """
platform_name: "CUDA"
device_description_str: "{name}"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  driver_version: "13.0.0"
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_memory_size: {memory}
  memory_bandwidth: {bandwidth}
  l2_cache_size: 52428800
}}
"""
# cuDNN's version, as cuDNN spells it.
CUDNN_VERSION = 91000
# Chip -> the same of it. All else of an H200 is an H100's.
GPU_TARGETS = {
    "h100": _HOPPER.format(name="NVIDIA H100 80GB HBM3", memory=80 * GIB, bandwidth=3352320000000),
    "h200": _HOPPER.format(name="NVIDIA H200", memory=141 * 10**9, bandwidth=4800000000000),
}

# What JAX calls a device, in part, as a regular expression -> its chip. Boards that are not SXM's, such as "H100 PCIe",
# "H200 NVL" and "GH200 480GB", have other figures, and are not known.
_KINDS = {
    "v5 lite": "v5e",
    "v5e": "v5e",
    "v5": "v5p",
    "v6": "v6e",
    "7x": "tpu7x",
    r"\bh100 80gb hbm3$": "h100",
    r"\bh200$": "h200",
}


def chip_of(device: Any) -> Chip | None:
    """The chip of a JAX device; None if it is not known."""
    kind = device.device_kind.lower()
    return next((CHIPS[name] for word, name in _KINDS.items() if re.search(word, kind)), None)
