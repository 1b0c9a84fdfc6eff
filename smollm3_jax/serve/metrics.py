"""What /metrics tells: vLLM's names after `smollm3_`, so that its dashboards need one replacement.

Labels come from fixed sets; nothing that a client sends is in one.
"""

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily

from ..compile_cache import compilations
from ..generation.requests import Delta
from .ticket import Ticket

# Why a request was not taken, and why one that was ended early.
REASONS = ("invalid", "unauthorized", "forbidden", "not_found", "too_large", "timeout", "queue_full", "queue_tokens")
REASONS += ("loading", "draining", "failed")
CAUSES = ("disconnect", "slow_reader", "drain", "error")
KINDS = ("prefill", "decode", "both", "idle")

SHORT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)


class Metrics:
    """Counters and histograms in a registry of their own; used in the event loop's thread alone."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()
        disable_created_metrics()  # a second series beside each, of when it began

        def counter(name: str, help: str, label: str = "", values: tuple[str, ...] = ()) -> Counter:
            made = Counter(f"smollm3_{name}", help, [label] if label else [], registry=registry)
            for value in values:
                made.labels(value)  # shown as 0 from the beginning
            return made

        def histogram(name: str, help: str, buckets: tuple[float, ...] = LONG, **labels: Any) -> Histogram:
            return Histogram(f"smollm3_{name}", help, registry=registry, buckets=buckets, **labels)

        self.rejected = counter("requests_rejected", "Requests that were not taken", "reason", REASONS)
        self.cancelled = counter("requests_cancelled", "Requests that ended early", "cause", CAUSES)
        self.failed = counter("requests_failed", "Requests that the server could not answer")
        self.success = counter("request_success", "Answers that ended", "finished_reason", ("stop", "length"))
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.generation_tokens = counter("generation_tokens", "Tokens of answers")
        self.first = histogram("time_to_first_token_seconds", "From a request's arrival to its first token")
        self.between = histogram("inter_token_latency_seconds", "Between tokens of an answer", SHORT)
        self.whole = histogram("e2e_request_latency_seconds", "From a request's arrival to its end")
        self.queued = histogram(
            "request_queue_time_seconds", "From a request's arrival to its prompt's way into a slot"
        )
        self.prefill = histogram("request_prefill_time_seconds", "From there to its first token")
        self.decode = histogram("request_decode_time_seconds", "From its first token to its last")
        self.steps = histogram("step_seconds", "Steps of the engine", SHORT, labelnames=["kind"])
        help = "Programs that were compiled, or loaded from the cache of compiled programs; none once it is ready"
        self._read("compilations", help, lambda: sum(compilations()))

    def _read(self, name: str, help: str, value: Callable[[], int]) -> None:
        """A counter whose value something else keeps."""
        self.registry.register(_Read(f"smollm3_{name}", help, value))  # pyright: ignore[reportArgumentType]

    def watch(
        self,
        running: Callable[[], int],
        waiting: Callable[[], int],
        usage: Callable[[], float],
        preemptions: Callable[[], int],
        queries: Callable[[], int],
        hits: Callable[[], int],
    ) -> None:
        """What is asked for when somebody looks: gauges, and the engine's own counts of prefixes."""
        help = "Answers that gave their part of the cache to older ones, and began again later"
        self._read("num_preemptions", help, preemptions)
        self._read("prefix_cache_queries", "Tokens of prompts that were looked for among shared prefixes", queries)
        self._read("prefix_cache_hits", "Tokens of prompts that came from a shared prefix", hits)
        for name, help, value in (
            ("num_requests_running", "Requests of which something is in a slot", running),
            ("num_requests_waiting", "Requests that wait for a slot", waiting),
            ("kv_cache_usage_perc", "The part of the cache, from 0 to 1, that answers have taken", usage),
        ):
            Gauge(f"smollm3_{name}", help, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def step(self, seconds: float, prefill: bool, decode: bool) -> None:
        kind = "both" if prefill and decode else "prefill" if prefill else "decode" if decode else "idle"
        self.steps.labels(kind).observe(seconds)

    def delta(
        self, delta: Delta, prompt: int, arrived: float, first: float | None, last: float | None, now: float
    ) -> None:
        """Tokens of a sample; prompt: tokens of its prompt; first, last: when any, or this sample's, came before."""
        new = len(delta.token_ids)
        if first is None:
            self.first.observe(now - arrived)
        if last is None:
            if delta.sample == 0:
                self.prompt_tokens.inc(prompt)
        else:
            for _ in range(new):
                self.between.observe((now - last) / new)
        self.generation_tokens.inc(new)
        if delta.finish_reason is not None:
            self.success.labels(delta.finish_reason).inc()

    def ended(self, ticket: Ticket) -> None:
        if ticket.state == "failed" and ticket.error is not None and ticket.error.status >= 500:
            self.failed.inc()
        if ticket.state != "finished" or ticket.began is None or ticket.first is None:
            return
        last = max(ticket.latest.values())
        self.whole.observe(last - ticket.arrived)
        self.queued.observe(ticket.began - ticket.arrived)
        self.prefill.observe(ticket.first - ticket.began)
        self.decode.observe(last - ticket.first)


class _Read:
    def __init__(self, name: str, help: str, value: Callable[[], int]):
        self.name, self.help, self.value = name, help, value

    def collect(self) -> Iterator[CounterMetricFamily]:
        yield CounterMetricFamily(self.name, self.help, value=self.value())
