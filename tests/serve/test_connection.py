"""Heads that do not end, requests that do not arrive, readers that take nothing."""

import asyncio
import contextlib
import socket
import time

import pytest
from serving import Puppet, serving
from uvicorn.server import ServerState

from smollm3_jax.generation.requests import Delta
from smollm3_jax.serve import run
from smollm3_jax.serve.connection import HEAD_TOO_LARGE, MAX_HEAD, Connection

ids = tuple(range(2000))


@pytest.fixture
def server():
    def step(running):
        time.sleep(0.01)
        return [Delta(number, 0, ids, "", None, None, None) for number in running]

    with serving(lambda: Puppet(step)) as it:
        yield it


def rest(client: socket.socket) -> bytes:
    client.settimeout(20)
    content = b""
    with contextlib.suppress(ConnectionError):
        while more := client.recv(65536):
            content += more
    return content


def until(client: socket.socket, end: bytes) -> bytes:
    content = b""
    while end not in content:
        content += client.recv(4096)
    return content


def test_a_head_is_bounded(server):
    """S2."""
    client = server.connect()
    with contextlib.suppress(ConnectionError):
        client.sendall(b"GET /health HTTP/1.1\r\n")
        for i in range(MAX_HEAD // 100 + 50):
            client.sendall(f"X-{i}: {'x' * 100}\r\n".encode())
    assert rest(client).startswith(b"HTTP/1.1 431 ")
    client = server.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * (MAX_HEAD // 2) + b"\r\n\r\n")
    assert client.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("path, fields", [(b"/health", b"X: x\r\n" * 20_000), (b"/" + b"x" * 100_000, b"")])
def test_a_head_that_is_there_at_once_is_bounded(path, fields):
    """Whatever the reads are cut into: all of it may be in one."""

    class Transport(asyncio.Transport):
        written, closed = b"", False

        def write(self, data):
            self.written += data

        def close(self):
            self.closed = True

        def is_closing(self):
            return self.closed

    async def answer() -> tuple[bytes, bool]:
        config = run.config_of(lambda scope, receive, send: asyncio.sleep(0))
        config.load()
        connection, transport = Connection(config, ServerState(), {}), Transport()
        connection.connection_made(transport)
        connection.data_received(b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + fields + b"\r\n")
        connection.connection_lost(None)
        return transport.written, transport.closed

    assert asyncio.run(answer()) == (HEAD_TOO_LARGE, True)


@pytest.mark.parametrize("sent", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: loc"])
def test_a_head_that_does_not_come_is_not_awaited(server, monkeypatch, sent):
    monkeypatch.setattr(Connection, "arrival_seconds", 0.2)
    client = server.connect(sent)
    assert rest(client) == b""


def test_a_connection_that_trickles_ends(server, monkeypatch):
    """S2."""
    monkeypatch.setattr(Connection, "arrival_seconds", 0.5)
    client = server.connect()
    begin = time.monotonic()
    with contextlib.suppress(ConnectionError):
        client.sendall(b"GET /health HTTP/1.1\r\n")
        while time.monotonic() < begin + 20:
            client.sendall(b"X: x\r\n")
            time.sleep(0.05)
    assert time.monotonic() - begin < 10


def test_a_reader_that_takes_nothing_is_cut_off_alone(server, monkeypatch):
    """S13."""
    monkeypatch.setattr(Connection, "slow_reader_seconds", 2.0)
    idle = server.open({"prompt": [5], "stream": True}, receive_buffer=4096)
    reader = server.open({"prompt": [5], "stream": True})
    begin, taken = time.monotonic(), 0
    name = 'smollm3_requests_cancelled_total{cause="slow_reader"}'
    while server.metric(name) == 0:
        assert time.monotonic() < begin + 30
        taken += len(reader.recv(1 << 20))
    for _ in range(20):
        assert reader.recv(1 << 20)
    server.until(lambda: len(server.service.worker.tickets) == 1)
    idle.close()
    reader.close()
    server.until(server.is_at_rest)
    assert server.metric(name) == 1 and taken


def test_a_reader_that_is_slow_is_not_cut_off(server, monkeypatch):
    monkeypatch.setattr(Connection, "slow_reader_seconds", 0.4)
    client = server.open({"prompt": [5], "stream": True}, receive_buffer=4096)
    time.sleep(0.2)
    for _ in range(20):
        assert client.recv(200_000)
        time.sleep(0.05)
    assert server.metric('smollm3_requests_cancelled_total{cause="slow_reader"}') == 0


def test_connections_are_kept_and_many_requests_go_over_one(server):
    client = server.connect()
    client.settimeout(20)
    for _ in range(3):
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b'"ok"' in until(client, b"}")
    client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b'"ok"' in until(client, b'"ready"')
