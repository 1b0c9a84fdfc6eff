"""weights/address.py: every way in which people name a model on a hub."""

import pytest

from smollm3_jax.errors import HubError
from smollm3_jax.weights.address import hub_address

GIVEN = {
    "org/name": None,
    "org/name/": None,
    "org/name@main": "main",
    "org/name@stage1-step-40000": "stage1-step-40000",
    "org/name@refs/pr/3": "refs/pr/3",
    "org/name@feature/a.b/c": "feature/a.b/c",
    "org/name@" + "0" * 40: "0" * 40,
    "https://huggingface.co/org/name": None,
    "https://huggingface.co/org/name/": None,
    "http://www.huggingface.co/org/name?library=transformers#usage": None,
    "huggingface.co/org/name": None,
    "hf.co/org/name": None,
    "https://hf.co/org/name": None,
    "https://huggingface.co/org/name.git": None,
    "git@hf.co:org/name": None,
    "hf://org/name": None,
    "hf://org/name@dev": "dev",
    "https://huggingface.co/org/name/tree/main": "main",
    "https://huggingface.co/org/name/tree/stage1-step-40000": "stage1-step-40000",
    "https://huggingface.co/org/name/tree/refs%2Fpr%2F1": "refs/pr/1",
    "https://huggingface.co/org/name/tree/refs/pr/1": "refs/pr/1",
    "https://huggingface.co/org/name/tree/feature/x": "feature/x",
    "https://huggingface.co/org/name/commit/abcdef0": "abcdef0",
    "https://huggingface.co/org/name/blob/dev/config.json": "dev",
    "https://huggingface.co/org/name/resolve/main/model.safetensors?download=true": "main",
    "https://huggingface.co/org/name/blob/refs/pr/2/model.safetensors": "refs/pr/2",
    "https://huggingface.co/models/org/name": None,
    "https://mirror.example/org/name/tree/dev": "dev",
    "https://user:hf_secret@huggingface.co/org/name": None,
    "https://hf_secret@hf.co/org/name.git": None,
}


@pytest.mark.parametrize("given", GIVEN)
def test_what_names_a_model(given, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    assert hub_address(given) == ("org/name", GIVEN[given])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("https://huggingface.co/datasets/org/name", "one of the hub's datasets"),
        ("hf.co/spaces/org/name", "one of the hub's spaces"),
        ("https://huggingface.co/org", "names no model"),
        ("https://huggingface.co/", "names no model"),
        ("https://github.com/org/name", "no address of a model on the hub; a hub id reads ORG/NAME"),
        ("https://mirror.example/org/name", "no address of a model on the hub"),
        ("https://huggingface.co/org/name/discussions/5", "give org/name, or org/name@REVISION"),
        (
            "https://huggingface.co/org/name/blob/main/a.Q4_K_M.gguf",
            "`hf download org/name a.Q4_K_M.gguf --revision main`",
        ),
        ("hf://datasets/org/name", "no address of a model"),
    ],
)
def test_what_names_something_else(given, words, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with pytest.raises(HubError) as error:
        hub_address(given)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given", ["https://me:hf_secret@huggingface.co/datasets/a/b", "https://hf_secret@github.com/a/b"]
)
def test_a_token_in_an_address_is_not_shown(given, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://me:hf_secret@mirror.example")
    with pytest.raises(HubError) as error:
        hub_address(given)
    assert "hf_secret" not in str(error.value) and "https://***@" in str(error.value)
    assert hub_address("https://mirror.example/org/name") == ("org/name", None)


@pytest.mark.parametrize(
    "given", ["demo", "./org/name@x", "a/b/c", "a/b/c.gguf", "", "gs://bucket/model", "org/na me", "/tmp/x", "x@y"]
)
def test_what_is_none_of_a_hubs(given):
    assert hub_address(given) is None
