"""`smollm3 launch`."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..screen_text import plain
from .plan import add_serving, serving_options, stopped_by_ctrl_c
from .shared import add_model_name, count, say

if TYPE_CHECKING:
    from ..launch.job import TrainJob
    from ..launch.machines import Machine


def add(parser: argparse.ArgumentParser) -> None:
    from sharding.strategies import STRATEGIES

    targets = parser.add_subparsers(required=True, metavar="TARGET", prog="smollm3 launch")

    def target(
        name: str, run: Callable[[argparse.Namespace], str], help: str, words: str = ""
    ) -> argparse.ArgumentParser:
        usage = f"smollm3 launch {name} --topology CHIP:SHAPE {words} [OPTION ...]"
        sub = targets.add_parser(name, help=help, description=help, usage=usage)
        sub.set_defaults(launch=run)
        sub.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="such as v5e:4x4 or h100:8")
        sub.add_argument("--name", metavar="NAME", help="of the job (default: the recipe's or the model's)")
        plan_help = "do not compile it first, to see whether it fits: that takes minutes"
        sub.add_argument("--no-plan", action="store_true", help=plan_help)
        return sub

    def training(name: str, run: Callable[[argparse.Namespace], str], help: str) -> argparse.ArgumentParser:
        sub = target(name, run, help, "--config FILE.toml|RECIPE [section.key=value ...]")
        sub.add_argument("--config", required=True, metavar="FILE.toml|RECIPE", help="as of smollm3 train")
        sub.add_argument("settings", nargs="*", metavar="section.key=value", help="over those of the file")
        grace_help = "from SIGTERM to its end (default: two steps and a save, as planned)"
        sub.add_argument("--grace", type=count, metavar="SECONDS", help=grace_help)
        return sub

    train = training("gke-train", _gke_train, "a JobSet for Google Kubernetes Engine, of TPUs")
    _add_image(train)
    train.add_argument(
        "--slices", type=count, default=1, metavar="N", help="how many slices of this topology (default: 1)"
    )
    serve = target("gke-serve", _gke_serve, "a Deployment and its Service for Google Kubernetes Engine", "MODEL")
    add_model_name(serve)
    _add_image(serve)
    serve.add_argument("--mesh", metavar="AXIS=N,...", help="of all devices; default: by rules")
    serve.add_argument("--rules", default="serve_tp", choices=STRATEGIES, help="default: serve_tp")
    add_serving(serve)
    serve.add_argument("--replicas", type=count, default=1, metavar="N", help="default: 1")
    drain_help = "for answers that are under way when a pod is to end (default: 120)"
    serve.add_argument("--drain-timeout", type=count, default=120, metavar="SECONDS", help=drain_help)
    slurm = training("slurm", _slurm, "a script for sbatch, of GPUs")
    sky = training("skypilot", _skypilot, "a task for `sky jobs launch`")
    vm = training("tpu-vm", _tpu_vm, "a script that asks Cloud TPU's API for a slice (legacy), and trains on it")
    vm.add_argument("--zone", required=True, metavar="ZONE", help="such as us-west4-a")
    for sub in (slurm, sky):
        sub.add_argument("--gpus-per-node", type=count, default=8, metavar="N", help="at most (default: 8)")
    for sub in (slurm, sky, vm):
        usual = "none" if sub is slurm else "pip install of this package"
        sub.add_argument("--setup", metavar="COMMAND", help=f"a line of shell that goes before (default: {usual})")
    for sub in (train, sky, vm):
        sub.add_argument("--spot", action="store_true", help="machines that may be taken away")


def _add_image(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image", required=True, metavar="IMAGE", help="made of scripts/launch/Dockerfile.tpu, say")


def run(args: argparse.Namespace) -> int:
    """Prints what starts it, after the plan has said whether it fits. No device is touched."""
    import jax

    jax.config.update("jax_platforms", "cpu")

    def work() -> int:
        say(args.launch(args), end="")
        return 0

    return stopped_by_ctrl_c(work)


def _gke_train(args: argparse.Namespace) -> str:
    from ..launch.gke import jobset
    from ..launch.text import manifest

    return _training(
        args, lambda job, machine: manifest(jobset(job, machine, args.image, args.slices, args.spot)), args.slices
    )


def _slurm(args: argparse.Namespace) -> str:
    from ..launch.scripts import slurm

    return _training(args, lambda job, machine: slurm(job, machine, args.setup), shared=True)


def _skypilot(args: argparse.Namespace) -> str:
    from ..launch.scripts import skypilot
    from ..launch.text import manifest

    return _training(args, lambda job, machine: manifest([skypilot(job, machine, args.setup, args.spot)]))


def _tpu_vm(args: argparse.Namespace) -> str:
    from ..launch.scripts import tpu_vm

    return _training(args, lambda job, machine: tpu_vm(job, machine, args.zone, args.setup, args.spot))


def _training(
    args: argparse.Namespace, make: "Callable[[TrainJob, Machine], str]", slices: int = 1, shared: bool = False
) -> str:
    """What `make` makes of the run that is asked for, once it is planned; slices, shared: as of `train_job`."""
    from ..launch import fit
    from ..launch.job import grace, train_job
    from ..launch.machines import machine

    where = machine(args.topology, getattr(args, "gpus_per_node", 8))
    job = train_job(args.config, args.settings, args.name, slices=slices, shared=shared)
    make(job, where)  # a mistake shows before a plan takes minutes
    config, remark = fit.config_of(job.settings.model.config or job.settings.model.path)
    if remark:
        _remark(args, remark)
    seconds = None
    if not args.no_plan:
        report = fit.train_fits(job.settings, config, where, slices)
        _remark(args, fit.said_of_training(report))
        seconds = report["modelled"]["step_seconds"]
    wait = args.grace or grace(fit.state_bytes(job.settings, config), where.hosts * slices, seconds)
    _remark(args, f"{where.needed(slices)}; {wait} s from SIGTERM to the end of a save")
    return make(dataclasses.replace(job, grace=wait), where)


def _gke_serve(args: argparse.Namespace) -> str:
    from ..launch import fit
    from ..launch.gke import serving
    from ..launch.job import job_name
    from ..launch.machines import machine
    from ..launch.text import manifest

    where, name = machine(args.topology), job_name(args.name, args.model)
    several = where.chips_of_a_host > 1 or args.mesh is not None
    given = {"--rules": args.rules if several else None, "--mesh": args.mesh, "--slots": args.slots}
    given |= {"--context": args.context, "--cache-tokens": args.cache_tokens, "--weights": args.weights}
    given |= {"--cache": args.cache if args.cache != "bfloat16" else None}
    options = [word for option, value in given.items() if value is not None for word in (option, str(value))]
    made = serving(name, args.model, options, where, args.image, args.drain_timeout, args.replicas)
    config, remark = fit.config_of(args.model)
    if remark:
        _remark(args, remark)
    if not args.no_plan:
        report = fit.serve_fits(config, where, serving_options(args, config))
        _remark(args, fit.said_of_serving(report))
    _remark(args, f"{where.needed()}; the secret {name} with the key api-key, of requests, and, if need be, hf-token")
    return manifest(made)


def _remark(args: argparse.Namespace, text: str) -> None:
    if not args.quiet:
        print(f"smollm3: {plain(text)}", file=sys.stderr, flush=True)
