"""Scripts in bash: a Slurm job, TPU machines by themselves, and what a host of SkyPilot runs."""

import importlib.resources
import shlex
from typing import Any

import jinja2

from ..errors import OptionError
from ..support import version
from .job import RESTART, TrainJob
from .machines import GPUS, Machine
from .text import shell

PORT = 8476  # at which the processes of a job meet
FILE = "/tmp/smollm3-config.toml"  # a file of settings, on a host that does not see this machine's
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FunctionLoader(lambda name: (importlib.resources.files("smollm3_jax.launch") / name).read_text()),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters["quote"] = shlex.quote


def slurm(job: TrainJob, machine: Machine, setup: str | None = None) -> str:
    """A script for sbatch; setup: a line of shell that goes before.

    Raises:
      OptionError: TPUs.
    """
    if not machine.is_gpu:
        raise OptionError(f"--topology is {machine.name}, of TPUs; slurm is for {' and '.join(GPUS)}: take gke-train")
    devices = ",".join(map(str, range(machine.chips_of_a_host)))
    return _filled("slurm.sh.jinja", job, machine, setup=setup, devices=devices, command=shell(job.command()))


def skypilot(job: TrainJob, machine: Machine, setup: str | None = None, spot: bool = False) -> dict[str, Any]:
    """A task of SkyPilot, for `sky jobs launch`; setup: what installs the package.

    Raises:
      OptionError: a TPU that its API lacks.
    """
    resources: dict[str, Any] = {}
    if machine.is_gpu:
        resources["accelerators"] = f"{GPUS[machine.chip][1]}:{machine.chips_of_a_host}"
    else:
        resources["accelerators"] = f"tpu-{accelerator_type(machine)}"
        resources["accelerator_args"] = {"runtime_version": machine.tpu.runtime}
    if spot:
        resources["use_spot"] = True
    resources["job_recovery"] = {"recover_on_exit_codes": [RESTART]}
    return {
        "name": job.name,
        "num_nodes": machine.hosts if machine.is_gpu else 1,  # the hosts of a slice are one node
        "resources": resources,
        "setup": _installing(machine, setup) + "\n",
        "run": _worker(job, machine),
    }


def tpu_vm(job: TrainJob, machine: Machine, zone: str, setup: str | None = None, spot: bool = False) -> str:
    """A script that asks for a slice as a queued resource, trains on it, and asks again where it was taken away.

    Raises:
      OptionError: GPUs, or a TPU that the API lacks.
    """
    values = {"type": accelerator_type(machine), "runtime": machine.tpu.runtime, "zone": zone, "spot": spot}
    return _filled(
        "tpu-vm.sh.jinja",
        job,
        machine,
        **values,
        setup=_installing(machine, setup),
        # Its shell stays, to start it again; whoever shuts a machine down ends each of its processes by itself.
        worker=f"while code=0; (\n{_worker(job, machine)}) || code=$?; [ $code = {RESTART} ]; do :; done\nexit $code\n",
    )


def accelerator_type(machine: Machine) -> str:
    """What the Cloud TPU API calls a slice, such as v5litepod-16.

    Raises:
      OptionError: nothing.
    """
    if machine.is_gpu:
        raise OptionError(f"--topology is {machine.name}, of GPUs; tpu-vm is for TPUs: take slurm or skypilot")
    if not machine.tpu.type:
        raise OptionError(f"--topology is {machine.name}; the Cloud TPU API has no {machine.chip}: take gke-train")
    return machine.tpu.type.format(machine.size)


def _installing(machine: Machine, setup: str | None) -> str:
    if setup is not None:
        return setup
    own = version("smollm3-jax")
    package = f"smollm3-jax[{'cuda13' if machine.is_gpu else 'tpu'},remote]" + (f"=={own}" if own else "")
    return shlex.join(["pip", "install", package])


def _worker(job: TrainJob, machine: Machine) -> str:
    """What each host runs."""
    return _filled("worker.sh.jinja", job, machine, command=shell(job.command(FILE)), path=FILE, port=PORT)


def _filled(template: str, job: TrainJob, machine: Machine, **values: Any) -> str:
    return _TEMPLATES.get_template(template).render(job=job, machine=machine, restart=RESTART, **values)
