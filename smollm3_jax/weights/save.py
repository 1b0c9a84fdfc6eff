"""Hugging Face folders, written whole or not at all."""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import FORMATS, GGUF_TYPES, GenerationConfig, ModelConfig
from ..errors import CheckpointFormatError, OptionError, SaveError
from ..files import carry, new_folder, write
from ..model import SmolLM3
from ..paths import user_path
from ..progress import progress
from . import hub, safetensors, torch_files
from .card import CARD, Card, is_ours, last_part, origin, put
from .gguf_write import check_file, write_gguf
from .key_map import hf_tensors, locate, parameters
from .load import Checkpoint, check_dtype, common_dtype, is_gguf, open_checkpoint, with_adapters
from .peft import Adapter
from .quantized import dequantize_tensors, quantize_tensors, with_scheme
from .stored import StoredTensor, cast
from .texts import check_links, is_text_file, left_out

# What belongs to the model that a folder held before, and goes with it.
_OLD_MODEL = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?|(generation_)?config\.json"
)
# Names under which a user may expect a file, and what to do about it.
_FILE_ENDINGS = {
    ".gguf": "; `smollm3 convert FOLDER FILE.gguf` makes a .gguf of it",
    **dict.fromkeys((".bin", ".pt", ".pth"), "; `convert --format torch` puts a state dict in it"),
    **dict.fromkeys((".safetensors", ".json", ".onnx", ".npz", ".zip", ".tar", ".gz"), ""),
}

log = logging.getLogger(__name__)


def save_pretrained(
    model: SmolLM3,
    folder: str | Path,
    max_shard_size: int | str = "5GB",
    format: str = "safetensors",
    texts: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a model as a Hugging Face folder; see `pretrained.save_pretrained`.

    Args:
      texts: the text files that go with it; None keeps those that the folder has.
    """
    dtype = model.dtype.name
    config = model.config if model.config.dtype == dtype else dataclasses.replace(model.config, dtype=dtype)
    tensors = tensors_of(model)
    write_folder(Path(folder), config, model.generation_config, tensors, texts, max_shard_size, format, force=True)


def tensors_of(model: SmolLM3) -> list[StoredTensor]:
    """A model's parameters under Hugging Face's names, in its order."""
    params = parameters(model)
    tensors = []
    for name, hf in hf_tensors(model.config).items():
        path, layer = locate(hf, params)
        param = params[path]

        def read(array=param[...], layer=layer, shape=hf.shape) -> np.ndarray:
            # Brought to the host one tensor at a time; the index is taken on the device.
            return np.asarray(array if layer is None else array[layer]).reshape(shape)

        tensors.append(StoredTensor(name=name, dtype=param.dtype.name, shape=hf.shape, file="", read=read))
    return tensors


def convert(
    source: str | Path,
    folder: str | Path,
    dtype: str | None = None,
    format: str = "safetensors",
    max_shard_size: int | str = "5GB",
    force: bool = False,
    adapters: Sequence[tuple[Adapter, float]] = (),
    gguf_type: str | None = None,
) -> None:
    """Rewrites a checkpoint (folder, .gguf, hub id) as a Hugging Face folder or a .gguf file, tensor by tensor.

    Args:
      folder: the folder to write, or the file, with a name that ends in .gguf; see `gguf_write.write_gguf`.
      dtype: cast every tensor to this, quantized ones too; None keeps each as it is (those that a GGUF
        holds quantized become float32).
      force: the folder may be there, and its model is replaced, tokenizer and templates included; it may be the source.
      adapters: are folded in, each times a number.
      gguf_type: what a file's matrices become, one of GGUF_TYPES; None is the checkpoint's own dtype.

    Raises:
      SmolLM3Error: the source is unsound, or the folder cannot be written; it is then as it was.
    """
    if is_gguf(user_path(folder)):
        if dtype is not None or format != FORMATS[0] or max_shard_size != "5GB":
            raise OptionError(
                f"a .gguf file is one file, whose numbers --type says (gguf_type in Python: {', '.join(GGUF_TYPES)}); "
                "dtype, format and max_shard_size are a folder's"
            )
        check_file(folder, force)
        checkpoint = open_checkpoint(hub.resolve(source))
        checkpoint = with_adapters(checkpoint, adapters) if adapters else checkpoint
        write_gguf(checkpoint, folder, gguf_type, force)
        return
    if gguf_type is not None:
        raise OptionError(f"--type {gguf_type} is of .gguf files: name one, such as {Path(folder).name}.gguf")
    checkpoint = _open(source, folder, force)
    checkpoint = with_adapters(checkpoint, adapters) if adapters else checkpoint
    config, tensors = checkpoint.config, list(checkpoint.tensors.values())
    if dtype is not None:
        dtype = check_dtype(dtype)
        if config.quantization is not None:
            config, plain = dequantize_tensors(config, checkpoint.tensors)
            tensors = list(plain.values())
        tensors = [cast(tensor, dtype) for tensor in tensors]
        if config.dtype != dtype:
            config = dataclasses.replace(config, dtype=dtype)
    generation, card = checkpoint.generation_config, _card_of(source, folder, dtype, format, adapters)
    write_folder(Path(folder), config, generation, tensors, checkpoint.files, max_shard_size, format, force, card)


def _card_of(
    source: str | Path,
    folder: str | Path,
    dtype: str | None,
    format: str,
    adapters: Sequence[tuple[Adapter, float]],
) -> Card:
    """What is said of a conversion."""
    of = origin(hub.resolve(source))
    words = ["smollm3", "merge" if adapters else "convert", of.name, *(() if adapters else (last_part(str(folder)),))]
    words += [f"--adapter={last_part(str(adapter.folder))}:{scale:g}" for adapter, scale in adapters]
    words += [f"--out={last_part(str(folder))}"] if adapters else []
    words += [f"--dtype={dtype}"] if dtype else []
    words += [f"--format={format}"] if format != FORMATS[0] else []
    cast = f", in {dtype}" if dtype else ""
    if not adapters:
        return Card(f"The weights of `{of.name}`{cast}, rewritten.", [of], [shlex.join(words)])
    names = ", ".join(f"`{last_part(str(adapter.folder))}` times {scale:g}" for adapter, scale in adapters)
    what = f"`{of.name}` with adapters folded in{cast}: {names}."
    datasets = [name for adapter, _ in adapters for name in origin(adapter.folder).datasets]
    return Card(what, [of], [shlex.join(words)], "finetune", ["lora"], datasets)


def _open(source: str | Path, folder: str | Path, force: bool) -> Checkpoint:
    """The checkpoint to rewrite, after a look at where it is to go; names what does not go with it."""
    target, path = check_target(folder, force), hub.resolve(source)
    checkpoint = open_checkpoint(path)
    if path.is_dir():
        check_links(path)
        left = [name for name in left_out(path) if name != CARD or not is_ours(path / CARD)]
        if left and path.resolve() != target:
            more = f" and {len(left) - 10} more" if len(left) > 10 else ""
            log.info("%s: no part of the model, so not copied: %s%s", path, ", ".join(left[:10]), more)
    return checkpoint


def quantize(
    source: str | Path,
    folder: str | Path,
    weights: str,
    cache: str | None = None,
    max_shard_size: int | str = "5GB",
    force: bool = False,
) -> None:
    """Writes a checkpoint (folder, .gguf, hub id) as a quantized Hugging Face folder, tensor by tensor.

    Args:
      weights: a scheme of `smollm3_jax.quantize`.
      cache: "int8" if keys and values should be kept so when the model runs.
      force: as for `convert`.

    Raises:
      SmolLM3Error: as for `convert`; or there is no such scheme, or the source is quantized otherwise.
    """
    checkpoint = _open(source, folder, force)
    config, tensors = with_scheme(checkpoint.config, weights, cache), checkpoint.tensors
    if checkpoint.config.quantization is None:
        tensors = quantize_tensors(config, tensors)
    if config.dtype is None:
        config = dataclasses.replace(config, dtype=common_dtype(checkpoint.tensors))
    generation, texts, of = checkpoint.generation_config, checkpoint.files, origin(hub.resolve(source))
    words = ["smollm3", "quantize", of.name, last_part(str(folder)), f"--weights={weights}"]
    command = shlex.join([*words, *([f"--cache={cache}"] if cache else [])])
    what = f"`{of.name}` with weights in {weights}, which this package reads."
    card = Card(what, [of], [command], "quantized", [weights], library="smollm3-jax")
    write_folder(
        Path(folder), config, generation, list(tensors.values()), texts, max_shard_size, force=force, card=card
    )


def parse_size(size: int | str) -> int:
    """Bytes of a number or of "5GB", "500MB", "2GiB" (decimal and binary units).

    Raises:
      OptionError: it is not a size, or not positive.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    units |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in units or len(match[1]) > 20:
        parsed = 0
    else:
        parsed = int(float(match[1]) * units[match[2].upper()])
    if not parsed:
        raise OptionError(f"{size!r} is not a shard size; write it as 5GB, 500MB or 2GiB")
    return parsed


def check_target(folder: str | Path, force: bool) -> Path:
    """The folder that a user names for a model, as it will be written: where links lead to.

    Args:
      force: it may hold something.

    Raises:
      OptionError: there is something in it already, it is or holds the current directory, or its name is a file's.
      SaveError: it is a file.
    """
    folder = user_path(folder)
    try:
        folder = folder.resolve()
        there, holds = os.path.lexists(folder), folder.is_dir() and any(folder.iterdir())
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, one with NUL, links in a circle
        reason = error.strerror if isinstance(error, OSError) else error
        raise SaveError(f"{folder} cannot be written: {reason}; nothing was changed") from None
    if there and not folder.is_dir():
        raise SaveError(f"{folder} is a file; name a folder")
    if not there and folder.suffix.lower() in _FILE_ENDINGS:
        raise OptionError(
            f"{folder.name} is the name of a file, and a folder is written; name one, such as {folder.stem}"
            + _FILE_ENDINGS[folder.suffix.lower()]
        )
    if Path.cwd().is_relative_to(folder):
        raise OptionError(
            f"{folder} is or holds the current directory, and it would be replaced as a whole; name another"
        )
    if holds and not force:
        raise OptionError(
            f"{folder} is there already, and not empty: name another folder, or replace the model in it with --force "
            "(force=True in Python), which keeps the files that are not a model's"
        )
    return folder


def write_folder(
    folder: Path,
    config: ModelConfig,
    generation_config: GenerationConfig,
    tensors: Sequence[StoredTensor],
    files: Mapping[str, bytes] | None,
    max_shard_size: int | str = "5GB",
    format: str = "safetensors",
    force: bool = False,
    card: Card | None = None,
) -> None:
    """Writes a model folder beside its final place, and moves it there once it is complete.

    Args:
      files: the model's text files, name -> content; those that the folder has go, also where these have none of
        their names. None keeps them.
      force: there may be something in the folder; what is not a model's is kept.
      card: what its README.md says; one of the user's own stays.

    Raises:
      OptionError: the size or the format is none, or `check_target` refuses.
      SaveError: it cannot be written; nothing of it is left, and what was there is untouched.
    """
    if format not in FORMATS:
        raise OptionError(f"format is {format!r}; choose one of {', '.join(FORMATS)}")
    if format == "torch" and config.quantization is not None:
        raise OptionError("a PyTorch file cannot hold quantized weights; give a dtype to write plain ones")
    shards = safetensors.split(tensors, parse_size(max_shard_size))
    folder = check_target(folder, force)
    documents = {"config.json": config.to_hf()}
    if generation_config.to_hf():
        documents["generation_config.json"] = generation_config.to_hf()
    try:
        with new_folder(folder) as new:
            check_target(folder, force)  # once more, now that no other process writes it
            _write_shards(new, shards, format)
            for name, content in documents.items():
                write(new / name, json.dumps(content, indent=2) + "\n")
            for name, content in (files or {}).items():
                (new / name).parent.mkdir(exist_ok=True)
                write(new / name, content)
            put(card, folder, new, config.model_type)
            _keep_other_files(folder, new, files is None)
    except BlockingIOError:
        raise SaveError(f"{folder} is being written by another process; wait for it, or name another folder") from None
    except OSError as error:
        if isinstance(error, SaveError):
            raise
        raise SaveError(f"{folder} could not be written: {error.strerror or error}; nothing was changed") from None


def _write_shards(folder: Path, shards: Sequence[Sequence[StoredTensor]], format: str) -> None:
    names = safetensors.shard_names(len(shards), safetensors.SINGLE)
    index = safetensors.INDEX
    with progress("writing", sum(tensor.nbytes for shard in shards for tensor in shard)) as done:
        for name, shard in zip(names, shards, strict=True):
            safetensors.write_file(folder / name, shard, done)
    if format == "torch":
        safe_names, names, index = names, safetensors.shard_names(len(shards), torch_files.SINGLE), torch_files.INDEX
        for safe_name, name in zip(safe_names, names, strict=True):
            torch_files.rewrite(folder / safe_name, folder / name)
    if len(shards) > 1:
        content: dict[str, Any] = safetensors.index_content(shards, names)
        write(folder / index, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _keep_other_files(folder: Path, new: Path, texts: bool) -> None:
    """Carries over what an existing folder holds beside a model; with `texts` also the old model's text files."""
    if not folder.is_dir():
        return
    old = _old_weights(folder)
    for path in folder.iterdir():
        replaced = path.name in old or _OLD_MODEL.fullmatch(path.name) or (not texts and is_text_file(path.name))
        replaced = replaced or (path.name == CARD and is_ours(path))
        if not replaced and not os.path.lexists(new / path.name):
            carry(path, new / path.name)


def _old_weights(folder: Path) -> set[str]:
    """Shards under whatever names the folder's indexes give them."""
    names: set[str] = set()
    for index in (safetensors.INDEX, torch_files.INDEX):
        with contextlib.suppress(CheckpointFormatError):
            names |= set(safetensors.read_weight_map(folder / index).values())
    return names
