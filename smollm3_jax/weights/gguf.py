"""GGUF files (llama.cpp's format), read as the Hugging Face checkpoint that they were converted from.

The header is parsed here, not by `gguf.GGUFReader`: that one trusts every count and length, so a damaged
file can keep it busy for ever or pass as sound (its sizes wrap at 64 bits), and a vocabulary takes it
seconds. `gguf` supplies the block formats and their arithmetic.

Sources: ggml's docs/gguf.md (the container); llama.cpp's src/llama-model.cpp and src/llama-context.cpp
(what a key means, and what its absence means), conversion/llama.py (the row order), src/llama-vocab.cpp
(the pre-tokenizers).
"""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import ARCHITECTURES
from ..errors import CheckpointFormatError, TokenizerError
from .stored import NUMPY_DTYPES, StoredTensor

# Tensor formats by gguf's names. The plain ones keep their dtype; the others are read as float32.
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
CHUNK_BYTES = 16 << 20  # float32 bytes dequantized at once: the temporaries are a few times this
MAX_HEADER_BYTES = 100_000_000  # the largest vocabularies take 20 MB
# A value's type number in the file -> numpy's; the numbers that are missing are a string and an array.
SCALARS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
STRING, ARRAY = 8, 9
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # types of a token
# Keys that change the computation -> the value that does not. llama.cpp multiplies attn_factor onto YaRN's own
# 0.1 ln(factor) + 1, and ignores the yarn_attn_factor that its converter makes of Hugging Face's
# attention_factor: what a file with these was meant to compute is uncertain, so it is refused.
REFUSED = {f"rope.scaling.{key}": None for key in ("yarn_attn_factor", "yarn_ext_factor", "alpha")}
REFUSED |= {"rope.scaling.attn_factor": 1, "rope.scaling.yarn_log_multiplier": 0, "expert_count": 0}
REFUSED |= {"attention.sliding_window": 0, "attention.causal": True, "attention.scale": None}
REFUSED |= {"logit_scale": None, "residual_scale": None, "embedding_scale": None}
# tokenizer.ggml.pre -> the regexes that cut a text, one after the other; "default" is llama.cpp's own.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {
    "llama-bpe": (LLAMA3_SPLIT,),
    "smaug-bpe": (LLAMA3_SPLIT,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (),  # this one and the next are written as their tokenizer.json has them
    "smollm": (),
}
NUMBER = (int, float)
REQUIRED: Any = object()

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file holds, in Hugging Face's terms; the tensors are not read yet."""

    config: dict[str, Any]  # config.json, as ModelConfig.from_hf takes it
    generation_config: dict[str, Any]  # bos, eos and pad ids, as far as the file has them
    tensors: list[StoredTensor]  # with Hugging Face's names, shapes and row order
    tokenizer_files: dict[str, str]  # file name -> text; empty without a tokenizer that can be rebuilt


class _Entry(NamedTuple):
    """A tensor as the header has it: `shape` with rows first, `start` and `nbytes` in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


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
    metadata, entries = _read_header(path)
    if (parts := _get(metadata, "split.count", int, 1)) > 1:
        raise ValueError(f"it is one of {parts} parts; join them with llama-gguf-split --merge")
    if any(entry.name == "rope_freqs.weight" for entry in entries):
        raise ValueError(
            "rope_freqs.weight holds llama3 RoPE scaling without its parameters; "
            "convert from the model's Hugging Face folder instead"
        )
    names = {entry.name: name_of(entry.name) for entry in entries}
    if unknown := [name for name, hf_name in names.items() if hf_name is None]:
        raise ValueError(f"{len(unknown)} tensors are unknown: {', '.join(unknown[:10])}")
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
    keys = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    ids = {name: _get(metadata, f"tokenizer.ggml.{key}_token_id", int, None) for name, key in keys.items()}
    ids = {name: token_id for name, token_id in ids.items() if token_id is not None}
    try:
        files = _tokenizer_files(metadata, ids)
    except TokenizerError as error:
        log.warning("%s: its tokenizer is left out: %s", path, error)
        files = {}
    return GGUFFile(config | ids, ids, tensors, files)


def _read_header(path: Path) -> tuple[dict[str, Any], list[_Entry]]:
    """(metadata, tensors); the tensors lie one after the other, and all of them inside the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    size = path.stat().st_size
    if size < 24:
        raise ValueError(f"{size} bytes are too few for a GGUF file; fetch it again")
    data = np.memmap(path, np.uint8, "r").data
    limit, position = min(size, MAX_HEADER_BYTES), 0

    def take(count: int) -> memoryview:
        nonlocal position
        # Checked before anything is allocated; it also ends the loop over an absurd count.
        if count > limit - position:
            raise ValueError(f"its header does not end within {limit} bytes; fetch it again")
        position += count
        return data[position - count : position]

    def number(length: int) -> int:
        return int.from_bytes(take(length), "little")

    def text() -> str:
        return str(take(number(8)), "utf-8")

    def scalars(kind: int, count: int) -> np.ndarray:
        if kind not in SCALARS:
            raise ValueError(f"its header holds values of unknown type {kind}; fetch it again")
        dtype = np.dtype(SCALARS[kind]).newbyteorder("<")
        return np.frombuffer(take(count * dtype.itemsize), dtype)

    def value(kind: int) -> Any:
        if kind == STRING:
            return text()
        if kind == ARRAY:
            kind, count = number(4), number(8)
            return [text() for _ in range(count)] if kind == STRING else scalars(kind, count)
        scalar = scalars(kind, 1)[0]
        # The shortest decimal that rounds to a float32: 1e-05, not 9.999999747378752e-06.
        return float(str(scalar)) if scalar.dtype == np.float32 else scalar.item()

    if bytes(take(4)) != b"GGUF":
        raise ValueError("it does not begin with GGUF, so it is no GGUF file")
    if (version := number(4)) not in (2, 3):
        what = "big-endian" if version & 0xFFFF == 0 else f"GGUF version {version}"
        raise ValueError(f"it is {what}; little-endian versions 2 and 3 are supported")
    tensor_count, key_count = number(8), number(8)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        if (key := text()) in metadata:
            raise ValueError(f"key {key} stands twice")
        metadata[key] = value(number(4))
    alignment = _get(metadata, "general.alignment", int, 32)
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment}, not a power of two")
    kinds = {kind.value: kind for kind in GGMLQuantizationType}
    entries: dict[str, _Entry] = {}
    end = 0  # of the tensors so far, from where the first begins
    for _ in range(tensor_count):
        if (name := text()) in entries:
            raise ValueError(f"tensor {name} stands twice")
        if not 1 <= (rank := number(4)) <= 4:
            raise ValueError(f"tensor {name} has {rank} dimensions; fetch it again")
        # The file's first dimension varies fastest: it is a row, which blocks do not straddle.
        shape = tuple(number(8) for _ in range(rank))[::-1]
        kind = kinds.get(kind_number := number(4))
        if kind is None or kind.name not in (*PLAIN, *QUANTIZED):
            what = kind.name if kind else f"of the unknown type {kind_number}"
            raise ValueError(f"tensor {name} is {what}; supported are {', '.join((*PLAIN, *QUANTIZED))}")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block or (kind.name in QUANTIZED and rank != 2):
            raise ValueError(f"tensor {name} of shape {list(shape)} cannot be {kind.name}; fetch it again")
        # As llama.cpp demands: no overlaps, and no holes but the padding.
        if (offset := number(8)) != -(-end // alignment) * alignment:
            raise ValueError(f"tensor {name} does not lie where the one before it ends; fetch it again")
        entries[name] = _Entry(name, kind.name, shape, offset, math.prod(shape) // block * block_bytes)
        end = offset + entries[name].nbytes
    start = -(-position // alignment) * alignment
    if start + end > size:
        raise ValueError(f"it has {size} bytes where its tensors need {start + end}; fetch it again")
    return metadata, [entry._replace(start=start + entry.start) for entry in entries.values()]


def _get(metadata: dict[str, Any], key: str, kind: Any, default: Any = REQUIRED) -> Any:
    """metadata[key], checked for its type."""
    value = metadata.get(key, default)
    if value is REQUIRED:
        raise ValueError(f"the key {key} is missing; use the model's Hugging Face folder")
    if key in metadata and (not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, NUMBER))):
        raise ValueError(f"the key {key} holds a {type(value).__name__}; use the model's Hugging Face folder")
    return value


def _config(metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """config.json from the metadata and from which tensors there are, without dtype and token ids."""
    arch = _get(metadata, "general.architecture", str)
    if arch not in ARCHITECTURES:
        raise ValueError(f"its architecture is {arch!r}; this package runs {' and '.join(ARCHITECTURES)}")

    def get(key: str, kind: Any, default: Any = REQUIRED) -> Any:
        return _get(metadata, f"{arch}.{key}", kind, default)

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
    length = get("rope.scaling.original_context_length", int)
    betas = {name: get(f"rope.scaling.yarn_{name}", NUMBER, None) for name in ("beta_fast", "beta_slow")}
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    return scaling | {name: beta for name, beta in betas.items() if beta is not None}


def _row_order(entry: _Entry, heads: int, head_dim: int) -> np.ndarray:
    """int64 [heads * head_dim]: which of the file's rows is Hugging Face's row i, for q and k.

    llama.cpp rotates neighbours (2i, 2i + 1), Hugging Face (i, i + head_dim/2); so its converter reorders rows,
    on NoPE layers too, as w.reshape(heads, 2, head_dim/2).swapaxes(1, 2). This is the inverse.
    """
    if entry.shape[0] != heads * head_dim or head_dim % 2:
        raise ValueError(f"tensor {entry.name} has {entry.shape[0]} rows for {heads} heads of width {head_dim}")
    return np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2).swapaxes(1, 2).reshape(-1)


def _read(path: Path, entry: _Entry, order: np.ndarray | None) -> np.ndarray:
    """The tensor, `entry.shape`, in its own dtype or float32, with its rows in `order`."""
    if entry.nbytes == 0:  # an empty range cannot be mapped
        return np.zeros(entry.shape, NUMPY_DTYPES[PLAIN.get(entry.kind, "float32")])
    raw = np.asarray(np.memmap(path, np.uint8, "r", entry.start, (entry.nbytes,)))
    if entry.kind in PLAIN:
        array = raw.view(NUMPY_DTYPES[PLAIN[entry.kind]]).reshape(entry.shape)
        return array if order is None else array[order]
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows, width = entry.shape
    raw, out = raw.reshape(rows, -1), np.empty(entry.shape, np.float32)
    step = max(1, CHUNK_BYTES // (4 * width))
    with np.errstate(all="ignore"):  # NaN and infinite scales are for whoever loads the weights to report
        for start in range(0, rows, step):
            part = slice(start, start + step)
            packed = raw[part] if order is None else raw[order[part]]
            out[part] = dequantize(packed, GGMLQuantizationType[entry.kind])
    return out


def _tokenizer_files(metadata: dict[str, Any], ids: dict[str, int]) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, rebuilt; empty if the file carries no tokenizer.

    Raises:
      TokenizerError: it is of a kind that this package does not know, or contradicts itself.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    model, pre = (_get(metadata, f"tokenizer.ggml.{key}", str, None) for key in ("model", "pre"))
    if model in (None, "none", "no_vocab"):
        return {}
    if model != "gpt2" or pre not in SPLITS:
        raise TokenizerError(
            f"tokenizer.ggml.model is {model!r} and tokenizer.ggml.pre {pre!r}; gpt2 with {', '.join(SPLITS)} are known"
        )
    tokens, merges = (_get(metadata, f"tokenizer.ggml.{key}", list) for key in ("tokens", "merges"))
    types = _get(metadata, "tokenizer.ggml.token_type", np.ndarray)
    # Rows of the embedding that no token has come last, as UNUSED. What stands between them and the last ordinary
    # token was added to the vocabulary; added tokens that lie below (SmolLM2's first 17) are part of it as well.
    count = next((i + 1 for i in reversed(range(len(types))) if types[i] != UNUSED), 0)
    base = next((i + 1 for i in reversed(range(count)) if types[i] not in (CONTROL, USER_DEFINED)), 0)
    if len(types) != len(tokens) or any(not 0 <= token_id < count for token_id in ids.values()):
        raise TokenizerError(f"{len(tokens)} tokens, {len(types)} token types and the ids {ids} do not go together")
    try:
        vocabulary = {token: i for i, token in enumerate(tokens[:base])}
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        # Llama 3's vocabulary has whole words that its merges do not build.
        tokenizer = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre in ("llama-bpe", "smaug-bpe")))
    except Exception as error:  # `tokenizers` raises bare ones
        raise TokenizerError(f"its merges are not sound: {error}") from error
    added = [i for i in range(count) if types[i] in (CONTROL, USER_DEFINED)]
    tokenizer.add_tokens([AddedToken(tokens[i], special=bool(types[i] == CONTROL), normalized=False) for i in added])
    if wrong := [i for i in range(count) if tokenizer.id_to_token(i) != tokens[i]]:
        raise TokenizerError(f"token {wrong[0]} ({tokens[wrong[0]]!r}) cannot keep its id; it stands twice or is empty")
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    # llama.cpp begins every text with BOS for llama-bpe unless the file says otherwise.
    if _get(metadata, "tokenizer.ggml.add_bos_token", bool, pre == "llama-bpe"):
        if "bos_token_id" not in ids:
            raise TokenizerError("it begins every text with BOS, but has no bos_token_id")
        bos = tokens[ids["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            [bos, "$A"], [bos, "$A", f"{bos}:1", "$B:1"], [(bos, ids["bos_token_id"])]
        )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {name.removesuffix("_id"): tokens[token_id] for name, token_id in ids.items()}
    if (template := _get(metadata, "tokenizer.chat_template", str, None)) is not None:
        config["chat_template"] = template
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config, indent=2)}


def _pre_tokenizer(pre: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    if SPLITS[pre]:
        cuts = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in SPLITS[pre]]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, byte_level]) if pre == "smollm" else byte_level
