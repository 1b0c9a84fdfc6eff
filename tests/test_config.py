import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import BASE, CONFIGS, LLAMA3, YARN, raw_config

from smollm3_jax.config import GenerationConfig, ModelConfig, RopeScaling, with_yarn
from smollm3_jax.errors import ConfigError, OptionError


def test_the_released_config(shared):
    raw = json.loads((shared / "smollm3-3b" / "config.json").read_text())
    config = ModelConfig.from_hf(shared / "smollm3-3b")
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
    "yarn without original": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "original_max_position"),
    "llama3 without factors": ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
    "llama3 order": ({"rope_scaling": LLAMA3 | {"low_freq_factor": 9.0}}, "low_freq_factor"),
    "rope field unknown": ({"rope_scaling": YARN | {"betas": 1}}, "betas"),
    "factor without kind": ({"rope_scaling": {"factor": 2.0}}, "rope_type"),
    "two kinds": ({"rope_scaling": YARN | {"type": "linear"}}, "disagree"),
    "spellings disagree": ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, "disagree"),
    "factor below 1": ({"rope_scaling": YARN | {"factor": 0.5}}, "factor"),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "dtypes disagree": ({"dtype": "bfloat16"}, "disagree"),
    "dtype": ({"torch_dtype": "float8_e4m3fn"}, "float8"),
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


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(sorted({*BASE, "rope_parameters", "no_rope_layers", "layer_types", "head_dim"})), json_values)
def test_any_value_of_a_field_is_read_or_refused(field, value):
    try:
        config = ModelConfig.from_hf(BASE | {field: value})
    except ConfigError as error:
        assert str(error)
    else:
        assert ModelConfig.from_hf(config.to_hf()) == config


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
