import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny import random_tensors, raw_config, tiny_checkpoint, write_checkpoint

from smollm3_jax.commands.main import main
from smollm3_jax.errors import CheckpointFormatError
from smollm3_jax.evaluate.parity import verify


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("verify") / "good")


def changed(good, folder, change) -> str:
    """A copy of the checkpoint with its tensors changed in place."""
    tensors = load_file(good / "model.safetensors")
    change(tensors)
    raw = json.loads((good / "config.json").read_text())
    return str(write_checkpoint(folder, raw, {name: np.ascontiguousarray(t) for name, t in tensors.items()}))


def test_a_copy_is_verified(good, tmp_path, capsys):
    copy = changed(good, tmp_path / "copy", lambda tensors: None)
    assert main(["verify", copy, "--against", str(good), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["max_abs"] == 0 and report["top1"] == report["top5"] == 1
    assert report["greedy_agreement"] == report["greedy_tokens"] > 0
    assert report["first_diverging_layer"] is None and report["weights"]["different"] == 0


def swap(a, b):
    def change(tensors):
        for layer in range(4):
            names = [f"model.layers.{layer}.{name}.weight" for name in (a, b)]
            tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]

    return change


def permute_q_and_k(tensors):
    for name in tensors:
        if "q_proj" in name or "k_proj" in name:
            rows = tensors[name].reshape(-1, 2, 4, 64)  # heads of width 8
            tensors[name] = rows.swapaxes(1, 2).reshape(tensors[name].shape)


def flip_lowest_bit_of_layer_3(tensors):
    tensors["model.layers.3.mlp.up_proj.weight"].view(np.uint32)[7, 7] ^= 1


def double_layer_2(tensors):
    tensors["model.layers.2.mlp.down_proj.weight"] *= 2


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (swap("mlp.gate_proj", "mlp.up_proj"), 0),
        (permute_q_and_k, 0),
        (flip_lowest_bit_of_layer_3, None),  # too small to see in the logits, but the weights are compared too
        (double_layer_2, 2),
    ],
    ids=["gate and up", "q and k", "one bit", "layer 2"],
)
def test_a_wrong_checkpoint_is_not(change, layer, good, tmp_path, capsys):
    wrong = changed(good, tmp_path / "wrong", change)
    assert main(["verify", wrong, "--against", str(good), "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"] and not report["checks"]["weights"]
    assert report["first_diverging_layer"] == layer
    assert main(["verify", wrong, "--against", str(good)]) == 4
    assert "NOT verified" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"no_rope_layers": [0, 0, 0, 1]}, {"rope_theta": 8e3}], ids=["nope", "theta"])
def test_a_wrong_config_is_not(change, good, tmp_path):
    raw = raw_config("plain")
    wrong = write_checkpoint(tmp_path, raw | change, random_tensors(raw))
    report = verify(wrong, good)
    assert not report["ok"] and report["checks"]["weights"] and report["first_diverging_layer"] == 0


def test_rounded_weights_are_judged_by_the_coarser_dtype(good, tmp_path):
    assert main(["convert", str(good), str(tmp_path / "bf16"), "--dtype", "bfloat16"]) == 0
    report = verify(tmp_path / "bf16", good)
    assert report["tolerance"]["dtype"] == "bfloat16"
    assert report["max_abs"] > 0 and report["checks"]["weights"]


def test_nan_fails_and_is_valid_json(good, tmp_path, capsys):
    def poison(tensors):
        tensors["model.norm.weight"][3] = np.nan

    wrong = changed(good, tmp_path / "nan", poison)
    assert main(["verify", wrong, "--against", str(good), "--json"]) == 4

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    report = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert report["max_abs"] is None and not report["checks"]["finite"]


def test_nan_that_no_logit_shows_fails(tmp_path):
    raw = raw_config("untied")
    tensors = random_tensors(raw)
    folder = write_checkpoint(tmp_path, raw, tensors)
    used = set(np.random.RandomState(0).randint(0, raw["vocab_size"], 64))
    tensors["model.embed_tokens.weight"][min(set(range(raw["vocab_size"])) - used)] = np.nan
    write_checkpoint(tmp_path / "nan", raw, tensors)
    report = verify(tmp_path / "nan", folder)
    assert report["max_abs"] is not None and not report["checks"]["finite"] and not report["ok"]


def test_different_models_cannot_be_compared(good, tmp_path):
    with pytest.raises(CheckpointFormatError, match="num_hidden_layers is 1 in one, 4 in the other"):
        verify(tiny_checkpoint(tmp_path, "one_layer"), good)


def test_a_prompt_needs_a_tokenizer(good, capsys):
    assert main(["verify", str(good), "--against", str(good), "--prompt", "Hello"]) == 3
    assert "tokenizer.json is missing" in capsys.readouterr().err


@pytest.mark.torch
@pytest.mark.parametrize("name", ["plain", "llama", "untied"])
def test_against_transformers(name, tmp_path, capsys):
    folder = tiny_checkpoint(tmp_path, name, dtype="bfloat16")
    assert main(["verify", str(folder), "--against", "transformers", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["first_diverging_layer"] is None
    assert 0 < report["max_abs"] <= report["max_abs_bound"]


@pytest.mark.torch
def test_a_model_that_computes_something_else_fails_against_transformers(tmp_path, monkeypatch):
    """Not the checkpoint but the code is wrong here: RoPE turned off everywhere."""
    import smollm3_jax.rope

    # A config that no other test has: what is compiled here is used nowhere else.
    raw = raw_config("one_layer") | {"rope_theta": 12345.0}
    folder = write_checkpoint(tmp_path, raw, random_tensors(raw))
    monkeypatch.setattr(smollm3_jax.rope, "rotate", lambda x, cos, sin, use_rope: x)
    report = verify(folder, "transformers")
    assert not report["ok"] and report["first_diverging_layer"] == 0


def test_missing_transformers_is_said(good, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["verify", str(good), "--against", "transformers"]) == 3
    assert "transformers is not installed: pip install" in capsys.readouterr().err
