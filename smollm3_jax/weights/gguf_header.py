"""The header of a GGUF file (llama.cpp's format): its metadata, and where each tensor lies.

Parsed here, not by `gguf.GGUFReader`: that one trusts every count and length, so a damaged file can keep
it busy for ever or pass as sound (its sizes wrap at 64 bits), and a vocabulary takes it seconds. `gguf`
supplies the sizes of the block formats. Source of the layout: ggml's docs/gguf.md.
"""

import importlib
import math
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ..errors import SupportError
from ..file_kind import what_it_is
from .stored import shown

# Tensor formats by gguf's names. The plain ones keep their dtype; the others are read as float32.
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
QUANTIZED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
MAX_HEADER_BYTES = 100_000_000  # the largest vocabularies take 20 MB
# A value's type number in the file -> numpy's; the numbers that are missing are a string and an array.
SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
STRING, ARRAY = 8, 9
NUMBER = (int, float)
REQUIRED: Any = object()


class Entry(NamedTuple):
    """A tensor as the header has it: `shape` with rows first, `start` and `nbytes` in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def gguf_package(module: str = "gguf") -> ModuleType:
    """The package gguf, or a module of it, imported at its first use: nothing but GGUF files needs it.

    Raises:
      SupportError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SupportError(f"GGUF files need the package gguf ({error}): pip install 'gguf>=0.17'") from error


class _Reader:
    """Takes values off the front of a file's bytes, but never beyond `limit`."""

    def __init__(self, data: memoryview, limit: int):
        self.data, self.limit, self.position = data, limit, 0

    def take(self, count: int) -> memoryview:
        # Checked before anything is allocated; it also ends the loop over an absurd count.
        if count > self.limit - self.position:
            raise ValueError(f"its header does not end within {self.limit} bytes; fetch it again")
        self.position += count
        return self.data[self.position - count : self.position]

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")

    def text(self) -> str:
        return str(self.take(self.number(8)), "utf-8")

    def scalars(self, kind: int, count: int) -> np.ndarray:
        if kind not in SCALARS:
            raise ValueError(f"its header holds values of unknown type {kind}; fetch it again")
        dtype = np.dtype(SCALARS[kind]).newbyteorder("<")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, count = self.number(4), self.number(8)
            return [self.text() for _ in range(count)] if kind == STRING else self.scalars(kind, count)
        scalar = self.scalars(kind, 1)[0]
        # The shortest decimal that rounds to a float32: 1e-05, not 9.999999747378752e-06.
        return float(str(scalar)) if scalar.dtype == np.float32 else scalar.item()


def read_header(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """(metadata, tensors); the tensors lie one after the other, and all of them inside the file.

    Raises:
      SupportError: the package gguf is not installed.
      ValueError: the header is damaged, or of a kind that is not supported; the reason.
    """
    gguf = gguf_package()
    size = path.stat().st_size
    if size < 24:
        raise ValueError(f"{size} bytes are too few for a GGUF file; fetch it again")
    reader = _Reader(np.memmap(path, np.uint8, "r").data, min(size, MAX_HEADER_BYTES))
    if bytes(reader.take(4)) != b"GGUF":
        what = what_it_is(path, "GGUF")
        raise ValueError(f"it does not begin with GGUF, so it is no GGUF file{f': {what}' if what else ''}")
    if (version := reader.number(4)) not in (2, 3):
        what = "big-endian" if version & 0xFFFF == 0 else f"GGUF version {version}"
        raise ValueError(f"it is {what}; little-endian versions 2 and 3 are supported")
    tensor_count, key_count = reader.number(8), reader.number(8)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        if (key := reader.text()) in metadata:
            raise ValueError(f"key {shown(key)} occurs twice")
        metadata[key] = reader.value(reader.number(4))
    alignment = metadata_value(metadata, "general.alignment", int, 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment}, not a power of two")
    entries: dict[str, Entry] = {}
    end = 0  # of the tensors so far, from where the first begins
    for _ in range(tensor_count):
        entry = _read_entry(reader, gguf)
        if entry.name in entries:
            raise ValueError(f"tensor {shown(entry.name)} occurs twice")
        # As llama.cpp demands: no overlaps, and no holes but the padding.
        if entry.start != -(-end // alignment) * alignment:
            raise ValueError(f"tensor {shown(entry.name)} does not lie where the one before it ends; fetch it again")
        entries[entry.name] = entry
        end = entry.start + entry.nbytes
    start = -(-reader.position // alignment) * alignment
    if start + end > size:
        raise ValueError(f"it has {size} bytes where its tensors need {start + end}; fetch it again")
    return metadata, [entry._replace(start=start + entry.start) for entry in entries.values()]


def _read_entry(reader: _Reader, gguf: ModuleType) -> Entry:
    """The next tensor's entry, whose `start` counts from where the first tensor begins."""
    name = reader.text()
    if not 1 <= (rank := reader.number(4)) <= 4:
        raise ValueError(f"tensor {shown(name)} has {rank} dimensions; fetch it again")
    # The file's first dimension varies fastest: it is a row, which blocks do not straddle.
    shape = tuple(reader.number(8) for _ in range(rank))[::-1]
    kind_number = reader.number(4)
    kind = next((kind for kind in gguf.GGMLQuantizationType if kind.value == kind_number), None)
    if kind is None or kind.name not in (*PLAIN, *QUANTIZED):
        what = kind.name if kind else f"of the unknown type {kind_number}"
        raise ValueError(f"tensor {shown(name)} is {what}; supported are {', '.join((*PLAIN, *QUANTIZED))}")
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block or (kind.name in QUANTIZED and rank != 2):
        raise ValueError(f"tensor {shown(name)} of shape {list(shape)} cannot be {kind.name}; fetch it again")
    return Entry(name, kind.name, shape, reader.number(8), math.prod(shape) // block * block_bytes)


def metadata_value(metadata: dict[str, Any], key: str, kind: Any, default: Any = REQUIRED) -> Any:
    """metadata[key], checked for its type."""
    value = metadata.get(key, default)
    if value is REQUIRED:
        raise ValueError(f"the key {key} is missing; use the model's Hugging Face folder")
    if key in metadata and (not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, NUMBER))):
        raise ValueError(f"the key {key} holds a {type(value).__name__}; use the model's Hugging Face folder")
    return value
