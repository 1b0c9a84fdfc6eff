"""Whether what is launched fits its machine, by the plan."""

import re
from pathlib import Path
from typing import Any

from sharding.hardware import GIB
from sharding.mesh import parse_axes

from ..config import RELEASE, SMOLLM3_3B, ModelConfig
from ..errors import OutOfMemoryError, SupportError
from ..plan.serve import plan_serve
from ..plan.train import plan_train
from ..train.run.dry_run import counted
from ..train.settings import Settings, Stage, stage_at, starts
from ..weights.demo import model_folder
from ..weights.load import text_folder
from .machines import Machine

NO_PLAN = "--no-plan prints it all the same"


def config_of(model: str) -> tuple[ModelConfig, str]:
    """The shape of a model, and what has to be said of it: of one that is not on this machine it is SmolLM3-3B's."""
    if model == "demo" or Path(model).expanduser().exists():
        return ModelConfig.from_hf(text_folder(model_folder(model))), ""
    known = model.startswith(RELEASE)  # SmolLM3-3B, and SmolLM3-3B-Base
    return ModelConfig.from_hf(SMOLLM3_3B), "" if known else f"{model} is not on this machine: taken for a SmolLM3-3B"


def state_bytes(settings: Settings, config: ModelConfig) -> int:
    """What a save of the run writes: what is trained, and two moments of it, in float32."""
    return 12 * counted(settings, config)[2]


def largest_stage(settings: Settings) -> Stage:
    """The stage that computes the most tokens at a time."""
    stages = [stage_at(settings, start)[1] for start in starts(settings)]
    return max(stages, key=lambda stage: stage.rows * stage.length / stage.micro_batches)


def train_fits(settings: Settings, config: ModelConfig, machine: Machine, slices: int = 1) -> dict[str, Any]:
    """The plan of a run's largest stage.

    Raises:
      OutOfMemoryError: it does not fit. SupportError: there is no compiler to ask. OptionError: it can not be at all.
    """
    stage = largest_stage(settings)
    try:
        report = plan_train(
            config,
            machine.name,
            settings.mesh.rules or "fsdp",
            stage.rows,
            stage.length,
            axes=parse_axes(settings.mesh.axes) if settings.mesh.axes else None,
            slices=slices,
            remat=settings.step.remat,
            micro_batches=stage.micro_batches,
            settings=settings,
        )
    except SupportError as error:
        raise SupportError(f"{error}; or leave the plan out, --no-plan") from None
    if not report["fits"]:
        refused = min(report["refused"], key=lambda one: one["needed"])
        raise OutOfMemoryError(
            f"the step does not fit {machine.name}: {refused['needed'] / GIB:.1f} GiB of "
            f"{refused['limit'] / GIB:.1f} a device; {as_settings(report['change'])}; {NO_PLAN}"
        )
    return report


def said_of_training(report: dict[str, Any]) -> str:
    """What a plan that fits says, in a line."""
    hbm, modelled = report["hbm"], report["modelled"]
    return (
        f"fits: {hbm['total'] / GIB:.1f} GiB of {hbm['limit'] / GIB:.1f} a device; modelled, not measured: "
        f"{modelled['step_seconds']:.3g} s a step, {modelled['tokens_per_second']:,.0f} tokens/s"
    )


def as_settings(change: str) -> str:
    """The options of `smollm3 plan train` in a text, as settings of a run."""
    names = {"micro-batches": "step.micro_batches", "remat": "step.remat", "rules": "mesh.rules"}
    return re.sub(r"--([a-z-]+) (\w+)", lambda found: f"{names.get(found[1], found[1])}={found[2]}", change)


def serve_fits(config: ModelConfig, machine: Machine, options: dict[str, Any]) -> dict[str, Any]:
    """The plan of a server; options: of `plan_serve`.

    Raises:
      as `train_fits`.
    """
    try:
        report = plan_serve(config, machine.name, **options)
    except SupportError as error:
        raise SupportError(f"{error}; or leave the plan out, --no-plan") from None
    if not report["fits"]:
        hbm = report["hbm"]
        raise OutOfMemoryError(
            f"the server does not fit {machine.name}: {hbm['total'] / GIB:.1f} GiB of {hbm['limit'] / GIB:.1f} a "
            f"device; {report['change']}; {NO_PLAN}"
        )
    return report


def said_of_serving(report: dict[str, Any]) -> str:
    """What a plan that fits says, in a line."""
    hbm, rate = report["hbm"], report["modelled"]["tokens_per_second"]
    return (
        f"fits: {hbm['total'] / GIB:.1f} GiB of {hbm['limit'] / GIB:.1f} a device, the largest context "
        f"{report['largest_context']:,}; modelled, not measured: {rate:,.0f} tokens/s"
    )
