"""A checkpoint of a run as a model that is read tensor by tensor, without an export."""

import dataclasses
import logging
import math

import numpy as np
from etils import epath

from ...config import GenerationConfig, ModelConfig
from ...errors import TrainingError
from ...weights.card import Origin, origin_of
from ...weights.key_map import HFTensor, hf_tensors
from ...weights.load import Checkpoint
from ...weights.stored import StoredTensor
from . import checkpoint as checkpoints
from .checkpoint import Damaged
from .export import is_of_adapter, texts_of
from .export_adapter import adapter_of, folded_tensors

log = logging.getLogger(__name__)


def open_saved(run: epath.Path, step: int | None = None) -> tuple[Checkpoint, Origin]:
    """(a checkpoint of a run, float32, what a card says of it). Of a run that trains an adapter it is the base with the
    adapter in it, not rounded.

    Of each parameter all layers are read at once, and verified; those of the last one that was read stay in memory.

    Args:
      step: None is the newest that is sound: to know that, it is read once before.

    Raises:
      OptionError: there is no such checkpoint.
      TrainingError: it is damaged, which may show only where a tensor is read.
    """
    saved = run / "checkpoints"
    there = checkpoints.steps_of(run, step, f"{run}@{step}: the run")
    opened = _adapted if is_of_adapter(saved, there) else _whole
    damage = ""
    for candidate in reversed(there) if step is None else [step]:
        try:
            checkpoint = opened(run, candidate, verify=step is None)
            path = checkpoints.read_about(saved, candidate).get("settings", {}).get("model", {}).get("path")
        except Damaged as reason:
            damage += f"; {reason}"
            continue
        if damage:
            log.warning("%s%s: step %d is taken", run, damage, candidate)
        return checkpoint, dataclasses.replace(origin_of(path) if path else Origin(""), name=f"{run.name}@{candidate}")
    raise TrainingError(f"{run} has no sound checkpoint{damage}" if step is None else damage.removeprefix("; "))


def _adapted(run: epath.Path, step: int, verify: bool) -> Checkpoint:
    adapter = adapter_of(run / "checkpoints", step)  # read, and verified
    config = dataclasses.replace(adapter.config, quantization=None, dtype="float32")
    return Checkpoint(config, adapter.opened.generation_config, folded_tensors(adapter), texts_of(run))


def _whole(run: epath.Path, step: int, verify: bool) -> Checkpoint:
    about = checkpoints.read_about(run / "checkpoints", step)
    config = dataclasses.replace(ModelConfig.from_hf(about["config"]), dtype="float32")
    where = hf_tensors(config)
    saved = _Saved(run / "checkpoints", step)
    for param in {hf.param for hf in where.values()} if verify else ():
        saved.stack(param)
    tensors = {name: saved.tensor(name, hf) for name, hf in where.items()}
    generation = GenerationConfig.from_hf(about["generation_config"], config)
    return Checkpoint(config, generation, tensors, texts_of(run), stacked=True)


class _Saved:
    """The parameters of a checkpoint, of which the last one that was read is kept."""

    def __init__(self, folder: epath.Path, step: int):
        self._folder, self._step = folder, step
        self._held: dict[str, np.ndarray] = {}

    def stack(self, param: str) -> np.ndarray:
        """Float32, of all layers. Raises Damaged."""
        if param not in self._held:
            self._held.clear()  # before the next one takes memory
            self._held[param] = np.asarray(checkpoints.restore_array(self._folder, self._step, f"model.{param}"))
        return self._held[param]

    def tensor(self, name: str, hf: HFTensor) -> StoredTensor:
        def read() -> np.ndarray:
            try:
                stack = self.stack(hf.param)
            except Damaged as reason:
                raise TrainingError(str(reason)) from None
            array = stack if hf.layer is None else stack[hf.layer]
            if array.size != math.prod(hf.shape):
                raise TrainingError(f"checkpoint {self._step}: {hf.param} is {list(stack.shape)}, as no {name} is")
            return array.reshape(hf.shape)

        return StoredTensor(name, "float32", hf.shape, str(self._folder), read)
