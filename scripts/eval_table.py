"""What `smollm3 eval --output` has written, as a table with intervals.

    python scripts/eval_table.py FOLDER [FOLDER ...] [--out FILE.json]

Every folder below these with a results_*.json counts, the newest of each. An interval is of 95 %: Wilson's where each
question is right or wrong, else of 10,000 bootstrap draws of the questions. It says how sure a score is of questions
like these, and nothing else.
"""

import argparse
import json
import math
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


def scored(metric: str, values: list[Any]) -> tuple[float, float, float]:
    """(score, low, high) of what questions have of a metric: a number, a list of them, or (log-likelihood, bytes)."""
    pick = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    if metric == "bits_per_byte":
        sums = np.array(values, np.float64)
        return float(bits(sums)), *map(float, np.percentile(bits(sums[pick]), (2.5, 97.5)))
    if isinstance(values[0], list):  # IFEval's: several instructions a question
        right, count = (np.array([of(value) for value in values], np.float64) for of in (sum, len))
        draws = right[pick].sum(-1) / count[pick].sum(-1)
        return float(right.sum() / count.sum()), *map(float, np.percentile(draws, (2.5, 97.5)))
    numbers = np.array(values, np.float64)
    mean = float(numbers.mean())
    if set(numbers.tolist()) <= {0.0, 1.0}:
        return mean, *wilson(mean, len(numbers))
    return mean, *map(float, np.percentile(numbers[pick].mean(-1), (2.5, 97.5)))


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Of a folder with results: a task's metrics, or of a metric that names a length, each length."""
    results = json.loads(max(folder.glob("results_*.json")).read_text())
    about, chat = results["config"]["model_args"], results.get("chat_template") is not None
    mode = {True: "think", False: "no_think"}.get(about.get("thinking"), "chat" if chat else "text")
    for task in results["n-samples"]:
        lines = max(folder.glob(f"samples_{task}_*.jsonl")).read_text().splitlines()
        samples = [json.loads(line) for line in lines]
        for metric in dict.fromkeys(name for sample in samples for name in sample["metrics"]):
            values = [sample[metric] for sample in samples if metric in sample]
            if not values or metric in LEFT_OUT:
                continue
            value, low, high = scored(metric, values)
            row = {"model": about["pretrained"], "mode": mode, "task": task, "metric": metric, "value": value}
            yield row | {"low": low, "high": high, "questions": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="gets the rows as JSON")
    args = parser.parse_args()
    folders = sorted({file.parent for folder in args.folders for file in folder.rglob("results_*.json")})
    found = [row for folder in folders for row in rows(folder)]
    table = Table("model", "mode", "task", "metric", "score", "95 %", "questions")
    for row in found:
        shown = f"{row['value']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}", str(row["questions"])
        table.add_row(row["model"], row["mode"], row["task"], row["metric"], *shown)
    Console().print(table)
    if args.out:
        write_output(args.out, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
