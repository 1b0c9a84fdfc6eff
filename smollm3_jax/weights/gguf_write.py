"""GGUF files (llama.cpp's format), written from checkpoints: what gguf.py reads.

Sources: of the keys, the row order and what stays float32, llama.cpp's converter (conversion/base.py, llama.py); of the
types beside a 4-bit one, src/llama-quant.cpp; of what it computes, src/models/smollm3.cpp and llama.cpp.
"""

import errno
import logging
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from ..config import GGUF_TYPES, GenerationConfig, ModelConfig
from ..errors import CheckpointFormatError, ConfigError, OptionError, SaveError
from ..files import new_file
from ..paths import user_path
from ..progress import progress
from ..rope import inverse_frequencies
from ..tokenizer import build_tokenizer
from .gguf_header import PLAIN, gguf_package, read_header
from .gguf_tokenizer import tokenizer_metadata
from .key_map import HFTensor, gguf_name, hf_tensors
from .load import Checkpoint, common_dtype
from .quantized import dequantize_tensors
from .stored import StoredTensor, as_dtype, is_finite, raw_bytes

PIECE = 1 << 22  # numbers that are encoded at once: quantizing takes a few times their float32 bytes
ALIGNMENT = 32  # bytes, the format's default
# The type of a checkpoint's own dtype, where none is asked for.
TYPE_OF = {dtype: kind.lower() for kind, dtype in PLAIN.items()}

log = logging.getLogger(__name__)


class Part(NamedTuple):
    """A tensor on its way into the file; `order` says which of its rows comes where, None as they are."""

    name: str
    kind: str  # gguf's name of the type
    tensor: StoredTensor
    order: np.ndarray | None
    nbytes: int


def check_file(path: str | Path, force: bool) -> Path:
    """The .gguf file that a user names, as it will be written.

    Args:
      force: it may be there.

    Raises:
      OptionError: it is there.
      SaveError: its folder is not there, or the name can be no file's.
    """
    path = user_path(path)
    try:
        there = os.path.lexists(path)
        if not path.parent.is_dir():
            raise SaveError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    except ValueError as error:  # a name with NUL
        raise SaveError(f"{path} cannot be written: {error}") from None
    if there and not force:
        raise OptionError(
            f"{path} is there already: name another file, or replace it with --force (force=True in Python)"
        )
    return path


def write_gguf(checkpoint: Checkpoint, path: str | Path, kind: str | None = None, force: bool = False) -> None:
    """Writes a checkpoint as one GGUF file, holding some rows of one tensor at a time, and reads back what was written.

    Vectors are F32. Matrices whose rows are no multiple of a type's block are F16, and beside a 4-bit type what the
    logits are made of (the output, or the embedding tied to it) is Q8_0: llama.cpp has Q6_K there, which the package
    gguf cannot write.

    Args:
      kind: one of GGUF_TYPES; None is the checkpoint's own dtype.
      force: the file may be there; it is then replaced as a whole.

    Raises:
      OptionError: there is no such type, float16 would overflow, or the file is there.
      ConfigError: llama.cpp would compute another model.
      TokenizerError: llama.cpp would cut texts otherwise.
      CheckpointFormatError: numbers that are none cannot be quantized.
      SaveError: it cannot be written; nothing of it is left, and what was there is untouched.
    """
    path = check_file(path, force)
    kind = kind or TYPE_OF[common_dtype(checkpoint.tensors)]
    if kind not in GGUF_TYPES:
        raise OptionError(f"type is {kind!r}; choose one of {', '.join(GGUF_TYPES)}")
    config, tensors = checkpoint.config, checkpoint.tensors
    if config.quantization is not None:
        config, tensors = dequantize_tensors(config, tensors)
    arch = architecture(config)
    metadata = _metadata(checkpoint, config, arch, kind) | {"general.name": path.stem}
    parts = [
        _part(config, tensor, hf, kind)
        for tensor, hf in zip(tensors.values(), hf_tensors(config).values(), strict=True)
    ]
    if odd := [part.name for part in parts if part.kind == "F16" != kind.upper()]:
        log.warning("%s: the rows of %d tensors are no multiple of a block: F16 in place of %s", path, len(odd), kind)
    size = sum(part.nbytes + -part.nbytes % ALIGNMENT for part in parts)
    if (free := shutil.disk_usage(path.parent).free) < size:
        raise SaveError(f"{path} would take {size:,} bytes, and its disk has {free:,} left; nothing was changed")
    try:
        with new_file(path) as file, progress("writing", size) as done:
            _write_header(Path(file.name), arch, metadata, parts)
            file.seek(0, os.SEEK_END)
            checksums = _write_tensors(file, parts, done)
            if wrong := _differing(Path(file.name), checksums):
                raise SaveError(f"{path}: {wrong} reads back differently from what was written; nothing was changed")
    except OSError as error:
        if isinstance(error, SaveError):
            raise
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
        raise SaveError(f"{path} could not be written: {what}; nothing was changed") from None


def architecture(config: ModelConfig) -> str:
    """The llama.cpp architecture whose graph computes this model.

    Its smollm3 has no RoPE on every fourth layer, which no key can change, and no biases; its llama has RoPE on every
    layer.

    Raises:
      ConfigError: there is none.
    """
    layers = config.rope_layers
    fourth = tuple(bool((layer + 1) % 4) for layer in range(len(layers)))
    biased = config.attention_bias or config.mlp_bias
    if config.windows:
        raise ConfigError(
            "llama.cpp computes no sliding windows for this architecture: this model cannot be a .gguf file"
        )
    if config.head_dim % 2:
        raise ConfigError(f"llama.cpp rotates pairs of numbers, and heads are {config.head_dim} wide")
    if config.model_type == "smollm3" and layers == fourth and not biased:
        return "smollm3"
    if not all(layers):
        what = "biases" if layers == fourth else "NoPE on other layers than every fourth"
        raise ConfigError(f"llama.cpp's smollm3 cannot have {what}, as this model has: it cannot be a .gguf file")
    return "llama"


def _metadata(checkpoint: Checkpoint, config: ModelConfig, arch: str, kind: str) -> dict[str, Any]:
    """The file's keys -> values."""
    gguf = gguf_package()
    ftype = gguf.LlamaFileType[("ALL_" if kind == "f32" else "MOSTLY_") + kind.upper()]
    own = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_theta),
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    } | _rope_scaling(config)
    ids = _token_ids(config, checkpoint.generation_config)
    metadata = {"general.type": "model", "general.file_type": int(ftype)} | _sampling(checkpoint.generation_config)
    if kind.startswith("q"):
        metadata["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    metadata |= {f"{arch}.{name}": value for name, value in own.items()}
    if "tokenizer.json" in checkpoint.files:
        tokenizer = build_tokenizer(checkpoint.files, "", config)
        own = {f"{'pad' if name == 'padding' else name}_token_id": token for name, token in ids.items()}
        known = {name: token for name, token in own.items() if name[:3] in ("bos", "eos", "pad")}
        metadata |= tokenizer_metadata(tokenizer, config.vocab_size, known)
    else:
        log.warning("the model has no tokenizer.json, and so the file will have no tokenizer: only token ids go in")
        metadata["tokenizer.ggml.model"] = "no_vocab"
    return metadata | {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()}


def _token_ids(config: ModelConfig, generation: GenerationConfig) -> dict[str, int]:
    """GGUF's names of special tokens -> ids; the second and third end go by those of turns and messages."""
    ends = generation.eos_token_id
    if len(ends) > 3:
        log.warning("a .gguf file holds three ends of a text; left out: %s", ", ".join(map(str, ends[3:])))
    found = {"bos": config.bos_token_id, "padding": config.pad_token_id}
    found |= dict(zip(("eos", "eot", "eom"), ends, strict=False))
    return {name: token for name, token in found.items() if token is not None}


def _sampling(generation: GenerationConfig) -> dict[str, Any]:
    """What llama.cpp's programs sample with unless they are told otherwise."""
    if not generation.do_sample:
        return {}
    values = {"temp": generation.temperature, "top_p": generation.top_p}
    return {f"general.sampling.{name}": value for name, value in values.items()}


def _rope_scaling(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None:
        return {}
    own: dict[str, Any] = {"type": scaling.rope_type, "factor": float(scaling.factor)}
    if scaling.rope_type == "yarn":
        # What llama.cpp multiplies cos and sin with, and how it rounds the dimensions between which it blends.
        usual = 0.1 * math.log(scaling.factor) + 1
        if not math.isclose(inverse_frequencies(config)[1], usual, rel_tol=1e-6) or scaling.truncate is False:
            raise ConfigError(
                "rope_scaling has an attention_factor, mscale or truncate that a .gguf file cannot say without doubt; "
                "leave them out of config.json if the model was not trained with them"
            )
        own["original_context_length"] = scaling.original_max_position_embeddings
        betas = {"yarn_beta_fast": scaling.beta_fast, "yarn_beta_slow": scaling.beta_slow}
        own |= {name: float(beta) for name, beta in betas.items() if beta}
    elif scaling.rope_type != "linear":
        raise ConfigError(
            f"rope_scaling is {scaling.rope_type}, of which a .gguf file keeps the frequencies alone; "
            "llama.cpp's convert_hf_to_gguf.py writes these"
        )
    return {f"rope.scaling.{name}": value for name, value in own.items()}


def _part(config: ModelConfig, tensor: StoredTensor, hf: HFTensor, kind: str) -> Part:
    gguf, name = gguf_package(), gguf_name(hf)
    wanted = "F32" if len(tensor.shape) == 1 else kind.upper()
    head = "token_embd.weight" if config.tie_word_embeddings else "output.weight"
    if wanted.startswith("Q4") and name == head:
        wanted = "Q8_0"
    if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[wanted]][0]:
        wanted = "F16"
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[wanted]]
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    orders = [_row_order(count, config.head_dim) for part, count in heads.items() if part in name]
    nbytes = math.prod(tensor.shape) // block * block_bytes
    return Part(name, wanted, tensor, orders[0] if orders else None, nbytes)


def _row_order(heads: int, head_dim: int) -> np.ndarray:
    """int64 [heads * head_dim]: which of Hugging Face's rows is the file's row i, for q and k, on NoPE layers too.

    Hugging Face rotates (i, i + head_dim/2), llama.cpp neighbours (2i, 2i + 1).
    """
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def _encoded(part: Part) -> Iterator[memoryview]:
    """The tensor's bytes in the file, some rows at a time."""
    array = part.tensor.read()
    step = max(1, PIECE // max(1, math.prod(array.shape[1:])))
    quants, kinds = gguf_package("gguf.quants"), gguf_package().GGMLQuantizationType
    for start in range(0, len(array), step):
        rows = slice(start, start + step)
        piece = array[rows] if part.order is None else array[part.order[rows]]
        if part.kind in PLAIN:
            yield raw_bytes(as_dtype(piece, PLAIN[part.kind], part.tensor.name))
            continue
        piece = np.ascontiguousarray(piece, np.float32)
        if not is_finite(piece):
            raise CheckpointFormatError(f"tensor {part.tensor.name} holds NaN or infinity, which {part.kind} cannot")
        yield raw_bytes(quants.quantize(piece, kinds[part.kind]))


def _write_header(path: Path, arch: str, metadata: dict[str, Any], parts: Sequence[Part]) -> None:
    """Writes all that comes before the first tensor's bytes, without padding."""
    gguf = gguf_package()
    writer = gguf.GGUFWriter(path, arch)
    add: dict[type, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    for key, value in metadata.items():
        add[type(value)](key, value)
    for part in parts:
        kind = gguf.GGMLQuantizationType[part.kind]
        writer.add_tensor_info(part.name, part.tensor.shape, np.dtype(np.float32), part.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _write_tensors(file: IO[bytes], parts: Sequence[Part], done: Callable[[int], None]) -> dict[str, int]:
    """Writes what follows the header; the CRC-32 of each tensor's bytes, by its name."""
    checksums = {}
    _pad(file)
    for part in parts:
        checksums[part.name] = 0
        for piece in _encoded(part):
            file.write(piece)
            checksums[part.name] = zlib.crc32(piece, checksums[part.name])
            done(piece.nbytes)
        _pad(file)
    file.flush()
    return checksums


def _pad(file: IO[bytes]) -> None:
    file.write(b"\0" * (-file.tell() % ALIGNMENT))


def _differing(path: Path, checksums: dict[str, int]) -> str | None:
    """What of the file is not what was written; None if all is."""
    try:
        _, entries = read_header(path)
    except ValueError:
        return "the header"
    for entry in entries:
        raw = np.memmap(path, np.uint8, "r", entry.start, (entry.nbytes,)) if entry.nbytes else b""
        if zlib.crc32(raw) != checksums.get(entry.name):
            return f"tensor {entry.name}"
    return None
