"""The routes, on a real socket and with a tiny model."""

import json

import pytest
from serving import serving, tiny_engine


@pytest.fixture(scope="module")
def server():
    with serving(tiny_engine) as it:
        yield it


def test_an_answer_and_a_stream_say_the_same(server):
    body = {"prompt": [5, 6, 7], "max_tokens": 6, "n": 2}
    status, whole, _ = server.ask("POST", "/v1/completions", body)
    assert status == 200 and [len(ids) for ids in whole["ids"]] == [6, 6]
    status, text, headers = server.ask("POST", "/v1/completions", body | {"stream": True})
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    frames = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert frames[-1] == "[DONE]" and json.loads(frames[0]) == {"begin": True}
    streamed = [[], []]
    for event in map(json.loads, frames[1:-1]):
        streamed[event["sample"]] += event["ids"]
    assert streamed == whole["ids"]


def test_what_is_asked_of_the_server_itself(server):
    assert server.ask("GET", "/health")[:2] == (200, {"status": "ok"})
    assert server.ask("GET", "/ready")[:2] == (200, {"status": "ready"})
    assert server.said == [f"ready http://127.0.0.1:{server.port}"]
    assert [model["id"] for model in server.ask("GET", "/v1/models")[1]["data"]] == ["tiny"]
