"""The client of loads, against a server that answers after known times."""

import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_serve as bench
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

FIRST, GAP = 0.03, 0.01


class StandIn:
    """Two tokens a chunk: the first after FIRST seconds, then one each GAP; at most `room` requests at a time."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most = self.looks = 0
        self.room = 1000
        self.failing: set[int] = set()
        self.address = ""
        self.routes = [
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/v1/completions", self.answer, methods=["POST"]),
            Route("/v1/chat/completions", self.answer, methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        if request.headers.get("Authorization") != "Bearer secret":
            return JSONResponse({"error": {"message": "No key."}}, 401)
        return JSONResponse({"data": [{"id": "tiny"}, {"id": "other"}]})

    async def health(self, request: Request) -> Response:
        self.looks += 1
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        count = len(self.bodies)
        name = "smollm3_step_seconds"
        return Response(f'{name}_count{{kind="both"}} {count}\n{name}_sum{{kind="both"}} {0.5 * count}\n')

    async def answer(self, request: Request) -> Response:
        self.bodies.append(await request.json())
        if self.running >= self.room:
            return JSONResponse({"error": {"message": "The queue is full."}}, 429)
        return StreamingResponse(self.frames(self.bodies[-1], len(self.bodies)), media_type="text/event-stream")

    async def frames(self, body: dict[str, Any], number: int) -> AsyncIterator[bytes]:
        def frame(data: Any) -> bytes:
            return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()

        self.running += 1
        self.most = max(self.most, self.running)
        try:
            chat, tokens = "messages" in body, body["max_tokens"]
            yield b": keepalive\n\n" + frame({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
            await asyncio.sleep(FIRST)
            for i in range(0, tokens, 2):
                yield frame({"choices": [{"delta": {"reasoning_content": "a b"}} if chat else {"text": "a b"}]})
                if number in self.failing:
                    yield frame({"error": {"message": "The engine has failed."}})
                    return
                await asyncio.sleep(GAP if i + 2 < tokens else 0)
            yield frame({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}}) + frame("[DONE]")
        finally:
            self.running -= 1


@pytest.fixture
def server() -> Iterator[StandIn]:
    it = StandIn()
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=it.routes), port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    it.address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    with contextlib.ExitStack() as stack:
        stack.callback(thread.join)
        stack.callback(setattr, server, "should_exit", True)
        yield it


def arguments(*more: str, url: str = "http://127.0.0.1") -> Any:
    return bench.parse(["--url", url, "--key", "secret", "--requests", "12", "--prompt", "5-9", "--new", "6", *more])


def measure(server: StandIn, *more: str) -> list[tuple[bench.Level, dict[str, Any], list[dict[str, Any]]]]:
    return asyncio.run(bench.measure(arguments(*more, url=server.address), lambda text: None))["levels"]


def test_an_open_loop_sends_at_its_times_whatever_is_answered(server):
    ((level, summary, results),) = measure(server, "--rate", "100", "--first-limit", "5", "--token-limit", "1")
    assert str(level) == "100 a second"
    planned = bench.plan(0, 0, arguments("--rate", "100"))[1:]
    sent = [result["sent"] - result["late"] for result in results]
    assert sent == pytest.approx([x.at / 100 for x in planned])
    assert all(result["late"] >= 0 for result in results)
    assert server.most > 1  # requests come faster than answers
    assert summary["answered"] == summary["requests"] == 12 and not summary["errors"]
    assert summary["tokens"] == 72 and summary["prompt_tokens"] == 84
    assert summary["tokens_per_second"] == pytest.approx(72 / summary["seconds"])
    assert summary["good_per_second"] == summary["answered_per_second"] == pytest.approx(12 / summary["seconds"])
    # Three chunks of two tokens: what the server waits is the least that can be measured.
    assert summary["first"]["p50"] >= FIRST and summary["gap"]["p50"] >= 0.9 * GAP
    assert summary["per_token"]["p50"] >= 0.9 * 2 * GAP / 5
    body = server.bodies[1]
    assert {body["prompt"] for body in server.bodies[1:]} == {str(x.prompt) for x in planned}
    assert {key: value for key, value in body.items() if key != "prompt"} == {
        "model": "tiny",
        "max_tokens": 6,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        "ignore_eos": True,
    }


def test_a_closed_loop_keeps_so_many_under_way(server):
    levels = measure(server, "--concurrency", "1", "4", "--chat", "--model", "other", "--body", '{"top_k": 1}')
    assert [str(level) for level, *_ in levels] == ["1 at a time", "4 at a time"]
    assert server.most == 4
    assert all(summary["answered"] == 12 for _, summary, _ in levels)
    body = server.bodies[0]
    assert (body["model"], body["top_k"], "ignore_eos" in body) == ("other", 1, False)
    assert len(server.bodies) == 2 * 13 and body["messages"][0]["role"] == "user"


def test_what_fails_is_counted_and_is_not_good(server):
    server.room, server.failing = 3, {2}
    ((_, summary, results),) = measure(server, "--rate", "1000", "--first-limit", "10", "--token-limit", "10")
    refused = summary["errors"].pop("429 The queue is full.")
    assert summary["errors"] == {"The engine has failed.": 1}
    assert summary["answered"] == 12 - 1 - refused > 0 and refused > 0
    assert summary["good_share"] == summary["answered"] / 12
    (failed,) = [result for result in results if result.get("error") == "The engine has failed."]
    assert len(failed["chunks"]) == 1


def test_a_long_prompt_beside_streams_and_health_meanwhile(server):
    options = ["--concurrency", "3", "--long", "30", "--new", "40", "--health"]
    ((_, summary, results),) = measure(server, *options)
    assert len(results) == 3 == summary["answered"] and server.most == 4
    assert len(server.bodies[-1]["prompt"].split()) == 30 and server.bodies[-1]["max_tokens"] == 4
    long = summary["long"]
    assert long["going"] == 3 and long["first"] >= FIRST and long["gap"]["max"] >= 0.9 * GAP
    assert long["steps"] == {"both": {"count": 1, "mean": 0.5}}
    assert 0 < summary["health"]["count"] == server.looks and summary["health"]["p50"] < 1
    lines = list(bench.told(summary))
    assert len(lines) == 3 and lines[0].startswith("/health, ")
    assert "health" not in measure(server, "--concurrency", "1")[0][1]


def test_limits_decide_what_is_good():
    def result(first: float, last: float) -> dict[str, Any]:
        return {"sent": 1.0, "chunks": [1 + first, 1 + last], "tokens": 11, "prompt_tokens": 3, "late": 0.0}

    results = [result(0.5, 1.5), result(1.5, 2.0), result(0.5, 2.5), result(0.25, 0.75)]
    summary = bench.summarize([*results, {"sent": 3.0, "chunks": [], "error": "gone", "late": 0.0}], 1.0, 0.1)
    assert summary["good_share"] == 2 / 5 and summary["good_per_second"] == 2 / 2.5
    assert summary["first"]["p50"] == 0.5 and summary["first"]["p99"] == pytest.approx(1.47)
    assert summary["per_token"]["p90"] == pytest.approx(0.17)
    assert summary["errors"] == {"gone": 1} and summary["tokens_per_second"] == 44 / 2.5
    nothing = bench.summarize([{"sent": 0.0, "chunks": [], "error": "gone", "late": 0.0}], 1.0, 0.1)
    assert nothing["tokens_per_second"] == 0 and nothing["first"] == {}
    assert "-" in list(bench.table([(bench.Level(rate=1), nothing)]).columns[-1].cells)


def test_a_seed_draws_arrivals_lengths_and_prompts():
    args = arguments("--rate", "1", "--requests", "400", "--shared", "4", "--new", "2-5")
    planned = bench.plan(0, 0, args)
    assert planned == bench.plan(0, 0, args)
    assert len(planned) == 401 and 0.8 < planned[-1].at / 401 < 1.2
    assert {len(x.prompt.split()) for x in planned} == set(range(5, 10)) and {x.new for x in planned} == set(
        range(2, 6)
    )
    other = bench.plan(0, 1, args)  # another level's prompts begin alike, and are others
    assert {" ".join(x.prompt.split()[:4]) for x in [*planned, *other]} == {" ".join(planned[0].prompt.split()[:4])}
    assert not {str(x.prompt) for x in planned if len(x.prompt.split()) > 8} & {str(x.prompt) for x in other}


def test_the_file_and_the_table(server, tmp_path, capsys):
    out = tmp_path / "bench.json"
    options = ["--requests", "3", "--new", "4", "--prompt", "5", "--rate", "50", "100", "--out", str(out)]
    bench.main(["--url", f"{server.address}/v1", "--key", "secret", *options])
    found = json.loads(out.read_text())
    assert [level["rate"] for level in found["levels"]] == [50, 100] and found["model"] == "tiny"
    assert [len(result["chunks"]) for result in found["levels"][0]["results"]] == [2, 2, 2]
    assert "secret" not in out.read_text()
    printed = capsys.readouterr().out
    assert "100 a second" in printed and "3/3" in printed and max(map(len, printed.splitlines())) <= 80


def test_the_chart(tmp_path):
    pytest.importorskip("matplotlib")
    summary = bench.summarize(
        [{"sent": 0.0, "chunks": [0.1, 0.2], "tokens": 4, "prompt_tokens": 3, "late": 0.0}], 1.0, 0.1
    )
    nothing = bench.summarize([{"sent": 0.0, "chunks": [], "error": "gone", "late": 0.0}], 1.0, 0.1)
    bench.draw([(bench.Level(rate=1), summary), (bench.Level(rate=2), nothing)], "tiny", tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rate", "0"], "above 0"),
        (["--rate", "1", "--concurrency", "1"], "not allowed"),
        (["--rate", "1", "--prompt", "9-5"], "invalid length, such as 128 or 64-512, value: '9-5'"),
        (["--rate", "1", "--body", "[]"], "no JSON object"),
        (["--rate", "1", "--out", "x.txt"], "must end in .json"),
        (["--rate", "1", "--long", "9"], "goes with --concurrency"),
        (["--concurrency", "13", "--long", "9"], "--requests is no less than that"),
    ],
)
def test_options_that_cannot_be(options, said, capsys):
    with pytest.raises(SystemExit):
        arguments(*options)
    assert said in capsys.readouterr().err


def test_a_server_that_refuses_or_is_not_there_is_named(server):
    with pytest.raises(SystemExit, match=r"/v1/models: 401 No key\.$"):
        bench.main(["--url", server.address, "--key", "wrong", "--rate", "1"])
    server.room = 0
    with pytest.raises(SystemExit, match=r"/v1/: 429 The queue is full\.$"):
        bench.main(["--url", server.address, "--key", "secret", "--rate", "1"])
    with pytest.raises(SystemExit, match=r"names no model \(ConnectError\); is it a server\?"):
        bench.main(["--url", "http://127.0.0.1:9", "--rate", "1"])
