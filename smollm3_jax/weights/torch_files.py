"""PyTorch state dicts (.bin, .pt), through torch's restricted unpickler only."""

import errno
import re
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ..errors import CheckpointFormatError, SupportError
from ..file_kind import what_it_is
from ..files import new_file
from ..support import how_to_install
from .safetensors import read_weight_map
from .stored import NUMPY_DTYPES, StoredTensor, is_buffer, shown

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError:
        raise SupportError(
            f"PyTorch files need torch: {how_to_install('torch')}; or convert where torch is installed"
        ) from None
    return torch


def find(folder: Path) -> list[Path]:
    """The PyTorch files of a folder: those of its index, pytorch_model.bin, or a lone .pt or .bin.

    Raises:
      CheckpointFormatError: there is more than one and no index.
    """
    if (folder / INDEX).exists():
        return [folder / shard for shard in sorted(set(read_weight_map(folder / INDEX).values()))]
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    lone = sorted(p for kind in ("*.pt", "*.bin") for p in folder.glob(kind) if p.name != "adapter_model.bin")
    if len(lone) > 1:
        raise CheckpointFormatError(
            f"{folder} has {', '.join(p.name for p in lone)} and no {INDEX}; keep one, or name the weights {SINGLE}"
        )
    return lone


def open_file(path: Path) -> list[StoredTensor]:
    """The tensors of a state dict but for buffers, memory-mapped.

    Raises:
      CheckpointFormatError: the file is missing or damaged, holds anything but a flat dict of
        float tensors, or would run code when unpickled.
      SupportError: torch is not installed.
    """
    if what := what_it_is(path, "zip"):
        raise CheckpointFormatError(f"{path} is no PyTorch file: {what}")
    torch = _torch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that torch has not written: it refuses them next
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                        raise ValueError("compressed: what is mapped would not be the numbers")
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            else:  # the format before torch 1.6 cannot be mapped
                state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointFormatError(f"{path} is missing") from None
    except Exception as error:  # torch raises what its parts raise: UnpicklingError, EOFError, KeyError, ...
        # torch's own text is not passed on: its advice is to unpickle the file without any guard.
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it asks to call {foreign[1]}" if foreign else "it is damaged, or holds something else"
        raise CheckpointFormatError(
            f"{path} cannot be read as a plain state dict ({reason}); "
            "save it with torch.save(model.state_dict(), ...) or as safetensors"
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise CheckpointFormatError(f"{path} is not a flat dict of tensors; save model.state_dict() itself")
    return [_stored(path, name, tensor) for name, tensor in state.items() if not is_buffer(name)]


def _stored(path: Path, name: str, tensor: Any) -> StoredTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in NUMPY_DTYPES:
        raise CheckpointFormatError(f"{path}: tensor {shown(name)} is {dtype}; supported are {', '.join(NUMPY_DTYPES)}")

    if tensor.layout is not _torch().strided or tensor.device.type != "cpu":
        raise CheckpointFormatError(
            f"{path}: tensor {shown(name)} is {tensor.layout} on {tensor.device}; save it dense"
        )
    # A view may repeat a few numbers without end: it claims more than any memory holds.
    claimed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > stored:
        raise CheckpointFormatError(
            f"{path}: tensor {shown(name)} claims {claimed:,} bytes where the file has {stored:,}; save it contiguous"
        )

    def read() -> np.ndarray:
        whole = tensor.detach().resolve_neg().contiguous()
        if dtype == "bfloat16":  # numpy's comes from ml_dtypes, which torch does not know: hand over the bits
            return whole.view(_torch().int16).numpy().view(NUMPY_DTYPES[dtype])
        return whole.numpy()

    return StoredTensor(name=name, dtype=dtype, shape=tuple(tensor.shape), file=str(path), read=read)


def rewrite(shard: Path, target: Path) -> None:
    """Turns a safetensors file into a torch state dict; its pages stay mapped, so this costs no memory."""
    torch = _torch()
    from safetensors.torch import load_file

    try:
        with new_file(target) as file:
            torch.save(load_file(shard), file)
    except RuntimeError as error:  # torch's writer, which hides what the system said
        hidden = error.__context__
        raise hidden if isinstance(hidden, OSError) else OSError(errno.EIO, str(error).split("\n")[0]) from None
    shard.unlink()
