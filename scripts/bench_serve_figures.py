"""The figures of a load: what bench_serve.py's requests add up to, as a table and as a chart."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from smollm3_jax.files import new_file

PERCENTILES = (50, 90, 99)
TIMES = {"first": "first token", "per_token": "per token", "gap": "gap"}  # key -> name; all in seconds


class Level(NamedTuple):
    """One load: `rate` requests a second, or else `concurrency` of them at a time."""

    rate: float | None = None
    concurrency: int | None = None

    def __str__(self) -> str:
        return f"{self.rate:g} a second" if self.rate else f"{self.concurrency} at a time"


def times(result: dict[str, Any]) -> dict[str, list[float]]:
    """A request's own figures, by the keys of TIMES."""
    chunks = result["chunks"]
    spread = [(chunks[-1] - chunks[0]) / (result["tokens"] - 1)] if result["tokens"] > 1 else []
    return {"first": [chunks[0] - result["sent"]], "per_token": spread, "gap": np.diff(chunks).tolist()}


def summarize(results: Sequence[dict[str, Any]], first_limit: float, token_limit: float) -> dict[str, Any]:
    """A level's figures: counts, rates per second, and percentiles of seconds."""
    answered = [result for result in results if "error" not in result]
    own = [times(result) for result in answered]
    end = max((chunk for result in results for chunk in result["chunks"]), default=0.0)
    seconds = max(0.0, end - min(result["sent"] for result in results))
    good = [x for x in own if x["first"][0] <= first_limit and all(y <= token_limit for y in x["per_token"])]
    summary: dict[str, Any] = {
        "requests": len(results),
        "answered": len(answered),
        "errors": dict(Counter(result["error"] for result in results if "error" in result)),
        "seconds": seconds,
        "late": max(result["late"] for result in results),
        "prompt_tokens": sum(result["prompt_tokens"] or 0 for result in answered),
        "tokens": sum(result["tokens"] for result in answered),
        "answered_per_second": len(answered) / seconds if answered else 0.0,
        "tokens_per_second": sum(result["tokens"] for result in answered) / seconds if answered else 0.0,
        "good_per_second": len(good) / seconds if good else 0.0,
        "good_share": len(good) / len(results),
    }
    for key in TIMES:
        values = [value for x in own for value in x[key]]
        summary[key] = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES} if values else {}
    return summary


def table(levels: Sequence[tuple[Level, dict[str, Any]]]) -> Table:
    low, high = PERCENTILES[0], PERCENTILES[-1]
    load = Column("load", no_wrap=True)
    names = [f"{name}, ms" for name in TIMES.values()]
    result = Table(load, "answered", "tokens/s", "good/s", *names, box=SIMPLE_HEAD, caption=f"ms: p{low}/p{high}")
    for level, summary in levels:
        own = [[summary[key].get(f"p{p}") for p in (low, high)] for key in TIMES]
        cells = ["-" if None in pair else "/".join(f"{1000 * value:.0f}" for value in pair) for pair in own]
        rates = (f"{summary[key]:.3g}" for key in ("tokens_per_second", "good_per_second"))
        result.add_row(str(level), f"{summary['answered']}/{summary['requests']}", *rates, *cells)
    return result


def draw(levels: Sequence[tuple[Level, dict[str, Any]]], title: str, path: Path) -> None:
    """Six panels over the levels: three latencies with their percentiles, answers, goodput, throughput."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(13, 7), layout="constrained")
    figure.suptitle(title)
    panels = list(figure.subplots(2, 3).flat)
    offered = [level.rate or level.concurrency for level, _ in levels]
    unit = "requests/s sent" if levels[0][0].rate else "requests at a time"
    for axis, (key, name) in zip(panels, TIMES.items(), strict=False):
        for p in PERCENTILES:
            values = [1000 * summary[key].get(f"p{p}", np.nan) for _, summary in levels]
            axis.plot(offered, values, marker="o", label=f"p{p}")
        axis.set_title(f"{name}, ms")
        axis.set_ylim(bottom=0)
        axis.legend()
    others = {"tokens_per_second": "tokens/s", "answered_per_second": "answers/s", "good_per_second": "good answers/s"}
    for axis, (key, name) in zip(panels[3:], others.items(), strict=True):
        axis.plot(offered, [summary[key] for _, summary in levels], marker="o")
        axis.set_title(name)
        axis.set_ylim(bottom=0)
    for axis in figure.axes:
        axis.set_xlabel(unit)
        axis.spines[["top", "right"]].set_visible(False)
    with new_file(path) as file:
        figure.savefig(file, dpi=150, format="png")


def told(summary: dict[str, Any]) -> Iterator[str]:
    """Lines on what was measured beside the load."""

    def ms(found: dict[str, float], *names: str) -> str:
        return "/".join(f"{1000 * found[name]:.0f}" for name in names)

    if health := summary.get("health"):
        yield f"/health, {health['count']} times: p50/p99/most {ms(health, 'p50', 'p99', 'max')} ms"
    long = summary.get("long", {})
    if "error" in long:
        yield f"the long prompt failed: {long['error']}"
    if long.get("gap"):
        yield (
            f"a prompt of {long['prompt_tokens']:,} tokens took {long['first']:.1f} s, beside {long['going']} streams "
            f"with gaps of p50/p99/most {ms(long['gap'], 'p50', 'p99', 'max')} ms"
        )
    kinds = {"both": "a piece of a prompt and a call", "decode": "a call alone", "prefill": "pieces alone"}
    for kind, name in kinds.items():
        if step := long.get("steps", {}).get(kind):
            yield f"{step['count']:.0f} steps of {name}: {ms(step, 'mean')} ms each"
