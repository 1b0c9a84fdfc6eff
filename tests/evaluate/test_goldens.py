"""Golden values of a tiny model, computed by transformers, stand in for the released model's."""

import json
import os
from typing import Any

import numpy as np
import pytest
from parity import bound, reference_logits, reference_model
from safetensors.numpy import load_file, save_file
from tiny import raw_config, talking_checkpoint

from smollm3_jax.commands.main import main
from smollm3_jax.config import SMOLLM3_3B
from smollm3_jax.errors import CheckpointFormatError, OptionError
from smollm3_jax.evaluate import goldens
from smollm3_jax.weights.save import quantize

IDS = [1, 30, 46, 27, 65, 31, 28, 33]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Any, dict[str, Any]]:
    """(a model, its golden values)."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    folder = talking_checkpoint(tmp_path_factory.mktemp("goldens"))
    reference = reference_model(folder)
    logits = reference_logits(reference, np.array([IDS]))[0]
    ids = torch.tensor([[3, 4]])
    new = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)[
        0, 2:
    ].tolist()
    return folder, {
        "model": "org/tiny",
        "source": "transformers",
        "config": raw_config("plain"),
        "token_ids": IDS,
        "mean": np.round(logits.mean(-1), 4).tolist(),
        "mean_tolerance": 1e-2,
        "first": np.round(logits[0, :30], 4).tolist(),
        "first_tolerance": 1e-4,
        "prompt": "w3 w4",
        "new_tokens": 6,
        "continuation": "".join(f" w{token}" for token in new[:-1]),
    }


@pytest.fixture
def as_released(tiny, monkeypatch):
    monkeypatch.setattr(goldens, "released", lambda: tiny[1])
    return tiny[0]


pytestmark = pytest.mark.torch


def test_the_model_itself_is_verified(as_released, tiny, capsys):
    _, values = tiny
    assert main(["verify", str(as_released), "--goldens", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["checks"] == dict.fromkeys(("finite", "mean", "first", "text"), True)
    # Golden values have four decimals.
    assert report["first_max_abs"] <= bound(np.array(values["first"])) + 0.5e-4 and report["text"].startswith(" w")
    assert main(["verify", str(as_released), "--goldens"]) == 0
    out = capsys.readouterr().out
    assert "against the golden values of org/tiny" in out and out.endswith("\nverified\n")


@pytest.mark.parametrize(
    ("change", "failed"),
    [
        (lambda t: t["model.layers.3.mlp.down_proj.weight"].__imul__(1.01), {"first"}),
        (lambda t: t["model.norm.weight"].__imul__(1.5), {"mean", "first"}),
        (lambda t: t["model.layers.0.mlp.up_proj.weight"].fill(np.nan), {"finite", "mean", "first", "text"}),
    ],
    ids=["a hundredth", "norm", "nan"],
)
def test_another_checkpoint_of_the_architecture_is_not(change, failed, as_released, tmp_path, capsys):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((as_released / name).read_bytes())
    tensors = load_file(as_released / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    assert main(["verify", str(tmp_path), "--goldens", "--json"]) == 4
    report = json.loads(capsys.readouterr().out)
    assert {name for name, passed in report["checks"].items() if not passed} >= failed and not report["ok"]
    assert main(["verify", str(tmp_path), "--goldens"]) == 4
    out = capsys.readouterr().out
    assert "another one of the same architecture" in out and out.endswith("NOT verified\n")


def test_another_model_is_said_to_be_one(tiny, tmp_path, capsys):
    folder, values = tiny
    assert main(["verify", str(folder), "--goldens"]) == 3
    assert "is not HuggingFaceTB/SmolLM3-3B" in (err := capsys.readouterr().err) and "vocab_size is 160" in err
    for field, value in (("rope_theta", 2e4), ("no_rope_layers", [1, 1, 0, 1]), ("rms_norm_eps", 1e-5)):
        with pytest.raises(CheckpointFormatError, match="is not org/tiny"):
            goldens.verify_goldens(folder, values | {"config": values["config"] | {field: value}})
    quantize(folder, tmp_path / "int8", "int8")
    with pytest.raises(OptionError, match="quantized: give the plain"):
        goldens.verify_goldens(tmp_path / "int8", values)


@pytest.mark.parametrize("arguments", [[], ["--goldens", "--against", "transformers"], ["--goldens", "--prompt", "x"]])
def test_usage(arguments, tiny, capsys):
    try:
        code = main(["verify", str(tiny[0]), *arguments])
    except SystemExit as end:
        code = end.code
    assert code == 2 and "goldens" in capsys.readouterr().err


def test_the_released_values_are_what_the_package_has():
    values = goldens.released()
    assert values["config"] == SMOLLM3_3B and values["model"] == "HuggingFaceTB/SmolLM3-3B"
    assert len(values["token_ids"]) == len(values["mean"]) == 8 and len(values["first"]) == 30
    assert (values["mean"][4], values["first"][29]) == (11.1218, 15.2733)
    assert values["continuation"].endswith("always present,")


@pytest.mark.slow
def test_released_weights_give_the_published_logits_and_text():
    """Values of tests/models/smollm3/test_modeling_smollm3.py of transformers, computed in float32."""
    path = os.environ.get("SMOLLM3_WEIGHTS")
    if not path:
        pytest.skip("SMOLLM3_WEIGHTS does not name a folder with the weights of SmolLM3-3B")
    assert main(["verify", path, "--goldens"]) == 0
