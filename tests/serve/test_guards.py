"""Whom the server talks to, and what it reads of a request."""

import json
import logging
from typing import Any

import pytest
from serving import HEAD, Puppet, serving, token

from smollm3_jax.serve import app, guards

PROMPT = {"prompt": [5]}


def engine() -> Puppet:
    return Puppet(lambda running: [token(number, "stop") for number in running])


@pytest.fixture(scope="module")
def server():
    with serving(engine) as it:
        yield it


@pytest.fixture(scope="module")
def locked():
    options: dict[str, Any] = {
        "keys": ["secret", "other"],
        "hosts": ["models.example"],
        "origins": ["https://page.example"],
    }
    with serving(engine, **options) as it:
        yield it


def test_without_the_key_only_signs_of_life_and_the_page_are_open(locked):
    """S19."""
    assert [locked.ask("GET", path)[0] for path in ("/health", "/ready")] == [200, 200]
    status, text, headers = locked.ask("GET", "/")
    assert status == 200 and "<script>" in text and "default-src 'none'" in headers["content-security-policy"]
    for path in ("/metrics", "/v1/models", "/openapi.json", "/nothing", "/health/"):
        assert locked.ask("GET", path)[0] == 401
    for given in ("Bearer wrong", "Bearer secret2", "Bearer ", "Basic secret", "secret", "Bearer secre\u00e9"):
        status, body, headers = locked.ask("POST", "/v1/completions", PROMPT, Authorization=given)
        assert (status, body["error"]["code"], headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
        assert "secret" not in json.dumps(body)
    for key in ("Bearer secret", "bearer other"):
        assert locked.ask("POST", "/v1/completions", PROMPT, Authorization=key)[0] == 200
    text = locked.ask("GET", "/metrics", Authorization="Bearer secret")[1]
    assert 'smollm3_requests_rejected_total{reason="unauthorized"} 11.0' in text


@pytest.mark.parametrize("key", ["secret", "wrong-secret"])
def test_logs_hold_neither_keys_nor_what_clients_wrote(key, caplog):
    """S19, S21: a line for each request, whose words are the server's own."""
    with caplog.at_level(logging.DEBUG), serving(engine, keys=["secret"], log_requests=True) as server:
        given = {"Authorization": f"Bearer {key}", "User_Agent": "x\tINFO: forged"}
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/models/a%0AINFO:%20forged", "/%0Aforged"):
            server.ask("POST" if "completions" in path else "GET", path, PROMPT | {"x": "\nforged"}, **given)
    own = [record.getMessage() for record in caplog.records if record.name.startswith(("smollm3", "uvicorn"))]
    assert len(own) >= 2 * (key == "secret") and not any("\n" in line for line in own)
    assert "forged" not in caplog.text and "secret" not in caplog.text


def test_keys_are_compared_in_constant_time(locked, monkeypatch):
    """S19."""
    compared = []
    compare = guards.hmac.compare_digest
    monkeypatch.setattr(guards.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b))
    locked.ask("GET", "/v1/models", Authorization="Bearer secret")
    assert len(compared) == 2 and {len(x) for pair in compared for x in pair} == {32}


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1:9", "[::1]:8000", "192.168.1.7"])
def test_its_own_names_and_addresses_are_answered(server, host):
    assert server.ask("GET", "/health", Host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[", "a@b"])
def test_a_foreign_host_is_forbidden(server, host):
    """S20."""
    status, body, _ = server.ask("GET", "/health", Host=host)
    assert (status, body["error"]["code"]) == (403, "host_not_allowed")


def test_a_host_that_is_allowed_and_none_at_all(server, locked):
    assert locked.ask("GET", "/health", Host="Models.Example:443")[0] == 200
    client = server.connect(b"GET /health HTTP/1.0\r\n\r\n")
    assert client.recv(1000).startswith(b"HTTP/1.1 403 ")


def test_pages_of_other_sites_are_not_answered(server, locked):
    """S20."""
    for origin in ("https://evil.example", "null", "http://localhost:1", "http://[", ""):
        status, body, headers = server.ask("POST", "/v1/completions", PROMPT, Origin=origin)
        assert (status, body["error"]["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in headers
    own = {"Host": f"localhost:{server.port}", "Origin": f"http://localhost:{server.port}"}
    status, _, headers = server.ask("POST", "/v1/completions", PROMPT, **own)
    assert status == 200 and "access-control-allow-origin" not in headers  # CORS is off
    asked = {"Origin": "https://page.example", "Access_Control_Request_Method": "POST"}
    asked |= {"Access_Control_Request_Headers": "authorization,content-type"}
    status, _, headers = locked.ask("OPTIONS", "/v1/completions", **asked)  # a browser sends no key with it
    assert status == 200 and headers["access-control-allow-origin"] == "https://page.example"
    key = {"Origin": "https://page.example", "Authorization": "Bearer secret"}
    status, _, headers = locked.ask("POST", "/v1/completions", PROMPT, **key)
    assert status == 200 and headers["access-control-allow-origin"] == "https://page.example"


def test_an_origin_is_nobodys_where_no_host_is_named():
    with serving(engine, hosts=["*"]) as server:
        for origin in (b"http://page.example", b"http://[", b"null", b""):
            client = server.connect(b"GET /health HTTP/1.0\r\nOrigin: " + origin + b"\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 403 ")
        assert server.connect(b"GET /health HTTP/1.0\r\n\r\n").recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"{'a': 1}", b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 100_000, b'{"a": ' * 10_000, b"1" * 5000],
)
def test_what_is_no_json_is_the_clients_mistake(server, body):
    """S1, S2."""
    status, told, _ = server.ask("POST", "/v1/completions", body)
    assert (status, told["error"]["code"]) == (400, "invalid_json")


def test_a_body_is_json_by_its_type(server):
    """S1."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, told, _ = server.ask("POST", "/v1/completions", json.dumps(PROMPT).encode(), Content_Type=kind)
        assert status == 400 and "application/json" in told["error"]["message"]
    kind = "Application/JSON; charset=utf-8"
    assert server.ask("POST", "/v1/completions", json.dumps(PROMPT).encode(), Content_Type=kind)[0] == 200


def test_a_large_body_is_refused_by_what_it_says_and_by_what_it_is(server):
    """S2."""
    client = server.connect()
    client.sendall(HEAD + b"Content-Length: 99999999999\r\n\r\n")
    assert client.recv(1000).startswith(b"HTTP/1.1 413 ")
    client = server.connect(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    for _ in range(guards.MAX_BODY // 0x10000 + 2):
        client.sendall(chunk)
    assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_not_awaited_for_ever(server, monkeypatch):
    def sooner(request, off_the_loop):
        return guards.read_json(request, off_the_loop, seconds=0.1)

    monkeypatch.setattr(app, "read_json", sooner)
    client = server.connect()
    client.sendall(HEAD + b'Content-Length: 100\r\n\r\n{"prompt"')
    content = b"".join(iter(lambda: client.recv(4096), b""))  # it ends: the connection is closed
    assert content.startswith(b"HTTP/1.1 408 ") and b'"code":"timeout"' in content
    server.until(server.is_at_rest)


def test_paths_and_methods_that_are_not_there(server):
    assert server.ask("GET", "/v1/nothing")[1]["error"]["message"] == "GET /v1/nothing: Not Found"
    status, body, headers = server.ask("GET", "/v1/completions")
    assert (status, headers["allow"]) == (405, "POST") and "error" in body
    status, body, _ = server.ask("GET", "/v1/models/gpt-4")
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    assert server.ask("GET", "/v1/models/tiny")[1]["id"] == "tiny"
    assert server.ask("GET", "/v1/models/")[1] == server.ask("GET", "/v1/models")[1]
    # Not sent on: to http it would be, behind a proxy that has taken https.
    status, _, headers = server.ask("POST", "/v1/completions/", PROMPT)
    assert status == 404 and "location" not in headers
