"""What a server does beside its load: how soon it answers /health, and how long streams wait for a long prompt."""

import asyncio
import http.client
import itertools
import re
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

# Begins a stream, calls what it is given at each chunk with a token, and returns as `bench_serve.ask`.
Ask = Callable[[Callable[[], None]], Awaitable[dict[str, Any]]]
POLL_SECONDS = 0.02
STEP = re.compile(r'^smollm3_step_seconds_(sum|count)\{kind="(\w+)"\} (\S+)$', re.MULTILINE)


class Health:
    """Asks for /health again and again, from a thread of its own, while the block runs; `seconds` has how long each
    answer took. An answer that is not 200 counts as infinite."""

    def __init__(self, url: str):
        self._address = urlsplit(url)
        self.seconds: list[float] = []

    def __enter__(self) -> "Health":
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        kind = http.client.HTTPSConnection if self._address.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._address.netloc, timeout=60)
        while not self._stop.wait(POLL_SECONDS):
            begin = time.perf_counter()
            try:
                connection.request("GET", "/health")
                response = connection.getresponse()
                response.read()
                ok = response.status == 200
            except (OSError, http.client.HTTPException):
                connection.close()
                ok = False
            self.seconds.append(time.perf_counter() - begin if ok else float("inf"))
        connection.close()


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """The 50th and 99th percentile and the largest; nothing of nothing."""
    if not seconds:
        return {}
    p50, p99 = np.percentile(seconds, (50, 99), method="higher")
    return {"p50": float(p50), "p99": float(p99), "max": max(seconds), "count": len(seconds)}


def gaps_while(streams: Sequence[Sequence[float]], begin: float, end: float) -> list[float]:
    """The gaps between chunks of each stream that reach into the time from `begin` to `end`."""
    pairs = [pair for chunks in streams for pair in itertools.pairwise(chunks)]
    return [after - before for before, after in pairs if after > begin and before < end]


def steps(before: str, after: str) -> dict[str, dict[str, float]]:
    """The engine's steps between two texts of /metrics: how many of each kind, and their mean in seconds. Only
    `smollm3 serve` tells them."""
    then, now = ({(kind, what): float(value) for what, kind, value in STEP.findall(text)} for text in (before, after))
    grown = {key: value - then.get(key, 0.0) for key, value in now.items()}
    kinds = sorted(kind for kind, what in grown if what == "count" and grown[kind, what] > 0)
    counted = {kind: (grown[kind, "count"], grown[kind, "sum"]) for kind in kinds}
    return {kind: {"count": count, "mean": total / count} for kind, (count, total) in counted.items()}


async def beside_a_long_prompt(
    asks: Sequence[Ask],
    ask_long: Ask,
    metrics: Callable[[], Awaitable[str]],
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Starts streams, and when all of them have tokens sends a long prompt, too.

    Args:
      asks: a stream each.
      ask_long: the same, of the long prompt.
      metrics: the text of /metrics; "" from a server that has none.

    Returns:
      The streams' results, and what happened while the long prompt went in: "first", the seconds to its first token;
      "gap", the streams' gaps meanwhile; "steps", see `steps`; "going", how many streams went on for all of it.
    """
    began = [asyncio.Event() for _ in asks]
    streams = [asyncio.ensure_future(ask(event.set)) for ask, event in zip(asks, began, strict=True)]
    await asyncio.gather(*map(_either, began, streams))
    before, first = await metrics(), asyncio.Event()
    long = asyncio.ensure_future(ask_long(first.set))
    await _either(first, long)
    told, result, results = await metrics(), await long, await asyncio.gather(*streams)
    found: dict[str, Any] = {"error": result["error"]} if "error" in result else {}
    if result["chunks"]:
        begin, end = result["sent"], result["chunks"][0]
        found |= {"first": end - begin, "prompt_tokens": result["prompt_tokens"], "steps": steps(before, told)}
        chunks = [stream["chunks"] for stream in results]
        found["gap"] = spread(gaps_while(chunks, begin, end))
        found["going"] = sum(bool(own) and own[0] < begin and own[-1] > end for own in chunks)
    return results, found


async def _either(event: asyncio.Event, task: asyncio.Future[Any]) -> None:
    """Waits for the event, or for a task that ends without it."""
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait([waiting, task], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
