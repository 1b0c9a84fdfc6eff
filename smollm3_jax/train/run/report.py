"""A run's curves: report.html, which opens without a network, and report.png (with the extra `bench`)."""

import html
import importlib.util
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from ...files import write
from .metrics import read_lines

WIDTH, HEIGHT, MARGIN = 720, 256, 64
LOSS, HELD_OUT = "loss, nats a token", "held-out text, nats a token"
# What is drawn of held-out pairs: the metric -> its chart's title.
PAIRS = {
    "loss": "held-out pairs, loss",
    "rewards/accuracies": "held-out pairs, share of right rewards",
    "rewards/margins": "held-out pairs, margin of rewards",
}
COLORS = ("#2a6fbb", "#c8553d", "#3a8f5c", "#8a5fb0", "#b8860b", "#4a4a4a", "#d17fa3", "#5fb0b0")
Curve = Sequence[tuple[float, float]]


def write_report(folder: epath.Path, about: Mapping[str, Any] | None = None) -> None:
    """report.html and, where matplotlib is installed, report.png, from metrics.jsonl.

    Args:
      about: what is known of the run beside its folder: "state", and what `Monitor.summary` and the headline say.
    """
    charts = curves(folder)
    settings = json.loads((folder / "settings.json").read_text())
    environment = json.loads((folder / "environment.json").read_text())
    parts = [_table(summary(charts, settings, about or {}))]
    parts += [
        f"<h2>{html.escape(title)}</h2>{_svg(title, lines)}" for title, lines in charts.items() if any(lines.values())
    ]
    name = html.escape(settings["run"]["name"] or folder.name)
    tables = "".join(
        f"<details><summary>{title}</summary><pre>{html.escape(json.dumps(content, indent=2))}</pre></details>"
        for title, content in (("settings", settings), ("environment", environment))
    )
    style = "body{font:15px sans-serif;max-width:760px;margin:2em auto}text{font:11px sans-serif}h2{font-size:16px}"
    style += "th{text-align:left;vertical-align:top;padding-right:1em;font-weight:normal;color:#666}"
    write(
        folder / "report.html",
        f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{style}</style><h1>{name}</h1>"
        + "".join(parts)
        + tables,
    )
    if importlib.util.find_spec("matplotlib") is not None:
        _draw(charts, folder / "report.png")


def summary(
    charts: Mapping[str, Mapping[str, Curve]], settings: Mapping[str, Any], about: Mapping[str, Any]
) -> dict[str, str]:
    """What a run came to, for people: its state, steps, losses and data."""

    def course(curve: Curve) -> str:
        if not curve:
            return "none yet"
        lowest = min(curve, key=lambda point: point[1])
        points = {"at first": curve[0], "lowest": lowest, "last": curve[-1]}
        return ", ".join(f"{name} {value:.4f} (step {step:,})" for name, (step, value) in points.items())

    training = charts[LOSS]["training"]
    reached = training[-1][0] if training else 0
    data = settings["data"]
    sources = data["sources"] or {"data": {"path": data["path"]}}
    weights, documents = about.get("weights", {}), about.get("documents", {})
    rows = {
        "state": str(about.get("state", "not known")),
        "steps": f"{about.get('step', reached):,} of {settings['run']['steps']:,}",
        "loss": course(training),
        **{f"held out: {name}": course(curve) for name, curve in charts[HELD_OUT].items()},
        **{f"{title}: {name}": course(x) for title in PAIRS.values() for name, x in charts[title].items()},
    }
    if about.get("skipped"):
        rows["left out"] = f"something of {about['skipped']:,} steps, which was not finite; see skipped.jsonl"
    if "tokens" in about:
        rows["last call"] = f"{about['tokens']:,} tokens in {about['seconds']:,.0f} s"
    if "parameters" in about:
        rows["model"] = f"{about['parameters']:,} parameters, of {settings['model']['path'] or 'new weights'}"
    for name, source in sources.items():
        count = f"{documents[name]:,} documents, " if name in documents else ""
        share = f"{100 * weights[name]:.4g} %: " if name in weights else ""
        rows[f"data: {name}" if len(sources) > 1 else "data"] = f"{share}{count}{source['path']}"
    return rows


def _table(rows: Mapping[str, str]) -> str:
    lines = (f"<tr><th>{html.escape(key)}</th><td>{html.escape(value)}</td></tr>" for key, value in rows.items())
    return f"<table>{''.join(lines)}</table>"


def curves(folder: epath.Path) -> dict[str, dict[str, Curve]]:
    """Title -> name of a line -> (step, value) of each point."""
    lines = read_lines(folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "held_out" in line]
    names = {name: None for line in held_out for name in line["held_out"]}

    def of(key: str) -> Curve:
        return [(line["step"], line[key]) for line in steps if math.isfinite(line.get(key, math.nan))]

    def of_held_out(key: str) -> dict[str, Curve]:
        found: dict[str, Curve] = {}
        for name in names:
            points = [(x["step"], x["held_out"][name][key]) for x in held_out if key in x["held_out"].get(name, {})]
            if points:
                found[name] = [point for point in points if math.isfinite(point[1])]
        return found

    return {
        LOSS: {"training": of("loss")},
        HELD_OUT: of_held_out("nats_per_token"),
        **{title: of_held_out(key) for key, title in PAIRS.items()},
        "gradient norm": {"": of("grad_norm")},
        "learning rate": {"": of("learning_rate")},
        "tokens a second": {"": of("tokens_per_second")},
    }


def _svg(title: str, lines: dict[str, Curve]) -> str:
    """A chart; title: of its vertical axis."""
    points = [point for curve in lines.values() for point in curve]
    (left, right), (low, high) = ((min(x), max(x)) for x in zip(*points, strict=True))
    right, high = right + (right == left), high + (high == low) * (abs(high) or 1)

    def at(x: float, y: float) -> str:
        across = MARGIN + (x - left) / (right - left) * (WIDTH - MARGIN - 10)
        return f"{across:.1f},{HEIGHT - 40 - (y - low) / (high - low) * (HEIGHT - 56):.1f}"

    def label(x: float, y: float, text: str, anchor: str) -> str:
        across, down = at(x, y).split(",")
        shift = "dx=-4" if anchor == "end" else "dy=14"
        return f"<text x={across} y={down} {shift} text-anchor={anchor}>{html.escape(text)}</text>"

    drawn = [label(left, y, f"{y:.3g}", "end") for y in (low, (low + high) / 2, high)]
    drawn += [label(x, low, f"{x:.0f}", "middle") for x in (left, right)]
    middle = (HEIGHT - 40) / 2
    drawn.append(f"<text x={(WIDTH + MARGIN) / 2:.0f} y={HEIGHT - 6} text-anchor=middle>step</text>")
    turned = f'transform="rotate(-90 12 {middle:.0f})"'
    drawn.append(f"<text x=12 y={middle:.0f} text-anchor=middle {turned}>{html.escape(title)}</text>")
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
        axes.set_xlabel("step")
        axes.set_ylabel(title)
        if len(lines) > 1:
            axes.legend()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    write(path, drawn.getvalue())
