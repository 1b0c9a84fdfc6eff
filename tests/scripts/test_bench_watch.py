"""What is measured beside a load: /health, steps by /metrics, and the gaps that a long prompt makes."""

import asyncio
import http.server
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import bench_watch as watch
from bench_serve_figures import told


class _Answers(http.server.BaseHTTPRequestHandler):
    """Every third /health fails, and all take 10 ms."""

    protocol_version = "HTTP/1.1"
    asked = 0

    def do_GET(self) -> None:
        type(self).asked += 1
        time.sleep(0.01)
        self.send_response(503 if self.asked % 3 == 0 else 200 if self.path == "/health" else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def test_health_is_asked_for_while_the_block_runs():
    with http.server.HTTPServer(("127.0.0.1", 0), _Answers) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        with watch.Health(f"http://127.0.0.1:{server.server_port}") as health:
            time.sleep(0.3)
        server.shutdown()
        thread.join()
    assert 4 < len(health.seconds) == _Answers.asked
    failed = [seconds == float("inf") for seconds in health.seconds]
    assert failed == [number % 3 == 0 for number in range(1, len(failed) + 1)]
    assert min(health.seconds) >= 0.01
    assert watch.spread(health.seconds)["p99"] == float("inf")


def test_a_server_that_is_gone_is_not_healthy():
    with watch.Health("http://127.0.0.1:9") as health:
        time.sleep(0.1)
    assert health.seconds and set(health.seconds) == {float("inf")}


def test_percentiles_are_values_that_came():
    assert watch.spread([]) == {}
    assert watch.spread([0.1] * 98 + [0.2, 0.4]) == {"p50": 0.1, "p99": 0.4, "max": 0.4, "count": 100}


def test_gaps_reach_into_the_time_of_the_long_prompt():
    streams = [[0.0, 1.0, 2.5, 2.75, 4.0], [2.0], []]
    # From 1.5 to 3: the gaps that begin before and end in it, lie in it, and end after it.
    assert watch.gaps_while(streams, 1.5, 3.0) == [1.5, 0.25, 1.25]
    assert watch.gaps_while(streams, 4.0, 5.0) == []


def test_steps_are_what_came_between_two_looks():
    def text(both: float, count: int, decode: float) -> str:
        return (
            "# TYPE smollm3_step_seconds histogram\n"
            f'smollm3_step_seconds_bucket{{kind="both",le="0.5"}} 1.0\nsmollm3_step_seconds_sum{{kind="both"}} {both}\n'
            f'smollm3_step_seconds_count{{kind="both"}} {count}\nsmollm3_step_seconds_count{{kind="decode"}} 4.0\n'
            f'smollm3_step_seconds_sum{{kind="decode"}} {decode}\n'
        )

    assert watch.steps(text(1.5, 3, 1.0), text(4.0, 8, 1.0)) == {"both": {"count": 5, "mean": 0.5}}
    assert watch.steps("", text(1.5, 3, 1.0))["decode"] == {"count": 4, "mean": 0.25}
    assert watch.steps("", "") == {}


async def _stream(on_token: Any, begin: float, gaps: list[float]) -> dict[str, Any]:
    result: dict[str, Any] = {"sent": time.perf_counter() - begin, "chunks": [], "prompt_tokens": 9}
    for gap in gaps:
        await asyncio.sleep(gap)
        result["chunks"].append(time.perf_counter() - begin)
        on_token()
    return result


def test_a_long_prompt_goes_in_when_all_streams_have_tokens():
    async def run(*others: list[float], fails: bool = False) -> Any:
        begin, looks = time.perf_counter(), []

        async def metrics() -> str:
            looks.append(time.perf_counter() - begin)
            return ""

        async def failing(on_token: Any) -> dict[str, Any]:
            return {"sent": 0.0, "chunks": [], "error": "no"}

        streams = [lambda on_token, gaps=gaps: _stream(on_token, begin, gaps) for gaps in others]
        long = failing if fails else lambda on_token: _stream(on_token, begin, [0.2, 0.01])
        return *await watch.beside_a_long_prompt(streams, long, metrics), looks

    results, found, looks = asyncio.run(run([0.01] * 3, [0.1, 0.05, 0.3, 0.01]))
    assert [len(result["chunks"]) for result in results] == [3, 4]
    assert looks[0] >= results[1]["chunks"][0] and looks[1] - looks[0] >= 0.2
    assert found["first"] >= 0.2 and found["prompt_tokens"] == 9
    assert found["gap"]["max"] >= 0.3 and found["going"] == 1  # the first stream had ended
    _, found, _ = asyncio.run(run([0.01], fails=True))
    assert found == {"error": "no"}
    assert list(told({"long": found})) == ["the long prompt failed: no"]


def test_what_is_told():
    long = {"first": 2.5, "prompt_tokens": 7000, "going": 8, "gap": watch.spread([0.1, 0.2])}
    long["steps"] = {"both": {"count": 28.0, "mean": 0.15}, "idle": {"count": 1.0, "mean": 1.0}}
    lines = list(told({"health": watch.spread([0.001, 0.002]), "long": long}))
    assert lines == [
        "/health, 2 times: p50/p99/most 2/2/2 ms",
        "a prompt of 7,000 tokens took 2.5 s, beside 8 streams with gaps of p50/p99/most 200/200/200 ms",
        "28 steps of a piece of a prompt and a call: 150 ms each",
    ]
    assert list(told({})) == []
