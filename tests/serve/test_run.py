"""A server from its first breath to its last."""

import errno
import json
import socket
import threading
import time

import pytest
from serving import Puppet, plain_parse, plain_server, serving, token

from smollm3_jax.errors import OptionError, OutOfMemoryError
from smollm3_jax.serve import run
from smollm3_jax.serve.app import Service, Settings
from smollm3_jax.serve.metrics import Metrics
from smollm3_jax.serve.worker import Worker

BODY = {"prompt": [5], "stream": True}


def step(running):
    time.sleep(0.005)
    return [token(number) for number in running]


def read_until(client: socket.socket, end: bytes) -> bytes:
    content = b""
    while end not in content:
        more = client.recv(4096)
        assert more, content
        content += more
    return content


def test_it_listens_at_once_and_says_that_it_is_ready_when_it_is():
    """S18."""
    made = threading.Event()

    def make():
        assert made.wait(20)
        return Puppet(step)

    with serving(make, wait=False) as server:
        assert server.ask("GET", "/ready")[:2] == (503, {"status": "loading"})
        assert server.ask("GET", "/health")[0] == 200
        status, body, headers = server.ask("POST", "/v1/completions", BODY)
        assert (status, body["error"]["code"]) == (503, "loading") and "retry-after" in headers
        assert server.metric('smollm3_requests_rejected_total{reason="loading"}') == 1 and not server.said
        made.set()
        server.until(lambda: bool(server.said))
        assert server.said == [f"ready http://127.0.0.1:{server.port}"]
        assert server.ask("GET", "/ready")[0] == 200


def test_a_drain_lets_streams_end_and_takes_nothing_new():
    """S17."""
    ends = threading.Event()

    def step(running):
        time.sleep(0.005)
        return [token(number, "stop" if ends.is_set() else None) for number in running]

    with serving(lambda: Puppet(step)) as server:
        client, plain = server.open(BODY), server.open({"prompt": [6]})
        read_until(client, b"ids")
        server.until(lambda: len(server.service.worker.tickets) == 2)
        server.stop()
        server.until(lambda: server.service.draining)
        assert server.ask("GET", "/ready")[:2] == (503, {"status": "draining"})
        assert server.ask("GET", "/health")[0] == 200
        status, body, headers = server.ask("POST", "/v1/completions", BODY)
        assert (status, body["error"]["code"]) == (503, "draining") and "retry-after" in headers
        ends.set()
        assert read_until(client, b"[DONE]") and b'{"ids":[[' in read_until(plain, b"]]}")
        server.thread.join(20)
        assert not server.thread.is_alive() and server.service.worker.failure is None
        with pytest.raises(OSError):
            server.connect()
    assert server.service.worker.engine.closed and not server.failures


def test_what_does_not_end_in_time_is_ended():
    """S17."""
    with serving(lambda: Puppet(step), drain_timeout=0.2) as server:
        client = server.open(BODY)
        read_until(client, b"ids")
        server.stop()
        told = b"".join(iter(lambda: client.recv(4096), b""))
        assert b'data: {"error":' in told and b'"draining"' in told and b"[DONE]" not in told
        server.thread.join(20)
        assert not server.thread.is_alive() and server.service.worker.failure is None
        assert server.service.metrics.cancelled.labels("drain")._value.get() == 1


def service_of(make) -> Service:
    return Service(Worker(make, Metrics()), plain_server(), plain_parse, Settings(4, 8, 1000))


def test_an_engine_that_cannot_be_made_ends_the_server():
    def make():
        raise OutOfMemoryError("too little memory")

    own, said = run.listen("127.0.0.1", 0), []
    with pytest.raises(OutOfMemoryError):
        run.serve(lambda: service_of(make), own, say=said.append, drain_timeout=1)
    assert said == []


def test_a_failed_engine_ends_the_server_with_its_error():
    """C1."""

    def step(running):
        raise RuntimeError("a chip has failed")

    own, said = run.listen("127.0.0.1", 0), []

    def client() -> None:
        while not said:
            time.sleep(0.01)
        content = json.dumps({"prompt": [5]}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
        with socket.create_connection(own_address) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + content)
            said.append(connection.recv(4096))

    own_address = own.getsockname()
    thread = threading.Thread(target=client)
    thread.start()
    with pytest.raises(RuntimeError, match="a chip has failed"):
        run.serve(lambda: service_of(lambda: Puppet(step)), own, say=said.append, drain_timeout=1)
    thread.join(20)
    assert said[1].startswith(b"HTTP/1.1 500 ")


def test_an_address_that_cannot_be_had(monkeypatch):
    """S18."""
    with run.listen("127.0.0.1", 0) as own:
        port = own.getsockname()[1]
        with pytest.raises(OptionError, match=f"--port {port} is in use by another program"):
            run.listen("127.0.0.1", port)
    with pytest.raises(OptionError, match=r"--host 192\.0\.2\.1 is no address of this machine"):
        run.listen("192.0.2.1", 0)
    with pytest.raises(OptionError, match=r"--host no\.such\.name\.invalid is no name"):
        run.listen("no.such.name.invalid", 0)
    with pytest.raises(OptionError, match="--port is 70000; it must be from 0"):
        run.listen("127.0.0.1", 70000)

    def refuse(self, address):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(OptionError, match=r"--port 80 is for the administrator"):
        run.listen("127.0.0.1", 80)


def test_a_name_with_two_kinds_of_addresses_is_ipv4(monkeypatch):
    four, six = (socket.AF_INET, ("127.0.0.1", 0)), (socket.AF_INET6, ("::1", 0, 0, 0))
    found = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in (six, four)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    with run.listen("localhost", 0) as own:
        assert run.url_of(own).startswith("http://127.0.0.1:")


def test_the_url_of_an_address_of_six():
    try:
        own = run.listen("::1", 0)
    except OptionError:
        pytest.skip("this machine has no IPv6")
    with own:
        assert run.url_of(own) == f"http://[::1]:{own.getsockname()[1]}"
