"""The table of names is a bijection, for every tensor of the release and of every configuration."""

import json

import pytest
from tiny import CONFIGS, raw_config

from smollm3_jax.config import ModelConfig
from smollm3_jax.weights.key_map import TABLE, abstract_model, hf_name_of_gguf, parameters, place, slots


def config_of(name: str) -> ModelConfig:
    return ModelConfig.from_hf(raw_config(name))


def test_no_name_stands_twice():
    for column in zip(*TABLE, strict=True):
        assert len(set(column)) == len(TABLE)
    for param, hf_name, gguf_name in TABLE:
        assert ("{}" in hf_name) == ("{}" in gguf_name) == param.startswith("layers.")


def test_the_release_has_these_names_and_no_others(release):
    raw = json.loads((release / "config.json").read_text())
    index = json.loads((release / "model.safetensors.index.json").read_text())["weight_map"]
    found = slots(ModelConfig.from_hf(raw))
    assert found.keys() == index.keys()
    assert len({(slot.param, slot.layer) for slot in found.values()}) == len(found)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_is_one_tensor_and_every_tensor_one_parameter(name, stacked):
    config = config_of(name)
    params = parameters(abstract_model(config, "float32", stacked=stacked))
    found = slots(config)
    places = [place(slot, params) for slot in found.values()]
    assert len(set(places)) == len(found)
    assert {path for path, _ in places} == set(params)
    layers = {path: sorted(i for p, i in places if p == path and i is not None) for path, _ in places}
    for path, indices in layers.items():
        whole = params[path].shape
        assert indices == (list(range(whole[0])) if params[path].get_metadata("axes")[0] == "layers" else [])
    sizes = {path: 0 for path in params}
    for (path, _), slot in zip(places, found.values(), strict=True):
        size = 1
        for length in slot.shape:
            size *= length
        sizes[path] += size
    assert sizes == {path: param.size for path, param in params.items()}


@pytest.mark.parametrize("name", ["plain", "untied", "all_biases", "nope_pattern"])
def test_gguf_names_lead_to_the_same_tensors(name):
    config = config_of(name)
    gguf_names = [
        gguf_name.format(layer)
        for _, _, gguf_name in TABLE
        for layer in (range(config.num_hidden_layers) if "{}" in gguf_name else [None])
    ]
    to_hf = {gguf_name: hf_name_of_gguf(gguf_name) for gguf_name in gguf_names}
    assert len(set(to_hf.values())) == len(gguf_names)
    assert slots(config).keys() <= set(to_hf.values())


@pytest.mark.parametrize("name", ["blk.x.attn_q.weight", "blk.1.attn_qkv.weight", "token_embd", "blk.1.", "", "v.1.ln"])
def test_other_gguf_names_are_unknown(name):
    assert hf_name_of_gguf(name) is None
