"""Models by any of their names, with their tokenizers: a folder, a .gguf file, a hub id, or "demo"."""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sharding.strategies import Rules

from .errors import unknown_name
from .model import SmolLM3
from .tokenizer import Tokenizer, build_tokenizer, carry_tokenizer
from .tokenizer import load_tokenizer as read_tokenizer
from .weights import save
from .weights.demo import model_folder
from .weights.load import load, open_checkpoint, text_folder

# What other libraries call an argument of `from_pretrained` -> what it is here.
ELSEWHERE = {
    **dict.fromkeys(("torch_dtype", "precision", "param_dtype"), "dtype"),
    **dict.fromkeys(("device_map", "device", "devices", "tensor_parallel_size"), "mesh, and rules"),
    **dict.fromkeys(("use_auth_token", "hf_token", "auth_token"), "token"),
    **dict.fromkeys(("quantization", "quantization_config"), "weights"),
    **dict.fromkeys(("pretrained_model_name_or_path", "model_id", "path"), "model"),
    "load_in_8bit": 'weights="int8"',
    "load_in_4bit": 'weights="int4"',
    "trust_remote_code": "nothing in its place: no code of a model is ever run",
    "local_files_only": "the environment's HF_HUB_OFFLINE=1",
    "cache_dir": "the environment's HF_HOME",
}

# The text files of models that `from_pretrained` loaded, for `save_pretrained`.
_texts: "weakref.WeakKeyDictionary[SmolLM3, Mapping[str, bytes]]" = weakref.WeakKeyDictionary()


def from_pretrained(
    model: str | Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
    rules: str | Rules | None = None,
    *,
    weights: str | None = None,
    stacked: bool = False,
    revision: str | None = None,
    token: str | None = None,
    **other: object,
) -> SmolLM3:
    """Loads a model, tensor by tensor, straight to where each one stays.

    Its tokenizer comes along, for `generate`, `stream` and `save_pretrained`: beside the module, which is a tree of
    arrays for jit. A copy that a transformation makes of the module has none.

    Args:
      model: a Hugging Face folder, a .gguf file, a hub id, or "demo".
      dtype: float32, bfloat16 or float16; None keeps the checkpoint's own, which must then be one.
      mesh: place every parameter on this mesh; None is the default device.
      rules: a strategy of `sharding.rules` or a table of one's own; None with a mesh means "fsdp".
      weights: quantize them on the way: "int8", "int8-g64", "int8-g32" or "int4" (see quantize.py); dtype is
        then the activations'. None keeps them as they are, quantized or not.
      stacked: one array holds a parameter of all layers, which training scans over, in place of one array a layer.
        Decoding wants the latter on every platform: out of a stack, layers are copied before they are used.
      revision, token: of the hub.

    Raises:
      SmolLM3Error: what is wrong, with the file, tensor or field by name.
      ShardingError: the rules do not fit the mesh or the model.
    """
    known = ("model", "dtype", "mesh", "rules", "weights", "stacked", "revision", "token")
    for name in other:
        raise unknown_name("from_pretrained", name, known, ELSEWHERE)
    path = model_folder(str(model), revision, token)
    checkpoint = open_checkpoint(path)
    loaded = load(checkpoint, dtype, mesh, rules, weights=weights, stacked=stacked)
    texts, config = checkpoint.files, checkpoint.config
    _texts[loaded] = texts
    carry_tokenizer(loaded, lambda: build_tokenizer(texts, path, config) if "tokenizer.json" in texts else None)
    return loaded


def load_tokenizer(model: str | Path, *, revision: str | None = None, token: str | None = None) -> Tokenizer:
    """The tokenizer of a model, with its chat templates.

    Args:
      model: as for `from_pretrained`; a folder that holds a tokenizer alone will do.
      revision, token: of the hub.

    Raises:
      TokenizerError: there is none, it cannot be read, or it belongs to another model.
      SmolLM3Error: the model cannot be found or fetched.
    """
    return read_tokenizer(text_folder(model_folder(str(model), revision, token)))


def save_pretrained(
    model: SmolLM3, folder: str | Path, max_shard_size: int | str = "5GB", format: str = "safetensors"
) -> None:
    """Writes the model as a Hugging Face folder, with the tokenizer and templates that came with it.

    The folder is replaced as a whole: at any moment, power cuts included, it is the old or the new one. What it holds
    beside a model is kept; so are its tokenizer and templates where none came with the model.

    Args:
      max_shard_size: bytes, or "5GB", "500MB", "2GiB", ...
      format: "safetensors", or "torch" for a state dict.

    Raises:
      OptionError: a quantized model cannot be a state dict.
      SaveError: the disk is full, the folder is read-only, or another process is writing it.
    """
    save.save_pretrained(model, folder, max_shard_size, format, _texts.get(model) or None)


def convert(source: str | Path, folder: str | Path, *options: Any, **named: Any) -> None:
    """As `weights.save.convert`, of "demo" too."""
    save.convert(model_folder(str(source)), folder, *options, **named)
