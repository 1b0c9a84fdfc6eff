"""Model cards of what is exported: as huggingface_hub reads them, with nothing of this machine in them."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from tiny import talking_checkpoint, tiny_adapter, tiny_checkpoint

import smollm3_jax
from smollm3_jax.commands.main import main
from smollm3_jax.weights import card
from smollm3_jax.weights.hub import DEMO_ID
from smollm3_jax.weights.merge_file import read_merge


def data_of(folder: Path) -> dict[str, Any]:
    """The front matter, and that nothing of the test's folders is in the card."""
    text = (folder / "README.md").read_text()
    assert str(folder.parent) not in text and "/tmp" not in text
    found = ModelCard(text, ignore_metadata_errors=False)
    assert found.data.to_dict() == yaml.safe_load(text.split("---\n")[1])
    assert found.text.strip().startswith(f"# {folder.name}\n") and card.is_ours(folder / "README.md")
    return found.data.to_dict()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """As the hub's library keeps it: in a folder that says which model it is of."""
    cache = tmp_path_factory.mktemp("hub") / "models--HuggingFaceTB--SmolLM3-3B"
    return talking_checkpoint(cache / "snapshots" / ("0" * 40))


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("models") / "mine")


SIX = ["en", "fr", "es", "it", "pt", "de"]


def test_a_conversion_of_a_hubs_model(base, tmp_path):
    assert main(["convert", str(base), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert data_of(tmp_path / "out") == {
        "base_model": ["HuggingFaceTB/SmolLM3-3B"],
        "language": SIX,
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["smollm3", "jax", "smollm3-jax"],
    }
    text = (tmp_path / "out" / "README.md").read_text()
    assert "\nsmollm3 convert HuggingFaceTB/SmolLM3-3B out --dtype=bfloat16\n" in text
    assert 'AutoModelForCausalLM.from_pretrained("out")' in text and "\n`apache-2.0`, that of `Hugging" in text


def test_what_a_card_says_goes_on_to_the_next(base, tmp_path):
    """Of weights in int8 that were made from a conversion, whose own name is told, too."""
    smollm3_jax.convert(base, tmp_path / "plain")
    assert main(["quantize", str(tmp_path / "plain"), str(tmp_path / "int8"), "--weights", "int8"]) == 0
    data = data_of(tmp_path / "int8")
    assert data["base_model"] == ["HuggingFaceTB/SmolLM3-3B"] and data["base_model_relation"] == "quantized"
    assert data["library_name"] == "smollm3-jax" and "int8" in data["tags"] and data["language"] == SIX
    assert "smollm3 quantize plain int8 --weights=int8" in (tmp_path / "int8" / "README.md").read_text()


def test_a_model_that_nothing_is_known_of(own, tmp_path):
    smollm3_jax.convert(own, tmp_path / "out")
    data = data_of(tmp_path / "out")
    assert data["license"] == "unknown" and "base_model" not in data and "language" not in data
    assert "say under which licence" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    "name, text, license",
    [
        ("LICENSE", "Apache License\nVersion 2.0, January 2004", {"license": "apache-2.0"}),
        ("LICENSE.md", "Mine.", {"license": "other", "license_name": "in-the-file", "license_link": "LICENSE.md"}),
        ("README.md", "---\nlicense: mit\n---\n", {"license": "mit"}),
        ("README.md", "---\nlicense: [a]\nlanguage: {}\nbase_model: /etc/passwd\n---\n", {"license": "unknown"}),
        ("README.md", "---\n- &a [*a]\n---\n", {"license": "unknown"}),
    ],
)
def test_licences(own, tmp_path, name, text, license):
    source = tmp_path / "source"
    shutil.copytree(own, source)
    (source / name).write_text(text)
    smollm3_jax.convert(source, tmp_path / "out")
    data = data_of(tmp_path / "out")
    assert {key: value for key, value in data.items() if key.startswith("license")} == license
    assert "base_model" not in data


def test_a_merge_has_its_recipe(base, own, tmp_path):
    other = tmp_path / "mine"
    shutil.copytree(base, other)
    assert main(["merge", f"{base}=0.9", f"{other}=0.3", "--out", str(tmp_path / "out")]) == 0
    data = data_of(tmp_path / "out")
    assert data["base_model_relation"] == "merge" and data["base_model"] == ["HuggingFaceTB/SmolLM3-3B"]
    text = (tmp_path / "out" / "README.md").read_text()
    (tmp_path / "merge.yml").write_text(text.split("```yaml\n")[1].split("```")[0])
    found = read_merge(tmp_path / "merge.yml")
    assert [(part.model, part.weight) for part in found.parts] == [("HuggingFaceTB/SmolLM3-3B", 0.9), ("mine", 0.3)]
    assert found.method == "linear" and "smollm3 merge --config merge.yml --out out" in text
    # Whose licences differ, each is named.
    assert data["license"] == "other" and "- `HuggingFaceTB/SmolLM3-3B`: apache-2.0\n- `mine`: unknown" in text


def test_an_adapter_that_is_folded_in(base, tmp_path):
    adapter = tiny_adapter(tmp_path / "adapter", base)
    assert main(["merge", str(base), "--adapter", f"{adapter}:0.5", "--out", str(tmp_path / "out")]) == 0
    assert data_of(tmp_path / "out")["base_model_relation"] == "finetune"
    text = (tmp_path / "out" / "README.md").read_text()
    assert "smollm3 merge HuggingFaceTB/SmolLM3-3B --adapter=adapter:0.5 --out=out" in text
    smollm3_jax.convert(adapter, tmp_path / "again")  # an adapter's folder is its base with the adapter in it
    assert data_of(tmp_path / "again")["base_model"] == ["HuggingFaceTB/SmolLM3-3B"]


def test_a_card_of_the_users_own_stays(own, tmp_path):
    """Also one that was ours, and was written in; ours as it was goes with the model that it was of."""
    out = tmp_path / "out"
    smollm3_jax.convert(own, out)
    assert main(["quantize", str(own), str(out), "--weights", "int8", "--force"]) == 0
    assert "int8" in data_of(out)["tags"]
    written = (out / "README.md").read_text().replace("# out\n", "# My model\n")
    (out / "README.md").write_text(written)
    smollm3_jax.convert(own, out, force=True)
    assert (out / "README.md").read_text() == written and not card.is_ours(out / "README.md")
    smollm3_jax.convert(own, tmp_path / "other")
    smollm3_jax.save_pretrained(smollm3_jax.from_pretrained(own), tmp_path / "other")
    assert not (tmp_path / "other" / "README.md").exists()


def test_the_parity_report_goes_into_the_card(own, tmp_path, capsys):
    out = tmp_path / "out"
    smollm3_jax.convert(own, out)
    for _ in range(2):  # the second takes the place of the first
        assert main(["verify", str(out), "--against", str(own), "--card"]) == 0
    text = (out / "README.md").read_text()
    assert text.count("## Parity\n\n`smollm3 verify out --against=mine`: verified, in float32.\n") == 1
    assert "| max_abs | 0 |\n" in text and "| check: weights | passed |" in text
    assert text.index("## How it was made") < text.index("## Parity") < text.index("## Use") and data_of(out)
    # Not one bit of a weight may differ ...
    model = smollm3_jax.from_pretrained(out)
    model.norm[...] += np.float32(0.5)
    smollm3_jax.save_pretrained(model, tmp_path / "changed")
    capsys.readouterr()
    # ... and a folder without a card, or with the user's, is told what would have been written.
    for there in (None, "mine"):
        if there:
            (tmp_path / "changed" / "README.md").write_text(there)
        assert main(["verify", str(tmp_path / "changed"), "--against", str(own), "--card"]) == 2
        assert "**not** verified" in capsys.readouterr().err
    assert (tmp_path / "changed" / "README.md").read_text() == "mine"
    assert main(["verify", str(out), "--goldens", "--card"]) == 2


@pytest.mark.parametrize(
    "word, shown",
    [
        ("/home/me/secret project/model", "model"),
        ("../models/x/", "x"),
        ("C:\\Users\\me\\model", "model"),
        ("s3://bucket/key/model?X-Amz-Signature=abc#x", "model"),
        ("https://user:hf_token@huggingface.co/ORG/NAME/tree/main", "ORG/NAME"),
        ("https://elsewhere.org/a/b?token=hf_abc", "b"),
        ("ORG/NAME@v1", "ORG/NAME"),
        ("demo", "demo"),
        ("/a/`rm`\n# b", "'rm'\\n# b"),
        ("/", "unnamed"),
        ("x" * 300, "x" * 300),
        ("a\0b", "a\\x00b"),
    ],
)
def test_names_without_what_is_ones_own(word, shown):
    assert card.shown_name(word) == shown


def test_names_of_models(own, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert card.origin_of("HuggingFaceTB/SmolLM3-3B").license == {"license": "apache-2.0"}
    assert card.origin_of("demo").bases == (DEMO_ID,) and card.origin_of("demo").languages == ("en",)
    other = card.origin_of("unknown/model@main")
    assert other.bases == ("unknown/model",) and other.license["license_link"] == "https://hf.co/unknown/model"
    shutil.copytree(own, tmp_path / "unknown" / "model")
    assert card.origin_of("unknown/model").bases == ()  # a folder here
    monkeypatch.setenv("SMOLLM3_JAX_CACHE", str(tmp_path / "cache"))
    assert card.origin(tmp_path / "cache" / DEMO_ID.split("/")[1]).bases == (DEMO_ID,)
    assert card.origin(tmp_path / "else" / DEMO_ID.split("/")[1]).bases == ()
