"""A run's curves: report.html, which opens without a network, and report.png (with the extra `bench`)."""

import html
import importlib.util
import io
import json
import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from ..files import write
from .monitor import read_lines

WIDTH, HEIGHT, MARGIN = 720, 240, 48
COLORS = ("#2a6fbb", "#c8553d", "#3a8f5c", "#8a5fb0", "#b8860b", "#4a4a4a", "#d17fa3", "#5fb0b0")
Curve = Sequence[tuple[float, float]]


def write_report(folder: epath.Path) -> None:
    """report.html and, where matplotlib is installed, report.png, from metrics.jsonl."""
    charts = curves(folder)
    settings = json.loads((folder / "settings.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    parts = [f"<h2>{html.escape(title)}</h2>{_svg(lines)}" for title, lines in charts.items() if any(lines.values())]
    name = html.escape(settings["run"]["name"] or folder.name)
    tables = "".join(
        f"<details><summary>{title}</summary><pre>{html.escape(json.dumps(content, indent=2))}</pre></details>"
        for title, content in (("settings", settings), ("environment", environment))
    )
    style = "body{font:15px sans-serif;max-width:760px;margin:2em auto}text{font:11px sans-serif}h2{font-size:16px}"
    write(
        folder / "report.html",
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{style}</style><h1>{name}</h1>"
        + "".join(parts)
        + tables,
    )
    if importlib.util.find_spec("matplotlib") is not None:
        _draw(charts, folder / "report.png")


def curves(folder: epath.Path) -> dict[str, dict[str, Curve]]:
    """Title -> name of a line -> (step, value) of each point."""
    lines = read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "held_out" in line]
    names = {name: None for line in held_out for name in line["held_out"]}

    def of(key: str) -> Curve:
        return [(line["step"], line[key]) for line in steps if math.isfinite(line.get(key, math.nan))]

    return {
        "loss, nats a token": {"training": of("loss")},
        "held-out text, nats a token": {
            name: [(x["step"], x["held_out"][name]["nats_per_token"]) for x in held_out if name in x["held_out"]]
            for name in names
        },
        "gradient norm": {"": of("grad_norm")},
        "learning rate": {"": of("learning_rate")},
        "tokens a second": {"": of("tokens_per_second")},
    }


def _svg(lines: dict[str, Curve]) -> str:
    points = [point for curve in lines.values() for point in curve]
    (left, right), (low, high) = ((min(x), max(x)) for x in zip(*points, strict=True))
    right, high = right + (right == left), high + (high == low) * (abs(high) or 1)

    def at(x: float, y: float) -> str:
        across = MARGIN + (x - left) / (right - left) * (WIDTH - MARGIN - 10)
        return f"{across:.1f},{HEIGHT - 24 - (y - low) / (high - low) * (HEIGHT - 40):.1f}"

    def label(x: float, y: float, text: str, anchor: str) -> str:
        across, down = at(x, y).split(",")
        shift = "dx=-4" if anchor == "end" else "dy=14"
        return f"<text x={across} y={down} {shift} text-anchor={anchor}>{html.escape(text)}</text>"

    drawn = [label(left, y, f"{y:.3g}", "end") for y in (low, (low + high) / 2, high)]
    drawn += [label(x, low, f"{x:.0f}", "middle") for x in (left, right)]
    for color, (name, curve) in zip(COLORS * 9, lines.items(), strict=False):
        path = " ".join(at(x, y) for x, y in curve)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        if name and len(lines) > 1:
            place = 40 + 14 * list(lines).index(name)
            drawn.append(f'<text x={WIDTH - 8} y={place} text-anchor=end fill="{color}">{html.escape(name)}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="100%">{"".join(drawn)}</svg>'


def _draw(charts: dict[str, dict[str, Curve]], path: epath.Path) -> None:
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    shown: dict[str, Any] = {title: lines for title, lines in charts.items() if any(lines.values())}
    figure = Figure(figsize=(9, 3 * max(1, len(shown))), layout="constrained")
    for i, (title, lines) in enumerate(shown.items()):
        axes = figure.add_subplot(len(shown), 1, i + 1)
        for name, curve in lines.items():
            axes.plot(*zip(*curve, strict=True), label=name)
        axes.set_title(title)
        if len(lines) > 1:
            axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    write(path, drawn.getvalue())
