"""Models by name with their tokenizers, and text in, text out."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import talking_checkpoint, tiny_checkpoint

import smollm3_jax as s3
from smollm3_jax.errors import ConfigError, HubError, OptionError, TokenizerError
from smollm3_jax.generation import sampling
from smollm3_jax.tokenizer import tokenizer_of
from smollm3_jax.weights import hub

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("pretrained") / "talking")


@pytest.fixture(scope="module")
def model(talking: Path) -> s3.SmolLM3:
    return s3.from_pretrained(talking)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> s3.SmolLM3:
    return s3.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("pretrained") / "bare"))


def test_texts_give_texts_and_ids_give_ids(model: s3.SmolLM3, bare: s3.SmolLM3, talking: Path):
    tokenizer, options = s3.load_tokenizer(talking), {"max_new_tokens": 6, "ignore_eos": True}
    ids = s3.generate(model, [[5, 6], [7]], **options)
    assert [len(row) for row in ids] == [6, 6] and all(isinstance(token, int) for token in ids[0])
    texts = s3.generate(model, ["w5 w6", "w7"], **options)
    assert texts == [tokenizer.decode([5, *ids[0]])[2:], tokenizer.decode([7, *ids[1]])[2:]]
    assert s3.generate(model, "w5 w6", **options) == texts[0]
    assert s3.generate(model, ("w5 w6",), s3.SamplingParams(**options)) == texts[:1]
    short = s3.SamplingParams(max_new_tokens=3, ignore_eos=True)
    assert s3.generate(model, "w5 w6", short, max_new_tokens=6) == texts[0]
    assert s3.generate(bare, "w5 w6", tokenizer=tokenizer, **options) == texts[0]
    assert len(s3.generate(model, "w5", n=2, temperature=1.0, **options)) == 2
    assert s3.generate(model, np.array([[5, 6]]), **options) == s3.generate(model, jnp.array([[5, 6]]), **options)
    assert s3.generate(model, []) == []
    requests = [s3.Request("w5 w6", s3.SamplingParams(**options))]
    assert "".join(delta.text for delta in s3.stream(model, requests)) == texts[0]
    assert "".join(delta.text for delta in s3.stream(model, "w5 w6")) == s3.generate(model, "w5 w6")


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([1, 2, 3], {}, r"flat list of 3 ids; give a list of prompts, each a list of ids: \[\[1, 2, 3\]\]"),
        (np.array([1, 2]), {}, "flat list of 2 ids"),
        (7, {}, "prompts is a int; give a text"),
        (["w1", [1]], {}, "not both at once"),
        ([[1], "w1"], {}, "not both at once"),
        ([{"role": "user", "content": "w1"}], {}, r"not messages; .*encode_chat"),
        ([["w1"]], {}, "prompt 0 is .* must be a text or a list of token ids"),
        ([[1.5]], {}, "prompt 0 is .* must be a text or a list of token ids"),
        ([[160]], {}, "holds the id 160"),
        ("", {}, "prompt 0 is empty"),
        ("\ud800", {}, "surrogate"),
        ("w1 " * 3000, {}, "more than 512 tokens can hold"),
        ("w1", {"max_tokens": 3}, "generate has no argument max_tokens; use max_new_tokens"),
        ("w1", {"temprature": 3}, "generate has no argument temprature; use temperature"),
        ("w1", {"do_sample": True}, "use temperature"),
        ("w1", {"xyzzy": 1}, "generate has no argument xyzzy; it has frequency_penalty, "),
    ],
)
def test_what_is_no_prompt_is_refused(model: s3.SmolLM3, prompts: Any, options: dict[str, Any], words: str):
    with pytest.raises(OptionError, match=words):
        s3.generate(model, prompts, **options)


def test_other_libraries_names_are_known(talking: Path):
    with pytest.raises(OptionError, match="from_pretrained has no argument torch_dtype; use dtype"):
        s3.from_pretrained(talking, torch_dtype="float32")
    with pytest.raises(OptionError, match="SamplingParams has no argument max_tokens; use max_new_tokens"):
        s3.SamplingParams(max_tokens=3)  # pyright: ignore[reportCallIssue]


def test_a_text_without_a_tokenizer_says_how_to_give_one(bare: s3.SmolLM3):
    with pytest.raises(OptionError, match=r"prompt 0 is a text, and the model has no tokenizer: .*load_tokenizer"):
        s3.generate(bare, "w1")
    with pytest.raises(OptionError, match="prompt 0 is a text"):
        list(s3.stream(bare, [s3.Request("w1")]))
    with pytest.raises(OptionError, match="prompt 0 is a list; it must be a Request or a text"):
        list(s3.stream(bare, [[1, 2]]))  # pyright: ignore[reportArgumentType]


def test_a_model_keeps_its_tokenizer_beside_it(talking: Path, tmp_path: Path):
    model = s3.from_pretrained(talking)
    structure = jax.tree.structure(model)
    before = tokenizer_of(model)
    assert before is not None and before is tokenizer_of(model) and before.encode("w5") == [5]
    assert jax.tree.structure(model) == structure == jax.tree.structure(s3.from_pretrained(talking))
    s3.save_pretrained(model, tmp_path / "saved")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "saved" / name).read_bytes() == (talking / name).read_bytes()
    assert s3.load_tokenizer(tmp_path / "saved").encode("w5 w6") == [5, 6]
    gone = weakref.ref(before)
    del model, before
    gc.collect()
    assert gone() is None


def test_a_model_without_a_tokenizer_keeps_that_of_the_folder(bare: s3.SmolLM3, tmp_path: Path):
    folder = talking_checkpoint(tmp_path / "talking")
    content = (folder / "tokenizer.json").read_bytes()
    s3.save_pretrained(bare, folder)
    assert (folder / "tokenizer.json").read_bytes() == content


def test_tokenizers_alone(talking: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_bytes((talking / "tokenizer.json").read_bytes())
    assert s3.load_tokenizer(tmp_path).encode("w5") == [5]
    with pytest.raises(TokenizerError, match=r"tokenizer\.json is missing"):
        s3.load_tokenizer(tiny_checkpoint(tmp_path / "bare"))
    with pytest.raises(HubError, match="no such folder"):
        s3.load_tokenizer(str(tmp_path / "nowhere"))


def test_demo_is_a_name_everywhere(talking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from smollm3_jax.evaluate.parity import verify
    from smollm3_jax.weights.summary import summarize

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMOLLM3_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "pull", lambda name: talking)
    assert s3.from_pretrained("demo").config.vocab_size == 160
    assert s3.load_tokenizer("demo").encode("w5") == [5]
    assert summarize("demo")["path"] == str(talking)
    assert verify("demo", "demo")["ok"]
    s3.convert("demo", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.slow
def test_importing_is_light():
    heavy = "torch transformers orbax grain tokenizers requests httpx aiohttp huggingface_hub jax flax"
    code = f"import sys, smollm3_jax; print(*sorted(set('{heavy}'.split()) & set(sys.modules)))"
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, check=True, cwd=ROOT, capture_output=True, text=True).stdout.split() == []
    code = f"import smollm3_jax as s; [getattr(s, n) for n in s.__all__]; {code}"
    run = [sys.executable, "-c", code]
    found = subprocess.run(run, check=True, cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert set(found) <= {"jax", "flax"}


def with_generation_config(folder: Path, content: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize(
    "content",
    [
        {"repetition_penalty": 1.8},
        {"suppress_tokens": list(range(20, 120)), "max_new_tokens": 5},
        {"repetition_penalty": 0.7, "eos_token_id": [2, 30]},
        {"stop_strings": ["w7"], "max_new_tokens": 3},
        {"min_p": 0.2, "temperature": 0.5, "max_length": 400, "max_new_tokens": 12},
    ],
)
def test_generation_config_counts_as_in_transformers(tmp_path: Path, content: dict[str, Any]):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = with_generation_config(tiny_checkpoint(tmp_path / "m", "release_like"), {"eos_token_id": 2} | content)
    prompt = [5, 9, 11, 5, 9]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.stop_strings = None  # they need a tokenizer there, and end nothing here
    new = theirs.generate(torch.tensor([prompt]), **({} if "max_new_tokens" in content else {"max_new_tokens": 12}))
    tokenizer = s3.load_tokenizer(talking_checkpoint(tmp_path / "t")) if "stop_strings" in content else None
    options: Any = {} if "max_new_tokens" in content else {"max_new_tokens": 12}
    [mine] = s3.generate(s3.from_pretrained(folder), [prompt], tokenizer=tokenizer, **options)
    assert mine == new[0, len(prompt) :].tolist()


def test_generation_config_gives_defaults_and_what_is_said_counts(talking: Path, tmp_path: Path):
    config = s3.ModelConfig.from_hf(talking)
    raw = {"max_new_tokens": 7, "min_p": 0.1, "stop_strings": "w3", "suppress_tokens": [4], "repetition_penalty": 1.5}
    own = s3.GenerationConfig.from_hf(raw, config)
    params = sampling.with_defaults(own, 160)
    assert (params.max_new_tokens, params.min_p, params.stop, params.suppress_tokens) == (7, 0.1, ["w3"], [4])
    assert sampling.with_defaults(own, 160, max_new_tokens=9, stop=(), repetition_penalty=1.0) == s3.SamplingParams(
        max_new_tokens=9, min_p=0.1, suppress_tokens=[4]
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("temperature", -1.0),
        ("max_new_tokens", 0),
        ("suppress_tokens", "4"),
        ("suppress_tokens", [160]),
        ("stop_strings", [""]),
        ("max_new_tokens", 2.5),
    ],
)
def test_a_bad_default_is_named_with_its_file(talking: Path, tmp_path: Path, key: str, value: Any):
    raw = {key: value, "do_sample": True}
    config = s3.GenerationConfig.from_hf(raw, s3.ModelConfig.from_hf(talking))
    name = "stop" if key == "stop_strings" else key
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {name} (is|names the id) "):
        sampling.with_defaults(config, 160)
    good = {"top_k": 1, "suppress_tokens": [], "stop": []}.get(name, 1)
    assert getattr(sampling.with_defaults(config, 160, **{name: good}), name) == good


@pytest.mark.parametrize(
    ("key", "value"), [("top_k", "a"), ("temperature", []), ("do_sample", 3), ("eos_token_id", "2")]
)
def test_a_default_of_another_type_is_named_with_its_file(talking: Path, tmp_path: Path, key: str, value: Any):
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {key} is "):
        s3.GenerationConfig.from_hf(with_generation_config(tmp_path, {key: value}), s3.ModelConfig.from_hf(talking))


def test_what_cannot_be_done_is_named_once(talking: Path, caplog: pytest.LogCaptureFixture):
    raw = {"no_repeat_ngram_size": 3, "num_beams": 4, "typical_p": 1.0, "min_length": 0, "bad_words_ids": [[1, 2]]}
    own = s3.GenerationConfig.from_hf(raw, s3.ModelConfig.from_hf(talking))
    sampling._not_done.cache_clear()
    for _ in range(2):
        sampling.with_defaults(own, 160)
    [record] = caplog.records
    assert "no_repeat_ngram_size (3), num_beams (4), bad_words_ids ([[1, 2]])" in record.getMessage()
