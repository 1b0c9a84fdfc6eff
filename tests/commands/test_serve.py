"""`smollm3 serve`, as it is started, and as it ends."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from proxies import FULL
from serving import QUICK, next_line, started
from tiny import raw_config, talking_checkpoint, tiny_adapter

from smollm3_jax.commands import serve
from smollm3_jax.commands.main import main
from smollm3_jax.generation import hosts
from smollm3_jax.serve.run import listen


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def adapter(tiny) -> Path:
    return tiny_adapter(tiny.parent / "adapter", tiny)


def ask(port: int, path: str, body: object = None, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    with contextlib.closing(connection):
        content = None if body is None else json.dumps(body)
        connection.request("POST" if body else "GET", path, content, {"Content-Type": "application/json"} | headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


@contextlib.contextmanager
def streaming(port: int) -> Iterator[http.client.HTTPResponse]:
    """An answer that has begun, and goes on for long."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        body = {"prompt": [5, 6], "max_tokens": 400, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as answer:
            answer.readline()
            yield answer


@pytest.mark.slow
def test_it_answers_and_ends_when_its_streams_have(tiny, adapter):
    """S17."""
    options = ("--name", "mine", "--adapter", f"sea={adapter}:0.5", "--log-requests")
    with started(tiny, "--slots", "2", *options) as (process, port):
        assert [one["id"] for one in json.loads(ask(port, "/v1/models")[1])["data"]] == ["mine", "sea"]
        asked = {"model": "sea", "prompt": "w5", "max_tokens": 3}
        assert json.loads(ask(port, "/v1/completions", asked)[1])["model"] == "sea"
        assert ask(port, "/ready")[0] == 200
        with streaming(port) as answer:
            process.terminate()
            assert next_line(process.stderr, "draining")
            assert ask(port, "/v1/completions", {"prompt": "w5"})[0] == 503
            assert answer.read().endswith(b"data: [DONE]\n\n")
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out == ""
        assert err.splitlines()[-1].startswith("smollm3: INFO: /v1/completions: finished, prompts 2 tokens, samples 1")


@pytest.mark.parametrize(
    "options, told",
    [
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key", "schl\u00fcssel"], "--api-key is empty or has other than ASCII"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines ask: give --api-key KEY"),
        (["--host", "::"], "lets other machines ask"),
        (["--max-queue", "-1"], "--max-queue is -1"),
        (["--drain-timeout", "-1"], "--drain-timeout is -1.0"),
        (["--drain-timeout", "nan"], "--drain-timeout is nan"),
        (["--context", "100000"], "--context is 100000; the model has been trained for 512"),
        (["--port", "70000"], "--port is 70000; it must be from 0"),
        (["--host", "192.0.2.1", "--no-api-key"], "--host 192.0.2.1 is no address of this machine"),
        (["--slots", "0"], "no whole number from 1"),
    ],
)
def test_options_that_cannot_be(tiny, options, told, capsys, monkeypatch):
    """S18, S20."""
    monkeypatch.delenv("SMOLLM3_API_KEY", raising=False)
    try:
        code = main(["serve", str(tiny), *options])
    except SystemExit as end:
        code = end.code
    assert code == 2 and told in capsys.readouterr().err


def test_adapters_that_cannot_be_served(tiny, adapter, tmp_path, capsys):
    twice = ["--adapter", str(adapter), "--adapter", f"adapter={adapter}"]
    assert main(["serve", str(tiny), *twice]) == 2
    assert "two models are called 'adapter'; name this one: NAME=" in capsys.readouterr().err
    assert main(["serve", str(tiny), "--name", "sea", "--adapter", f"sea={adapter}"]) == 2
    assert main(["serve", str(tiny), "--adapter", str(tmp_path / "nowhere")]) == 2
    dora = tiny_adapter(tmp_path / "dora", tiny, use_dora=True)
    assert main(["serve", str(tiny), "--adapter", str(dora)]) == 3
    assert f"(smollm3 merge BASE --adapter {dora} --out OUT)" in capsys.readouterr().err
    other = tiny_adapter(tmp_path / "other", tiny, raw_config("plain") | {"intermediate_size": 128})
    assert main(["serve", str(tiny), "--adapter", str(other)]) == 3
    assert "other is an adapter of another model" in capsys.readouterr().err


def test_a_port_that_is_taken(tiny, capsys):
    """S18."""
    with listen("127.0.0.1", 0) as own:
        port = own.getsockname()[1]
        for model in (str(tiny), "nobody/has-fetched-this"):
            assert main(["serve", model, "--port", str(port)]) == 2
            assert f"--port {port} is in use by another program" in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path, capsys):
    """S18."""
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) in (2, 3)
    assert "nothing" in capsys.readouterr().err


def test_an_empty_key_in_the_environment_is_no_key_that_opens_all(tiny, capsys, monkeypatch):
    monkeypatch.setenv("SMOLLM3_API_KEY", "")
    assert main(["serve", str(tiny)]) == 2 and "SMOLLM3_API_KEY is empty" in capsys.readouterr().err


def test_the_extra_that_is_missing_is_named(tiny, capsys, monkeypatch):
    monkeypatch.setattr(serve, "NEEDED", ("starlette", "no_such_module"))
    assert main(["serve", str(tiny)]) == 3
    assert "no_such_module is not installed" in (told := capsys.readouterr().err)
    assert "pip install 'starlette" in told


def test_processes_that_follow_leave_signals_to_the_first(tiny, monkeypatch):
    """A service manager ends all of a job's processes, as Ctrl-C does; the first one drains, and ends the others."""
    met = []

    @contextlib.contextmanager
    def opened(args, served):
        met.extend(signal.getsignal(number) for number in numbers)
        yield None

    monkeypatch.setattr(hosts, "is_follower", lambda: True)
    monkeypatch.setattr(serve, "opened", opened)
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        assert main(["serve", str(tiny)]) == 0
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert met == [signal.SIG_IGN] * 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=FULL)])
def test_a_second_signal_ends_it_at_once(tiny, number):
    """S17."""
    with started(tiny, "--slots", "2") as (process, port), streaming(port):
        process.send_signal(number)
        assert next_line(process.stderr, "draining")
        begin = time.monotonic()
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        assert time.monotonic() - begin < 2


@FULL
def test_two_processes_are_one_server(tiny):
    """What both answer together, from pages that hold one long answer, is what one process answers from rows; the
    second ends when the first has drained."""

    def texts(port: int) -> list[str]:
        settings = {"max_tokens": 300, "temperature": 1.0, "ignore_eos": True}
        bodies = [{"prompt": [5, 6, seed], "seed": seed, **settings} for seed in (7, 8)]
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(lambda body: ask(port, "/v1/completions", body)[1], bodies))
        return [json.loads(one)["choices"][0]["text"] for one in found]

    mesh = ("--slots", "2", "--context", "512", "--mesh", "tensor=2")
    kept = {"JAX_ENABLE_COMPILATION_CACHE": "false"}  # see compile_cache.enable; and processes must all compile
    with started(tiny, *mesh, JAX_NUM_CPU_DEVICES="2", **kept) as (_, port):
        alone = texts(port)
    with listen("127.0.0.1", 0) as own:
        coordinator = f"127.0.0.1:{own.getsockname()[1]}"
    job = (*mesh, "--cache-tokens", "512", "--coordinator", coordinator, "--processes", "2", "--process")
    command = [sys.executable, "-m", "smollm3_jax", "serve", str(tiny), "--port", "0", *job, "1"]
    one = {"JAX_NUM_CPU_DEVICES": "1", **kept, **QUICK}
    with subprocess.Popen(command, env=os.environ | one, stderr=subprocess.PIPE, text=True) as second:
        try:
            with started(tiny, *job, "0", **one) as (first, port):
                assert texts(port) == alone
                time.sleep(15)  # longer than processes that wait for each other are given
                assert texts(port) == alone
                assert "smollm3_num_preemptions_total 0.0" not in ask(port, "/metrics")[1]
                for process in (second, first):
                    process.terminate()
                assert first.wait(60) == 0
            assert second.wait(60) == 0
        finally:
            second.kill()


@FULL
@pytest.mark.slow
def test_the_demo_model_from_its_start_to_its_end(demo_folder):
    """A conversation with a real model, by curl's means and by OpenAI's client."""
    import openai

    key = {"SMOLLM3_API_KEY": "secret"}
    with started("demo", "--slots", "4", "--context", "1024", **key) as (process, port):
        assert ask(port, "/health")[0] == ask(port, "/ready")[0] == 200
        assert ask(port, "/v1/models")[0] == 401
        with openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="secret", max_retries=0) as client:
            asked = [{"role": "user", "content": "What is the capital of France?"}]
            options = {"model": "demo", "messages": asked, "temperature": 0, "max_tokens": 40}
            whole = client.chat.completions.create(**options).choices[0].message.content
            chunks = client.chat.completions.create(**options, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
            assert "Paris" in whole
        process.terminate()
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and out == ""
