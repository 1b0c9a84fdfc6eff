"""From the checkpoints of a run that trains an adapter to a PEFT folder, or to its base with the adapter folded in."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from etils import epath

from ...config import ModelConfig
from ...errors import TrainingError
from ...weights import demo
from ...weights.card import Card, put
from ...weights.key_map import hf_tensors
from ...weights.load import Checkpoint, common_dtype, open_checkpoint
from ...weights.peft import Adapter, LowRank, adapter_config, folded, write_adapter
from ...weights.save import write_folder
from ...weights.stored import StoredTensor, cast
from .. import lora
from ..settings import LoraSettings
from ..settings_file import parse
from ..state import split
from . import checkpoint as checkpoints
from .checkpoint import digest_of, named_arrays


@dataclasses.dataclass(frozen=True)
class TrainedAdapter:
    """What a run has learned. base: the folder of its model; parts: Hugging Face's name of a weight -> "a" [r, K],
    "b" [N, r] and perhaps "magnitude" [N], float32."""

    settings: LoraSettings
    base: Path
    opened: Checkpoint
    config: ModelConfig
    parts: dict[str, dict[str, np.ndarray]]


def adapter_of(folder: epath.Path, step: int) -> TrainedAdapter:
    """The adapter of a checkpoint.

    Raises:
      Damaged: the checkpoint is.
      TrainingError: the base is not what the adapter was trained on.
    """
    about = checkpoints.read_about(folder, step)
    settings = parse(about["settings"], "the checkpoint")
    base = demo.model_folder(settings.model.path)
    opened, config = open_checkpoint(base), ModelConfig.from_hf(about["config"])
    dtype = common_dtype(opened.tensors)
    shapes = lora.shapes_of(config, settings.lora, lora.base_of(opened, settings.lora), dtype)
    trained, _ = split(shapes, lora.TRAINED)
    at = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), trained)
    model = checkpoints.restore(folder, step, like, under="model")
    whole = lora.attach(lora.load_base(opened, config, settings.lora, None), settings.lora)
    if digest_of(split(whole, lora.TRAINED)[1]) != about["base"]:
        raise TrainingError(f"{settings.model.path} is not the model that the adapter was trained on; it has changed")
    arrays = {name: np.asarray(x) for name, x in named_arrays(model).items()}
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, hf in hf_tensors(dataclasses.replace(config, quantization=None)).items():
        for part in ("a", "b", "magnitude"):
            if (stack := arrays.get(f"{hf.param}.{part}")) is not None and hf.layer is not None:
                shape = {"a": (settings.lora.rank, -1), "b": (-1, settings.lora.rank), "magnitude": (-1,)}[part]
                parts.setdefault(name, {})[part] = stack[hf.layer].reshape(shape)
    return TrainedAdapter(settings.lora, base, opened, config, parts)


def write_trained(
    adapter: TrainedAdapter,
    folder: Path,
    files: Mapping[str, bytes],
    dtype: str | None,
    force: bool,
    card: Card,
    *,
    alone: bool,
) -> None:
    """The PEFT folder, or the base with the adapter folded in: in float32, rounded once.

    Args:
      files: the model's text files, name -> content.
      dtype: of what is written; None is float32 for the adapter, the base's own for the whole model.
    """
    s = adapter.settings
    if alone:
        parts = {
            name: {part: x.astype(dtype or "float32") for part, x in arrays.items()}
            for name, arrays in adapter.parts.items()
        }
        more = {"lora_dropout": s.dropout, "use_rslora": s.rslora, "use_dora": s.dora}
        alpha = s.alpha or 2.0 * s.rank
        config = adapter_config(str(adapter.base.resolve()), lora.targets_of(s), s.rank, alpha, **more)
        target = folder.resolve()
        write_adapter(target, config, parts, files, lambda new: put(card, target, new, adapter.config.model_type))
        return
    target = dtype or common_dtype(adapter.opened.tensors)
    tensors = folded_tensors(adapter)
    config = dataclasses.replace(adapter.config, quantization=None, dtype=target)
    order = [cast(tensors[name], target) for name in hf_tensors(config)]
    write_folder(folder, config, adapter.opened.generation_config, order, files, force=force, card=card)


def folded_tensors(adapter: TrainedAdapter) -> dict[str, StoredTensor]:
    """The base with the adapter in it, by Hugging Face's names: float32, not yet rounded, computed as it is read."""
    s = adapter.settings
    parts = {name: _low_rank(arrays, lora.scale_of(s)) for name, arrays in adapter.parts.items()}
    return folded(lora.base_tensors(adapter.opened, s), [(Adapter(adapter.base, None, parts), 1.0)])


def _low_rank(arrays: Mapping[str, np.ndarray], scale: float) -> LowRank:
    def stored(part: str) -> StoredTensor:
        return StoredTensor(part, "float32", arrays[part].shape, "", lambda: arrays[part])

    return LowRank(stored("a"), stored("b"), stored("magnitude") if "magnitude" in arrays else None, scale)
