"""Adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors, read, written and folded in.

Shapes: r rank, N outputs, K inputs of a projection.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..config_file import read_json
from ..errors import CheckpointFormatError, ConfigError, OptionError
from ..files import new_folder, write
from . import safetensors
from .key_map import PROJECTIONS
from .stored import NUMPY_DTYPES, StoredTensor, shown

T = TypeVar("T")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# A projection's part -> what its tensor is called after the module's name.
PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
_NAME = re.compile(
    r"base_model\.model\.(model\.layers\.\d+\.(?:self_attn|mlp)\.\w+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)"
)
_TIED = "one matrix is both embedding and head here, and an adapter on it would untie them"
# Ways to begin that change the base model itself; True, "gaussian", "orthogonal" and the like do not.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True)
class LowRank:
    """One projection's adapter: float arrays that are read when they are asked for.

    a [r, K], b [N, r], magnitude [N] of DoRA or None; scale of B A.
    """

    a: StoredTensor
    b: StoredTensor
    magnitude: StoredTensor | None
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter's folder, opened: `base` is the name of its model, `parts` are by Hugging Face's names of weights."""

    folder: Path
    base: str | None
    parts: Mapping[str, LowRank]


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    models = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return (path / CONFIG).is_file() and not any((path / name).exists() for name in models)


def parse_adapter(word: str) -> tuple[str, Path, float]:
    """(name, folder, scale) of [NAME=]DIR[:SCALE]; without a name the folder's is taken.

    Raises:
      OptionError: there is no such folder, or the scale is no number.
    """
    name, equals, rest = word.partition("=")
    if not equals or Path(word).is_dir():
        name, rest = "", word
    path, colon, text = rest.rpartition(":")
    scale = 1.0
    if not Path(rest).is_dir() and colon:
        try:
            rest, scale = path, float(text)
        except ValueError:
            raise OptionError(
                f"--adapter {word}: {shown(text)!r} is no scale; write DIR, DIR:0.5 or NAME=DIR"
            ) from None
    folder = Path(rest).expanduser()
    if not (folder / CONFIG).is_file():
        raise OptionError(f"--adapter {word}: {folder} is no adapter's folder; there is no {CONFIG} in it")
    return name or folder.resolve().name, folder, scale


def read_adapter(folder: Path) -> Adapter:
    """An adapter's folder; of its weights the header alone is read.

    Raises:
      CheckpointFormatError: it is damaged, incomplete, or of a kind that is not read here.
    """
    if not (folder / WEIGHTS).is_file():
        raise CheckpointFormatError(f"{folder} has no {WEIGHTS}; PEFT writes it with save_pretrained")
    config = _config(folder)
    found: dict[str, dict[str, StoredTensor]] = {}
    for tensor in safetensors.open_file(folder / WEIGHTS):
        match = _NAME.fullmatch(tensor.name)
        if match is None or match[1].rpartition(".")[2] not in PROJECTIONS:
            tied = any(word in tensor.name for word in ("lm_head", "embed_tokens"))
            why = f": {_TIED}" if tied else "; LoRA and DoRA on projections are"
            raise CheckpointFormatError(f"{folder / WEIGHTS}: tensor {shown(tensor.name)} is not read{why}")
        part = next(part for part, ending in PARTS.items() if ending == match[2])
        found.setdefault(f"{match[1]}.weight", {})[part] = tensor
    parts = {}
    for name, tensors in found.items():
        wanted = {"a", "b"} | ({"magnitude"} if config["use_dora"] else set())
        if tensors.keys() != wanted:
            odd = ", ".join(sorted(tensors.keys() ^ wanted))
            raise CheckpointFormatError(f"{folder}: {name} has not what an adapter of its kind has: {odd}")
        parts[name] = _low_rank(folder, config, name, tensors)
    targets = config["target_modules"]
    for target in targets if isinstance(targets, list) else ():
        if not any(re.search(rf"(^|\.){re.escape(target)}\.weight$", name) for name in parts):
            raise CheckpointFormatError(f"{folder}: target_modules names {target}, and {WEIGHTS} has nothing of it")
    if not parts:
        raise CheckpointFormatError(f"{folder / WEIGHTS} is empty")
    base = config.get("base_model_name_or_path")
    return Adapter(folder, base if isinstance(base, str) and base else None, parts)


def _config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, which must ask for nothing that is not done here."""
    try:
        config = {"use_dora": False, "use_rslora": False, "target_modules": [], **read_json(folder / CONFIG)}
    except ConfigError as error:
        raise CheckpointFormatError(str(error)) from None

    def need(holds: bool, said: str) -> None:
        if not holds:
            raise CheckpointFormatError(f"{folder / CONFIG}: {said}")

    kind = config.get("peft_type")
    need(kind == "LORA", f"peft_type is {shown(repr(kind))}; LORA is read")
    need(config.get("bias", "none") == "none", "bias is trained, and is not read; PEFT can merge it into the model")
    need(not config.get("fan_in_fan_out"), "fan_in_fan_out is of GPT-2's layers, not of this model's")
    need(not config.get("modules_to_save"), f"modules_to_save holds whole modules; {_TIED}")
    begin = str(config.get("init_lora_weights", True)).lower()
    changed = any(begin.startswith(word) for word in _CHANGE_THE_BASE)
    need(not changed, f"init_lora_weights={begin} changes the base model; save it from PEFT as a plain LoRA")
    for key in ("use_qalora", "alora_invocation_tokens", "target_parameters", "trainable_token_indices", "lora_bias"):
        need(not config.get(key), f"{key} is not read; LoRA, rslora and DoRA are")
    targets = config["target_modules"]
    for tied in ("lm_head", "embed_tokens"):
        need(not (isinstance(targets, list) and tied in targets), f"target_modules has {tied}: {_TIED}")
    for key in ("r", "lora_alpha"):
        need(isinstance(config.get(key), (int, float)) and config[key] > 0, f"{key} must be a number above 0")
    return config


def _low_rank(folder: Path, config: Mapping[str, Any], name: str, tensors: Mapping[str, StoredTensor]) -> LowRank:
    a, b, magnitude = (tensors.get(part) for part in PARTS)
    assert a is not None and b is not None
    rank = a.shape[0] if a.shape else 0
    rows = b.shape[:1] if magnitude is None else magnitude.shape
    if len(a.shape) != 2 or len(b.shape) != 2 or b.shape[1] != rank or rows != b.shape[:1] or not rank:
        shapes = ", ".join(str(list(x.shape)) for x in tensors.values())
        raise CheckpointFormatError(f"{folder}: the shapes of {name}'s adapter do not fit together: {shapes}")
    module = name.removesuffix(".weight")
    wanted = _of_pattern(config.get("rank_pattern"), module, config["r"])
    if rank != wanted:
        raise CheckpointFormatError(f"{folder}: {name}'s adapter is of rank {rank}, and {CONFIG} says {wanted}")
    alpha = _of_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return LowRank(a, b, magnitude, alpha / (math.sqrt(rank) if config["use_rslora"] else rank))


def _of_pattern(patterns: Mapping[str, T] | None, module: str, default: T) -> T:
    """What the first pattern that fits a module's name says, as in PEFT; else the default."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def folded(tensors: Mapping[str, StoredTensor], adapters: Sequence[tuple[Adapter, float]]) -> dict[str, StoredTensor]:
    """A plain model's tensors with adapters added: in float32, and rounded once to the tensor's own dtype.

    Args:
      adapters: each with what its addition is multiplied by.

    Raises:
      CheckpointFormatError: an adapter is of another model: of other shapes, or of weights that this has not.
    """
    out = dict(tensors)
    for adapter, _ in adapters:
        check_base(adapter, {name: tensor.shape for name, tensor in tensors.items()})
    for name in {name: None for adapter, _ in adapters for name in adapter.parts}:
        parts = [(adapter.parts[name], scale) for adapter, scale in adapters if name in adapter.parts]
        out[name] = dataclasses.replace(tensors[name], read=functools.partial(_sum, tensors[name], parts))
    return out


def check_base(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """
    Raises:
      CheckpointFormatError: the adapter is of another model than one whose tensors have these shapes.
    """
    for name, part in adapter.parts.items():
        shape = (part.b.shape[0], part.a.shape[1])
        if shapes.get(name) != shape:
            there = f"is {list(shapes[name])}" if name in shapes else "is not in it"
            raise CheckpointFormatError(
                f"{adapter.folder} is an adapter of another model: it has {name} {list(shape)}, which {there}"
            )


def _sum(tensor: StoredTensor, parts: Sequence[tuple[LowRank, float]]) -> np.ndarray:
    w_NK = tensor.read().astype(np.float32)
    for part, scale in parts:
        a_rK, b_Nr = (x.read().astype(np.float32) for x in (part.a, part.b))
        w_NK = w_NK + np.float32(scale * part.scale) * (b_Nr @ a_rK)
        if part.magnitude is not None:
            length_N1 = np.linalg.norm(w_NK, axis=1, keepdims=True)
            w_NK = part.magnitude.read().astype(np.float32)[:, None] / length_N1 * w_NK
    return w_NK.astype(NUMPY_DTYPES[tensor.dtype])


def adapter_config(base: str, targets: Sequence[str], rank: int, alpha: float, **more: object) -> dict[str, Any]:
    """What adapter_config.json says of an adapter of this package's; more: what differs from a plain LoRA's."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": list(targets),
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        **more,
    }


def write_adapter(
    folder: Path,
    config: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, np.ndarray]],
    files: Mapping[str, bytes],
    finish: Callable[[Path], None] = lambda new: None,
) -> None:
    """Writes a PEFT folder, whole or not at all.

    Args:
      parts: Hugging Face's name of a weight -> "a" [r, K], "b" [N, r] and for DoRA "magnitude" [N], float32.
      files: text files that go along: the tokenizer's, the templates.
      finish: is called with the new folder before that takes its place.
    """
    tensors = []
    for name, arrays in parts.items():
        for part, array in arrays.items():
            own = f"base_model.model.{name.removesuffix('.weight')}.{PARTS[part]}"
            tensors.append(StoredTensor(own, array.dtype.name, array.shape, "", lambda array=array: array))
    with new_folder(folder) as new:
        safetensors.write_file(new / WEIGHTS, tensors)
        write(new / CONFIG, json.dumps(config, indent=2) + "\n")
        for name, content in files.items():
            (new / name).parent.mkdir(exist_ok=True)
            write(new / name, content)
        finish(new)
