"""A server whose models are adapters of one base, over HTTP."""

import openai
import pytest
from serving import serving
from tiny import random_tokens, raw_config, talking_checkpoint, tiny_adapter

from smollm3_jax.compile_cache import compilations
from smollm3_jax.generation.engine import Engine
from smollm3_jax.serve.job import Server, parse
from smollm3_jax.serve.openapi import described
from smollm3_jax.tokenizer import load_tokenizer
from smollm3_jax.weights.load import load, open_checkpoint
from smollm3_jax.weights.served import attach, read_served

PROMPT = random_tokens(raw_config("plain"), 1, 40)[0].tolist()


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    folder = talking_checkpoint(tmp_path_factory.mktemp("models") / "tiny")
    words = [str(tiny_adapter(folder.parent / name, folder, seed=i)) for i, name in enumerate(("sea", "land"))]
    adapters, checkpoint = read_served(words, "tiny"), open_checkpoint(folder)
    model, tokenizer = attach(load(checkpoint), adapters), load_tokenizer(folder, checkpoint.config)

    def make() -> Engine:
        own = {"slots": 2, "context": 128, "piece_sizes": (16, 64), "prefix_tokens": 256}
        engine = Engine(model, tokenizer=tokenizer, **own)
        engine.warm_up()
        return engine

    folders = {one.name: str(one.adapter.folder) for one in adapters}
    server = Server("tiny", tokenizer, model.config, model.generation_config, 128, folders)
    with serving(make, parse, server=server) as it:
        before = compilations()
        yield it
        assert compilations() == before  # C11


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"http://localhost:{running.port}/v1", api_key="none", max_retries=0) as it:
        yield it


@pytest.mark.slow
def test_all_models_are_listed(running, client):
    found = {model.id: model for model in client.models.list()}
    assert list(found) == ["tiny", "sea", "land"]
    assert found["tiny"].parent is None and found["tiny"].root == "tiny"
    assert found["sea"].parent == "tiny" and found["sea"].root.endswith("/sea")
    assert client.models.retrieve("land") == found["land"]
    schemas = described("0", running.service.server)["components"]["schemas"]
    assert {"enum": ["tiny", "sea", "land"]} in schemas["ChatRequest"]["properties"]["model"]["anyOf"]


@pytest.mark.slow
def test_each_model_answers_for_itself(client):
    """In all three APIs, streamed or not; what one has kept of a prompt no other finds."""
    texts = {}
    for name in ("tiny", "sea", "land"):
        options = {"model": name, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
        options |= {"extra_body": {"ignore_eos": True}}
        whole = client.completions.create(**options)
        chunks = list(client.completions.create(**options, stream=True))
        texts[name] = whole.choices[0].text
        assert whole.model == name and {chunk.model for chunk in chunks} == {name}
        assert "".join(chunk.choices[0].text for chunk in chunks) == texts[name]
    assert len(set(texts.values())) == 3
    said = [{"role": "user", "content": "w5 w6"}]
    for name in texts:
        assert client.chat.completions.create(model=name, messages=said, max_tokens=4).model == name
        assert client.responses.create(model=name, input=said, max_output_tokens=4).model == name


def test_without_a_name_the_base_answers(running):
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answers = [running.ask("POST", "/v1/completions", body | more)[1] for more in ({}, {"model": "tiny"})]
    assert answers[0]["model"] == "tiny" and answers[0]["choices"] == answers[1]["choices"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/tokenize"])
def test_a_model_that_is_not_there(running, path):
    """S11."""
    status, body, _ = running.ask("POST", path, {"model": "lake", "prompt": "w5"})
    error = body["error"]
    assert status == 404 and (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["message"] == "the model 'lake' does not exist; this server has 'tiny', 'sea', 'land'"
    assert running.ask("GET", "/v1/models/lake")[0] == 404
    assert running.ask("POST", "/tokenize", {"model": "sea", "prompt": "w5"})[0] == 200
