"""weights/gguf.py: files written by gguf's own writer come back bit for bit, and damaged ones are refused."""

import json
import logging
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from proxies import FULL
from tokenizers import Tokenizer
from vocabularies import PRE, TEXTS, gguf_keys_of, trained, vocabulary_keys

from smollm3_jax import from_pretrained
from smollm3_jax.commands.main import main
from smollm3_jax.config import ModelConfig, RopeScaling
from smollm3_jax.errors import CheckpointFormatError, SupportError
from smollm3_jax.weights import gguf as reader
from smollm3_jax.weights import gguf_header, gguf_tokenizer

KIND = gguf.GGMLQuantizationType
LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, MLP, VOCAB = 4, 4, 2, 64, 256, 512, 24
# GGUF name -> Hugging Face name, shape; K-quants need rows that are a multiple of 256 long.
LAYER = {
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
    "ffn_gate": ("mlp.gate_proj", (MLP, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (MLP, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, MLP)),
}
TOP = {
    "token_embd": ("model.embed_tokens", (VOCAB, HIDDEN)),
    "output_norm": ("model.norm", (HIDDEN,)),
    "output": ("lm_head", (VOCAB, HIDDEN)),
}
SHAPES = {f"{name}.weight": shape for name, (_, shape) in TOP.items() if name != "output"} | {
    f"blk.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, (_, shape) in LAYER.items()
}


def name_of(name: str) -> str | None:
    *prefix, part, end = name.split(".")
    if end not in ("weight", "bias") or part not in (LAYER if prefix else TOP):
        return None
    return f"model.layers.{prefix[1]}.{LAYER[part][0]}.{end}" if prefix else f"{TOP[part][0]}.{end}"


def metadata(arch="llama", **changes):
    """Keys as llama.cpp's converter writes them; a change to None leaves the key out, __ stands for a dot."""
    keys = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": HIDDEN,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5000000.0,
        "rope.dimension_count": HEAD_DIM,
        "vocab_size": VOCAB,
    }
    keys |= {name.replace("__", "."): value for name, value in changes.items()}
    return {f"{arch}.{name}": value for name, value in keys.items() if value is not None}


def write(path, tensors, keys=None, arch="llama", **options):
    """tensors: name -> array, or (raw blocks, format)."""
    writer = gguf.GGUFWriter(path, arch, **options)
    for key, value in (metadata(arch) if keys is None else keys).items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, array in tensors.items():
        raw, kind = array if isinstance(array, tuple) else (array, None)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def minimal(tmp_path, keys=None, arch: Any = "llama", **tensors):
    """A file with an embedding, for what does not need a whole model."""
    embed = {"token_embd.weight": np.ones((VOCAB, HIDDEN), np.float32)}
    return write(tmp_path / "m.gguf", embed | tensors, keys, arch)


def opened(path):
    return reader.open_gguf(path, name_of)


def permute(weights, name):
    """What llama.cpp's converter does to q and k (conversion/llama.py)."""
    heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
    if heads is None:
        return weights
    return weights.reshape(heads, 2, HEAD_DIM // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def weights(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


# --- tensors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "smollm3"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_plain_tensors_come_back_bit_for_bit(tmp_path, arch, dtype):
    biases = {
        f"{name.removesuffix('.weight')}.bias": shape[:1] for name, shape in SHAPES.items() if "_norm" not in name
    }
    original = weights(SHAPES | {"output.weight": (VOCAB, HIDDEN)} | {k: v for k, v in biases.items() if "blk" in k})
    original = {name: array.astype(dtype) for name, array in original.items()}
    stored = {name: permute(array, name) for name, array in original.items()}
    if dtype == ml_dtypes.bfloat16:
        stored = {name: (array.view(np.uint8), KIND.BF16) for name, array in stored.items()}
    path = write(tmp_path / "m.gguf", stored, metadata(arch), arch)
    file = opened(path)
    assert {t.name for t in file.tensors} == {name_of(name) for name in original}
    read = {t.name: t for t in file.tensors}
    for name, array in original.items():
        tensor = read[str(name_of(name))]
        assert (tensor.shape, tensor.dtype, tensor.file) == (array.shape, np.dtype(dtype).name, str(path))
        got = tensor.read()
        assert got.dtype == dtype and got.shape == array.shape
        np.testing.assert_array_equal(got.view(np.uint8), array.view(np.uint8), err_msg=name)
    assert file.config["torch_dtype"] == np.dtype(dtype).name
    assert (file.config["attention_bias"], file.config["mlp_bias"]) == (True, True)
    assert file.config["tie_word_embeddings"] is False


CAN_BE_WRITTEN = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


def blocks(kind, rows, width, rng):
    """Raw blocks of a format that gguf cannot quantize to: random bits, and scales that are numbers."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows * width // block, size), np.uint8)
    at = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    at |= {"TQ1_0": (52,), "TQ2_0": (64,), "MXFP4": (), "NVFP4": (), "IQ1_M": ()}
    for offset in at.get(kind.name, (0,)):
        scale = rng.uniform(0.001, 0.1, (len(raw), 1)).astype(np.float16)
        raw[:, offset : offset + 2] = scale.view(np.uint8)
    if kind.name == "MXFP4":
        raw[:, 0] = rng.integers(120, 128, len(raw))  # an exponent
    if kind.name == "NVFP4":
        raw[:, :4] = rng.integers(40, 60, (len(raw), 4))  # float8
    if kind.name == "IQ1_M":  # a float16 in the highest bits of the last four numbers: 0.1
        raw[:, 48:56].view("<u2")[...] = raw[:, 48:56].view("<u2") & 0x0FFF | np.array([0x6, 0x6, 0xE, 0x2]) << 12
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", gguf_header.QUANTIZED)
def test_quantized_tensors_are_dequantized_whole_and_unpermuted(tmp_path, kind, monkeypatch):
    rng, kind = np.random.default_rng(1), KIND[kind]
    names = ["blk.0.attn_q.weight", "blk.3.attn_k.weight", "blk.1.ffn_down.weight", "token_embd.weight"]
    expected, stored = {}, {}
    for name in names:
        if kind.name not in CAN_BE_WRITTEN:
            raw = blocks(kind, *SHAPES[name], rng)
        else:
            raw = quantize(rng.standard_normal(SHAPES[name], np.float32), kind)
        stored[name], expected[name] = (raw, kind), dequantize(raw, kind)
        assert np.isfinite(expected[name]).all() and expected[name].std() > 0
    monkeypatch.setattr(reader, "CHUNK_BYTES", 5 * 4 * HIDDEN)  # 5 rows at once: the last chunk is a rest
    file = opened(write(tmp_path / "m.gguf", stored))
    assert "torch_dtype" not in file.config
    for tensor, name in zip(file.tensors, names, strict=True):
        got = tensor.read()
        assert tensor.name == name_of(name) and tensor.dtype == "float32" and got.dtype == np.float32
        assert got.flags.c_contiguous and got.shape == tensor.shape == SHAPES[name]
        np.testing.assert_array_equal(permute(got, name), expected[name])


def test_reading_takes_little_more_memory_than_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1 << 16)
    raw = quantize(np.ones((4096, HIDDEN), np.float32), KIND.Q8_0)
    [tensor] = opened(write(tmp_path / "m.gguf", {"token_embd.weight": (raw, KIND.Q8_0)})).tensors
    tensor.read()  # imports and caches
    tracemalloc.start()
    array = tensor.read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.nbytes == 4 << 20
    assert peak < array.nbytes + (1 << 20)


def test_plain_tensors_are_memory_mapped(tmp_path):
    [tensor] = opened(minimal(tmp_path)).tensors
    array = tensor.read()
    assert not array.flags.owndata and not array.flags.writeable


def test_dtype_is_the_one_of_most_bytes(tmp_path):
    tensors = {
        "token_embd.weight": np.ones((VOCAB, HIDDEN), np.float16),
        "output_norm.weight": np.ones(HIDDEN, np.float32),
    }
    file = opened(write(tmp_path / "m.gguf", tensors))
    assert file.config["torch_dtype"] == "float16"
    assert [tensor.dtype for tensor in file.tensors] == ["float16", "float32"]


def test_zero_size_tensor(tmp_path):
    file = opened(write(tmp_path / "m.gguf", {"token_embd.weight": np.ones((0, HIDDEN), np.float32)}))
    assert file.tensors[0].read().shape == (0, HIDDEN)


def test_nan_scales_are_read_without_a_word(tmp_path):
    raw = quantize(np.ones((2, HIDDEN), np.float32), KIND.Q4_1)
    raw[0, :2] = np.array([np.inf], np.float16).view(np.uint8)
    [tensor] = opened(write(tmp_path / "m.gguf", {"token_embd.weight": (raw, KIND.Q4_1)})).tensors
    array = tensor.read()
    assert not np.isfinite(array[0, :32]).all() and np.isfinite(array[1]).all()


# --- config ----------------------------------------------------------------------------------------------


def test_config_of_smollm3(tmp_path):
    ids = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0}
    file = opened(minimal(tmp_path, metadata("smollm3") | ids, "smollm3"))
    assert file.config == {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "rope_theta": 5000000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
        "torch_dtype": "float32",
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    assert file.generation_config == {"eos_token_id": 2, "pad_token_id": 0}
    assert file.tokenizer_files == {}
    assert ModelConfig.from_hf(file.config).rope_layers == (True, True, True, False)


def test_config_of_llama_has_rope_everywhere(tmp_path):
    keys = metadata(attention__head_count_kv=None, vocab_size=None, attention__key_length=32, rope__dimension_count=32)
    config = opened(minimal(tmp_path, keys)).config
    assert config["num_key_value_heads"] == HEADS and config["vocab_size"] == VOCAB and config["head_dim"] == 32
    assert "no_rope_layer_interval" not in config
    assert ModelConfig.from_hf(config).rope_layers == (True,) * LAYERS


@pytest.mark.parametrize(
    ("value", "expected"), [(1e-5, 1e-5), (1e-6, 1e-6), (2.5e-7, 2.5e-7), (5e6, 5e6), (1 / 3, 0.33333334)]
)
def test_float32_values_become_the_shortest_decimal(tmp_path, value, expected):
    config = opened(minimal(tmp_path, metadata(attention__layer_norm_rms_epsilon=value, rope__freq_base=value))).config
    assert config["rms_norm_eps"] == config["rope_theta"] == expected


YARN = {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0}
YARN_512 = YARN | {"rope__scaling__original_context_length": 256}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, None),
        ({"rope__scaling__type": "linear"}, None),
        ({"rope__scaling__factor": 0.0}, None),
        ({"rope__scaling__factor": 4.0}, RopeScaling(rope_type="linear", factor=4.0)),
        ({"rope__scale_linear": 4.0}, RopeScaling(rope_type="linear", factor=4.0)),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, RopeScaling(rope_type="linear", factor=4.0)),
        (YARN, RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=512)),
        (YARN_512, RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=256)),
        (
            YARN_512 | {"rope__scaling__yarn_beta_fast": 16.0, "rope__scaling__attn_factor": 1.0},
            RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=256, beta_fast=16.0),
        ),
    ],
)
def test_rope_scaling(tmp_path, keys, expected):
    config = opened(minimal(tmp_path, metadata("smollm3", **keys), "smollm3")).config
    assert ModelConfig.from_hf(config).rope_scaling == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope__scaling__type": "yarn"}, "rope.scaling.factor is missing"),
        ({"rope__scaling__type": "longrope"}, "'longrope'"),
        (YARN_512 | {"rope__scaling__attn_factor": 1.1}, "attn_factor is 1.1"),
        (YARN_512 | {"rope__scaling__yarn_attn_factor": 1.0}, "yarn_attn_factor is 1.0"),
        (YARN_512 | {"rope__scaling__yarn_log_multiplier": 1.0}, "yarn_log_multiplier is 1.0"),
        ({"attention__sliding_window": 128}, "attention.sliding_window is 128"),
        ({"attention__causal": False}, "attention.causal is False"),
        ({"expert_count": 8}, "expert_count is 8"),
        ({"logit_scale": 0.5}, "logit_scale is 0.5"),
        ({"rope__dimension_count": 32}, "rope.dimension_count is 32"),
        ({"attention__value_length": 32}, "attention.value_length is 32"),
        ({"attention__head_count": 0}, "must be positive"),
        ({"block_count": "four"}, "llama.block_count holds a str"),
        ({"block_count": True}, "llama.block_count holds a bool"),
        ({"feed_forward_length": [MLP, MLP]}, "llama.feed_forward_length holds a ndarray"),
    ],
)
def test_what_a_config_cannot_say_is_refused(tmp_path, keys, message):
    path = minimal(tmp_path, metadata(**keys))
    with pytest.raises(CheckpointFormatError, match=message) as error:
        opened(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("key", [k for k in metadata() if not k.endswith(("vocab_size", "head_count_kv"))])
def test_missing_key_is_named(tmp_path, key):
    keys = {name: value for name, value in metadata().items() if name != key}
    with pytest.raises(CheckpointFormatError, match=f"the key {key} is missing"):
        opened(minimal(tmp_path, keys))


def test_vocab_size_needs_its_key_or_the_embedding(tmp_path):
    path = write(tmp_path / "m.gguf", {"output_norm.weight": np.ones(HIDDEN, np.float32)}, metadata(vocab_size=None))
    with pytest.raises(CheckpointFormatError, match=r"llama\.vocab_size is missing"):
        opened(path)


# --- refused files ---------------------------------------------------------------------------------------


def test_other_architectures_are_named(tmp_path):
    with pytest.raises(CheckpointFormatError, match="'qwen2'"):
        opened(minimal(tmp_path, metadata("qwen2"), "qwen2"))


def test_llama3_scaling_as_a_tensor_is_refused(tmp_path):
    path = minimal(tmp_path, **{"rope_freqs.weight": np.ones(HEAD_DIM // 2, np.float32)})
    with pytest.raises(CheckpointFormatError, match=r"rope_freqs\.weight.*Hugging Face folder"):
        opened(path)


def test_buffers_of_old_files_are_left_out(tmp_path):
    old = {f"blk.{i}.attn_rot_embd{end}": np.ones(8, np.float32) for i, end in enumerate(("", ".weight"))}
    assert [tensor.name for tensor in opened(minimal(tmp_path, **old)).tensors] == [name_of("token_embd.weight")]


def test_unknown_tensors_are_counted_and_the_first_named(tmp_path):
    path = minimal(tmp_path, **{f"blk.0.strange{i}.weight": np.ones(2, np.float32) for i in range(12)})
    with pytest.raises(CheckpointFormatError, match="12 tensors are unknown") as error:
        opened(path)
    assert "strange9" in str(error.value) and "strange10" not in str(error.value)


def test_unsupported_tensor_type_is_named(tmp_path):
    with pytest.raises(CheckpointFormatError, match=r"output_norm\.weight is I32"):
        opened(minimal(tmp_path, **{"output_norm.weight": np.ones(HIDDEN, np.int32)}))


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.0.attn_k.bias"])
def test_heads_must_fit_the_rows_of_q_and_k(tmp_path, name):
    with pytest.raises(CheckpointFormatError, match=f"{name} has 96 rows"):
        opened(minimal(tmp_path, **{name: np.ones((96, HIDDEN)[: 1 + name.endswith("weight")], np.float32)}))


def test_part_of_a_split_file(tmp_path):
    with pytest.raises(CheckpointFormatError, match="one of 3 parts"):
        opened(minimal(tmp_path, metadata() | {"split.count": 3}))


def test_big_endian(tmp_path):
    tensors = {"token_embd.weight": np.ones((2, 32), np.float32)}
    with pytest.raises(CheckpointFormatError, match="big-endian"):
        opened(write(tmp_path / "m.gguf", tensors, endianess=gguf.GGUFEndian.BIG))


def text(string):
    return struct.pack("<Q", len(string)) + string.encode()


def raw_file(keys=(), tensors=(), data=b"", *, magic=b"GGUF", version=3, counts=None):
    """A file byte by byte: keys are (name, type, payload), tensors (name, dimensions, type, offset)."""
    out = magic + struct.pack("<I2Q", version, *(counts or (len(tensors), len(keys))))
    for name, kind, payload in keys:
        out += text(name) + struct.pack("<I", kind) + payload
    for name, dimensions, kind, offset in tensors:
        out += text(name) + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset)
    return out + b"\0" * (-len(out) % 32) + data


HUGE = 2**62
F32, Q8_0, U32, STRING, ARRAY = 0, 8, 4, 8, 9
ONE = ("a.weight", (8,), F32, 0)
DAMAGED = {
    "empty": (b"", "too few"),
    "short": (b"GGUF\3\0\0", "too few"),
    "not gguf": (raw_file(magic=b"PK\3\4"), "begin with GGUF"),
    "version 1": (raw_file(version=1), "version 1"),
    "key count": (raw_file(counts=(0, HUGE)), "header does not end"),
    "tensor count": (raw_file(counts=(HUGE, 0)), "header does not end"),
    "string length": (raw_file([("k", STRING, struct.pack("<Q", HUGE))]), "header does not end"),
    "array of numbers": (raw_file([("k", ARRAY, struct.pack("<IQ", U32, HUGE))]), "header does not end"),
    "array of strings": (raw_file([("k", ARRAY, struct.pack("<IQ", STRING, HUGE))]), "header does not end"),
    "array of arrays": (raw_file([("k", ARRAY, struct.pack("<IQ", ARRAY, HUGE))]), "unknown type 9"),
    "value type": (raw_file([("k", 77, b"")]), "unknown type 77"),
    "not utf-8": (raw_file([("k", STRING, struct.pack("<Q", 1) + b"\xff")]), "utf-8"),
    "key twice": (raw_file([("k", U32, bytes(4)), ("k", U32, bytes(4))]), "key k occurs twice"),
    "alignment": (raw_file([("general.alignment", U32, struct.pack("<I", 24))]), "power of two"),
    "alignment 0": (raw_file([("general.alignment", U32, bytes(4))]), "power of two"),
    "no dimensions": (raw_file([], [("a.weight", (), F32, 0)]), "0 dimensions"),
    "dimensions": (raw_file([], [("a.weight", (1,) * 5, F32, 0)]), "5 dimensions"),
    "wraps at 64 bits": (raw_file([], [("a.weight", (2**32, 2**32), F32, 0)]), "tensors need"),
    "tensor type": (raw_file([], [("a.weight", (8,), 1000, 0)]), "unknown type 1000"),
    "rows of no whole block": (raw_file([], [("a.weight", (16, 2), Q8_0, 0)]), "cannot be Q8_0"),
    "quantized vector": (raw_file([], [("a.weight", (32,), Q8_0, 0)]), "cannot be Q8_0"),
    "tensor twice": (raw_file([], [ONE, ("a.weight", (8,), F32, 32)], bytes(64)), "a.weight occurs twice"),
    "overlap": (raw_file([], [ONE, ("b.weight", (8,), F32, 0)], bytes(64)), "b.weight does not lie"),
    "hole": (raw_file([], [ONE, ("b.weight", (8,), F32, 64)], bytes(128)), "b.weight does not lie"),
    "first not at 0": (raw_file([], [("a.weight", (8,), F32, 32)], bytes(64)), "a.weight does not lie"),
    "no data": (raw_file([], [ONE]), "tensors need"),
    "no architecture": (raw_file([], []), "general.architecture is missing"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file(tmp_path, case):
    content, message = DAMAGED[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    started = time.monotonic()
    with pytest.raises(CheckpointFormatError, match=message) as error:
        opened(path)
    assert str(path) in str(error.value)
    assert time.monotonic() - started < 1


def test_header_has_an_upper_limit(tmp_path, monkeypatch):
    path = minimal(tmp_path)
    monkeypatch.setattr("smollm3_jax.weights.gguf_header.MAX_HEADER_BYTES", 100)
    with pytest.raises(CheckpointFormatError, match="within 100 bytes"):
        opened(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointFormatError, match=r"m\.gguf is missing"):
        opened(tmp_path / "m.gguf")
    with pytest.raises(CheckpointFormatError, match=str(tmp_path)):
        opened(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(a small file with a tokenizer, where its tensors begin and end, where to put changed copies)."""
    folder = tmp_path_factory.mktemp("whole")
    embed = quantize(np.ones((VOCAB, HIDDEN), np.float32), KIND.Q4_0)
    norm = np.ones(5, np.float32)  # so short that padding follows
    arrays = {"token_embd.weight": (embed, KIND.Q4_0), "output_norm.weight": norm}
    tokens = ["a", "b", "ab", "<x>"]
    path = write(folder / "m.gguf", arrays, metadata() | vocabulary_keys(tokens, [1, 1, 1, 3], ["a b"], "smollm"))
    content = path.read_bytes()
    begin, end = content.index(embed.tobytes()), content.rindex(norm.tobytes()) + norm.nbytes
    assert len(opened(path).tensors) == 2 and end < len(content)
    return content, begin, end, folder / "changed.gguf"


@settings(deadline=None)
@given(st.data())
def test_truncated_file_is_refused_before_a_tensor_is_read(whole, data):
    content, _, end, path = whole
    path.write_bytes(content[: data.draw(st.integers(0, end - 1))])
    with pytest.raises(CheckpointFormatError, match="fetch it again"):
        opened(path)


def test_padding_after_the_last_tensor_may_be_missing(whole):
    content, _, end, path = whole
    path.write_bytes(content[:end])
    assert (opened(path).tensors[1].read() == 1).all()


@settings(deadline=None)
@given(st.data())
def test_changed_byte_in_the_header_raises_nothing_else(whole, data):
    content, begin, _, path = whole
    changed = bytearray(content)
    changed[data.draw(st.integers(0, begin - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        file = opened(path)
    except CheckpointFormatError as error:
        assert str(path) in str(error)
    else:
        assert all(tensor.read().shape == tensor.shape for tensor in file.tensors)


# --- tokenizers ------------------------------------------------------------------------------------------


def rebuilt(path):
    files = opened(path).tokenizer_files
    return Tokenizer.from_str(files["tokenizer.json"]), json.loads(files["tokenizer_config.json"])


def assert_same(ours, theirs, texts):
    ids = [encoding.ids for encoding in theirs.encode_batch(texts)]
    assert [encoding.ids for encoding in ours.encode_batch(texts)] == ids
    for skip in (False, True):
        assert ours.decode_batch(ids, skip_special_tokens=skip) == theirs.decode_batch(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("specials_first", [True, False])
@pytest.mark.parametrize("pre", PRE)
def test_tokenizer_is_rebuilt(tmp_path, pre, specials_first):
    theirs = trained(pre, specials_first)
    keys = gguf_keys_of(theirs, pre, eos_token_id=theirs.token_to_id("<|end|>"), add_bos_token=False)
    ours, config = rebuilt(minimal(tmp_path, metadata() | keys | {"tokenizer.chat_template": "{{ messages }}é"}))
    assert json.loads(ours.to_str()) == json.loads(theirs.to_str())
    assert_same(ours, theirs, [*TEXTS, *(f"<|begin|>user\n{text}<|end|><think>{text}</think>" for text in TEXTS)])
    assert config["eos_token"] == "<|end|>" and config["chat_template"] == "{{ messages }}é"
    assert "bos_token" not in config and "pad_token" not in config


def test_templates_by_name_are_kept(tmp_path):
    keys = vocabulary_keys(["a", "b", "ab"], [1, 1, 1], ["a b"], "smollm")
    keys |= {"tokenizer.chat_template": "{{ 1 }}", "tokenizer.chat_template.tool_use": "{{ 2 }}"}
    _, config = rebuilt(minimal(tmp_path, metadata() | keys))
    assert config["chat_template"] == [
        {"name": "default", "template": "{{ 1 }}"},
        {"name": "tool_use", "template": "{{ 2 }}"},
    ]
    del keys["tokenizer.chat_template"]
    _, config = rebuilt(minimal(tmp_path, metadata() | keys))
    assert config["chat_template"] == [{"name": "tool_use", "template": "{{ 2 }}"}]


def test_unused_rows_are_no_tokens(tmp_path):
    theirs = trained("smollm", specials_first=False)
    keys = gguf_keys_of(theirs, "smollm")
    keys["tokenizer.ggml.tokens"] += ["[PAD325]", "[PAD326]"]
    keys["tokenizer.ggml.token_type"] += [5, 5]
    ours, _ = rebuilt(minimal(tmp_path, metadata() | keys))
    assert json.loads(ours.to_str()) == json.loads(theirs.to_str())


@pytest.mark.parametrize(
    ("pre", "flag", "expected"),
    [("smaug-bpe", True, True), ("smaug-bpe", None, False), ("llama-bpe", None, True), ("llama-bpe", False, False)]
    + [(alias, None, True) for alias in ("llama3", "llama-v3", "falcon3", "pixtral")],
)
def test_bos_is_added_where_llama_cpp_adds_it(tmp_path, pre, flag, expected):
    theirs = trained("llama-bpe" if pre in ("llama3", "llama-v3", "falcon3", "pixtral") else pre, specials_first=False)
    bos = theirs.token_to_id("<|begin|>")
    keys = gguf_keys_of(theirs, pre, bos_token_id=bos, add_bos_token=flag)
    ours, config = rebuilt(minimal(tmp_path, metadata() | keys))
    plain = theirs.encode(TEXTS[0]).ids
    assert ours.encode(TEXTS[0]).ids == [bos] * expected + plain
    assert ours.encode(TEXTS[0], add_special_tokens=False).ids == plain
    assert config["bos_token"] == "<|begin|>"


def test_default_pre_tokenizer_is_llama_cpps():
    text = "Price: $5,000!! it's\n 12345ab"
    pieces = [text[slice(*where)] for _, where in gguf_tokenizer._pre_tokenizer("default").pre_tokenize_str(text)]
    assert pieces == ["Price", ":", " ", "$", "5", ",", "000", "!!", " it", "'", "s", "\n", " ", "123", "45", "ab"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "qwen2"}, "pre 'qwen2'"),
        ({"pre": None}, "pre None"),
        ({"model": "llama"}, "model is 'llama'"),
        ({"merges": ["a b", "a q"]}, "merges are not sound"),
        ({"merges": ["a b c"]}, "merges are not sound"),
        ({"tokens": ["a", "b", "ab", "a"]}, "'a'"),
        ({"tokens": ["a", "b", "ab"]}, "3 tokens, 4 token types"),
        ({"add_bos_token": True}, "no bos_token_id"),
        ({"merges": None}, "no tokenizer.ggml.merges"),
        ({"types": None}, "no tokenizer.ggml.token_type"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"merges": "a b"}, "tokenizer.ggml.merges holds a str"),
    ],
)
def test_tokenizer_that_cannot_be_rebuilt_is_left_out_with_a_warning(tmp_path, caplog, change, message):
    keys = {"tokens": ["a", "b", "ab", "<x>"], "types": [1, 1, 1, 3], "merges": ["a b"], "pre": "smollm"} | change
    with caplog.at_level(logging.WARNING):
        file = opened(minimal(tmp_path, metadata() | vocabulary_keys(**keys)))
    assert file.tokenizer_files == {} and len(file.tensors) == 1
    [record] = caplog.records
    assert record.name == reader.__name__ and message in record.getMessage() and "m.gguf" in record.getMessage()


@pytest.mark.parametrize("token_id", [4, 2**31, 2**32 - 1])
@pytest.mark.parametrize(("key", "name"), [("eos", "eos"), ("padding", "pad"), ("bos", "bos"), ("eot", "eot")])
def test_a_special_token_that_there_is_not_is_left_out(tmp_path, caplog, key, name, token_id):
    keys = vocabulary_keys(["a", "b", "ab", "<x>"], [1, 1, 1, 3], ["a b"], "smollm", **{f"{key}_token_id": token_id})
    with caplog.at_level(logging.WARNING):
        file = opened(minimal(tmp_path, metadata() | keys))
    assert f"{name}_token_id" not in file.config and not file.generation_config and file.tokenizer_files
    [record] = caplog.records
    assert f"tokenizer.ggml.{key}_token_id is {token_id}, but there are 4 tokens" in record.getMessage()


@pytest.mark.parametrize(
    ("ids", "ends"),
    [({"eos": 2, "eot": 3}, [2, 3]), ({"eos": 2, "eot": 2}, 2), ({"eot": 3}, [3]), ({"eos": 1, "eom": 3}, [1, 3])],
)
def test_the_ends_of_turns_and_messages_are_ends(tmp_path, ids, ends):
    ids = {f"{name}_token_id": token_id for name, token_id in ids.items()}
    keys = vocabulary_keys(["a", "b", "ab", "<x>"], [1, 1, 1, 3], ["a b"], "smollm", **ids)
    file = opened(minimal(tmp_path, metadata() | keys))
    assert file.generation_config["eos_token_id"] == ends and file.config.get("eos_token_id") == ids.get("eos_token_id")


@pytest.mark.parametrize("default", [None, "d"])
def test_templates_with_names_are_kept(tmp_path, default):
    """transformers writes them as tokenizer.chat_template.NAME, and the names as tokenizer.chat_templates."""
    keys = vocabulary_keys(["a", "b", "ab"], [1, 1, 1], ["a b"], "smollm")
    keys |= {"tokenizer.chat_template.tool_use": "t", "tokenizer.chat_templates": ["tool_use"]}
    keys |= {} if default is None else {"tokenizer.chat_template": default}
    _, config = rebuilt(minimal(tmp_path, metadata() | keys))
    tools = [{"name": "tool_use", "template": "t"}]
    own = [] if default is None else [{"name": "default", "template": default}]
    assert sorted(config["chat_template"], key=str) == sorted(own + tools, key=str)


@pytest.mark.slow
def test_smollm3_tokenizer_on_six_languages(full_release, corpus, tmp_path):
    theirs = Tokenizer.from_str((full_release / "tokenizer.json").read_text())
    keys = gguf_keys_of(theirs, "smaug-bpe", bos_token_id=128000, eos_token_id=128012, padding_token_id=128004)
    ours, config = rebuilt(minimal(tmp_path, metadata("smollm3") | keys, "smollm3"))
    assert config["eos_token"] == "<|im_end|>" and config["pad_token"] == "<|finetune_right_pad_id|>"
    mine, original = json.loads(ours.to_str()), json.loads(theirs.to_str())
    assert mine.pop("post_processor") is None and original.pop("post_processor")["special_tokens"] == {}
    assert mine == original
    chat = "<|im_start|>system\n/think<|im_end|>\n<|im_start|>assistant\n<think>\n12345 ¿qué?</think>\n<tool_call>{}"
    languages = sorted(corpus.glob("*.jsonl"))
    assert len(languages) == 6
    # A sixth of each language, about 1.3 MB of text, encoded twice.
    lines = [line for file in languages for line in file.read_text().splitlines()[::6]]
    assert_same(ours, theirs, [chat, *TEXTS, *(json.loads(line)["text"] for line in lines)])


@FULL
@pytest.mark.torch
def test_every_command_reads_the_file_itself(tmp_path, capsys, monkeypatch):
    """Text and logits are those of the folder that it converts to, which transformers reads."""
    from parity import bound, reference_logits, reference_model

    monkeypatch.setenv("SMOLLM3_JAX_CACHE", str(tmp_path / "cache"))
    theirs = trained("smollm", specials_first=False)
    keys = gguf_keys_of(theirs, "smollm", eos_token_id=theirs.token_to_id("<|end|>"))
    keys |= {"tokenizer.chat_template": "{{ messages[0].content }}"}
    rows = theirs.get_vocab_size()
    shapes = SHAPES | {"token_embd.weight": (rows, HIDDEN)}
    stored = {name: permute(0.05 * array, name) for name, array in weights(shapes).items()}
    path = write(tmp_path / "m.gguf", stored, metadata("smollm3", vocab_size=rows) | keys, "smollm3")
    (tmp_path / "text.jsonl").write_text('{"text": "the quick brown fox"}\n')
    assert main(["convert", str(path), str(tmp_path / "hf")]) == 0
    tokens: Any = np.arange(12)[None]
    expected = reference_logits(reference_model(tmp_path / "hf"), tokens)
    assert np.abs(np.asarray(from_pretrained(path)(tokens)) - expected).max() <= bound(expected)
    calls = {
        "generate": ["generate", "--prompt", "the fox", "--max-new-tokens", "4", "--temperature", "0", "--model"],
        "chat": ["generate", "--chat", "--prompt", "the fox", "--max-new-tokens", "4", "--temperature", "0", "--model"],
        "perplexity": ["perplexity", "--text", str(tmp_path / "text.jsonl"), "--model"],
        "verify": ["verify", "--against", str(tmp_path / "hf"), "--model"],
        "plan": ["plan", "memory", "--model"],
        "tokenize": ["tokenize", str(tmp_path / "text.jsonl"), "--workers", "1", "--model"],
        "inspect": ["inspect", "--model"],
    }
    for name, call in calls.items():
        outs = []
        for model in (path, tmp_path / "hf"):
            capsys.readouterr()
            more = [str(tmp_path / f"tokens-{model.name}")] if name == "tokenize" else []
            code = main([*call[:2], *more, *call[2:], str(model)] if more else [*call, str(model)])
            out, err = capsys.readouterr()
            assert code == 0, (name, err)
            outs.append(out.replace(str(path), str(tmp_path / "hf")))
        assert outs[0] == outs[1] or name in ("verify", "inspect"), name
    assert main(["verify", str(path), "--against", "transformers"]) == 2
    assert "convert" in capsys.readouterr().err


@pytest.mark.slow
def test_importing_the_reader_does_not_import_gguf():
    code = "import sys, smollm3_jax.weights.gguf; sys.exit('gguf' in sys.modules or 'tokenizers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_without_gguf_the_reader_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SupportError, match=r"GGUF files need the package gguf .*pip install 'gguf"):
        reader.open_gguf(tmp_path / "model.gguf", lambda name: name)
