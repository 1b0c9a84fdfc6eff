"""GGUF files (llama.cpp's format), read as the Hugging Face checkpoint that they were converted from.

Source of what a key means, and what its absence: llama.cpp's src/llama-model.cpp and
src/llama-context.cpp; of the row order: its converter.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ARCHITECTURES
from ..errors import CheckpointFormatError, TokenizerError
from .gguf_header import NUMBER, PLAIN, REQUIRED, Entry, gguf_package, metadata_value, read_header
from .gguf_tokenizer import tokenizer_files
from .stored import NUMPY_DTYPES, StoredTensor, shown

CHUNK_BYTES = 16 << 20  # float32 bytes dequantized at once: the temporaries are a few times this
# Keys that change the computation -> the value that does not. llama.cpp multiplies attn_factor onto YaRN's own
# 0.1 ln(factor) + 1, and ignores the yarn_attn_factor that its converter makes of Hugging Face's
# attention_factor: what a file with these was meant to compute is uncertain, so it is refused.
REFUSED = {f"rope.scaling.{key}": None for key in ("yarn_attn_factor", "yarn_ext_factor", "alpha")}
REFUSED |= {"rope.scaling.attn_factor": 1, "rope.scaling.yarn_log_multiplier": 0, "expert_count": 0}
REFUSED |= {"attention.sliding_window": 0, "attention.causal": True, "attention.scale": None}
REFUSED |= {"logit_scale": None, "residual_scale": None, "embedding_scale": None}
# general.type of files that are no models -> what to do about it.
OTHER_TYPES = {
    "imatrix": ", what llama-imatrix measured for llama-quantize; give the model's own file",
    "mmproj": ", the part of a model that sees or hears; give the model's own file",
    "vocab": ", a vocabulary without weights; give the model's own file",
}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file holds, in Hugging Face's terms; the tensors are not read yet."""

    config: dict[str, Any]  # config.json, as ModelConfig.from_hf takes it
    generation_config: dict[str, Any]  # bos, eos and pad ids, as far as the file has them
    tensors: list[StoredTensor]  # with Hugging Face's names, shapes and row order
    tokenizer_files: dict[str, str]  # file name -> text; empty without a tokenizer that can be rebuilt


def open_gguf(path: Path, name_of: Callable[[str], str | None]) -> GGUFFile:
    """Opens a GGUF file of architecture `llama` or `smollm3`; only its header is read.

    F32, F16 and BF16 tensors are read in their own dtype, memory-mapped unless their rows are reordered;
    quantized ones as float32, which is exact. A tokenizer that cannot be rebuilt is left out with a warning.

    Args:
      name_of: GGUF tensor name -> Hugging Face tensor name, or None if there is none.

    Raises:
      CheckpointFormatError: the file is missing, damaged, truncated or split, lacks a key, or asks for what
        this package does not do.
    """
    try:
        return _open(path, name_of)
    except FileNotFoundError:
        raise CheckpointFormatError(f"{path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointFormatError(f"{path}: {error}") from error


def _open(path: Path, name_of: Callable[[str], str | None]) -> GGUFFile:
    metadata, entries = read_header(path)
    what = metadata_value(metadata, "general.type", str, "model")
    if "adapter.type" in metadata or what == "adapter":
        raise ValueError(
            "it is an adapter (LoRA), not a model: merge it into its base model (llama-export-lora), "
            "and give the file that this writes"
        )
    if what != "model":
        raise ValueError(f"it is no model: its general.type is {shown(repr(what))}{OTHER_TYPES.get(what, '')}")
    if (parts := metadata_value(metadata, "split.count", int, 1)) > 1:
        raise ValueError(f"it is one of {parts} parts; join them with llama-gguf-split --merge")
    if any(entry.name == "rope_freqs.weight" for entry in entries):
        raise ValueError(
            "rope_freqs.weight holds llama3 RoPE scaling without its parameters; "
            "convert from the model's Hugging Face folder instead"
        )
    if any(entry.name.endswith((".in_sum2", ".lora_a", ".lora_b")) for entry in entries):
        raise ValueError(
            "it holds what llama-imatrix measured, or an adapter (LoRA), and no model; give the model's file"
        )
    entries = [entry for entry in entries if not entry.name.removesuffix(".weight").endswith(".attn_rot_embd")]
    names = {entry.name: name_of(entry.name) for entry in entries}
    if unknown := [name for name, hf_name in names.items() if hf_name is None]:
        raise ValueError(f"{len(unknown)} tensors are unknown: {', '.join(map(shown, unknown[:10]))}")
    config = _config(metadata, {entry.name: entry.shape for entry in entries})
    heads = {".attn_q.": config["num_attention_heads"], ".attn_k.": config["num_key_value_heads"]}
    tensors = []
    for entry in entries:
        orders = [_row_order(entry, n, config["head_dim"]) for part, n in heads.items() if part in entry.name]
        read = functools.partial(_read, path, entry, orders[0] if orders else None)
        dtype = PLAIN.get(entry.kind, "float32")
        tensors.append(StoredTensor(str(names[entry.name]), dtype, entry.shape, str(path), read))
    if all(entry.kind in PLAIN for entry in entries):  # a quantized model has no dtype of its own
        sizes = {dtype: sum(t.nbytes for t in tensors if t.dtype == dtype) for dtype in PLAIN.values()}
        config["torch_dtype"] = max(sizes, key=lambda dtype: sizes[dtype])
    ids = _token_ids(path, metadata, config["vocab_size"])
    # llama.cpp ends at these too: where a turn, or a message that calls a tool, is over.
    ends = [ids.pop(name) for name in ("eot_token_id", "eom_token_id") if name in ids]
    ends = list(dict.fromkeys([ids.get("eos_token_id", ends[0]), *ends])) if ends else []
    generation = ids | ({"eos_token_id": ends} if ends[1:] or (ends and "eos_token_id" not in ids) else {})
    try:
        files = tokenizer_files(metadata, ids)
    except (TokenizerError, ValueError) as error:
        log.warning("%s: its tokenizer is left out: %s", path, error)
        files = {}
    return GGUFFile(config | ids, generation, tensors, files)


def _token_ids(path: Path, metadata: dict[str, Any], rows: int) -> dict[str, int]:
    """The special tokens' ids by config.json's names; as in llama.cpp, those that no token has are left out."""
    ids, tokens = {}, metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, list) else rows
    for key in ("bos", "eos", "padding", "eot", "eom"):
        full = f"tokenizer.ggml.{key}_token_id"
        token_id = metadata_value(metadata, full, int, None)
        if token_id is not None and not 0 <= token_id < count:
            log.warning("%s: %s is %d, but there are %d tokens: left out", path, full, token_id, count)
        elif token_id is not None:
            ids[f"{'pad' if key == 'padding' else key}_token_id"] = token_id
    return ids


def _config(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json from the metadata and from which tensors there are, without dtype and token ids."""
    arch = metadata_value(metadata, "general.architecture", str)
    if arch not in ARCHITECTURES:
        raise ValueError(f"its architecture is {shown(repr(arch))}; this package runs {' and '.join(ARCHITECTURES)}")

    def get(key: str, kind: Any, default: Any = REQUIRED) -> Any:
        return metadata_value(metadata, f"{arch}.{key}", kind, default)

    for key, neutral in REFUSED.items():
        if (value := get(key, (*NUMBER, bool), neutral)) != neutral:
            raise ValueError(f"{arch}.{key} is {value}, which is not supported; use the model's Hugging Face folder")
    hidden, heads = get("embedding_length", int), get("attention.head_count", int)
    # By GGUF's rules its absence means one key-value head per head; the tensors' rows are checked against it.
    kv_heads = get("attention.head_count_kv", int, heads)
    if heads < 1 or kv_heads < 1:
        raise ValueError(f"{arch}.attention.head_count {heads} and head_count_kv {kv_heads} must be positive")
    head_dim = get("attention.key_length", int, hidden // heads)
    widths = {"rope.dimension_count": REQUIRED, "attention.value_length": head_dim}
    for key, default in widths.items():
        if (width := get(key, int, default)) != head_dim:
            raise ValueError(f"{arch}.{key} is {width}, but heads are {head_dim} wide; they must be equal")
    config = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": get("vocab_size", int, shapes.get("token_embd.weight", (REQUIRED,))[0]),
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length", int),
        "num_hidden_layers": get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": get("context_length", int),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", NUMBER),
        # llama.cpp takes 10000 where this is absent; here that would be a model that is wrong without a word.
        "rope_theta": get("rope.freq_base", NUMBER),
        "rope_scaling": _rope_scaling(get),
        "attention_bias": any(".attn_" in name and name.endswith(".bias") for name in shapes),
        "mlp_bias": any(".ffn_" in name and name.endswith(".bias") for name in shapes),
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    # No key says which layers are NoPE: llama.cpp has SmolLM3's step of 4 in its code (llama.cpp#14581).
    return config | ({"no_rope_layer_interval": 4} if arch == "smollm3" else {})


def _rope_scaling(get: Callable[..., Any]) -> dict[str, Any] | None:
    """config.json's rope_scaling; like llama.cpp it reads no type as linear, and the factors 0 and 1 as none."""
    kind = get("rope.scaling.type", str, "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"the RoPE scaling type is {kind!r}; supported are none, linear and yarn")
    factor = get("rope.scaling.factor", NUMBER, REQUIRED if kind == "yarn" else get("rope.scale_linear", NUMBER, 1.0))
    if kind != "yarn":
        return None if kind == "none" or factor in (0, 1) else {"rope_type": "linear", "factor": factor}
    length = get("rope.scaling.original_context_length", int, get("context_length", int))
    betas = {name: get(f"rope.scaling.yarn_{name}", NUMBER, None) for name in ("beta_fast", "beta_slow")}
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    return scaling | {name: beta for name, beta in betas.items() if beta is not None}


def _row_order(entry: Entry, heads: int, head_dim: int) -> np.ndarray:
    """int64 [heads * head_dim]: which of the file's rows is Hugging Face's row i, for q and k.

    llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face (i, i + head_dim/2); so its converter reorders rows,
    on NoPE layers too, as w.reshape(heads, 2, head_dim/2).swapaxes(1, 2). This is the inverse.
    """
    if entry.shape[0] != heads * head_dim or head_dim % 2:
        raise ValueError(f"tensor {entry.name} has {entry.shape[0]} rows for {heads} heads of width {head_dim}")
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _read(path: Path, entry: Entry, order: np.ndarray | None) -> np.ndarray:
    """The tensor, `entry.shape`, in its own dtype or float32, with its rows in `order`."""
    if entry.nbytes == 0:  # an empty range cannot be mapped
        return np.zeros(entry.shape, NUMPY_DTYPES[PLAIN.get(entry.kind, "float32")])
    raw = np.asarray(np.memmap(path, np.uint8, "r", entry.start, (entry.nbytes,)))
    if entry.kind in PLAIN:
        array = raw.view(NUMPY_DTYPES[PLAIN[entry.kind]]).reshape(entry.shape)
        return array if order is None else array[order]
    kinds, dequantize = gguf_package().GGMLQuantizationType, gguf_package("gguf.quants").dequantize
    rows, width = entry.shape
    raw, out = raw.reshape(rows, -1), np.empty(entry.shape, np.float32)
    step = max(1, CHUNK_BYTES // (4 * width))
    with np.errstate(all="ignore"):  # NaN and infinite scales are for whoever loads the weights to report
        for start in range(0, rows, step):
            part = slice(start, start + step)
            packed = raw[part] if order is None else raw[order[part]]
            out[part] = dequantize(packed, kinds[entry.kind])
    return out
