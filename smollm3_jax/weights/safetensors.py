"""Safetensors files, read by memory map and written tensor by tensor.

The `safetensors` library judges whether a file is sound; the two things it does not do are done
here: it accepts a name that occurs twice in a header, and it writes a shard only from memory.
"""

import json
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config_file import MAX_JSON_BYTES
from ..errors import CheckpointFormatError, SaveError
from ..file_kind import what_it_is
from ..files import new_file
from ..reading import read_file, why
from .stored import INTEGER_TAGS, SAFETENSORS_TAGS, STORED_DTYPES, StoredTensor, is_buffer, raw_bytes, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

log = logging.getLogger(__name__)


def open_file(path: Path, quantized: bool = False) -> list[StoredTensor]:
    """The tensors of one file but for buffers; nothing but its header is read.

    Args:
      quantized: there may be integers.

    Raises:
      CheckpointFormatError: the file is missing, damaged or truncated, a name occurs twice, or a
        tensor is not of a dtype that is expected.
    """
    tags = SAFETENSORS_TAGS | (INTEGER_TAGS if quantized else {})
    from safetensors import SafetensorError, safe_open

    if what := what_it_is(path, "safetensors"):
        raise CheckpointFormatError(f"{path} is no safetensors file: {what}")
    try:
        # Opening checks the header against the file: sizes, offsets, overlaps, holes, truncation.
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size), object_pairs_hook=_unique)
    except FileNotFoundError:
        raise CheckpointFormatError(f"{path} is missing") from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointFormatError(f"{path} is not a sound safetensors file: {error}; fetch it again") from None
    header.pop("__metadata__", None)
    header = {name: entry for name, entry in header.items() if not is_buffer(name)}
    for name, entry in header.items():
        if entry["dtype"] not in tags:
            quantized_how = "; it may be quantized by another program" if entry["dtype"] in ("U32", "I32") else ""
            raise CheckpointFormatError(
                f"{path}: tensor {shown(name)} is {entry['dtype']}; supported are {', '.join(tags)}{quantized_how}"
            )
    return [
        StoredTensor(
            name=name,
            dtype=tags[entry["dtype"]],
            shape=tuple(entry["shape"]),
            file=str(path),
            read=_mapped(path, 8 + size + entry["data_offsets"][0], tags[entry["dtype"]], entry["shape"]),
        )
        for name, entry in header.items()
    ]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} occurs twice in the header")
        found[name] = value
    return found


def _mapped(path: Path, offset: int, dtype: str, shape: Sequence[int]):
    def read() -> np.ndarray:
        if 0 in shape:  # an empty range cannot be mapped
            return np.zeros(shape, STORED_DTYPES[dtype])
        # ascontiguousarray would copy; a plain ndarray over the map keeps it alive and lazy.
        return np.asarray(np.memmap(path, STORED_DTYPES[dtype], "r", offset, tuple(shape)))

    return read


def open_folder(
    folder: Path, quantized: bool = False, redundant: Callable[[str], bool] = is_buffer
) -> dict[str, StoredTensor]:
    """All tensors of a folder: of model.safetensors if it is there, as transformers does, else by the index.

    Args:
      quantized: there may be integers.
      redundant: whether a tensor of that name may be listed and not be there, or the other way round.

    Raises:
      CheckpointFormatError: the index or a shard is missing, damaged, or they contradict each other.
    """
    present = {path.name for path in folder.glob("*.safetensors")}
    if SINGLE in present:
        shards, listed = [SINGLE], None
    elif not (folder / INDEX).exists():
        raise CheckpointFormatError(
            f"{folder / INDEX} is missing, and without it {len(present)} shards cannot be told to be complete"
        )
    else:
        listed = read_weight_map(folder / INDEX)
        shards = sorted(set(listed.values()))
        if missing := [shard for shard in shards if not (folder / shard).exists()]:
            raise CheckpointFormatError(f"{folder}: {missing[0]} is listed in {INDEX} but missing; fetch it again")
    if extra := sorted(present - set(shards)):
        log.warning(
            "%s: %s not listed in %s, ignored", folder, ", ".join(map(shown, extra)), INDEX if listed else SINGLE
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in open_file(folder / shard, quantized):
            if tensor.name in tensors:
                raise CheckpointFormatError(
                    f"tensor {shown(tensor.name)} is in {tensors[tensor.name].file} and {tensor.file}"
                )
            tensors[tensor.name] = tensor
    if listed is not None:
        for name in sorted(listed.keys() | tensors.keys()):
            if name not in tensors or name not in listed or Path(tensors[name].file).name != listed[name]:
                found = Path(tensors[name].file).name if name in tensors else "no shard"
                if redundant(name):
                    continue
                where = listed.get(name, "no shard")
                raise CheckpointFormatError(
                    f"{folder / INDEX}: tensor {shown(name)} is listed in {where} but is in {found}"
                )
    return tensors


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard name of an index file, each a plain file name of the index's own folder.

    Raises:
      CheckpointFormatError: the index is garbled, or names a file outside its folder.
    """
    try:
        weight_map = json.loads(read_file(index, MAX_JSON_BYTES), object_pairs_hook=_unique)["weight_map"]
        entries = list(weight_map.items())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = what_it_is(index) or (why(error) if isinstance(error, OSError) else shown(repr(error)))
        raise CheckpointFormatError(f"{index} has no readable weight_map: {reason}") from None
    for name, shard in entries:
        # Judged by name: the shards of a Hugging Face cache are links that lead out of the folder.
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise CheckpointFormatError(
                f"{index}: {shown(name)} is in {shown(repr(shard))}, which is not a plain file name"
            )
    if not entries:
        raise CheckpointFormatError(f"{index}: weight_map is empty")
    return weight_map


def split(tensors: Sequence[StoredTensor], max_shard_size: int) -> list[list[StoredTensor]]:
    """The tensors in order, cut so that no shard exceeds max_shard_size bytes (a larger tensor stands alone)."""
    shards: list[list[StoredTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def shard_names(count: int, single: str) -> list[str]:
    """Names of `count` shards: the single one's, or Hugging Face's NAME-00001-of-0000N."""
    stem, suffix = os.path.splitext(single)
    return [single] if count == 1 else [f"{stem}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]


def index_content(shards: Sequence[Sequence[StoredTensor]], names: Sequence[str]) -> dict[str, Any]:
    """What the index file of these shards says."""
    every = [tensor for shard in shards for tensor in shard]
    return {
        "metadata": {
            "total_parameters": sum(tensor.nbytes // STORED_DTYPES[tensor.dtype].itemsize for tensor in every),
            "total_size": sum(tensor.nbytes for tensor in every),
        },
        "weight_map": {tensor.name: name for shard, name in zip(shards, names, strict=True) for tensor in shard},
    }


def write_file(path: Path, tensors: Sequence[StoredTensor], done: Callable[[int], None] | None = None) -> None:
    """Writes one file, holding one tensor at a time, and reads back what was written.

    Args:
      done: called with the bytes of each tensor written.

    Raises:
      OSError: as the system gives it.
      SaveError: what is on the disk is not what was written.
    """
    # Wider types first keep every tensor aligned to its own width, as the library's writer does.
    tensors = sorted(tensors, key=lambda t: -STORED_DTYPES[t.dtype].itemsize)
    tags = {dtype: tag for tag, dtype in (SAFETENSORS_TAGS | INTEGER_TAGS).items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        span = [offset, offset := offset + tensor.nbytes]
        header[tensor.name] = {"dtype": tags[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    checksums = {}
    with new_file(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = tensor.read()
            assert array.shape == tensor.shape and array.dtype == STORED_DTYPES[tensor.dtype], tensor.name
            content = raw_bytes(array)
            file.write(content)
            checksums[tensor.name] = zlib.crc32(content)
            if done is not None:
                done(tensor.nbytes)
    for tensor in open_file(path, quantized=True):
        if zlib.crc32(raw_bytes(tensor.read())) != checksums.pop(tensor.name):
            raise SaveError(f"{path}: tensor {tensor.name} reads back differently from what was written")
    assert not checksums
