"""Tiny random checkpoints that cover every option of the config; weights come from a frozen random stream."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from smollm3_jax.config import ModelConfig
from smollm3_jax.tokenizer import Tokenizer, build_tokenizer
from smollm3_jax.weights.key_map import PROJECTIONS, hf_tensors
from smollm3_jax.weights.peft import adapter_config, write_adapter

BASE: dict[str, Any] = {
    "model_type": "smollm3",
    "architectures": ["SmolLM3ForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "no_rope_layer_interval": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "no_rope_layer_interval": None}

# name -> what differs from BASE
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "release_like": {"rope_theta": 5000000.0, "num_hidden_layers": 8, "head_dim": None, "eos_token_id": [2, 3]},
    "untied": {"tie_word_embeddings": False},
    "head_dim": {"head_dim": 24},
    "attention_bias": {"attention_bias": True},
    "all_biases": {"attention_bias": True, "mlp_bias": True},
    "nope_everywhere": {"no_rope_layers": [0, 0, 0, 0]},
    "rope_everywhere": {"no_rope_layers": [1, 1, 1, 1]},
    "nope_pattern": {"no_rope_layers": [0, 1, 1, 0, 1], "num_hidden_layers": 5},
    "interval_2": {"no_rope_layer_interval": 2},
    "sliding": {"use_sliding_window": True, "sliding_window": 5},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "yarn": {"rope_scaling": YARN},
    "yarn_all_fields": {
        "rope_scaling": YARN
        | {"beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.2, "mscale_all_dim": 0.8, "truncate": False}
    },
    "yarn_factor": {"rope_scaling": YARN | {"attention_factor": 1.3}},
    "llama3": {"rope_scaling": LLAMA3},
    "multi_head": {"num_key_value_heads": 8},
    "multi_query": {"num_key_value_heads": 1},
    "one_layer": {"num_hidden_layers": 1},
    "llama": LLAMA | {"tie_word_embeddings": True},
    "llama_biased": LLAMA | {"rope_scaling": LLAMA3, "attention_bias": True, "pad_token_id": None},
    "v5_spelling": {
        "rope_theta": None,
        "torch_dtype": None,
        "dtype": "float32",
        "rope_parameters": YARN | {"rope_theta": 10000.0},
    },
    "large_eps": {"rms_norm_eps": 1e-2, "sliding_window": 7, "use_sliding_window": True, "num_hidden_layers": 6},
}


NULL_FACTOR: dict[str, Any] = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 64}
# name -> what differs from BASE in its words, and what in its meaning: transformers reads both the same.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no architectures": ({"architectures": []}, {}),
    "a decoder alone": ({"architectures": ["SmolLM3Model"]}, {}),
    "swish": ({"hidden_act": "swish"}, {}),
    "dtype auto": ({"torch_dtype": "auto"}, {"torch_dtype": None}),
    "dtype float8": ({"torch_dtype": "float8_e4m3fn"}, {"torch_dtype": None}),
    "dtype float64": ({"torch_dtype": None, "dtype": "float64"}, {"torch_dtype": None}),
    "dtype half": ({"torch_dtype": "half"}, {"torch_dtype": "float16"}),
    "dtype bf16": ({"torch_dtype": "bf16"}, {"torch_dtype": "bfloat16"}),
    "dtype of another program": ({"torch_dtype": "mxfp4"}, {"torch_dtype": None}),
    "dtypes": ({"dtype": "bfloat16"}, {"torch_dtype": "bfloat16"}),
    "no padding": ({"pad_token_id": -1}, {"pad_token_id": None}),
    "window beyond int32": ({"sliding_window": 2**62}, {"sliding_window": 2**62}),
    "default": ({"rope_scaling": {"rope_type": "default", "factor": 1.0}}, {}),
    "default of 2": ({"rope_scaling": {"type": "default", "factor": 2.0, "finetuned": True}}, {}),
    "only theta": ({"rope_scaling": YARN, "rope_parameters": {"rope_theta": 1e4}}, {"rope_scaling": YARN}),
    "null beside": ({"rope_parameters": YARN | {"rope_theta": 1e4}}, {"rope_scaling": YARN}),
    "original derived": (
        {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
        {"rope_scaling": YARN | {"original_max_position_embeddings": 512}},
    ),
    "original of llama3 derived": (
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if "original" not in k}},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 512}},
    ),
    "original with a point": (
        {"rope_scaling": YARN | {"original_max_position_embeddings": 64.0}},
        {"rope_scaling": YARN},
    ),
    "original outside": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0}, "original_max_position_embeddings": 64},
        {"rope_scaling": YARN},
    ),
    "factor derived": ({"rope_scaling": NULL_FACTOR}, {"rope_scaling": NULL_FACTOR | {"factor": 8.0}}),
    "YaRN's own fields": (
        {"rope_scaling": YARN | {"finetuned": True, "attn_factor": 3.0, "extrapolation_factor": 2.0}},
        {"rope_scaling": YARN},
    ),
    "betas of 0": ({"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": 0.0}}, {"rope_scaling": YARN}),
    "fields of another kind": (
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0, "attention_factor": 2.0} | {"beta_fast": 9}},
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ),
    "linear's original length": (
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0, "original_max_position_embeddings": 64}},
        {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ),
}


def without_nulls(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json's content without the keys that are None."""
    return {key: value for key, value in raw.items() if value is not None}


def raw_config(name: str) -> dict[str, Any]:
    """config.json's content; keys that are None here are absent there."""
    return {key: value for key, value in (BASE | CONFIGS[name]).items() if value is not None}


def random_tensors(raw: dict[str, Any], seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Weights large enough that every part of the model matters, from numpy's frozen legacy stream."""
    random = np.random.RandomState(seed)
    tensors = {}
    for name, slot in hf_tensors(ModelConfig.from_hf(raw)).items():
        values = random.standard_normal(slot.shape).astype(np.float32)
        if "norm" in name:
            values = 1 + 0.2 * values
        elif name.endswith("bias"):
            values = 0.3 * values
        else:
            values = values * 1.3 * slot.shape[-1] ** -0.5
        tensors[name] = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    return tensors


def write_checkpoint(folder: Path, raw: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """A Hugging Face folder, written by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tiny_checkpoint(folder: Path, name: str = "plain", seed: int = 0, dtype: str = "float32") -> Path:
    """Writes the named configuration with random weights; returns the folder."""
    raw = raw_config(name)
    if "torch_dtype" in raw:
        raw["torch_dtype"] = dtype
    return write_checkpoint(folder, raw, random_tensors(raw, seed, dtype))


def tiny_adapter(
    folder: Path,
    base: Path,
    raw: dict[str, Any] | None = None,
    rank: int = 4,
    targets: Sequence[str] = tuple(PROJECTIONS),
    seed: int = 0,
    **more: Any,
) -> Path:
    """Writes a PEFT folder, large enough to matter, of a model of this config ("plain"); returns the folder.

    more: fields of adapter_config.json.
    """
    random, parts = np.random.RandomState(seed), {}
    for name, hf in hf_tensors(ModelConfig.from_hf(raw or raw_config("plain"))).items():
        if name.split(".")[-2] in targets:
            n, k = hf.shape
            a, b = (random.standard_normal(shape).astype(np.float32) * 0.1 for shape in ((rank, k), (n, rank)))
            magnitude = {"magnitude": 1 + random.rand(n).astype(np.float32)} if more.get("use_dora") else {}
            parts[name] = {"a": a, "b": b} | magnitude
    write_adapter(folder, adapter_config(str(base), targets, rank, 8, **more), parts, {})
    return folder


def random_tokens(raw: dict[str, Any], batch: int, length: int, seed: int = 0) -> np.ndarray:
    """int32 [batch, length], padding ids included."""
    return np.random.RandomState(seed).randint(0, raw["vocab_size"], (batch, length)).astype(np.int32)


def letters() -> Tokenizer:
    """A tokenizer of 103 tokens: what ASCII can print, a line break, an end, and SmolLM3's tags."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = [
        *map(chr, range(33, 127)),
        "\u0120",
        "\u010a",
    ]  # a space and a line break, as byte-level spelling has them
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>"])
    backend.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>", "<code>", "</code>"])
    return build_tokenizer({"tokenizer.json": backend.to_str().encode()}, "")


def letters_checkpoint(folder: Path) -> Path:
    """A model of one layer with that tokenizer, and its end."""
    tokenizer = letters()
    raw = raw_config("one_layer") | {"eos_token_id": tokenizer.backend.token_to_id("<|im_end|>")}
    write_checkpoint(folder, raw, random_tensors(raw))
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    return folder


def talking_checkpoint(folder: Path, **more: Any) -> Path:
    """With a tokenizer of 160 words, w0 to w159, and a chat template; more: fields of the config."""
    import tokenizers
    from tokenizers import models, pre_tokenizers

    raw = raw_config("plain") | more
    write_checkpoint(folder, raw, random_tensors(raw))
    tokenizer = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(160)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text("{{ 'w9' if enable_thinking else 'w8' }} {{ messages[0].content }}")
    return folder


def chat_checkpoint(folder: Path, template: Path, **more: Any) -> Path:
    """A model with `letters`, the tags of chats, and a chat template; as SmolLM3's its tokenizer pads with the end of a
    turn. more: fields of the config."""
    tokenizer = letters().backend
    tokenizer.add_special_tokens(["<|im_start|>"])
    end = tokenizer.token_to_id("<|im_end|>")
    raw = raw_config("plain") | {"eos_token_id": end, "pad_token_id": end, "bos_token_id": None} | more
    write_checkpoint(folder, without_nulls(raw), random_tensors(raw))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "chat_template.jinja").write_bytes(template.read_bytes())
    return folder
