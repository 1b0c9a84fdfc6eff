"""The table of the models, as text, as JSON and as a picture."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from smollm3_jax.files import new_file

from .measure import RATES, Numbers, expectations, interval


def summary(recipe: Mapping[str, Any], seed: int, models: Mapping[str, Numbers], about: Mapping[str, Any]) -> dict:
    """All of it, ready for JSON: shares from 0 to 1, perplexities, each with its interval."""
    share, languages = recipe["measure"]["interval"], recipe["dialogues"]["languages"]
    table = {
        name: {
            **{rate: interval(numbers[rate], share) for rate in RATES},
            "perplexity": {
                language: interval(numbers[key], share, math.exp)
                for language, key in [*((x, x) for x in languages), ("all", "perplexity")]
            },
        }
        for name, numbers in models.items()
    }
    expected = expectations(recipe["expected"], models, share)
    return {"recipe": recipe["name"], "seed": seed, "interval": share, **about, "models": table, "expected": expected}


def show(found: Mapping[str, Any], console: Console) -> None:
    """Prints what `summary` found."""
    share = f"{found['interval']:.0%} intervals by the bootstrap"
    first = Table("model", *RATES, title=f"{found['held_out']} held-out prompts in both modes, {share}")
    for name, row in found["models"].items():
        first.add_row(name, *(_spelled(row[rate], "{:.0%}") for rate in RATES))
    second = Table("language", *found["models"], title="perplexity")
    perplexities = [row["perplexity"] for row in found["models"].values()]
    for language in perplexities[0]:
        second.add_row(language, *(_spelled(of[language], "{:.1f}") for of in perplexities))
    console.print(first, second, soft_wrap=True)
    for one in found["expected"]:
        against = "" if one["of"] == one["against"] else f" over {one['against']}"
        bound = f"above {one['above']:g}" if "above" in one else f"below {one['below']:g}"
        measure = "logarithm of perplexity" if one["measure"] == "perplexity" else one["measure"]
        where = f"{measure} of {one['of']}{against} {_spelled(one, '{:+.3f}')}, expected {bound}"
        console.print(f"{'held' if one['held'] else 'did not hold'}: {one['what']} ({where})", soft_wrap=True)
    console.print(f"{found['pairs']} pairs of {found['prompts']} prompts; {found['seconds'] / 60:.0f} minutes in all")


def _spelled(of: Mapping[str, float], form: str) -> str:
    value, low, high = (form.format(of[key]) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def draw(found: Mapping[str, Any], path: Path) -> None:
    """A picture of the table: shares on the left, perplexities on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    models = found["models"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    languages = list(next(iter(models.values()))["perplexity"])
    for axes, names, of in (
        (left, RATES, lambda row, name: row[name]),
        (right, languages, lambda row, name: row["perplexity"][name]),
    ):
        for i, (model, row) in enumerate(models.items()):
            cells = [of(row, name) for name in names]
            at = [x + (i - (len(models) - 1) / 2) * 0.16 for x in range(len(names))]
            axes.vlines(at, [cell["low"] for cell in cells], [cell["high"] for cell in cells], colors=f"C{i}")
            axes.plot(at, [cell["value"] for cell in cells], "o", color=f"C{i}", label=model)
        axes.set_xticks(range(len(names)), [name.replace("accuracy ", "accuracy\n") for name in names])
        axes.grid(axis="y", alpha=0.3)
    left.set_ylim(-0.02, 1.02)
    left.set_title(f"held-out answers (seed {found['seed']}, {found['interval']:.0%} intervals)")
    right.set_yscale("log")
    right.yaxis.set_minor_formatter(ticker.ScalarFormatter())
    right.yaxis.set_major_formatter(ticker.ScalarFormatter())
    right.set_title("perplexity")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    with new_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
