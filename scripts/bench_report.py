"""What bench_inference.py makes of its samples: medians, ratios, a table, a chart and a file."""

import importlib.util
import json
import os
import platform
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Column, Table

from smollm3_jax.files import new_file, write

GIB = 2**30
OURS = "smollm3_jax"


def token_count(command: dict[str, Any]) -> int:
    """The tokens that a measurement's seconds are about."""
    return len(command["prompts"]) * command["new"] if command["do"] == "decode" else len(command["prompts"][0])


def summarize(samples: Sequence[dict[str, Any]], commands: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians of the measured rounds, and how many times better than each peer smollm3_jax is."""
    engines = list(dict.fromkeys(sample["engine"] for sample in samples))
    rows = []
    for what, unit in [("load", "s"), *((what, "tokens/s") for what in commands), ("peak memory", "GiB")]:
        values = {}
        for engine in engines:
            own = [sample for sample in samples if sample["engine"] == engine]
            if unit == "GiB":
                values[engine] = max(sample["peak_bytes"] for sample in own) / GIB
            else:
                seconds = [sample["seconds"] for sample in own if sample["what"] == what and sample["round"]]
                median = statistics.median(seconds)
                values[engine] = median if unit == "s" else token_count(commands[what]) / median
        ratios = {peer: values[OURS] / values[peer] for peer in engines if peer != OURS}
        if unit != "tokens/s":
            ratios = {peer: 1 / ratio for peer, ratio in ratios.items()}
        rows.append({"what": what, "unit": unit, "values": values, "ratios": ratios})
    return rows


def agreement(samples: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For each peer, how many of the first row's greedy tokens are smollm3_jax's before the two part."""
    first = {}
    for sample in samples:
        if "tokens" in sample:
            first.setdefault(sample["engine"], sample["tokens"][0])
    ours = first.get(OURS, [])
    same = {peer: [a == b for a, b in zip(ours, row, strict=True)] for peer, row in first.items() if peer != OURS}
    return {peer: f"{[*equal, False].index(False)} of {len(ours)}" for peer, equal in same.items()}


def table(rows: Sequence[dict[str, Any]], labels: dict[str, str]) -> Table:
    """One line a measurement: our value, then each peer's and the ratio."""
    peers = [engine for engine in labels if engine != OURS]
    columns = [column for peer in peers for column in (labels[peer], "ratio")]
    result = Table(Column("what", no_wrap=True), "unit", labels[OURS], *columns)
    for row in rows:
        cells = [cell for peer in peers for cell in (f"{row['values'][peer]:.3g}", f"{row['ratios'][peer]:.2f}")]
        result.add_row(row["what"], row["unit"], f"{row['values'][OURS]:.3g}", *cells)
    return result


def draw(rows: Sequence[dict[str, Any]], labels: dict[str, str], title: str, path: Path) -> None:
    """A bar chart, one panel a unit and kind."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(f"{re.split(r'[ ,]', row['what'])[0]}, {row['unit']}", []).append(row)
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), width_ratios=[len(panel) + 0.6 for panel in panels.values()])
    width = 0.8 / len(labels)
    for axis, (name, panel) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for number, (engine, label) in enumerate(labels.items()):
            places = [i + (number - (len(labels) - 1) / 2) * width for i in range(len(panel))]
            bars = axis.bar(places, [row["values"][engine] for row in panel], width * 0.92, label=label)
            axis.bar_label(bars, fmt="%.3g", fontsize=8)
        axis.set_title(name)
        axis.set_xticks(range(len(panel)), [row["what"].removeprefix(name.split(",")[0]).lstrip(" ,") for row in panel])
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*np.atleast_1d(axes)[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(labels))
    with new_file(path) as file:
        figure.savefig(file, dpi=150, format="png")


def machine(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    info = Path("/proc/cpuinfo").read_text()
    found = {key: re.search(rf"^{key}\s*: (.*)", info, re.MULTILINE) for key in ("model name", "flags")}
    names = {key: match[1] if match else "" for key, match in found.items()}
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
    return {
        "processor": names["model name"] or platform.processor(),
        "instructions": [flag for flag in wanted if flag in names["flags"].split()],
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def save(result: dict[str, Any], path: Path) -> None:
    """The JSON file and, where there is matplotlib, the chart beside it."""
    write(path, json.dumps(result, indent=2) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        title = f"{result['model']}, {result['machine']['processor']}, {result['machine']['threads']} threads"
        draw(result["results"], result["engines"], title, path.with_suffix(".png"))
