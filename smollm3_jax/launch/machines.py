"""What a topology such as v5e:4x4 is called by those who rent it out.

Sources: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (labels, machine types, shapes),
cloud.google.com/tpu/docs/runtimes and /docs/v5e, /v5p, /v6e (accelerator types, software), docs.skypilot.co.
"""

import dataclasses
import math
import re

from ..errors import OptionError

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A kind of TPU.

    accelerator: its label on GKE. machine: GKE's type of machine, {} being its chips. shapes: of a slice; those of
      three numbers go on, in multiples of four.
    whole: the shape that is one host of eight chips, if there is one; all other hosts have four, or all there are.
    type: what the Cloud TPU API calls a slice, {} being its size; empty: it has none. cores: that size's count a chip.
    runtime: the software of such a machine.
    """

    accelerator: str
    machine: str
    shapes: tuple[str, ...]
    whole: str = ""
    type: str = ""
    cores: int = 1
    runtime: str = ""


TPUS = {
    "v5e": Tpu(
        "tpu-v5-lite-podslice", "ct5lp-hightpu-{}t", _FLAT, "2x4", "v5litepod-{}", runtime="v2-alpha-tpuv5-lite"
    ),
    "v5p": Tpu("tpu-v5p-slice", "ct5p-hightpu-{}t", _CUBES, "", "v5p-{}", 2, "v2-alpha-tpuv5"),
    "v6e": Tpu("tpu-v6e-slice", "ct6e-standard-{}t", _FLAT, "2x4", "v6e-{}", runtime="v2-alpha-tpuv6e"),
    "tpu7x": Tpu("tpu7x", "tpu7x-standard-{}t", _CUBES),
}
# GPU -> its label on GKE, and its name in SkyPilot.
GPUS = {"h100": ("nvidia-h100-80gb", "H100"), "h200": ("nvidia-h200-141gb", "H200")}
GPUS_OF_A_HOST = 8


@dataclasses.dataclass(frozen=True)
class Machine:
    """The hosts of one slice, or of one set of GPUs.

    name: the topology's; chip: as in `sharding.hardware`; shape: "4x4" of TPUs, empty of GPUs.
    """

    name: str
    chip: str
    shape: str
    hosts: int
    chips_of_a_host: int

    @property
    def tpu(self) -> Tpu:
        return TPUS[self.chip]

    @property
    def is_gpu(self) -> bool:
        return self.chip in GPUS

    @property
    def size(self) -> int:
        """What the Cloud TPU API counts of a slice: chips, or cores."""
        return self.hosts * self.chips_of_a_host * self.tpu.cores

    def needed(self, slices: int = 1) -> str:
        """What has to be there, in words."""
        hosts = f"{self.hosts} host{'' if self.hosts == 1 else 's'}"
        if self.is_gpu:
            return f"{hosts} of {self.chips_of_a_host} {self.chip.upper()}"
        return (
            f"{slices} slice{'' if slices == 1 else 's'} {self.shape} of {self.chip}, each {hosts} of "
            f"{self.chips_of_a_host} chips (on GKE {self.tpu.machine.format(self.chips_of_a_host)})"
        )


def machine(topology: str, gpus_of_a_host: int = GPUS_OF_A_HOST) -> Machine:
    """The machine of a topology, such as v5e:4x4 or, on two hosts, h100:16.

    Raises:
      OptionError: nobody rents that out.
    """
    chip, _, shape = topology.partition(":")
    if chip in GPUS:
        if not re.fullmatch(r"[1-9]\d{0,4}", shape, re.ASCII):
            raise OptionError(f"--topology is {topology!r}; of GPUs it reads {chip}:NUMBER, such as {chip}:8")
        count = int(shape)
        of_a_host = min(count, gpus_of_a_host)
        if count % of_a_host:
            raise OptionError(f"--topology is {topology!r}: {count} GPUs are no whole hosts of {of_a_host}")
        return Machine(topology, chip, "", count // of_a_host, of_a_host)
    if chip not in TPUS:
        raise OptionError(
            f"--topology is {topology!r}; it reads CHIP:SHAPE, such as v5e:4x4 or h100:8, with a chip of "
            f"{', '.join([*TPUS, *GPUS])}"
        )
    tpu = TPUS[chip]
    if shape not in tpu.shapes and not _is_large_cube(tpu, shape):
        more = ", and larger ones in multiples of four" if tpu.shapes is _CUBES else ""
        raise OptionError(f"--topology is {topology!r}; slices of {chip} are {', '.join(tpu.shapes)}{more}")
    chips = math.prod(map(int, shape.split("x")))
    of_a_host = 8 if shape == tpu.whole else min(chips, 4)
    return Machine(topology, chip, shape, chips // of_a_host, of_a_host)


def _is_large_cube(tpu: Tpu, shape: str) -> bool:
    if tpu.shapes is not _CUBES or not re.fullmatch(r"[1-9]\d?(x[1-9]\d?){2}", shape, re.ASCII):
        return False
    sides = [int(side) for side in shape.split("x")]
    return sides == sorted(sides) and all(side % 4 == 0 for side in sides)
