"""Runs that train an adapter: what is saved, gone on from, and exported as a PEFT folder or a merged model."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import parity
import pytest
import tiny
from etils import epath
from huggingface_hub import ModelCard
from proxies import FULL
from runs import checkpoint_digests, losses, write_corpus
from safetensors.numpy import load_file, save_file

from smollm3_jax.commands.main import main
from smollm3_jax.errors import OptionError, TrainingError
from smollm3_jax.train.run.export import export
from smollm3_jax.train.run.loop import train
from smollm3_jax.train.settings_file import parse
from smollm3_jax.weights import peft


def settings_in(folder, run="run", steps=4, **lora):
    return parse(
        {
            "run": {"dir": str(folder / run), "steps": steps},
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {"path": str(folder / "corpus.jsonl"), "length": 16, "rows": 8},
            "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"},
            "checkpoint": {"every": 2},
            "lora": {"rank": 4, **lora},
        }
    )


@pytest.fixture
def place(tmp_path):
    tiny.talking_checkpoint(tmp_path / "model", num_hidden_layers=1)
    write_corpus(tmp_path / "corpus.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    "lora",
    [
        pytest.param({"dropout": 0.1}, id="dropout", marks=pytest.mark.slow),
        pytest.param({"base": "int8", "dora": True}, id="quantized", marks=FULL),
    ],
)
def test_a_run_goes_on_with_its_adapter_bit_for_bit(place, lora):
    """lerobot #3459, transformers #24818: a resume that discarded the adapter."""
    train(settings_in(place, **lora))
    arrays, _ = checkpoint_digests(place / "run", 4)
    models = {name for name in arrays if name.startswith("model.")}
    assert models and all(name.split(".")[-1] in ("a", "b", "magnitude") for name in models)  # the base is not in it
    train(settings_in(place, "parts", 2, **lora))
    train(settings_in(place, "parts", **lora), resume=True)
    assert losses(place / "parts") == losses(place / "run")
    assert checkpoint_digests(place / "parts", 4) == checkpoint_digests(place / "run", 4)


@pytest.mark.slow
def test_a_base_that_has_changed_is_refused(place):
    train(settings_in(place, steps=2))
    weights = place / "model" / "model.safetensors"
    tensors = load_file(weights)
    changed = dict(tensors)
    changed["model.norm.weight"] = np.nextafter(tensors["model.norm.weight"], np.float32(9))
    save_file(changed, weights, metadata={"format": "pt"})
    with pytest.raises(TrainingError, match="is not the model that the adapter was trained on"):
        train(settings_in(place), resume=True)
    with pytest.raises(TrainingError, match="is not the model that the adapter was trained on"):
        export(epath.Path(place / "run"), place / "out")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert train(settings_in(place), resume=True)["step"] == 4
    with pytest.raises(OptionError, match="give one of both"):
        train(settings_in(place, "other"), trainable="norm")


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("lora", [{"rslora": True, "alpha": 3.0, "targets": ["q_proj", "down_proj"]}, {"dora": True}])
def test_exports_answer_the_same_under_peft(place, capsys, lora):
    settings = settings_in(place, steps=3, **lora)
    train(settings)
    run = str(place / "run")
    assert main(["export", run, str(place / "adapter"), "--adapter"]) == 0
    assert main(["export", run, str(place / "merged")]) == 0
    assert (place / "adapter" / "tokenizer.json").exists() and (place / "merged" / "chat_template.jinja").exists()
    tokens = tiny.random_tokens(tiny.raw_config("plain"), 2, 12)
    want = parity.reference_logits(parity.peft_model(place / "model", place / "adapter"), tokens)
    merged = parity.reference_logits(parity.reference_model(place / "merged"), tokens)
    np.testing.assert_allclose(merged, want, rtol=0, atol=1e-5 * np.abs(want).max())
    base = parity.reference_logits(parity.reference_model(place / "model"), tokens)
    assert np.abs(want - base).max() > 0.01 * np.abs(want).max()


@pytest.mark.slow
def test_a_merged_export_is_in_the_bases_dtype_and_rounded_once(place):
    tiny.write_checkpoint(
        place / "model",
        tiny.raw_config("plain") | {"num_hidden_layers": 1, "torch_dtype": "bfloat16"},
        tiny.random_tensors(tiny.raw_config("one_layer"), dtype="bfloat16"),
    )
    train(settings_in(place, steps=2, base="bfloat16"))
    run = epath.Path(place / "run")
    assert export(run, place / "adapter", adapter=True) == export(run, place / "merged") == [2]
    adapter, was = peft.read_adapter(place / "adapter"), load_file(place / "model" / "model.safetensors")
    for name, x in load_file(place / "merged" / "model.safetensors").items():
        assert x.dtype == ml_dtypes.bfloat16
        exact = was[name].astype(np.float32)
        if part := adapter.parts.get(name):
            exact = exact + np.float32(part.scale) * (part.b.read() @ part.a.read())
        np.testing.assert_array_equal(x, exact.astype(ml_dtypes.bfloat16), err_msg=name)
    said = json.loads((place / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["bias"], said["peft_type"]) == (4, 8, "none", "LORA")
    assert len(said["target_modules"]) == 7 and said["base_model_name_or_path"] == str(place / "model")
    for name, library in (("adapter", "peft"), ("merged", "transformers")):
        text = (place / name / "README.md").read_text()
        card = ModelCard(text, ignore_metadata_errors=False).data
        assert (card.library_name, card.get("base_model")) == (library, None)  # nobody knows where it is from
        assert "lora.rank = 4" in text and "- `corpus.jsonl`\n" in text and str(place) not in text
    (place / "adapter" / "README.md").write_text("mine")
    export(run, place / "adapter", adapter=True, force=True)
    assert (place / "adapter" / "README.md").read_text() == "mine"
    with pytest.raises(OptionError, match="--average"):
        export(run, place / "mean", average=2)


@pytest.mark.slow
def test_a_merge_of_its_checkpoints_has_the_adapter_in_it(place):
    """Which export refuses to average: here it is the whole models that are added."""
    train(settings_in(place))
    for step in (2, 4):
        assert export(epath.Path(place / "run"), place / f"step{step}", step=step) == [step]
    words = {"by-hand": ("{}/step2=0.5", "{}/step4=0.5"), "merged": ("{}/run@2=0.5", "{}/run=0.5")}
    for name, models in words.items():
        assert main(["merge", *(word.format(place) for word in models), "--out", str(place / name)]) == 0
    by_hand, merged = (load_file(place / name / "model.safetensors") for name in words)
    assert by_hand.keys() == merged.keys() and all((x == by_hand[name]).all() for name, x in merged.items())
    first = load_file(place / "step2" / "model.safetensors")
    assert any((x != first[name]).any() for name, x in merged.items())


def test_a_run_of_the_whole_model_has_no_adapter(place):
    settings = settings_in(place, steps=1)
    train(dataclasses.replace(settings, lora=type(settings.lora)()))
    with pytest.raises(OptionError, match="trains the model itself"):
        export(epath.Path(place / "run"), place / "out", adapter=True)
