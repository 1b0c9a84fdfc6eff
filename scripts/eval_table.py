"""What `smollm3 eval --output` has written, as a table with intervals.

    python scripts/eval_table.py FOLDER [FOLDER ...] [--out FILE.json]

Every folder below these with a results_*.json counts, the newest of each. An interval is of 95 %: Wilson's where each
question is right or wrong, else of 10,000 bootstrap draws of the questions. It says how sure a score is of questions
like these, and nothing else.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from smollm3_jax.files import write_output

DRAWS, Z = 10_000, 1.96
# What is shown of perplexity, whose three metrics are one number.
LEFT_OUT = ("word_perplexity", "byte_perplexity")


def wilson(share: float, count: int) -> tuple[float, float]:
    """Of a share of right answers."""
    middle, below = share + Z * Z / (2 * count), 1 + Z * Z / count
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return max(0.0, (middle - half) / below), min(1.0, (middle + half) / below)


def bits(sums: np.ndarray) -> np.ndarray:
    """[..., texts, (log-likelihood, bytes)] -> [...], bits a byte."""
    nats, size = np.moveaxis(sums.sum(-2), -1, 0)
    return -nats / size / math.log(2)


def drawn(metric: str, values: list[Any], random: np.random.Generator) -> tuple[float, np.ndarray]:
    """(score, [DRAWS] scores of drawn questions) of what each has of a metric: a number, a list of them, or
    (log-likelihood, bytes)."""
    pick = random.integers(len(values), size=(DRAWS, len(values)))
    if metric == "bits_per_byte":
        sums = np.array(values, np.float64)
        return float(bits(sums)), bits(sums[pick])
    if isinstance(values[0], list):  # IFEval's: several instructions a question
        right, count = (np.array([of(value) for value in values], np.float64) for of in (sum, len))
        return float(right.sum() / count.sum()), right[pick].sum(-1) / count[pick].sum(-1)
    numbers = np.array(values, np.float64)
    return float(numbers.mean()), numbers[pick].mean(-1)


def scored(metric: str, parts: list[list[Any]]) -> dict[str, Any]:
    """The mean over the parts of a group, or of one task alone, with its interval."""
    random = np.random.default_rng(0)
    means, draws = zip(*(drawn(metric, values, random) for values in parts), strict=True)
    value, flat = float(np.mean(means)), [one for values in parts for one in values]
    if all(isinstance(one, int | float) and one in (0, 1) for one in flat):
        low, high = wilson(value, len(flat))
    else:
        low, high = np.percentile(np.mean(draws, 0), (2.5, 97.5))
    return {"score": value, "low": float(low), "high": float(high), "questions": len(flat)}


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Of a folder with results: each task's metrics, those of RULER by length, and then those of groups."""
    results = json.loads(max(folder.glob("results_*.json")).read_text())
    about, chat = results["config"]["model_args"], results.get("chat_template") is not None
    mode = {True: "think", False: "no_think"}.get(about.get("thinking"), "chat" if chat else "text")
    found: dict[str, dict[str, list[Any]]] = {}
    for task in results["n-samples"]:
        lines = max(folder.glob(f"samples_{task}_*.jsonl")).read_text().splitlines()
        found[task] = of_task = {}
        for sample in map(json.loads, lines):
            for metric in (name for name in sample["metrics"] if name not in LEFT_OUT):
                of_task.setdefault(metric, []).append(sample[metric])
    groups = {name: [found[part] for part in parts] for name, parts in results.get("group_subtasks", {}).items()}
    for name, parts in [*((task, [of]) for task, of in found.items()), *groups.items()]:
        for metric in parts[0]:
            if f"{metric},none" in results["results"].get(name, {}):
                row = {"model": about["pretrained"], "mode": mode, "task": name, "metric": metric}
                yield row | scored(metric, [of[metric] for of in parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="gets the rows as JSON")
    args = parser.parse_args()
    folders = sorted({file.parent for folder in args.folders for file in folder.rglob("results_*.json")})
    if not folders:
        parser.error("no results_*.json lies below what was named; `smollm3 eval --output FOLDER` writes one")
    found = [row for folder in folders for row in rows(folder)]
    table = Table("model", "mode", "task", "metric", "score", "95 %", "questions")
    for row in found:
        shown = f"{row['score']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", str(row["questions"])
        table.add_row(row["model"], row["mode"], row["task"], row["metric"], *shown)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if args.out:
        write_output(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
