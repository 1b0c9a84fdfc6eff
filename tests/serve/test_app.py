"""The routes, on a real socket and with a tiny model."""

import dataclasses
import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from proxies import FULL
from serving import PlainReply, Puppet, plain_parse, resident, serving, tiny_engine, tiny_server, token

from smollm3_jax.generation.sampling import SamplingParams
from smollm3_jax.serve import app, guards


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


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_take_long_to_make_hold_up_nobody(stream):
    """Log-probabilities are listed, and large bodies read, while others are answered."""
    hold, where = threading.Event(), []

    class Slow(PlainReply):
        def add(self, index, delta):
            where.append(threading.current_thread().name)
            assert hold.wait(20)
            return super().add(index, delta)

        def body(self):
            where.append(threading.current_thread().name)
            return super().body()

    def parse(kind, body, server):
        job = plain_parse(kind, body, server)
        if "logprobs" in body:
            job.requests[0] = dataclasses.replace(job.requests[0], params=SamplingParams(logprobs=1))
            job.reply = Slow(1)
        return job

    engine = Puppet(lambda running: [token(number, "stop") for number in running])
    with serving(lambda: engine, parse) as server:
        client = server.open({"prompt": [5], "stream": stream, "logprobs": 1})
        server.until(lambda: bool(where))
        assert server.ask("GET", "/health")[0] == server.ask("POST", "/v1/completions", {"prompt": [5]})[0] == 200
        hold.set()
        content = b""
        while b"ids" not in content:
            content += client.recv(4096)
        assert {name.rpartition("_")[0] for name in where} == {"answers"}


def test_whole_answers_are_written_in_threads():
    """However many tokens they have: a server of many slots may owe megabytes at a time."""
    where = []

    class Watched(PlainReply):
        def body(self):
            where.append(threading.current_thread().name)
            return super().body()

    def parse(kind, body, server):
        job = plain_parse(kind, body, server)
        job.reply = Watched(1)
        return job

    engine = Puppet(lambda running: [token(number, "stop") for number in running])
    with serving(lambda: engine, parse) as server:
        assert server.ask("POST", "/v1/completions", {"prompt": [5]})[1] == {"ids": [[7]]}
        assert [name.rpartition("_")[0] for name in where] == ["answers"]


def test_large_bodies_and_lists_of_tokens_are_read_and_written_in_threads(monkeypatch):
    where = []

    def watched(function):
        return lambda *args: where.append(threading.current_thread().name) or function(*args)

    monkeypatch.setattr(guards, "_parse", watched(guards._parse))
    monkeypatch.setattr(app, "in_pieces", watched(app.in_pieces))
    with serving(lambda: Puppet(lambda running: []), server=tiny_server()) as server:
        for path, body in (("/tokenize", {"prompt": " w5" * 30_000}), ("/detokenize", {"tokens": [5] * 30_000})):
            assert server.ask("POST", path, body)[0] == 200
        assert len(where) == 4 and all(name.startswith("texts") for name in where)


def test_what_is_asked_of_the_server_itself(server):
    assert server.ask("GET", "/health")[:2] == (200, {"status": "ok"})
    assert server.ask("GET", "/ready")[:2] == (200, {"status": "ready"})
    assert server.said == [f"ready http://127.0.0.1:{server.port}"]
    assert [model["id"] for model in server.ask("GET", "/v1/models")[1]["data"]] == ["tiny"]


def test_slow_templates_hold_up_neither_health_nor_the_bound():
    """C2: Requests that are rendered and tokenized count as under way."""
    hold = threading.Event()

    def slow(kind, body, server):
        assert hold.wait(20)
        return plain_parse(kind, body, server)

    engine = Puppet(lambda running: [token(number, "stop") for number in running])
    with serving(lambda: engine, slow, slots=4, max_queue=8) as server:
        clients = [server.open({"prompt": [5]}) for _ in range(12)]
        server.until(lambda: server.service.worker.samples == 12)
        assert server.ask("GET", "/health")[0] == 200
        status, body, _ = server.ask("POST", "/v1/completions", {"prompt": [5]})
        assert (status, body["error"]["code"]) == (429, "queue_full")
        hold.set()
        assert all(client.recv(100).startswith(b"HTTP/1.1 200 ") for client in clients)
        server.until(server.is_at_rest)


def test_clients_that_leave_do_not_fill_the_threads_that_read_bodies():
    """What they have asked for is not read any more, and until a thread gets to it, it is in the way of others."""
    hold, read = threading.Event(), []

    def slow(kind, body, server):
        read.append(body)
        assert hold.wait(20)
        return plain_parse(kind, body, server)

    engine = Puppet(lambda running: [token(number, "stop") for number in running])
    with serving(lambda: engine, slow, slots=4, max_queue=4) as server:
        clients = [server.open({"prompt": [5]}) for _ in range(8)]
        server.until(lambda: server.service.answering == 8 and len(read) == 2)
        for client in clients:
            client.close()
        server.until(lambda: not server.service.worker.tickets)
        status, body, _ = server.ask("POST", "/v1/completions", {"prompt": [5]})
        assert (status, body["error"]["code"]) == (429, "queue_full")
        hold.set()
        server.until(server.is_at_rest)
        assert len(read) == 2
        assert server.ask("POST", "/v1/completions", {"prompt": [5]})[0] == 200


def test_a_mistake_of_our_own_is_a_500_and_no_more(caplog):
    def wrong(kind, body, server):
        if body["prompt"] == [13]:
            raise ZeroDivisionError("by zero")
        return plain_parse(kind, body, server)

    engine = Puppet(lambda running: [token(number, "stop") for number in running])
    with serving(lambda: engine, wrong) as server:
        status, body, _ = server.ask("POST", "/v1/completions", {"prompt": [13]})
        assert status == 500 and body["error"]["type"] == "server_error" and "zero" not in body["error"]["message"]
        server.until(lambda: "ZeroDivisionError" in caplog.text)
        assert server.ask("POST", "/v1/completions", {"prompt": [5]})[0] == 200
        server.until(server.is_at_rest)


def test_a_stream_that_cannot_go_on_says_so(caplog):
    """Its last event is an error, and the server goes on."""

    class Broken(PlainReply):
        def add(self, index, delta):
            if self.ids[0]:
                raise ZeroDivisionError("by zero")
            return super().add(index, delta)

    def parse(kind, body, server):
        job = plain_parse(kind, body, server)
        job.reply = Broken(1)
        return job

    def step(running):
        time.sleep(0.02)
        return [token(number) for number in running]

    with serving(lambda: Puppet(step), parse) as server:
        status, text, _ = server.ask("POST", "/v1/completions", {"prompt": [5], "stream": True, "max_tokens": 400})
        *_, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        error = json.loads(last)["error"]
        assert status == 200 and error["type"] == "server_error" and "zero" not in last and "[DONE]" not in text
        server.until(server.is_at_rest)
        assert "ZeroDivisionError" in caplog.text and server.metric("smollm3_requests_failed_total") == 1


def ask_many(server, count: int) -> float:
    """Requests, some of which stream, are mistaken, or are left; what memory they leave."""

    def some(start: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        for i in range(start, start + count // 4):
            prompt = [5 + i % 100] * (1 + i % 60) if i % 10 else [999]
            body = {"prompt": prompt, "max_tokens": 1 + i % 8, "stream": i % 2 == 0}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            if i % 7:
                connection.getresponse().read()
            else:
                connection.close()
        connection.close()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: some(part * count // 4), range(4)))
    server.until(server.is_at_rest)
    return resident()


@pytest.mark.slow
@pytest.mark.parametrize("count", [pytest.param(2000, marks=FULL), pytest.param(10_000, marks=FULL)])
def test_memory_is_flat(server, count):
    before = ask_many(server, count // 4)
    assert ask_many(server, count - count // 4) - before < 20


@pytest.mark.slow
def test_memory_is_flat_whatever_comes_of_ten_thousand_requests():
    engine = Puppet(lambda running: [token(number, "stop") for number in running])
    with serving(lambda: engine) as server:
        before = ask_many(server, 2000)
        assert ask_many(server, 8000) - before < 10
