"""A training step on a topology: its memory, its collectives and its modelled time."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.stages import Compiled

from sharding import hlo
from sharding.arrays import shapes, spec, specs_of
from sharding.hardware import Chip
from sharding.mesh import device_bytes
from sharding.products import KernelCost
from sharding.roofline import Roofline, roofline
from sharding.rules import Sharding

from ..config import ModelConfig
from ..errors import OptionError
from ..files import write_output
from ..train import lora
from ..train.objectives import objective_of
from ..train.optimizer import adamw
from ..train.options import COMPILER_OPTIONS, REMAT, StepOptions
from ..train.settings import Settings
from ..train.state import Batch, TrainState, count, init_state, split
from ..train.step import train_step
from ..weights.key_map import abstract_model, count_parameters
from .devices import DoesNotFit, compile_for, sharding_for, topology
from .report import assumptions, bound_by, collectives, program, times

OF_ADAPTERS = "MFU: four operations for each frozen parameter and token, six for each trained one"
PRETRAINING = Settings()
_OPTIMIZER = adamw(2e-4)
# Scores and mix; scores, their gradient, dq; scores, their gradient, dv, dk.
_SPLASH_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


@dataclasses.dataclass(frozen=True)
class TrainSetting:
    """One training step on one topology: batch rows of `length` tokens, over all devices; of the settings the
    objective and the adapter."""

    config: ModelConfig
    chip: Chip
    sharding: Sharding
    batch: int
    length: int
    options: StepOptions
    settings: Settings = PRETRAINING

    @property
    def trainable(self) -> str | None:
        """As in `TrainState`."""
        return lora.TRAINED if self.settings.lora.rank else None

    @functools.cached_property
    def arguments(self) -> tuple[TrainState, Batch]:
        """Shapes of the state and the batch, with their shardings.

        Raises:
          OptionError: the rows do not divide over the devices and micro-batches.
        """
        if self.settings.lora.rank:
            model = lora.planned(self.config, self.settings.lora, self.sharding)
        else:
            model = abstract_model(self.config, jnp.float32, sharding=self.sharding)
        state = jax.eval_shape(lambda model: init_state(model, _OPTIMIZER, self.trainable), model)
        state = shapes(specs_of(state), self.sharding)
        parts = self.sharding.parts("batch")
        if self.batch % (parts * self.options.micro_batches):
            raise OptionError(
                f"a batch of {self.batch} rows does not divide over {parts} devices and "
                f"{self.options.micro_batches} micro-batches; make it a multiple of "
                f"{parts * self.options.micro_batches}"
            )
        tokens, floats = (
            shapes(spec(dtype, batch=self.batch, row=self.length), self.sharding) for dtype in (jnp.int32, jnp.float32)
        )
        kind = self.settings.objective.kind
        more = {"pretrain": (), "sft": (floats,), "preference": (floats, floats)}[kind]
        return state, Batch(tokens, tokens, *more)

    @property
    def trained(self) -> int:
        """How many parameters are trained."""
        return count(split(self.arguments[0].model, self.trainable)[0])

    def compile(self) -> Compiled:
        state, batch = self.arguments
        return compile_for(
            train_step,
            state,
            batch,
            objective=objective_of(self.settings),
            optimizer=_OPTIMIZER,
            options=self.options,
            sharding=self.sharding,
            compiler_options=COMPILER_OPTIONS.get(self.sharding.platform),
            what=f"compiling the step, remat {self.options.remat}, micro-batches {self.options.micro_batches}",
        )

    def model_of(self, compiled: Compiled) -> Roofline:
        """The roofline. Loops of unknown length are attention's, for more documents than one call takes: none runs."""
        return roofline(
            hlo.operations(compiled),
            self.chip,
            self.kernel_cost,
            slice_devices=_slice_devices(self.sharding),
            unknown_trips=0,
        )

    def kernel_cost(self, op: hlo.Operation) -> KernelCost | None:
        """The cost of splash attention, forward and backward: products over the half of the scores that are causal."""
        products = next((n for name, n in _SPLASH_PRODUCTS.items() if name in op.name + op.op_name), None)
        if products is None:
            return None
        rows = self.batch // self.options.micro_batches // self.sharding.parts("batch")
        heads = self.config.num_attention_heads // self.sharding.parts("heads")
        queries = self.length // self.sharding.parts("length")
        flops = products * 2 * rows * heads * queries * self.length * self.config.head_dim / 2
        return KernelCost(flops=flops, bytes=0.0, share=0.5)


def plan_train(
    config: ModelConfig,
    topology_name: str,
    rules: str = "fsdp",
    batch: int = 16,
    length: int = 4096,
    *,
    axes: Mapping[str, int] | None = None,
    slices: int = 1,
    remat: str | None = None,
    micro_batches: int = 1,
    settings: Settings = PRETRAINING,
    dump: Path | None = None,
) -> dict[str, Any]:
    """Compiles the training step for a topology and reports memory, collectives and the modelled time.

    Args:
      batch: rows of `length` tokens a step, over all devices.
      axes: of the mesh; None is the strategy's usual.
      remat: a key of REMAT; None takes the first, and so the one that recomputes least, that fits.
      settings: whose objective and adapter it is, and nothing else of them; the frozen part of an adapter is as the
        config says where lora.base does not.
      dump: a file for the compiled program.

    Returns:
      What `smollm3 plan train --json` prints; "fits": false, with what to change, if nothing does.
    """
    if remat is not None and remat not in REMAT:
        raise OptionError(f"--remat is {remat!r}; choose one of {', '.join(REMAT)}")
    chip, devices = topology(topology_name, slices)
    sharding = sharding_for(config, devices, rules, axes, slices)
    setting = TrainSetting(config, chip, sharding, batch, length, StepOptions(micro_batches=micro_batches), settings)
    refused: list[dict[str, Any]] = []
    head = {
        "topology": topology_name,
        "slices": slices,
        "devices": len(devices),
        "rules": rules,
        "mesh": dict(sharding.mesh.shape),
        "batch": batch,
        "length": length,
        "objective": settings.objective.kind,
        "parameters": count_parameters(config),
        "trained": setting.trained,
        "refused": refused,
    }
    # With all devices' rows in one go whatever is not saved has to be small; "none" hardly ever is.
    for policy in [remat] if remat else [name for name in REMAT if name != "none"]:
        if report := _attempt(setting, policy, micro_batches, refused, dump):
            return {**head, "fits": True, **report}
    # What would: the leanest policy that leaves the host alone, with the rows in several goes; or else fewer of them.
    rows = batch // sharding.parts("batch")
    for micro in (n for n in (2, 4, 8, 16) if rows % n == 0 and n > micro_batches):
        if _attempt(setting, "full", micro, refused, dump):
            return {**head, "fits": False, "change": f"--micro-batches {micro} --remat full fits"}
    return {**head, "fits": False, "change": _leaner(rules, sharding)}


def _attempt(
    setting: TrainSetting, remat: str, micro_batches: int, refused: list[dict[str, Any]], dump: Path | None
) -> dict[str, Any] | None:
    """The report of a setting with these options; None if it does not fit, which then stands in `refused`."""
    options = StepOptions(remat=remat, micro_batches=micro_batches)
    setting = dataclasses.replace(setting, options=options)
    try:
        compiled = setting.compile()
    except DoesNotFit as refusal:
        refused.append(
            {"remat": remat, "micro_batches": micro_batches, "needed": refusal.needed, "limit": refusal.limit}
        )
        return None
    if dump is not None:
        write_output(dump, compiled.as_text() or "")
    return _report(setting, compiled)


def _leaner(rules: str, sharding: Sharding) -> str:
    if sharding.mesh.size == 1:
        return "more devices, shorter rows, or less that is trained and kept: lora.rank=16 lora.base=int8"
    if sharding.parts("embed") == 1:
        return "the parameters are whole on every device: --rules fsdp splits them"
    if sharding.parts("length") == 1:
        return "more devices, shorter rows, or --rules fsdp_tp_cp, which splits them"
    return "more devices, or shorter rows"


def _report(setting: TrainSetting, compiled: Compiled) -> dict[str, Any]:
    state, batch = setting.arguments
    memory = hlo.memory(compiled)
    model = setting.model_of(compiled)
    tokens = setting.batch * setting.length
    frozen = count_parameters(setting.config) if setting.trainable else 0
    useful = (6 * setting.trained + 4 * frozen) * tokens / setting.sharding.mesh.size  # what is frozen has no gradient
    return {
        "remat": setting.options.remat,
        "micro_batches": setting.options.micro_batches,
        "hbm": {
            "limit": setting.chip.hbm,
            "total": memory.total,
            "parameters": device_bytes(state.model),
            "optimizer": device_bytes(state.optimizer),
            "batch": device_bytes(batch),
            "temporaries": memory.temporaries,
            "code": memory.code,
        },
        "program": program(model, setting.sharding),
        "collectives": collectives(model),
        "modelled": {
            **times(model),
            "tokens_per_second": tokens / model.seconds,
            "mfu": useful / (setting.chip.peak * model.seconds),
            "bound_by": bound_by(model),
        },
        "assumptions": [*assumptions(setting.sharding), *([OF_ADAPTERS] if setting.trainable else [])],
    }


def _slice_devices(sharding: Sharding) -> int | None:
    """Devices of a slice; None if the mesh is one slice."""
    slices = {getattr(device, "slice_index", 0) for device in sharding.mesh.devices.flat}
    return sharding.mesh.size // len(slices) if len(slices) > 1 else None
