import copy
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parity import rope_rounding
from tiny import BASE, CONFIGS, LLAMA3, SAME, YARN, raw_config, without_nulls

from smollm3_jax.config import GenerationConfig, ModelConfig, RopeScaling, with_yarn
from smollm3_jax.errors import ConfigError, OptionError
from smollm3_jax.rope import inverse_frequencies


def test_the_released_config(release):
    raw = json.loads((release / "config.json").read_text())
    config = ModelConfig.from_hf(release)
    assert (config.head_dim, config.tie_word_embeddings) == (128, True)
    assert [i for i, rope in enumerate(config.rope_layers) if not rope] == [3, 7, 11, 15, 19, 23, 27, 31, 35]
    assert (config.rope_theta, config.rope_scaling, config.dtype) == (5e6, None, "bfloat16")
    back = config.to_hf()
    assert {key: back[key] for key in raw} == raw
    assert back.keys() - raw.keys() == {"tie_word_embeddings", "head_dim", "rope_parameters", "dtype"}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_keeps_every_field_as_it_was_spelled(name):
    raw = raw_config(name)
    back = ModelConfig.from_hf(raw).to_hf()
    assert {key: back[key] for key in raw} == raw
    assert ModelConfig.from_hf(back) == ModelConfig.from_hf(raw)
    assert hash(ModelConfig.from_hf(back)) == hash(ModelConfig.from_hf(raw))


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_reads_what_we_write(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.from_hf(raw_config(name))
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert ModelConfig.from_hf(theirs.to_dict()) == config
    theirs.save_pretrained(tmp_path / "again")
    assert ModelConfig.from_hf(tmp_path / "again") == config


def test_a_changed_field_is_written_in_both_spellings():
    import dataclasses

    config = ModelConfig.from_hf(raw_config("plain") | {"pretraining_tp": 2, "rope_theta": 1e4})
    scaling = RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=64)
    back = dataclasses.replace(config, rope_theta=5e4, rope_scaling=scaling, dtype="bfloat16").to_hf()
    assert back["rope_theta"] == 5e4 and back["rope_scaling"] == YARN
    assert back["rope_parameters"] == YARN | {"rope_theta": 5e4}
    assert back["torch_dtype"] == back["dtype"] == "bfloat16"
    assert back["pretraining_tp"] == 2


def test_yarn_in_the_model_cards_spelling():
    card = {"factor": 2.0, "original_max_position_embeddings": 65536, "type": "yarn"}
    config = ModelConfig.from_hf(BASE | {"rope_scaling": card, "max_position_embeddings": 131072})
    assert config.rope_scaling == RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=65536)
    assert config.to_hf()["rope_scaling"] == card


def test_the_list_wins_over_the_interval():
    config = ModelConfig.from_hf(BASE | {"no_rope_layers": [0, 1, 1, 1], "no_rope_layer_interval": 2})
    assert config.rope_layers == (False, True, True, True)


ABSENT = object()
FAULTS = {
    "model_type": ({"model_type": "mistral"}, "mistral"),
    "no model_type": ({"model_type": ABSENT}, "model_type"),
    "theta infinite": ({"rope_theta": float("inf")}, "rope_theta"),
    "activation": ({"hidden_act": "gelu"}, "gelu"),
    "theta missing": ({"rope_theta": ABSENT}, "rope_theta is missing"),
    "theta text": ({"rope_theta": "1e4"}, "rope_theta"),
    "thetas differ": ({"rope_parameters": {"rope_theta": 5e4}}, "given twice"),
    "nope open": ({"no_rope_layer_interval": ABSENT}, "no_rope_layer_interval"),
    "nope too short": ({"no_rope_layers": [1, 1, 1]}, "num_hidden_layers"),
    "nope not flags": ({"no_rope_layers": [1, 1, 2, 0]}, "0 or 1"),
    "interval 0": ({"no_rope_layer_interval": 0}, "at least 1"),
    "rope kind": ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    "rope kind dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "yarn without factor": (
        {"rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 64}},
        "'yarn' needs factor",
    ),
    "linear with a factor of null": ({"rope_scaling": {"rope_type": "linear", "factor": None}}, "needs factor"),
    "originals differ": ({"rope_scaling": YARN, "original_max_position_embeddings": 128}, "128 outside"),
    "rope kind is no text": ({"rope_scaling": {"rope_type": 5, "factor": 2.0}}, "rope_type is 5"),
    "llama3 without factors": ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    "llama3 order": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 9.0}}, "low_freq_factor"),
    "rope field unknown": ({"rope_scaling": YARN | {"betas": 1}}, "betas"),
    "factor without kind": ({"rope_scaling": {"factor": 2.0}}, "rope_type"),
    "two kinds": ({"rope_scaling": YARN | {"type": "linear"}}, "disagree"),
    "spellings disagree": ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "disagree"),
    "factor below 1": ({"rope_scaling": YARN | {"factor": 0.5}}, "factor"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "dtype is no text": ({"torch_dtype": 16}, "torch_dtype is 16"),
    "architectures are no list": ({"architectures": 5}, "architectures is 5"),
    "architectures are no names": ({"architectures": [5]}, "list of names"),
    "eos beyond int32": ({"eos_token_id": 2**31}, "eos_token_id"),
    "eos beyond int32 in a list": ({"eos_token_id": [2, 2**40]}, "eos_token_id"),
    "negative bos": ({"bos_token_id": -2}, "bos_token_id"),
    "beta_fast": ({"rope_scaling": YARN | {"beta_fast": -3}}, "beta_fast is -3"),
    "attention_factor not a number": ({"rope_scaling": YARN | {"attention_factor": float("nan")}}, "attention_factor"),
    "attention_factor 0": ({"rope_scaling": YARN | {"attention_factor": 0}}, "attention_factor is 0"),
    "theta below 1": ({"rope_theta": 1e-5}, "rope_theta"),
    "eps": ({"rms_norm_eps": 1e300}, "rms_norm_eps"),
    "factor": ({"rope_scaling": YARN | {"factor": 1e300}}, "factor"),
    "more than any file": ({"vocab_size": 2**31 - 1, "hidden_size": 2**30}, "more than any file holds"),
    "MLX": ({"quantization": {"group_size": 64, "bits": 4}}, "MLX has quantized.*--dequantize"),
    "MLX twice": ({"quantization_config": {"group_size": 64, "bits": 4}}, "MLX has quantized"),
    "text for a number": ({"hidden_size": "64"}, "hidden_size"),
    "bool for a number": ({"vocab_size": True}, "vocab_size"),
    "negative": ({"intermediate_size": -1}, "intermediate_size"),
    "huge": ({"vocab_size": 2**40}, "vocab_size"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "odd head": ({"head_dim": 7}, "head_dim"),
    "heads do not divide": ({"num_attention_heads": 7}, "head_dim"),
    "groups do not divide": ({"num_key_value_heads": 3}, "num_key_value_heads"),
    "eps missing": ({"rms_norm_eps": ABSENT}, "rms_norm_eps"),
    "layer types": ({"layer_types": ["full_attention"]}, "layer_types"),
    "sliding without window": ({"layer_types": ["sliding_attention"] * 4}, "sliding"),
    "eos": ({"eos_token_id": [1, "2"]}, "eos_token_id"),
    "llama with nope": ({"model_type": "llama", "rope_scaling": {"rope_type": "su", "factor": 2.0}}, "su"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(name):
    change, words = FAULTS[name]
    raw = {key: value for key, value in (BASE | change).items() if value is not ABSENT}
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_hf(raw)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_garbled_file_is_named(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelConfig.from_hf(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize("name", SAME)
def test_what_is_redundant_or_derivable_may_be_absent_or_present(name):
    change, meaning = SAME[name]
    config = ModelConfig.from_hf(without_nulls(BASE | change))
    assert config == ModelConfig.from_hf(without_nulls(BASE | meaning))
    written = config.to_hf()
    assert ModelConfig.from_hf(written) == config
    assert written["architectures"] == ["SmolLM3ForCausalLM"]
    assert written["dtype"] == written["torch_dtype"] == config.dtype


@pytest.mark.torch
@pytest.mark.parametrize("name", [name for name, (change, _) in SAME.items() if "rope" in str(change)])
def test_transformers_reads_the_same_rope(name):
    """W18: what is derived is what transformers derives."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw = without_nulls(BASE | SAME[name][0])
    config = ModelConfig.from_hf(raw)
    theirs = transformers.SmolLM3Config(**copy.deepcopy(raw))  # it writes into what it is given
    kind = theirs.rope_parameters["rope_type"]
    assert kind == (config.rope_scaling.rope_type if config.rope_scaling else "default")
    if kind != "default":
        expected, factor = ROPE_INIT_FUNCTIONS[kind](theirs)
        got, got_factor = inverse_frequencies(config)
        assert got == pytest.approx(expected.numpy(), rel=rope_rounding(config.rope_scaling))
        assert got_factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "bfloat16"}, "torch_dtype 'float32' and dtype 'bfloat16' disagree"),
        ({"torch_dtype": "float8_e5m2"}, "'float8_e5m2' is not one of"),
        (
            {"rope_scaling": YARN | {"attn_factor": 1.0, "finetuned": False}},
            "'yarn' makes no use of attn_factor, finet",
        ),
        ({"rope_scaling": {"type": "default", "factor": 1.0}}, "'default' makes no use of factor"),
    ],
)
def test_what_has_no_effect_is_named(change, words, caplog):
    config = ModelConfig.from_hf(BASE | change)
    [record] = caplog.records
    assert words in record.message
    config.to_hf()
    assert len(caplog.records) == 1  # once


def test_a_foreign_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345678\n")
    with pytest.raises(ConfigError, match=r"git-LFS pointer to a file of 12,345,678 bytes.*git lfs pull"):
        ModelConfig.from_hf(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="no regular file"):
        ModelConfig.from_hf(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


FIELDS = {*BASE, "rope_parameters", "no_rope_layers", "layer_types", "head_dim", "dtype", "sliding_window"}


@given(st.sampled_from(sorted(FIELDS)), json_values)
def test_any_value_of_a_field_is_read_or_refused(field, value):
    try:
        config = ModelConfig.from_hf(BASE | {field: value})
    except ConfigError as error:
        assert str(error)
    else:
        assert ModelConfig.from_hf(config.to_hf()) == config


ODD: list[object] = [0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**62, 2**63, 10**400, -3, 0.5, 1.5, -2.5, 0.0, 5e-324, 1e-300]
ODD += [1e-30, 1e-6, 1e30, 1e300, math.nan, math.inf, -math.inf, "", "x", True, False, None, [], {}, [0], [None], ["x"]]
ODD += [{"a": 1}, [1, 0], 2**53 + 1]
SCALINGS = {"yarn": YARN, "llama3": LLAMA3, "linear": {"rope_type": "linear", "factor": 2.0}}
SCALING_FIELDS = {name for scaling in SCALINGS.values() for name in scaling} | {
    "rope_theta",
    "type",
    "finetuned",
    "foo",
}
SCALING_FIELDS |= {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
OTHERS = {
    "head_dim",
    "layer_types",
    "no_rope_layers",
    "rope_parameters",
    "use_sliding_window",
    "sliding_window",
    "dtype",
}
OTHERS |= {
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "initializer_range",
    "quantization",
    "quantization_config",
}
OTHERS |= {"original_max_position_embeddings", "partial_rotary_factor"}


def odd_configs():
    """BASE with every field, and RoPE's in every kind of scaling, set to every odd value."""
    for field in sorted({*BASE, *OTHERS}):
        for value in ODD:
            yield BASE | {"use_sliding_window": True, "sliding_window": 5} | {field: value}
    for scaling in SCALINGS.values():
        for field in sorted(SCALING_FIELDS):
            for value in ODD:
                yield BASE | {"rope_scaling": scaling | {field: value}}


@pytest.mark.filterwarnings("error")
def test_odd_numbers_are_refused_or_make_finite_angles(caplog):
    """W18: every outcome is a typed error of one short line, or a model whose RoPE and windows are numbers."""
    read = 0
    for raw in odd_configs():
        try:
            config = ModelConfig.from_hf(json.loads(json.dumps(raw)))
        except ConfigError as error:
            assert 0 < len(str(error)) < 1500, raw
            continue
        read += 1
        if config.head_dim < 2**20:
            frequencies, factor = inverse_frequencies(config)
            assert np.isfinite(frequencies).all() and (np.abs(frequencies) <= 1).all() and 0 < factor < 1e6, raw
        assert all(0 < window < 2**31 for window in config.windows or ()), raw
        assert all(0 <= i < 2**31 for i in GenerationConfig.from_hf({}, config).eos_token_id), raw
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config, raw
    assert read > 500


def test_generation_config_falls_back_on_config(tmp_path):
    config = ModelConfig.from_hf(BASE)
    assert GenerationConfig.from_hf(tmp_path, config).eos_token_id == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "do_sample": true, "temperature": 0.6}')
    read = GenerationConfig.from_hf(tmp_path, config)
    assert (read.eos_token_id, read.do_sample, read.temperature, read.top_p) == ((5, 6), True, 0.6, 1.0)
    assert read.to_hf() == {"eos_token_id": [5, 6], "do_sample": True, "temperature": 0.6}


@pytest.mark.parametrize("factor", [2, 2.0])
def test_with_yarn_is_what_the_model_card_says(factor):
    raw = raw_config("release_like") | {"max_position_embeddings": 65536}
    card = {"factor": 2.0, "original_max_position_embeddings": 65536, "type": "yarn"}
    expected = ModelConfig.from_hf(raw | {"rope_scaling": card, "max_position_embeddings": 131072})
    got = with_yarn(ModelConfig.from_hf(raw), factor)
    assert got == expected
    written = got.to_hf()
    assert ModelConfig.from_hf(written) == expected
    assert written["max_position_embeddings"] == 131072
    assert written["rope_scaling"] == {"factor": 2.0, "original_max_position_embeddings": 65536, "rope_type": "yarn"}


@pytest.mark.parametrize("factor", [1, 0.5, -2, 0, float("nan"), float("inf"), 1e9])
def test_with_yarn_refuses_factors(factor):
    with pytest.raises(OptionError, match=re.escape(f"the YaRN factor is {factor}")):
        with_yarn(ModelConfig.from_hf(raw_config("plain")), factor)


@pytest.mark.parametrize("name", ["yarn", "linear", "llama3"])
def test_with_yarn_refuses_what_is_scaled_already(name):
    with pytest.raises(OptionError, match=rf"scales RoPE already \({name}"):
        with_yarn(ModelConfig.from_hf(raw_config(name)), 2)
