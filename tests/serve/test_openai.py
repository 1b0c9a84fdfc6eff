"""OpenAI's Python client against a server on a socket, with a tiny model that says random words."""

import concurrent.futures
import json
import threading

import openai
import pytest
from serving import HEAD, serving, tiny_server, warm_engine

from smollm3_jax.compile_cache import compilations
from smollm3_jax.serve import app
from smollm3_jax.serve.errors import ApiError
from smollm3_jax.serve.job import parse

ASKED = [{"role": "user", "content": "w5 w6 w7"}]


@pytest.fixture(scope="module")
def running():
    with serving(warm_engine, parse, server=tiny_server(), keys=["secret"], max_queue=64) as it:
        begin = compilations()
        yield it
        assert compilations() == begin  # C11, S24: whatever the tests here have asked


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"http://localhost:{running.port}/v1", api_key="secret", max_retries=0) as it:
        yield it


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_chat_streams_what_it_answers(client):
    options = {"model": "tiny", "messages": ASKED, "max_tokens": 12, "temperature": 1.0, "seed": 7, "n": 2}
    whole = client.chat.completions.create(**options)
    assert whole.usage.completion_tokens == 24 and whole.usage.prompt_tokens == 4
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    texts = ["", ""]
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for chunk in chunks[:-1]:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


def test_completions_of_texts_and_of_ids(client):
    options = {"model": "tiny", "max_tokens": 5, "temperature": 0, "logprobs": 2}
    texts = client.completions.create(prompt=["w5 w6", "w7"], **options)
    ids = client.completions.create(prompt=[[5, 6], [7]], **options)
    assert [choice.text for choice in texts.choices] == [choice.text for choice in ids.choices]
    assert [choice.index for choice in texts.choices] == [0, 1]
    assert len(texts.choices[0].logprobs.token_logprobs) == 5


def test_the_same_answer_whatever_else_runs(client):
    """S22: Greedy and sampled, alone and beside twenty others."""
    options = [
        {"model": "tiny", "prompt": [[5 + i, 6, 7]], "max_tokens": 5 + i, "temperature": i % 2, "seed": i}
        for i in range(20)
    ]
    alone = [client.completions.create(**x).choices[0].text for x in options[:5]]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda x: client.completions.create(**x).choices[0].text, options))
    assert together[:5] == alone


def test_errors_are_those_that_the_client_knows(running, client):
    """S5, C12."""
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4", messages=ASKED)
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="maximum context length") as error:
        client.completions.create(model="tiny", prompt=[5] * 600)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(model="tiny", messages=ASKED, temperature=-1)
    assert error.value.param == "temperature"
    wrong = client.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    running.until(running.is_at_rest)


def test_a_client_that_stops_reading_a_stream_leaves_nothing(running, client):
    """S12, C4."""
    for _ in range(5):
        stream = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=400, stream=True)
        next(iter(stream))
        stream.close()
    running.until(running.is_at_rest)


def test_an_error_in_mid_stream_is_raised(running, client, monkeypatch):
    stream = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=400, stream=True)
    chunks = iter(stream)
    next(chunks)
    worker = running.service.worker
    for ticket in list(worker.tickets):
        running.loop.call_soon_threadsafe(worker.fail, ticket, ApiError(500, "a chip has failed"))
    with pytest.raises(openai.APIError, match="a chip has failed"):
        list(chunks)
    running.until(running.is_at_rest)


def test_tokens_there_and_back(running):
    key = {"Authorization": "Bearer secret"}
    status, body, _ = running.ask("POST", "/tokenize", {"prompt": "w5 w6"}, **key)
    assert (status, body) == (200, {"tokens": [5, 6], "count": 2, "max_model_len": 512})
    asked = {"messages": ASKED, "chat_template_kwargs": {"enable_thinking": False}}
    assert running.ask("POST", "/tokenize", asked, **key)[1]["tokens"] == [8, 5, 6, 7]
    assert running.ask("POST", "/detokenize", {"tokens": [5, 6]}, **key)[1] == {"prompt": "w5 w6"}


def test_all_that_is_described_is_there(running):
    key = {"Authorization": "Bearer secret"}
    status, described, _ = running.ask("GET", "/openapi.json", **key)
    assert status == 200 and len(described["paths"]) >= 10
    for path, methods in described["paths"].items():
        for method in methods:
            body = {} if method == "post" else None
            status = running.ask(method.upper(), path.replace("{model}", "tiny"), body, **key)[0]
            assert status == (400 if method == "post" else 200), path


def test_texts_that_wait_to_be_tokenized_are_bounded(running, monkeypatch):
    key, hold = {"Authorization": "Bearer secret"}, threading.Event()
    monkeypatch.setattr(app, "tokenize", lambda body, server: hold.wait(20) and {})
    content = json.dumps({"prompt": "w5"}).encode()
    head = HEAD.replace(b"/v1/completions", b"/tokenize") + b"Authorization: Bearer secret\r\n"
    clients = [running.connect(head + f"Content-Length: {len(content)}\r\n\r\n".encode() + content) for _ in range(68)]
    running.until(lambda: running.service._in_pool == 68)
    status, body, headers = running.ask("POST", "/tokenize", {"prompt": "w5"}, **key)
    assert (status, body["error"]["code"]) == (429, "queue_full") and "retry-after" in headers
    assert running.ask("GET", "/health")[0] == 200
    hold.set()
    assert all(client.recv(100).startswith(b"HTTP/1.1 200 ") for client in clients)
