"""A process of `smollm3 serve`, ways to ask it, and what has to be as it was."""

import contextlib
import dataclasses
import http.client
import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .common import Soak, log_file, no_reader, resident, wait_for

SLOTS, QUEUE, CONTEXT = 2, 4, 512
PATIENCE = 600.0  # seconds that an answer, a start or an end may take
AT_REST = 15.0  # seconds after which nothing may be left of what is over
GROWTH = 150.0  # MB that a server may grow by once it has answered each kind of request
PROMPT = "All that glisters is not gold; often have you heard that told. " * 4
PROBES = (
    ("/v1/completions", {"prompt": PROMPT, "max_tokens": 24, "temperature": 1.0, "seed": 7}),
    ("/v1/completions", {"prompt": "w5 w6", "max_tokens": 8, "temperature": 1.0, "seed": 8, "n": 2, "logprobs": 2}),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "w7 w8"}], "max_tokens": 16, "temperature": 1.0, "seed": 9},
    ),
)
LONG = {"prompt": "w3 w4", "max_tokens": 300, "ignore_eos": True, "seed": 1}
COMPILED = "compilations_total"
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


@dataclasses.dataclass
class Server:
    """A process that serves, and ways to ask it.

    wanted: what it has to answer to PROBES; base: descriptors, threads, MB and programs of when it was warm.
    """

    soak: Soak
    log: Path
    process: subprocess.Popen
    port: int
    wanted: list[Any] = dataclasses.field(default_factory=list)
    base: dict[str, float] = dataclasses.field(default_factory=dict)

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, path, body or None, {"Content-Type": "application/json"} | headers)
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, content, {name.lower(): value for name, value in answer.getheaders()}

    def metrics(self) -> dict[str, float]:
        lines = self.ask("GET", "/metrics")[1].decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    def metric(self, name: str) -> float:
        return self.metrics()[f"smollm3_{name}"]

    def probe(self) -> list[Any]:
        """What the same seeded requests are answered with, without what names an answer or says when it was."""
        found = []
        for path, body in PROBES:
            status, content, _ = self.ask("POST", path, json.dumps(body).encode())
            found.append([status, json.loads(content).get("choices")])
        return found

    def connect(self, sent: bytes, small: bool = False) -> socket.socket:
        client = socket.socket()
        if small:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", self.port))
        client.sendall(sent)
        return client

    def open(self, more: dict[str, Any], small: bool = False) -> socket.socket:
        """A connection on which a long answer is on its way."""
        return self.connect(request(LONG | more), small)

    def counts(self) -> dict[str, float]:
        """What has to come back to where it was."""
        folder = Path(f"/proc/{self.process.pid}")
        return {"descriptors": len(os.listdir(folder / "fd")), "threads": len(os.listdir(folder / "task"))}


def request(body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def leave(client: socket.socket, reset: bool = False) -> None:
    """As a process ends that is killed; reset: the other side is told so at once."""
    if reset:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@contextlib.contextmanager
def started(soak: Soak, number: int, kind: str, wait: bool = True) -> Iterator[Server]:
    """A server; those of odd numbers have pages. Its log is on the small disk, or nobody reads it."""
    log, ready = soak.logs.folder / f"serve{number}.log", soak.out / "ready.txt"
    words = ["serve", soak.model, "--port", "0", "--slots", SLOTS, "--context", CONTEXT, "--max-queue", QUEUE]
    words += ["--drain-timeout", 5, "--log-requests", "--name", "soaked"]
    words += ["--cache-tokens", CONTEXT + 256] if number % 2 else []
    with no_reader() if kind == "log without a reader" else log_file(log) as stderr, log_file(ready) as stdout:
        process = soak.start(*map(str, words), stdout=stdout, stderr=stderr)
    try:
        if wait and not wait_for(lambda: b"\n" in ready.read_bytes() or process.poll() is not None, PATIENCE):
            soak.found(f"a server was not ready after {PATIENCE:.0f} s", log)
        said = ready.read_text()
        if wait and not said.startswith("ready http://"):
            soak.found(f"a server has said {said!r} where it is ready, exit code {process.poll()}", log)
            yield Server(soak, log, process, 0)
            return
        yield Server(soak, log, process, int(said.strip().rpartition(":")[2] or 0) if wait else 0)
    finally:
        process.kill()
        process.wait()
        log.unlink(missing_ok=True)


def is_at_rest(server: Server) -> bool:
    return wait_for(lambda: not any(server.metric(name) for name in GAUGES), AT_REST, every=0.05)


def same(server: Server, when: str) -> None:
    """A seeded request is answered, whatever is there beside it, with the bits of before."""
    path, body = PROBES[0]
    status, content, _ = server.ask("POST", path, json.dumps(body).encode())
    found = [status, json.loads(content).get("choices")]
    server.soak.check(found == server.wanted[0], f"{when}: {found}", server.log)


def as_before(server: Server, what: str) -> None:
    soak, base = server.soak, server.base
    if server.process.poll() is not None:
        soak.found(f"the server has ended with {server.process.returncode}: {what}", server.log)
        return
    soak.check(is_at_rest(server), f"something is left in it after {AT_REST:.0f} s: {what}", server.log)
    for path in ("/health", "/ready"):
        status = server.ask("GET", path)[0]
        soak.check(status == 200, f"{path} is {status}: {what}", server.log)
    soak.check(server.probe() == server.wanted, f"other answers to the same requests: {what}", server.log)
    for name in ("descriptors", "threads"):
        there = wait_for(lambda name=name: server.counts()[name] <= base[name] + 2, AT_REST, every=0.05)
        soak.check(there, f"{name}: {server.counts()[name]:.0f}, {base[name]:.0f} before: {what}", server.log)
    compiled, memory = server.metric(COMPILED), resident(server.process.pid)
    soak.check(compiled == base["compilations"], f"it has compiled: {what}", server.log)
    soak.check(memory < base["MB"] + GROWTH, f"{memory:.0f} MB, {base['MB']:.0f} before: {what}", server.log)
    said = server.log.read_text(errors="replace") if server.log.exists() else ""
    soak.check("Traceback" not in said, f"a traceback: {what}", server.log)


def children_of(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]
