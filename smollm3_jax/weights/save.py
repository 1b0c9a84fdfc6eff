"""Hugging Face folders, written whole or not at all."""

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import FORMATS, GenerationConfig, ModelConfig
from ..errors import OptionError, SaveError
from ..model import SmolLM3
from ..progress import progress
from . import hub, safetensors, torch_files
from .key_map import parameters, place, slots
from .load import check_dtype, common_dtype, open_checkpoint
from .quantized import dequantized, quantized, with_scheme
from .stored import NUMPY_DTYPES, StoredTensor

# What belongs to the model that a folder held before, and goes with it.
_OLD_MODEL = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?|(generation_)?config\.json"
)


def save_pretrained(
    model: SmolLM3, folder: str | Path, max_shard_size: int | str = "5GB", format: str = "safetensors"
) -> None:
    """Writes the model as a Hugging Face folder; other files that the folder holds are kept.

    The folder is replaced as a whole: at any moment, power cuts included, it is the old or the new one.

    Args:
      max_shard_size: bytes, or "5GB", "500MB", "2GiB", ...
      format: "safetensors", or "torch" for a state dict.

    Raises:
      OptionError: a quantized model cannot be a state dict.
      SaveError: the disk is full, the folder is read-only, or another process is writing it.
    """
    dtype = model.dtype.name
    config = model.config if model.config.dtype == dtype else dataclasses.replace(model.config, dtype=dtype)
    write_folder(Path(folder), config, model.generation_config, tensors_of(model), {}, max_shard_size, format)


def tensors_of(model: SmolLM3) -> list[StoredTensor]:
    """A model's parameters under Hugging Face's names, in its order."""
    params = parameters(model)
    tensors = []
    for name, slot in slots(model.config).items():
        path, layer = place(slot, params)
        param = params[path]

        def read(array=param[...], layer=layer, shape=slot.shape) -> np.ndarray:
            # Brought to the host one tensor at a time; the index is taken on the device.
            return np.asarray(array if layer is None else array[layer]).reshape(shape)

        tensors.append(StoredTensor(name=name, dtype=param.dtype.name, shape=slot.shape, file="", read=read))
    return tensors


def convert(
    source: str | Path,
    folder: str | Path,
    dtype: str | None = None,
    format: str = "safetensors",
    max_shard_size: int | str = "5GB",
) -> None:
    """Rewrites a checkpoint (folder, .gguf, hub id) as a Hugging Face folder, tensor by tensor.

    Args:
      dtype: cast every tensor to this, quantized ones too; None keeps each as it is (those that a GGUF
        holds quantized become float32).

    Raises:
      SmolLM3Error: the source is unsound, or the folder cannot be written; it is then as it was.
    """
    checkpoint = open_checkpoint(hub.resolve(source))
    config, tensors = checkpoint.config, list(checkpoint.tensors.values())
    if dtype is not None:
        dtype = check_dtype(dtype)
        if config.quantization is not None:
            config, plain = dequantized(config, checkpoint.tensors)
            tensors = list(plain.values())
        tensors = [cast(tensor, dtype) for tensor in tensors]
        if config.dtype != dtype:
            config = dataclasses.replace(config, dtype=dtype)
    generation = checkpoint.generation_config
    write_folder(Path(folder), config, generation, tensors, checkpoint.files, max_shard_size, format)


def quantize(
    source: str | Path,
    folder: str | Path,
    weights: str,
    cache: str | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a checkpoint (folder, .gguf, hub id) as a quantized Hugging Face folder, tensor by tensor.

    Args:
      weights: a scheme of `smollm3_jax.quantize`.
      cache: "int8" if keys and values should be kept so when the model runs.

    Raises:
      SmolLM3Error: as for `convert`; or there is no such scheme, or the source is quantized otherwise.
    """
    checkpoint = open_checkpoint(hub.resolve(source))
    config, tensors = with_scheme(checkpoint.config, weights, cache), checkpoint.tensors
    if checkpoint.config.quantization is None:
        tensors = quantized(config, tensors)
    if config.dtype is None:
        config = dataclasses.replace(config, dtype=common_dtype(checkpoint.tensors))
    generation = checkpoint.generation_config
    write_folder(Path(folder), config, generation, list(tensors.values()), checkpoint.files, max_shard_size)


def cast(tensor: StoredTensor, dtype: str) -> StoredTensor:
    """The tensor in another dtype. Reading raises OptionError where float16 would overflow."""

    def read() -> np.ndarray:
        array = tensor.read()
        with np.errstate(over="ignore"):
            out = array.astype(NUMPY_DTYPES[dtype])
        if dtype == "float16" and np.isinf(out).sum() > np.isinf(array).sum():
            raise OptionError(f"tensor {tensor.name} holds numbers too large for float16; choose bfloat16 or float32")
        return out

    return dataclasses.replace(tensor, dtype=dtype, read=read)


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


def write_folder(
    folder: Path,
    config: ModelConfig,
    generation_config: GenerationConfig,
    tensors: Sequence[StoredTensor],
    files: Mapping[str, bytes],
    max_shard_size: int | str = "5GB",
    format: str = "safetensors",
) -> None:
    """Writes a model folder beside its final place, and moves it there once it is complete.

    Raises:
      OptionError: the size or the format is none, or the folder is the current directory.
      SaveError: it cannot be written; nothing is left behind, and what was there is untouched.
    """
    if format not in FORMATS:
        raise OptionError(f"no format {format!r}; choose one of {', '.join(FORMATS)}")
    if format == "torch" and config.quantization is not None:
        raise OptionError("a PyTorch file cannot hold quantized weights; give a dtype to write plain ones")
    shards = safetensors.split(tensors, parse_size(max_shard_size))
    folder = folder.expanduser().resolve()
    if Path.cwd().is_relative_to(folder):
        raise OptionError(
            f"{folder} is or holds the current directory, and it would be replaced as a whole; name another"
        )
    documents = {"config.json": config.to_hf()}
    if generation_config.to_hf():
        documents["generation_config.json"] = generation_config.to_hf()
    try:
        if folder.exists() and not folder.is_dir():
            raise SaveError(f"{folder} is a file; name a folder")
        with _new_folder(folder) as new:
            _write_shards(new, shards, format)
            for name, content in documents.items():
                _write(new / name, (json.dumps(content, indent=2) + "\n").encode())
            for name, content in files.items():
                _write(new / name, content)
            _keep_other_files(folder, new)
            _sync(new)
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
        _write(folder / index, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place when the block ends well, and vanishes when not."""
    new, previous = (folder.parent / f".{folder.name}.{end}" for end in ("partial", "previous"))
    refusal = SaveError(f"{folder} is being written by another process; wait for it, or name another folder")
    with contextlib.ExitStack() as created, contextlib.ExitStack() as locks:
        for parent in [parent for parent in reversed(folder.parents) if not parent.exists()]:
            parent.mkdir(exist_ok=True)
            created.callback(_remove_empty, parent)
        new.mkdir(exist_ok=True)
        if not _lock(new, locks):
            raise refusal
        try:
            if previous.exists():  # of a process that was killed inside _swap
                shutil.rmtree(previous) if folder.exists() else os.rename(previous, folder)
            for left in new.iterdir():
                shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
            yield new
            # After the swap the old folder has the name `new`: a writer who finds it there must find it locked
            # for as long as it is being removed.
            if folder.exists() and not _lock(folder, locks):
                raise refusal
            _swap(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)  # after the swap this is the old folder
        created.pop_all()
        _sync(folder.parent)


def _lock(folder: Path, locks: contextlib.ExitStack) -> bool:
    """Locks a folder until `locks` closes; False if another writer has it.

    The lock dies with its process, so a folder that a killed one left is taken over, not refused.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    locks.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_ino == os.stat(folder).st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def _swap(new: Path, folder: Path) -> None:
    """Puts new in folder's place; what was there, if anything, is then called `new`."""
    if not folder.exists():
        os.rename(new, folder)
        return
    # renameat2(RENAME_EXCHANGE): Linux's way to exchange two folders in one step.
    at_cwd, exchange = -100, 2
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is not None and rename(at_cwd, os.fsencode(new), at_cwd, os.fsencode(folder), exchange) == 0:
        return
    reason = ctypes.get_errno() if rename is not None else errno.ENOSYS
    if reason not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(reason, os.strerror(reason))
    # Where the system cannot exchange, two renames: between them only the old folder's new name exists.
    old = folder.parent / f".{folder.name}.previous"
    os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old, folder)
        raise
    os.rename(old, new)


def _keep_other_files(folder: Path, new: Path) -> None:
    """Carries over what an existing folder holds beside a model."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if _OLD_MODEL.fullmatch(path.name) or (new / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        else:
            _link(path, new / path.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # file systems without hard links
        shutil.copy2(source, target, follow_symlinks=False)
