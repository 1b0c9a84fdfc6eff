"""What becomes of a request whose client leaves, whose engine fails or stalls, and of the places that it held."""

import dataclasses
import functools
import itertools
import json
import socket
import threading
import time

import pytest
from serving import HEAD, PlainReply, Puppet, plain_parse, resident, serving, tiny_engine, token

import smollm3_jax as s3
from smollm3_jax.generation.device_loop import MAX_STEPS
from smollm3_jax.generation.requests import Request
from smollm3_jax.serve import worker

BODY = {"prompt": [5, 6, 7], "max_tokens": 400}


@pytest.fixture(scope="module")
def server():
    made = functools.partial(tiny_engine, slots=2, piece_sizes=(16, 64), prefix_tokens=512)
    with serving(made, slots=2, max_queue=6, max_queue_tokens=5000) as it:
        assert it.ask("POST", "/v1/completions", BODY | {"max_tokens": 20})[0] == 200  # all is compiled
        yield it


def read_some(client: socket.socket) -> bytes:
    content = b""
    while b"ids" not in content and b" 429 " not in content:  # of many that come and go at once, some are refused
        content += client.recv(4096) or pytest.fail("the server has closed the connection")
    return content


def cut(server, times: int) -> None:
    """Connections that leave: while their body is on its way, queued, in their prompt, decoding; streaming and not."""
    before = server.metric('smollm3_requests_cancelled_total{cause="disconnect"}')
    for i in range(times):
        body = {"prompt": [5 + i % 50] * (3, 450)[i % 2], "max_tokens": 40, "stream": i % 3 == 0, "n": 1 + i % 2}
        clients = [server.open(body) for _ in range(1 + i % 4)]
        match i % 5:
            case 0:
                time.sleep(0.002 * (i % 7))
            case 1 if body["stream"]:
                read_some(clients[0])
            case 2:
                clients[0].shutdown(socket.SHUT_WR)
            case 3:
                clients.append(half_a_request(server))
        for client in clients:
            client.close()
        server.until(lambda: server.service.worker.samples <= 6)
    server.until(server.is_at_rest)
    assert server.metric('smollm3_requests_cancelled_total{cause="disconnect"}') > before


def half_a_request(server) -> socket.socket:
    client = server.connect()
    client.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"prompt"')
    return client


def is_as_it_was(server) -> None:
    assert server.ask("POST", "/v1/completions", BODY | {"max_tokens": 4})[0] == 200
    gauges = [server.metric(f"smollm3_{name}") for name in ("num_requests_running", "num_requests_waiting")]
    assert gauges == [0, 0] and server.metric("smollm3_kv_cache_usage_perc") == 0
    assert server.service._in_pool == 0
    server.until(lambda: tasks(server) <= 6)
    server.until(lambda: threading.active_count() < 12)


def tasks(server) -> int:
    import asyncio

    return len(asyncio.all_tasks(server.loop))


def test_connections_that_are_cut_leave_nothing(server):
    """S12."""
    cut(server, 40)
    is_as_it_was(server)


@pytest.mark.slow
def test_a_thousand_connections_that_are_cut_leave_nothing(server):
    """S12: nor memory; what is kept of prompts is as whole as before, and gives the same answers."""
    asked = {"prompt": [9] * 200, "max_tokens": 8}
    cut(server, 200)  # of one to four connections each: threads and caches are there then
    before, said = resident(), server.ask("POST", "/v1/completions", asked)[1]
    cut(server, 240)
    is_as_it_was(server)
    hits = server.metric("smollm3_prefix_cache_hits_total")
    assert [server.ask("POST", "/v1/completions", asked)[1] for _ in range(2)] == [said, said]
    assert server.metric("smollm3_prefix_cache_hits_total") > hits and resident() - before < 20


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_for_others(server, stream):
    """S12, C4."""
    name = 'smollm3_requests_cancelled_total{cause="disconnect"}'
    before, tokens = server.metric(name), server.metric("smollm3_generation_tokens_total")
    clients = [server.open(BODY | {"stream": stream}) for _ in range(2)]
    server.until(lambda: server.metric("smollm3_num_requests_running") == 2)
    for client in clients:
        client.close()
    server.until(server.is_at_rest)
    assert server.metric(name) == before + 2
    assert server.metric("smollm3_generation_tokens_total") - tokens < 2 * 400


def test_a_full_queue_is_told_at_once(server):
    """S14, C3."""
    clients = [server.open(BODY | {"n": 4}) for _ in range(2)]  # 2 slots and 6 places
    server.until(lambda: server.service.worker.samples == 8)
    before = server.metric('smollm3_requests_rejected_total{reason="queue_full"}')
    status, body, headers = server.ask("POST", "/v1/completions", BODY)
    assert status == 429 and int(headers["retry-after"]) > 0 and body["error"]["code"] == "queue_full"
    assert server.metric('smollm3_requests_rejected_total{reason="queue_full"}') == before + 1
    for client in clients:
        client.close()
    server.until(server.is_at_rest)
    status, body, _ = server.ask("POST", "/v1/completions", BODY | {"n": 9})
    message, param = body["error"]["message"], body["error"]["param"]
    assert (status, param) == (400, "n") and "at most 8" in message and "--max-queue" in message


def test_prompts_that_wait_are_bounded_by_their_tokens():
    stop = threading.Event()
    engine = Puppet(lambda running: [] if not stop.wait(0.01) else [token(number, "stop") for number in running])
    with serving(lambda: engine, max_queue_tokens=100) as server:
        clients = [server.open({"prompt": [1] * 80})]  # alone it may be as long as it likes
        server.until(lambda: server.service.worker.waiting_tokens == 80)
        status, body, _ = server.ask("POST", "/v1/completions", {"prompt": [1] * 30})
        assert status == 429 and body["error"]["code"] == "queue_tokens"
        clients.append(server.open({"prompt": [1] * 10}))
        server.until(lambda: server.service.worker.waiting_tokens == 90)
        stop.set()
        server.until(server.is_at_rest)
        for client in clients:
            client.close()


def test_prompts_of_a_list_wait_until_each_has_begun():
    """The first one's way into a slot makes no room for as many as the rest."""

    def parse(kind, body, server):
        job = plain_parse(kind, {**body, "prompt": body["prompt"][0]}, server)
        job.requests = [dataclasses.replace(job.requests[0], prompt=prompt) for prompt in body["prompt"]]
        return job

    ends = threading.Event()

    def step(running):  # prompts begin one by one, and the first has tokens
        time.sleep(0.005)
        return [token(number, "stop" if ends.is_set() else None) for number in running[: 99 if ends.is_set() else 1]]

    with serving(lambda: Puppet(step), parse, max_queue_tokens=100) as server:
        server.open({"prompt": [[1] * 20, [2] * 80], "stream": True})
        server.until(lambda: server.metric("smollm3_num_requests_running") == 1)
        assert server.service.worker.waiting_tokens == 80
        status, body, _ = server.ask("POST", "/v1/completions", {"prompt": [[1] * 30]})
        assert status == 429 and body["error"]["code"] == "queue_tokens"
        server.service.worker.engine.prefilling = 2  # the second of them
        server.until(lambda: server.service.worker.waiting_tokens == 0)
        server.service.worker.engine.prefilling = None
        ends.set()
        server.until(server.is_at_rest)


def test_an_engine_that_fails_fails_all_requests():
    """S16, C1."""
    begun = threading.Event()

    def step(running):
        if len(running) < 3:
            return [token(number) for number in running]
        assert begun.wait(20)
        raise RuntimeError("a chip has failed")

    with serving(lambda: Puppet(step)) as server:
        stream = server.open(BODY | {"stream": True})
        read_some(stream)
        others = [server.open(BODY), server.open(BODY)]
        server.until(lambda: len(server.service.worker.tickets) == 3)
        begun.set()
        told = b"".join(iter(lambda: stream.recv(4096), b""))
        assert b'data: {"error":' in told and b"[DONE]" not in told
        for client in others:
            assert client.recv(4096).startswith(b"HTTP/1.1 500 ")
            client.close()
        server.thread.join(20)
        assert str(server.service.worker.failure) == "a chip has failed" and not server.failures
        stream.close()


@pytest.mark.parametrize("how", ["stuck", "empty", "undelivered"])
def test_a_stalled_engine_is_seen_by_what_it_delivers(how, caplog):
    """C1: A thread that hangs, one that steps without a token, and one whose tokens do not arrive."""
    hold, steps = threading.Event(), itertools.count()

    def step(running):
        next(steps)
        if how == "stuck":
            hold.wait(30)
        time.sleep(0.001)
        return [] if how == "empty" else [token(number) for number in running]

    with serving(lambda: Puppet(step), stall=1.0) as server:
        if how == "undelivered":
            server.service.worker._deliver = lambda step: None
        client = server.open({"prompt": [5], "max_tokens": 400})
        time.sleep(0.3)
        assert server.ask("GET", "/health")[0] == 200
        for _ in range(7):  # new ones do not make it look alive
            server.open({"prompt": [5], "max_tokens": 400})
            time.sleep(0.3)
            if server.service.worker.failure is not None:
                break
        assert server.service.worker.failure is not None
        assert client.recv(4096).startswith(b"HTTP/1.1 500 ")
        assert "no token" in str(server.service.worker.failure)
        server.thread.join(20)
        assert not server.thread.is_alive() and next(steps) > 0
        hold.set()


def test_a_process_that_was_stopped_has_not_stalled():
    """As by `docker pause`, for longer than a token may take: here neither the event loop nor the engine runs."""
    going, woke = threading.Event(), threading.Event()

    def step(running):
        going.wait(20)
        time.sleep(0.01)
        return [token(number) for number in running]

    def stopped():
        time.sleep(1.2)
        woke.set()

    going.set()
    with serving(lambda: Puppet(step), stall=0.8) as server:
        stream = server.open(BODY | {"stream": True, "max_tokens": 400})
        read_some(stream)
        going.clear()
        server.loop.call_soon_threadsafe(stopped)
        assert woke.wait(20)
        time.sleep(0.05)
        assert server.ask("GET", "/health")[0] == 200
        going.set()
        read_some(stream)
        assert server.service.worker.failure is None


def test_each_prompt_of_a_list_has_time_to_go_in():
    """Long after the first of them has been answered: the second has as many seconds as its tokens need."""

    def parse(kind, body, server):
        job = plain_parse(kind, {**body, "prompt": body["prompt"][0]}, server)
        job.requests = [dataclasses.replace(job.requests[0], prompt=prompt) for prompt in body["prompt"]]
        job.reply.ids = [[]]
        return job

    def step(running):
        time.sleep(0.01 if 1 in running else 1.0)
        return [token(running[0], "stop")]

    with serving(lambda: Puppet(step), parse, stall=0.3) as server:
        assert server.ask("POST", "/v1/completions", {"prompt": [[1], [2] * 100]})[0] == 200
        assert server.service.worker.failure is None


@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_that_the_engine_gives_up_fails_alone(n):
    """S16: Whole it is an error with a status of its own; of a stream the error is the last event. Others go on."""

    def step(running):
        time.sleep(0.005)
        failing = [number for number in running if len(engine.running[number].prompt) == 3]
        begun.extend(failing)
        return [token(number, "error" if begun.count(number) > 3 else None) for number in failing] + [
            token(number, "stop") for number in running if number not in failing
        ]

    begun, engine = list[int](), Puppet(step)
    with serving(lambda: engine) as server:
        body = {"prompt": [5, 6, 7], "n": n}
        status, told, _ = server.ask("POST", "/v1/completions", body)
        assert status == 500 and told["error"]["type"] == "server_error" and told["error"]["code"] == "answer_failed"
        status, text, _ = server.ask("POST", "/v1/completions", body | {"stream": True})
        events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n") if event]
        assert status == 200 and events[-1] == told and "ids" in events[1] and "[DONE]" not in text
        assert server.ask("POST", "/v1/completions", {"prompt": [5]})[0] == 200
        server.until(server.is_at_rest)
        assert server.metric("smollm3_requests_failed_total") == 2 and engine.is_idle


def test_what_the_engine_refuses_is_the_clients_mistake(server):
    for stream in (False, True):
        status, body, _ = server.ask("POST", "/v1/completions", {"prompt": [5, 999], "stream": stream})
        assert status == 400 and "999" in body["error"]["message"]
    server.until(server.is_at_rest)


def test_a_request_that_the_engine_cannot_take_fails_alone(caplog):
    class Choosy(Puppet):
        def submit(self, request):
            if request.prompt == [13]:
                raise ZeroDivisionError
            return super().submit(request)

    with serving(lambda: Choosy(lambda running: [token(number, "stop") for number in running])) as server:
        assert server.ask("POST", "/v1/completions", {"prompt": [13]})[0] == 500
        assert server.ask("POST", "/v1/completions", {"prompt": [12]})[0] == 200
        assert server.metric("smollm3_requests_failed_total") == 1
        assert server.ask("POST", "/v1/completions", {"prompt": [1], "n": 100})[0] == 400
        assert server.metric("smollm3_requests_failed_total") == 1
        assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("seconds, signs", [(15.0, 0), (0.05, 1)])
def test_what_is_held_back_has_signs_of_life_that_are_few(seconds, signs):
    """Tokens that are perhaps the beginning of a call are no events, and no comments either."""

    class Holding(PlainReply):
        def add(self, index, delta):
            return super().add(index, delta) if delta.finish_reason else []

    def parse(kind, body, server):
        job = plain_parse(kind, body, server)
        job.reply = Holding(1)
        return job

    def step(running):
        time.sleep(0.01)
        return [token(number, "stop" if next(steps) == 30 else None) for number in running]

    steps = itertools.count()
    with serving(lambda: Puppet(step), parse, keep_alive=seconds) as server:
        status, text, _ = server.ask("POST", "/v1/completions", {"prompt": [5], "stream": True})
        assert status == 200 and text.endswith("data: [DONE]\n\n") and '"ids":[7]' in text
        assert signs <= text.count(": keep-alive") <= 10 * signs


def test_a_long_wait_has_signs_of_life():
    hold = threading.Event()
    engine = Puppet(lambda running: [token(number, "stop") for number in running] if hold.wait(0.02) else [])
    with serving(lambda: engine, keep_alive=0.05) as server:
        client = server.open({"prompt": [5], "stream": True})
        content = b""
        while content.count(b": keep-alive\n\n") < 2:
            content += client.recv(4096)
        assert content.startswith(b"HTTP/1.1 200 ") and b"begin" in content
        hold.set()
        while b"[DONE]" not in content:
            content += client.recv(4096)
        assert json.loads(content.split(b"data: ")[-2].split(b"\n")[0])["ids"] == [7]
        client.close()


def test_slots_are_filled_before_many_tokens_come_at_a_time():
    """Five answers in four slots: a call brings one token while prompts wait for free slots, with all slots taken most,
    and else few."""
    engine = tiny_engine(slots=4)
    assert worker._steps(engine) == worker.FEW_STEPS
    for first in range(5):
        engine.submit(Request([5 + first, 6], s3.SamplingParams(max_new_tokens=40, ignore_eos=True)))
    steps = []
    while not engine.is_idle:
        steps.append(worker._steps(engine))
        engine.steps = steps[-1]
        engine.step()
    assert steps[:5] == [1, 1, 1, 1, MAX_STEPS]
    assert steps[-1] == worker.FEW_STEPS and steps.count(1) == 5
