"""Merged folders, against mergekit, and what is refused."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from tiny import random_tensors, raw_config, talking_checkpoint, tiny_checkpoint, write_checkpoint

from smollm3_jax.commands.main import main
from smollm3_jax.errors import CheckpointFormatError, OptionError
from smollm3_jax.weights.load import open_checkpoint
from smollm3_jax.weights.merge import merge
from smollm3_jax.weights.merge_file import Merge, Part, read_merge

RAW = raw_config("plain")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders base, a and b: b and a are the base and differences a tenth as large."""
    folder = tmp_path_factory.mktemp("merge")
    base = random_tensors(RAW, 0)
    write_checkpoint(folder / "base", RAW, base)
    for seed, name in enumerate(("a", "b"), 1):
        moved = {key: base[key] + np.float32(0.1) * x for key, x in random_tensors(RAW, seed).items()}
        write_checkpoint(folder / name, RAW, moved)
    return folder


def tensors(folder):
    return load_file(folder / "model.safetensors")


def write_yaml(path, folder, text):
    path.write_text(text.format(**{name: folder / name for name in ("base", "a", "b")}))
    return path


LINEAR = """
merge_method: linear
models:
  - {{model: {a}, parameters: {{weight: 0.9}}}}
  - {{model: {b}, parameters: {{weight: 0.3}}}}
dtype: float32
"""
AS_IT_IS = LINEAR + "parameters: {{normalize: false}}\n"
BY_LAYER = """
merge_method: linear
models:
  - model: {a}
    parameters:
      weight:
        - {{filter: self_attn, value: [0.0, 0.5, 1.0]}}
        - {{filter: mlp, value: [1.0, 0.25]}}
        - value: 0.5
  - {{model: {b}, parameters: {{weight: 0.3}}}}
dtype: float32
"""
SLERP = """
merge_method: slerp
base_model: {a}
models: [{{model: {a}}}, {{model: {b}}}]
parameters:
  t: [{{filter: self_attn, value: [0.0, 0.5, 0.3, 1.0]}}, {{value: 0.4}}]
dtype: float32
"""
TIES = """
merge_method: ties
base_model: {base}
models:
  - {{model: {base}}}
  - {{model: {a}, parameters: {{weight: 0.7, density: 0.4}}}}
  - {{model: {b}, parameters: {{weight: 0.5, density: [0.3, 0.9]}}}}
parameters: {{int8_mask: true}}
dtype: float32
"""
TIES_AS_IT_IS = TIES.replace("int8_mask: true", "normalize: false, lambda: 0.8")
DARE = TIES.replace("ties", "dare_linear").replace("density: 0.4", "density: 1").replace("[0.3, 0.9]", "1.0")
DARE_TIES = DARE.replace("dare_linear", "dare_ties")


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", [LINEAR, AS_IT_IS, BY_LAYER, SLERP, TIES, TIES_AS_IT_IS, DARE, DARE_TIES])
def test_as_mergekit_does(models, tmp_path, monkeypatch, text):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    file = write_yaml(tmp_path / "merge.yml", models, text)
    options = MergeOptions(copy_tokenizer=False, quiet=True)
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(file.read_text())), str(tmp_path / "theirs"), options)
    assert main(["merge", "--config", str(file), "--out", str(tmp_path / "ours")]) == 0
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    # Numbers of at most 2 go through 16 roundings on both sides together. Slerp's cosine is a sum of as many products
    # as there are numbers, whose roundings are of either sign.
    for name, x in ours.items():
        allowed = 2 * (16 + (2 * x.size**0.5 if text is SLERP else 0)) * 2.0**-24
        np.testing.assert_allclose(x, theirs[name], rtol=0, atol=allowed, err_msg=name)
        assert np.abs(x - tensors(models / "a")[name]).max() > 1e-3 or text is SLERP  # where t is 0 in some layers


def test_the_command_takes_models_and_weights(models, tmp_path, capsys):
    a, b = tensors(models / "a"), tensors(models / "b")
    assert main(["merge", f"{models / 'a'}=9", f"{models / 'b'}=1", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    for name, x in tensors(tmp_path / "out").items():
        np.testing.assert_allclose(x, 0.9 * a[name] + 0.1 * b[name], rtol=0, atol=2 * 8 * 2.0**-24)
    # Slerp by the share of the second weight, from the first: at its end it is the second.
    assert (
        main(["merge", f"{models / 'a'}=0", f"{models / 'b'}=1", "--method", "slerp", "--out", str(tmp_path / "s")])
        == 0
    )
    for name, x in tensors(tmp_path / "s").items():
        np.testing.assert_allclose(x, b[name], rtol=0, atol=2 * 8 * 2.0**-24)


def test_bfloat16_is_rounded_once(tmp_path):
    """Not once for each model: the weighted sum of float32 is rounded at the end."""
    for seed, name in enumerate("abc"):
        tiny_checkpoint(tmp_path / name, "one_layer", seed=seed, dtype="bfloat16")
    merge(Merge("linear", tuple(Part(str(tmp_path / name), 1.0) for name in "abc")), tmp_path / "out")
    found = [tensors(tmp_path / name) for name in "abc"]
    for name, x in tensors(tmp_path / "out").items():
        exact = sum(y[name].astype(np.float32) for y in found) / np.float32(3)
        assert x.dtype == ml_dtypes.bfloat16 and np.array_equal(x, exact.astype(ml_dtypes.bfloat16)), name


def test_tied_embeddings_stay_tied_and_the_tokenizer_goes_along(tmp_path):
    """peft #2777, transformers #45127, unsloth #9331: a merge that lost the tie, or wrote a head beside it."""
    for name in "ab":
        talking_checkpoint(tmp_path / name)
    (tmp_path / "b" / "chat_template.jinja").write_text("b's")
    merge(Merge("linear", (Part(str(tmp_path / "a"), 0.9), Part(str(tmp_path / "b"), 0.1))), tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings", True)
    files = open_checkpoint(tmp_path / "out").files  # a sound model, with the first one's tokenizer and template
    assert files == open_checkpoint(tmp_path / "a").files and files.keys() >= {"tokenizer.json", "chat_template.jinja"}
    parts = (Part(str(tmp_path / "a"), 0.9), Part(str(tmp_path / "b"), 0.1))
    merge(Merge("linear", parts, tokenizer=str(tmp_path / "b")), tmp_path / "other")
    assert (tmp_path / "other" / "chat_template.jinja").read_text() == "b's"


def test_quantized_models_become_plain(models, tmp_path):
    assert main(["quantize", str(models / "a"), str(tmp_path / "q"), "--weights", "int8"]) == 0
    merge(Merge("linear", (Part(str(tmp_path / "q"), 0.5), Part(str(models / "a"), 0.5))), tmp_path / "out")
    out, a = tensors(tmp_path / "out"), tensors(models / "a")
    assert open_checkpoint(tmp_path / "out").config.quantization is None
    for name, x in out.items():
        assert np.abs(x - a[name]).max() < 0.01 * np.abs(a[name]).max(), name


def test_only_one_tensor_of_each_model_is_read_at_a_time(models, tmp_path, monkeypatch):
    from smollm3_jax.weights import merge as module

    live, most = [], []

    def counted(arrays, weights, normalize):
        live.append(len(arrays))
        most.append(sum(x.nbytes for x in arrays))
        return linear(arrays, weights, normalize)

    linear = module.methods.linear
    monkeypatch.setattr(module.methods, "linear", counted)
    merge(Merge("linear", (Part(str(models / "a"), 0.9), Part(str(models / "b"), 0.1))), tmp_path / "out")
    every = tensors(models / "a")
    assert set(live) == {2} and len(live) == len(every)
    assert max(most) == 2 * max(x.nbytes for x in every.values())


def test_models_of_other_shapes(models, tmp_path):
    def refused(name, said):
        with pytest.raises(CheckpointFormatError, match=said):
            merge(Merge("linear", (Part(str(models / "a"), 0.5), Part(str(tmp_path / name), 0.5))), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    tiny_checkpoint(tmp_path / "short", "one_layer")
    refused("short", "different shapes: model.layers.1.* is in .*a alone")
    tiny_checkpoint(tmp_path / "untied", "untied")
    refused("untied", "lm_head.weight is in .*untied alone")
    raw = RAW | {"intermediate_size": 128}
    write_checkpoint(tmp_path / "wide", raw, random_tensors(raw))
    refused("wide", r"model.layers.0.mlp.gate_proj.weight is \[96, 64\] and \[128, 64\]")


def test_configs_that_differ_are_named(models, tmp_path, caplog):
    write_checkpoint(tmp_path / "far", RAW | {"rope_theta": 5e6}, tensors(models / "b"))
    merge(Merge("linear", (Part(str(models / "a"), 0.5), Part(str(tmp_path / "far"), 0.5))), tmp_path / "out")
    assert "rope_theta 10000.0 and 5000000.0" in caplog.text
    assert open_checkpoint(tmp_path / "out").config.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a=1", "b=1", "--method", "ties"], "ties sums differences from a base model: name it, .* --base MODEL"),
        (["a=1", "b=1", "--method", "dare"], "say what share stays, as in --density 0.5"),
        (["a=1", "b=1", "--density", "0.5"], "--density is of ties and dare; linear has none"),
        (["a=1", "b=-1"], "the weights sum up to 0 for model.embed_tokens.weight"),
        (["a", "b=1"], "a: write MODEL=WEIGHT, as in a=0.5"),
        (["a=much", "b=1"], "write MODEL=WEIGHT"),
        (["a=1", "a=1"], "a is named twice"),
        (["a=1"] * 3 + ["--method", "slerp"], "slerp goes from the first of two models"),
        ([], "name the models and their weights"),
        (["a=1", "--config", "x.yml"], "give it and --out alone"),
        (["--config", "x.yml"], "x.yml cannot be read"),
    ],
)
def test_mistakes_in_words(models, monkeypatch, capsys, words, said):
    import re

    monkeypatch.chdir(models)
    assert main(["merge", *words, "--out", "out"]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("merge_method: linear", "merge_method: soup", "choose one of linear, slerp"),
        ("merge_method: linear", "method: linear", "has no key method; use merge_method"),
        ("weight: 0.9", "wieght: 0.9", "has no key wieght; use weight"),
        ("weight: 0.9", "weight: much", "weight is 'much'; give a number"),
        ("parameters: {weight: 0.9}", "parameters: {}", "a has no weight: parameters.weight in the file"),
        ("dtype: float32", "dtype: int8", "dtype is 'int8'; choose one of"),
        ("dtype: float32", "tokenizer_source: union", "union makes a new vocabulary"),
        ("models:", "slices: []\nmodels:", "slices is not read: whole models are merged here"),
        ("merge_method: linear", "merge_method: ties", "ties sums differences from a base model"),
        ("merge_method: linear", "merge_method: slerp\nbase_model: x", "slerp goes from the base to one other model"),
        ("models:", "models: 3\nx:", "has no key x"),
        ("models:", "- ", "is not YAML"),
        ("weight: 0.9", "weight: [{filter: q_proj, value: 1}]", "no filter matches model.embed_tokens.weight"),
    ],
)
def test_mistakes_in_a_file(models, tmp_path, old, new, said):
    text = LINEAR.format(**{name: models / name for name in ("base", "a", "b")})
    assert old in text
    (tmp_path / "merge.yml").write_text(text.replace(old, new))
    with pytest.raises(OptionError, match=said):
        merge(read_merge(tmp_path / "merge.yml"), tmp_path / "out")
    assert not os.path.lexists(tmp_path / "out")


def test_the_recipe_is_the_releases_merge():
    from smollm3_jax.train.settings_file import RECIPES

    found = read_merge(RECIPES / "smollm3-merge.yml")
    assert [part.weight for part in found.parts] == [0.9, 0.1] and (found.method, found.dtype) == ("linear", "bfloat16")
