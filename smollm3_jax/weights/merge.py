"""Several checkpoints merged into one folder: each tensor is read, merged in float32, rounded once and written."""

import dataclasses
import logging
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..config import ModelConfig
from ..errors import CheckpointFormatError, OptionError
from . import merge_methods as methods
from .card import Card, Origin, last_part, origin_of, shown_name
from .demo import model_folder
from .key_map import HFTensor, hf_tensors
from .load import Checkpoint, common_dtype, open_checkpoint
from .merge_file import METHODS, Merge, Part, as_yaml, check, value_at
from .quantized import dequantize_tensors
from .save import check_target, write_folder
from .stored import StoredTensor, cast

log = logging.getLogger(__name__)


def open_model(name: str) -> tuple[Checkpoint, Origin]:
    """(a model by the name that a user gives it, what a card says of it)."""
    return open_checkpoint(model_folder(name)), origin_of(name)


def merge(
    asked: Merge,
    folder: str | Path,
    max_shard_size: int | str = "5GB",
    force: bool = False,
    open_model: Callable[[str], tuple[Checkpoint, Origin]] = open_model,
) -> None:
    """Writes what the models become, as `convert` writes a folder: tokenizer, templates and config of the base (or of
    the first model) go along.

    One tensor of each model is in memory at a time, in float32; of one that is `stacked`, that of all layers.

    Args:
      open_model: what opens a model by its name.

    Raises:
      SmolLM3Error: a model is unsound, or is of another shape than the others; the methods' settings do not fit;
        or the folder cannot be written. It is then as it was.
    """
    check(asked)
    check_target(folder, force)
    names = [part.model for part in asked.parts]
    first = asked.base or names[0]
    found = {name: open_model(name) for name in dict.fromkeys([first, *names])}
    opened = {name: checkpoint for name, (checkpoint, _) in found.items()}
    texts = opened[first].files
    if asked.tokenizer is not None:
        texts = opened.get(asked.tokenizer, opened[first]).files
        if asked.tokenizer not in opened:
            texts = open_model(asked.tokenizer)[0].files
    dtype = asked.dtype or common_dtype(opened[first].tensors)
    plain = {name: _plain(checkpoint) for name, checkpoint in opened.items()}
    config = dataclasses.replace(opened[first].config, quantization=None, dtype=dtype)
    _check_alike(opened, plain, first)
    where = hf_tensors(config)
    if any(checkpoint.stacked for checkpoint in opened.values()):
        where = dict(sorted(where.items(), key=lambda item: item[1].param))
    tensors = [
        cast(_merged(asked, config, name, hf, {model: of[name] for model, of in plain.items()}), dtype)
        for name, hf in where.items()
    ]
    card = _card(asked, {name: origin for name, (_, origin) in found.items()}, Path(folder))
    generation = opened[first].generation_config
    write_folder(Path(folder), config, generation, tensors, texts, max_shard_size, force=force, card=card)


def _card(asked: Merge, named: Mapping[str, Origin], folder: Path) -> Card:
    """What is said of a merge: its models, and mergekit's YAML of it."""
    origins = list(named.values())
    own: dict[str, str] = {}
    for name, of in named.items():  # folders of one name may lie in several
        own[name] = f"{of.name}-{len(own) + 1}" if of.name in own.values() else of.name
    recipe = as_yaml(
        dataclasses.replace(
            asked,
            parts=tuple(dataclasses.replace(part, model=own[part.model]) for part in asked.parts),
            base=own.get(asked.base or "", asked.base),
            tokenizer=asked.tokenizer and shown_name(asked.tokenizer),
        )
    )
    several = ", ".join(f"`{of.name}`" for of in origins)
    text = f"`merge.yml`, as mergekit reads it, too:\n\n```yaml\n{recipe}```"
    command = shlex.join(["smollm3", "merge", "--config", "merge.yml", "--out", last_part(str(folder))])
    what = f"{several}, merged by {asked.method}."
    return Card(what, origins, [command], "merge", ["merge", "mergekit"], sections={"Recipe": text})


def _plain(checkpoint: Checkpoint) -> Mapping[str, StoredTensor]:
    if checkpoint.config.quantization is None:
        return checkpoint.tensors
    return dequantize_tensors(checkpoint.config, checkpoint.tensors)[1]


def _check_alike(opened: Mapping[str, Checkpoint], plain: Mapping[str, Mapping[str, StoredTensor]], first: str) -> None:
    """Raises CheckpointFormatError where models have not the same tensors; says what else of their configs differs."""
    own = plain[first]
    for model, tensors in plain.items():
        if odd := sorted(own.keys() ^ tensors.keys()):
            which = model if odd[0] in tensors else first
            raise CheckpointFormatError(
                f"{first} and {model} are of different shapes: {odd[0]} is in {which} alone; models that are merged "
                "are trained from one"
            )
        for name, tensor in tensors.items():
            if tensor.shape != own[name].shape:
                raise CheckpointFormatError(
                    f"{first} and {model} are of different shapes: {name} is {list(own[name].shape)} and "
                    f"{list(tensor.shape)}; models that are merged are trained from one"
                )
        differ = _differences(opened[first].config, opened[model].config)
        if differ:
            log.warning("the configs differ, and that of %s goes along: %s", first, "; ".join(differ))
        texts = opened[first].files.get("tokenizer.json"), opened[model].files.get("tokenizer.json")
        if None not in texts and texts[0] != texts[1]:
            log.warning(
                "%s and %s have different tokenizers: their embeddings' rows may mean other tokens", first, model
            )


def _differences(a: ModelConfig, b: ModelConfig) -> list[str]:
    """Fields that change what a model computes."""
    fields = [x.name for x in dataclasses.fields(ModelConfig) if x.compare]
    fields = [x for x in fields if x not in ("dtype", "quantization", "initializer_range", "model_type")]
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in fields}
    return [f"{name} {x} and {y}" for name, (x, y) in pairs.items() if x != y]


def _merged(
    asked: Merge, config: ModelConfig, name: str, hf: HFTensor, tensors: Mapping[str, StoredTensor]
) -> StoredTensor:
    """A tensor as it will be merged, float32. Settings are resolved now, so that a mistake shows before any work."""
    last = config.num_hidden_layers - 1
    depth = 0.0 if hf.layer is None else hf.layer / last if last else 1.0
    others = [part for part in asked.parts if part.model != asked.base or METHODS[asked.method] is None]

    def of(part: Part, what: str) -> float:
        return value_at(getattr(part, what), f"{part.model}: {what}", name, depth)

    def array(model: str) -> np.ndarray:
        return tensors[model].read().astype(np.float32)

    if asked.method == "slerp":
        t, base = value_at(asked.t, "t", name, depth), str(asked.base)
        (other,) = [part.model for part in asked.parts if part.model != base]
        return _stored(name, hf, lambda: methods.slerp(array(base), array(other), t))
    weights = [of(part, "weight") for part in others]
    if asked.normalized and METHODS[asked.method] is None and abs(sum(weights)) < 1e-8:
        raise OptionError(
            f"the weights sum up to 0 for {name}, and are to be divided by their sum; parameters.normalize: false "
            "takes them as they are"
        )
    if METHODS[asked.method] is None:
        models = [part.model for part in others]
        return _stored(name, hf, lambda: methods.linear([array(x) for x in models], weights, asked.normalized))
    densities = [of(part, "density") for part in others]

    def read() -> np.ndarray:
        base = array(str(asked.base))
        deltas = []
        for part, density in zip(others, densities, strict=True):
            delta = array(part.model) - base
            if asked.method == "ties":
                delta = methods.largest(delta, density)
            else:
                kept = methods.drawn(delta.shape, density, name, len(deltas))
                delta = methods.dropped(delta, density, asked.rescale, kept)
            deltas.append(delta)
        elect, _ = METHODS[asked.method] or (False, False)
        return methods.added(base, deltas, weights, asked.normalized, elect, asked.scale)

    return _stored(name, hf, read)


def _stored(name: str, hf: HFTensor, read) -> StoredTensor:
    return StoredTensor(name=name, dtype="float32", shape=hf.shape, file="", read=read)
