"""What /metrics says, and the dashboard that reads it."""

import functools
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Puppet, serving, tiny_engine, token, warm_engine

from smollm3_jax.generation.requests import Delta
from smollm3_jax.serve import metrics

# vLLM's names, and this server's own.
WORDS = """
num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total prefix_cache_hits_total
prompt_tokens_total generation_tokens_total request_success_total time_to_first_token_seconds_bucket
inter_token_latency_seconds_bucket e2e_request_latency_seconds_bucket request_queue_time_seconds_bucket
request_prefill_time_seconds_bucket request_decode_time_seconds_bucket compilations_total requests_rejected_total
requests_cancelled_total requests_failed_total step_seconds_bucket num_preemptions_total
"""
NAMES = WORDS.split()


def samples(text: str) -> dict[str, float]:
    """Name and labels -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_all_names_are_there_and_add_up():
    body = {"prompt": [5, 6, 7], "max_tokens": 6, "n": 2}
    with serving(lambda: tiny_engine(slots=2, context=200)) as server:  # a shape that no other test has compiled
        before = samples(server.ask("GET", "/metrics")[1])
        for stream in (False, True):
            assert server.ask("POST", "/v1/completions", body | {"stream": stream})[0] == 200
        found = samples(server.ask("GET", "/metrics")[1])
        assert {f"smollm3_{name}" for name in NAMES} <= {key.partition("{")[0] for key in found}
        for name, value in {
            "prompt_tokens_total": 6,
            "generation_tokens_total": 24,
            "request_success_total{finished_reason=length}": 4,
            "time_to_first_token_seconds_count": 2,
            "e2e_request_latency_seconds_count": 2,
            "request_queue_time_seconds_count": 2,
            "request_prefill_time_seconds_count": 2,
            "request_decode_time_seconds_count": 2,
        }.items():
            assert found[f"smollm3_{name}"] - before[f"smollm3_{name}"] == value, name
        parts = [found[f"smollm3_request_{part}_time_seconds_sum"] for part in ("queue", "prefill", "decode")]
        assert sum(parts) == pytest.approx(found["smollm3_e2e_request_latency_seconds_sum"])
        assert min(parts) >= 0 and found["smollm3_step_seconds_count{kind=both}"] > 0
        assert found["smollm3_compilations_total"] > before["smollm3_compilations_total"]  # of an engine that is cold
        again = samples(server.ask("GET", "/metrics")[1])
        assert again["smollm3_compilations_total"] == found["smollm3_compilations_total"]


def test_gauges_say_what_runs_what_waits_and_what_the_cache_holds():
    going = {1}

    def step(running):
        time.sleep(0.005)
        return [token(number) for number in running if number in going]

    with serving(lambda: Puppet(step)) as server:
        for _ in range(3):
            server.open({"prompt": [5] * 100, "max_tokens": 400})
        server.until(lambda: server.metric("smollm3_num_requests_running") == 1)
        server.until(lambda: server.metric("smollm3_num_requests_waiting") == 2)
        held = server.metric("smollm3_kv_cache_usage_perc") * Puppet.slots * Puppet.capacity
        assert 100 < held < 2000
        going.update((2, 3))
        server.until(lambda: server.metric("smollm3_num_requests_running") == 3)
        assert server.metric("smollm3_num_requests_waiting") == 0


@pytest.mark.slow
def test_pages_and_preemptions_are_counted():
    """In a pool that holds one long answer: all are given, as rows give them, and all pages come back."""
    answers = []
    for cache_tokens in (None, 512):
        make = functools.partial(warm_engine, cache_tokens=cache_tokens, prefix_tokens=0)
        with serving(make) as server:
            bodies = [{"prompt": [5 + i] * 30, "max_tokens": 200} for i in range(3)]
            with ThreadPoolExecutor(3) as threads:
                answered = list(threads.map(lambda body: server.ask("POST", "/v1/completions", body), bodies))
            assert [status for status, *_ in answered] == [200] * 3
            answers.append([body["ids"] for _, body, _ in answered])
            assert (server.metric("smollm3_num_preemptions_total") > 0) == (cache_tokens is not None)
            server.until(server.is_at_rest)
            assert server.metric("smollm3_kv_cache_usage_perc") == 0
    assert answers[0] == answers[1]


def test_tokens_of_shared_prefixes_are_counted_by_key():
    """S23, C13: One key's prompts are found again by that key alone, and under one salt."""
    keys = [{"Authorization": f"Bearer {key}"} for key in ("one", "two")]
    with serving(lambda: tiny_engine(piece_sizes=(16, 32), prefix_tokens=256), keys=["one", "two"]) as server:
        found: dict[str, float] = {}
        asked = ((0, 0, ""), (0, 64, ""), (1, 64, ""), (1, 128, ""), (1, 128, "a"), (1, 192, "a"), (1, 256, ""))
        for key, hits, salt in asked:
            body = {"prompt": [5] * 70, "cache_salt": salt}
            assert server.ask("POST", "/v1/completions", body, **keys[key])[0] == 200
            found = samples(server.ask("GET", "/metrics", **keys[0])[1])
            assert found["smollm3_prefix_cache_hits_total"] == hits
        assert found["smollm3_prefix_cache_queries_total"] == 7 * 69


def test_tokens_that_come_together_are_as_many_intervals():
    own = metrics.Metrics()
    for first, reason in ((None, None), (1.0, "stop")):
        own.delta(Delta(0, 0, (1, 2), "", None, None, reason), 3, 0.0, first, first, 2.0)
    found = samples(own.text().decode())
    assert found["smollm3_inter_token_latency_seconds_count"] == 2
    assert found["smollm3_inter_token_latency_seconds_sum"] == 1.0


def test_labels_are_of_fixed_sets():
    """S21: Whatever clients send: paths, models, hosts."""
    with serving(lambda: Puppet(lambda running: [token(number, "stop") for number in running])) as server:
        before = len(server.ask("GET", "/metrics")[1].splitlines())
        for i in range(20):
            assert server.ask("GET", f"/v1/models/m{i}")[0] == 404
            assert server.ask("GET", f"/nothing/{i}", Host=f"h{i}.example")[0] == 403
        assert len(server.ask("GET", "/metrics")[1].splitlines()) == before


def test_the_dashboard_reads_what_there_is():
    board = json.loads(Path(metrics.__file__).with_name("grafana.json").read_text())
    own = metrics.Metrics()
    own.watch(int, int, float, int, int, int)
    own.step(0.1, prefill=True, decode=False)
    known = {key.partition("{")[0] for key in samples(own.text().decode())}
    asked = {name for x in board["panels"] for y in x["targets"] for name in re.findall(r"smollm3_\w+", y["expr"])}
    assert asked <= known and len(asked) >= len(NAMES)
