"""What the card of an export says of the run: all that made the model, and nothing of where it was made."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from smollm3_jax.train.run.card import card_of, recipe
from smollm3_jax.train.settings_file import RECIPES, parse, read_settings, recipes
from smollm3_jax.weights.card import render

SECRET = "s3cr3t"
# Each place that a user can write a name or an address to has a secret in it.
PRIVATE = {
    "run": {"dir": f"/home/{SECRET}/run", "steps": 100, "name": f"{SECRET}-run"},
    "model": {"path": f"/home/{SECRET}/model"},
    "data": {
        "sources": {
            "web page": {"path": f"s3://{SECRET}/corpus.jsonl?key={SECRET}", "weight": 3.0, "field": "body"},
            "talks": {"path": "HuggingFaceTB/smoltalk2:SFT:train", "format": "hf"},
            "shipped": {"path": str(RECIPES / "harbour.jsonl")},
        },
        "template": f"../{SECRET}/chat.jinja",
        "eval_path": f"gs://{SECRET}/held-out.jsonl",
    },
    "objective": {"kind": "preference", "reference": f"{SECRET}/models/start"},
    "log": {"wandb": f"{SECRET}/project"},
    "stages": [{"start": 50, "weights": {"web page": 1.0, "talks": 2.0}}],
}


@pytest.mark.parametrize("adapter", [False, True])
def test_nothing_private_is_told(adapter):
    settings = parse(PRIVATE | ({"lora": {"rank": 4}} if adapter else {}))
    text = render(card_of(settings, [100], Path(f"/{SECRET}/out"), "bfloat16", adapter), "out", "smollm3")
    assert SECRET not in text
    data = ModelCard(text, ignore_metadata_errors=False).data.to_dict()
    assert data["datasets"] == ["HuggingFaceTB/smoltalk2"] and data["library_name"] == (
        "peft" if adapter else "transformers"
    )
    assert "- `corpus.jsonl`, 0.6 of the tokens\n- `HuggingFaceTB/smoltalk2:SFT:train`, 0.2 " in text
    assert "- `recipe:harbour.jsonl`, 0.2 of the tokens\n\nWhat begins with `recipe:`" in text
    assert f"smollm3 export run out --step=100 --dtype=bfloat16{' --adapter' if adapter else ''}\n" in text


def test_the_recipe_is_read_as_the_same_settings():
    table = tomllib.loads(recipe(parse(PRIVATE)))
    found = parse(table)
    assert found.data.sources["web page"].path == "corpus.jsonl" and found.data.sources["web page"].weight == 3.0
    assert found.objective.kind == "preference" and found.stages == parse(PRIVATE).stages
    assert found.data.template == "chat.jinja" and found.model.path == "model" and found.run.steps == 100


@pytest.mark.parametrize("name", recipes())
def test_a_shipped_recipe_is_told_whole(name):
    """But for folders, displays and machines: what it trains, and on what."""
    settings = parse(tomllib.loads(recipes()[name].read_text()))
    found = parse(tomllib.loads(recipe(settings)))
    for section in ("optimizer", "objective", "step", "lora", "stages"):
        assert getattr(found, section) == getattr(settings, section)
    told, whole = found.data, settings.data
    assert {key: x.weight for key, x in told.sources.items()} == {key: x.weight for key, x in whole.sources.items()}
    assert (told.length, told.rows, told.overflow) == (whole.length, whole.rows, whole.overflow)
    card = yaml.safe_load(render(card_of(settings, [1], Path("out"), None, False), "out", "smollm3").split("---\n")[1])
    assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) for dataset in card.get("datasets", []))


def test_what_was_made_is_said():
    settings = read_settings("lora-quick")
    done = "fine-tuned on conversations, by an adapter of rank 8, which is here alone: step 24 of 24."
    assert card_of(settings, [24], Path("out"), None, True).what == f"`HuggingFaceTB/SmolLM2-135M-Instruct`, {done}"
    new = parse({"run": {"steps": 6}, "model": {"config": "/x/shape"}, "data": {"path": "corpus"}})
    said = card_of(new, [6, 4, 2], Path("out"), None, False)
    assert said.what == "A new model in the shape of `shape`, trained on text: the mean of the steps 2, 4, 6 of 6."
    assert "license: unknown" in render(said, "out", "smollm3")
