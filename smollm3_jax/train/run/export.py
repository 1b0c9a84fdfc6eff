"""From a run's checkpoints to a Hugging Face folder."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath

from ...config import GenerationConfig, ModelConfig
from ...errors import OptionError, TrainingError
from ...model import SmolLM3
from ...paths import is_remote
from ...weights.key_map import abstract_model
from ...weights.save import check_target, tensors_of, write_folder
from ...weights.stored import cast
from ...weights.texts import check_links, is_text_file
from ..settings import Settings
from ..settings_file import parse
from . import checkpoint as checkpoints
from .card import card_of
from .checkpoint import Damaged
from .export_adapter import TrainedAdapter, adapter_of, write_trained
from .folder import TOKENIZER

log = logging.getLogger(__name__)


def export(
    run: epath.Path,
    folder: Path,
    step: int | None = None,
    average: int = 1,
    dtype: str | None = None,
    force: bool = False,
    adapter: bool = False,
) -> list[int]:
    """Writes a checkpoint of a run as a model folder; returns the steps that went into it.

    Of a run that trains an adapter that is its base with the adapter folded in, or the adapter alone as a PEFT folder.

    Args:
      step: None is the newest that is sound.
      average: how many checkpoints to take the mean of: that one and those before it.
      dtype: of what is written; None is float32, or of a run that trains an adapter the base's own.
      force: replace the model that the folder holds, if any.
      adapter: write the adapter alone.

    Raises:
      OptionError: there is no such checkpoint, or there are fewer; or there is something in the folder already.
      TrainingError: it is damaged.
      SaveError: the folder cannot be written.
    """
    check_target(folder, force)
    saved = run / "checkpoints"
    there = checkpoints.steps_of(run, step, f"--step {step}: {run}")
    of_adapter = is_of_adapter(saved, there)
    if adapter and not of_adapter:
        raise OptionError(f"--adapter: {run} trains the model itself; without --adapter that is what is written")
    if of_adapter and average > 1:
        raise OptionError(
            "--average: the mean of adapters' matrices is none of their sums; export each, and merge these"
        )
    found, model = _restored(run, step, average, adapter_of if of_adapter else _model)
    files = texts_of(run)
    about = checkpoints.read_about(saved, found[0])
    settings = Settings()
    with contextlib.suppress(OptionError):  # of another version, with other settings: the card says less
        settings = parse(about.get("settings", {}), "the checkpoint")
    if settings.data.template and settings.objective.kind != "pretrain":
        log.info("the chat template is that of the training, %s", settings.data.template)
    card = card_of(settings, found, folder, dtype, adapter)
    if isinstance(model, TrainedAdapter):
        write_trained(model, folder, files, dtype, force, card, alone=adapter)
        return found
    dtype = dtype or "float32"
    config = ModelConfig.from_hf(about["config"])
    config = dataclasses.replace(config, dtype=dtype)
    tensors = [cast(tensor, dtype) for tensor in tensors_of(model)]
    write_folder(folder, config, model.generation_config, tensors, files, force=force, card=card)
    return found


def _restored(
    run: epath.Path, step: int | None, average: int, restore: Callable[[epath.Path, int], Any]
) -> tuple[list[int], Any]:
    """(the steps, what `restore` makes of the newest sound one up to `step`, or the mean of several)."""
    saved = run / "checkpoints"
    there = checkpoints.steps(saved)
    found: list[int] = []
    damage, model = "", None
    for candidate in reversed([x for x in there if step is None or x <= step]):
        try:
            one = restore(saved, candidate)
        except Damaged as reason:
            if candidate == step:
                raise TrainingError(str(reason)) from None
            damage += f"; {reason}"
            continue
        found.append(candidate)
        model = one if model is None else _running_mean(model, one, len(found))
        if len(found) == average:
            break
    if model is None or len(found) < average:
        raise TrainingError(f"{run} has {len(found)} sound checkpoints up to there, not {average}{damage}")
    return found, model


def is_of_adapter(saved: epath.Path, there: list[int]) -> bool:
    """Whether the newest sound checkpoint is of an adapter."""
    for step in reversed(there):
        with contextlib.suppress(Damaged):
            return bool(checkpoints.read_about(saved, step).get("settings", {}).get("lora", {}).get("rank"))
    return False


def texts_of(run: epath.Path) -> dict[str, bytes]:
    """The text files that go with what a run has trained, name -> content."""
    if not is_remote(run):
        check_links(Path(run / TOKENIZER))
    return {name: (run / TOKENIZER / name).read_bytes() for name in names_in(run / TOKENIZER)}


def names_in(folder: epath.Path) -> list[str]:
    """Of the text files of a model in a folder, "additional_chat_templates/x.jinja" too."""
    here = [path for path in sorted(folder.iterdir()) if is_text_file(path.name)]
    below = [file for inner in here if inner.is_dir() for file in sorted(inner.iterdir()) if file.is_file()]
    return [file.name for file in here if file.is_file()] + [f"{file.parent.name}/{file.name}" for file in below]


@functools.partial(jax.jit, donate_argnums=0)
def _running_mean(mean: SmolLM3, model: SmolLM3, count: int) -> SmolLM3:
    """Of `count` models, float32; `mean` is that of those before."""
    return jax.tree.map(lambda old, new: old + (new - old) / count, mean, model)


def _model(folder: epath.Path, step: int) -> SmolLM3:
    """The model of a checkpoint, in the host's memory unless JAX_PLATFORMS leaves out the CPU."""
    about = checkpoints.read_about(folder, step)
    config = ModelConfig.from_hf(about["config"])
    generation = GenerationConfig.from_hf(about["generation_config"], config)
    like = abstract_model(config, "float32", generation)
    at = jax.sharding.SingleDeviceSharding(checkpoints.host_device())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), like)
    return checkpoints.restore(folder, step, like, under="model")
