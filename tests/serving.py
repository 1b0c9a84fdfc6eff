"""A server in a thread, on a real socket, with a tiny model or an engine that does what a test says."""

import asyncio
import contextlib
import dataclasses
import functools
import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from said import deltas, ids_of
from tiny import BASE, talking_checkpoint

import smollm3_jax as s3
from smollm3_jax.config import GenerationConfig, ModelConfig
from smollm3_jax.generation.engine import Engine
from smollm3_jax.generation.requests import Delta, Request
from smollm3_jax.generation.sampling import SamplingParams
from smollm3_jax.serve.app import Service, Settings
from smollm3_jax.serve.job import DONE, Event, Job, Server
from smollm3_jax.serve.metrics import Metrics
from smollm3_jax.serve.run import config_of, listen, run
from smollm3_jax.serve.worker import Worker
from smollm3_jax.tokenizer import tokenizer_of

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class PlainReply:
    """Token ids, and nothing of OpenAI's forms: what the service does with a reply, whatever that is."""

    def __init__(self, samples: int):
        self.ids: list[list[int]] = [[] for _ in range(samples)]

    def begin(self) -> list[Event]:
        return [(None, {"begin": True})]

    def add(self, index: int, delta: Delta) -> list[Event]:
        self.ids[delta.sample] += delta.token_ids
        return [(None, {"index": index, "sample": delta.sample, "ids": list(delta.token_ids)})]

    def end(self) -> list[Event]:
        return [DONE]

    def body(self) -> dict[str, Any]:
        return {"ids": self.ids}


def plain_parse(kind: str, body: Any, server: Server) -> Job:
    """{"prompt": ids, "max_tokens": N, "n": N, "stream": bool}"""
    params = SamplingParams(max_new_tokens=body.get("max_tokens", 4), n=body.get("n", 1), ignore_eos=True)
    request = Request(body["prompt"], params)
    return Job(kind, [request], body.get("stream", False), PlainReply(params.n), body.get("cache_salt", ""))


@dataclasses.dataclass
class Running:
    """A server that runs, and ways to ask it."""

    service: Service
    port: int
    loop: asyncio.AbstractEventLoop
    stop: Callable[[], None]
    thread: threading.Thread
    said: list[str]
    failures: list[BaseException]
    clients: list[socket.socket] = dataclasses.field(default_factory=list)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """Status, body (decoded, if it is JSON) and headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            kind = {"Content-Type": "application/json"} if body is not None else {}
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, content, kind | named)
            answer = connection.getresponse()
            text = answer.read()
            own = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, json.loads(text) if "json" in own.get("content-type", "") else text.decode(), own
        finally:
            connection.close()

    def connect(self, sent: bytes = b"", receive_buffer: int | None = None) -> socket.socket:
        """A connection, for the test to read from or to close."""
        client = socket.socket()
        self.clients.append(client)
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(60)
        client.connect(("127.0.0.1", self.port))
        client.sendall(sent)
        return client

    def open(self, body: Any, receive_buffer: int | None = None) -> socket.socket:
        """One on which a request is on its way."""
        content = json.dumps(body).encode()
        return self.connect(HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content, receive_buffer)

    def metric(self, name: str) -> float:
        text = self.ask("GET", "/metrics")[1]
        return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[-1])

    def until(self, holds: Callable[[], bool], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, "it did not come to hold"
            time.sleep(0.005)

    def is_at_rest(self) -> bool:
        """Whether nothing of any request is left: no ticket, no task, no slot."""
        worker, engine = self.service.worker, self.service.worker.engine
        at_rest = not worker.tickets and not self.service.answering and engine is not None and engine.is_idle
        return at_rest and len(getattr(engine, "_free", "")) == getattr(engine, "slots", 0) and not engine.usage


@contextlib.contextmanager
def serving(
    make: Callable[[], Any],
    parse: Callable[..., Job] = plain_parse,
    *,
    server: Server | None = None,
    stall: float = 60.0,
    drain_timeout: float = 20.0,
    wait: bool = True,
    **settings: Any,
) -> Iterator[Running]:
    """A server in a thread; `wait`: until it is ready."""
    own, said, failures, found = listen("127.0.0.1", 0), [], [], threading.Event()
    running: list[Running] = []

    async def main() -> None:
        options: dict[str, Any] = {"slots": 4, "max_queue": 8, "max_queue_tokens": 1000} | settings
        service = Service(Worker(make, Metrics(), stall), server or plain_server(), parse, Settings(**options))
        loop, stop = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            with contextlib.suppress(RuntimeError):  # it has ended
                loop.call_soon_threadsafe(stop.set)

        running.append(Running(service, own.getsockname()[1], loop, end, thread, said, failures))
        found.set()
        await run(service, own, say=said.append, drain_timeout=drain_timeout, stop=stop)

    def body() -> None:
        try:
            with asyncio.Runner(loop_factory=config_of(None).get_loop_factory()) as runner:
                runner.run(main())
        except BaseException as error:
            failures.append(error)
        finally:
            found.set()

    thread = threading.Thread(target=body)
    thread.start()
    try:
        assert found.wait(20) and running, failures
        it = running[0]
        if wait:
            it.until(lambda: bool(said) or bool(failures) or it.service.worker.failure is not None, 200)
        yield it
    finally:
        for it in running:
            it.stop()
            for client in it.clients:
                client.close()
        thread.join(30)
        if running:
            running[0].service.worker.stop(5)
            running[0].service.pool.shutdown()
            running[0].service.answers.shutdown()
        own.close()


def plain_server() -> Server:
    config = ModelConfig.from_hf(BASE)
    nothing: Any = None
    return Server("tiny", nothing, config, GenerationConfig(), 512)


class Puppet:
    """An engine whose steps are the test's: `step_with` gets the numbers that run, and gives deltas or raises."""

    slots, capacity, steps, prefilling, prefixes, is_filling = 4, 512, 4, None, None, False
    usage, preemptions = None, 0

    def __init__(self, step_with: Callable[[list[int]], list[Delta]]):
        self.running: dict[int, Request] = {}
        self.step_with, self.closed, self._number = step_with, False, 0
        self._free = range(4)

    @property
    def is_idle(self) -> bool:
        return not self.running

    @property
    def has_room(self) -> bool:
        return True

    def submit(self, request: Request) -> int:
        self._number += 1
        self.running[self._number] = request
        return self._number

    def cancel(self, number: int) -> bool:
        return self.running.pop(number, None) is not None

    def step(self) -> list[Delta]:
        deltas = self.step_with(list(self.running))
        for delta in deltas:
            if delta.finish_reason:
                del self.running[delta.request]
        return deltas

    def close(self) -> None:
        self.closed = True


def resident() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def token(number: int, finish: str | None = None) -> Delta:
    return Delta(number, 0, (7,), "w7", None, None, finish)


@functools.cache
def tiny_model() -> Any:
    """A tiny model with random weights that knows 160 words, and a template."""
    with tempfile.TemporaryDirectory() as folder:
        model = s3.from_pretrained(talking_checkpoint(Path(folder) / "tiny"))
        assert tokenizer_of(model) is not None
    return model


def tiny_engine(**options: Any) -> Engine:
    own: dict[str, Any] = {"slots": 4, "context": 512}
    return Engine(tiny_model(), **(own | options))


def warm_engine(**options: Any) -> Engine:
    engine = tiny_engine(**({"piece_sizes": (16, 64), "prefix_tokens": 512} | options))
    engine.warm_up()
    return engine


def tiny_server() -> Server:
    model = tiny_model()
    tokenizer = tokenizer_of(model)
    assert tokenizer is not None
    return Server("tiny", tokenizer, model.config, model.generation_config, 512)


class Speaker(Puppet):
    """An engine that answers each request with a text, a token a step, with log-probabilities where asked.

    Args:
      says: the text that a request's sample is answered with; where it has no end, "length" is its finish.
      pace: seconds a step.
    """

    def __init__(self, server: Server, says: Callable[[Request, int], str], pace: float = 0.0):
        super().__init__(lambda running: [])
        self._server, self._says, self._pace = server, says, pace
        self._left: dict[int, list[list[Delta]]] = {}  # by the request, of each sample

    def submit(self, request: Request) -> int:
        number = super().submit(request)
        self._left[number] = [self._answer(number, request, sample) for sample in range(request.params.n)]
        return number

    def step(self) -> list[Delta]:
        time.sleep(self._pace)
        found = [sample.pop(0) for number in self.running for sample in self._left[number] if sample]
        for number in [number for number in self.running if not any(self._left[number])]:
            self.cancel(number)
        return found

    def _answer(self, number: int, request: Request, sample: int) -> list[Delta]:
        ids = ids_of(self._server.tokenizer, self._says(request, sample))
        found = deltas(self._server, request, ids, range(1, len(ids)), sample)
        found = [dataclasses.replace(delta, request=number) for delta in found]
        found[-1] = dataclasses.replace(found[-1], finish_reason=found[-1].finish_reason or "length")
        if request.params.prompt_logprobs and sample == 0:
            rest = len(request.prompt) - 1
            told = {"prompt_logprobs": (-1.0,) * rest, "prompt_top": ((),) * rest}
            found[0] = dataclasses.replace(found[0], **told)
        return found


# --- the command ------------------------------------------------------------------------------------------

# A few tokens take longer to compile for than to run.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}


@contextlib.contextmanager
def started(model: object, *options: str, **variables: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The command, and its port, when it is ready."""
    command = [sys.executable, "-m", "smollm3_jax", "serve", str(model), "--port", "0", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | QUICK | variables, **pipes) as process:
        try:
            line = next_line(process.stdout)
            assert line.startswith("ready http://127.0.0.1:"), (line, process.stderr and process.stderr.read())
            yield process, int(line.rpartition(":")[2])
        finally:
            process.kill()


def next_line(file: IO[str] | None, word: str = "") -> str:
    """The next line, or the next one that holds a word."""
    assert file is not None
    return next((line for line in file if word in line), "")
