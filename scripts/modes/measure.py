"""What a model's answers and log-probabilities come to, with intervals by the bootstrap.

What is drawn again is the prompt, with its answers in both modes, or within each language the text: R draws of N
prompts or texts. All models are drawn alike, so that a difference of two of them is of the same prompts.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .data import judged

Numbers = dict[str, np.ndarray]  # by measure: float64 [R + 1], first of what was measured, then of each draw
THINKING = "accuracy of thinking over that without"
RATES = ("obeyed", "accuracy with thinking", "accuracy without", "passed")


def rates(answers: Iterable[dict[str, Any]], resamples: int, seed: int) -> Numbers:
    """Shares of the held-out answers: of both modes together, but for the two accuracies."""
    found: dict[str, dict[bool, Any]] = {}
    for line in answers:
        [(_, verdict)] = judged(line)
        found.setdefault(line["id"]["question"], {})[line["id"]["thinking"]] = verdict
    each = {
        "obeyed": [(a.obeyed + b.obeyed) / 2 for a, b in _modes(found)],
        "accuracy with thinking": [a.correct for a, _ in _modes(found)],
        "accuracy without": [b.correct for _, b in _modes(found)],
        "passed": [(a.passes + b.passes) / 2 for a, b in _modes(found)],
    }
    drawn_RN = draws(len(found), resamples, seed)
    numbers = {name: np.asarray(values, np.float64)[drawn_RN].mean(axis=1) for name, values in each.items()}
    return numbers | {THINKING: numbers["accuracy with thinking"] - numbers["accuracy without"]}


def _modes(found: Mapping[str, Mapping[bool, Any]]) -> list[tuple[Any, Any]]:
    """(verdict with thinking, without) of each prompt, always in one order: answers come in any."""
    return [(found[question][True], found[question][False]) for question in sorted(found)]


def nats(report: Mapping[str, Any], resamples: int, seed: int) -> Numbers:
    """The logarithm of perplexity, nats a token, of each language and ("perplexity") of all, each language alike.

    Args:
      report: what `smollm3 perplexity --json` printed of texts whose language is "german 3".
    """
    texts: dict[str, list[tuple[float, int]]] = {}
    for name, of in report["languages"].items():
        texts.setdefault(name.rpartition(" ")[0], []).append((of["nats_per_token"], of["tokens"]))
    numbers = {}
    for i, (language, of) in enumerate(sorted(texts.items())):
        drawn_RN = draws(len(of), resamples, seed + i)
        mean_N, tokens_N = np.asarray(of, np.float64).T
        numbers[language] = (mean_N * tokens_N)[drawn_RN].sum(axis=1) / tokens_N[drawn_RN].sum(axis=1)
    return numbers | {"perplexity": np.mean(list(numbers.values()), axis=0)}


def draws(count: int, resamples: int, seed: int) -> np.ndarray:
    """int64 [R + 1, N]: which of N things are taken; first each of them once."""
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    return np.concatenate([np.arange(count)[None], drawn])


def interval(numbers: np.ndarray, share: float, of: Callable[[Any], Any] = lambda x: x) -> dict[str, float]:
    """The measured value, and between which values so large a share of the draws lies; of: taken of each at the end."""
    low, high = np.quantile(numbers[1:], [(1 - share) / 2, (1 + share) / 2])
    return {"value": float(of(numbers[0])), "low": float(of(low)), "high": float(of(high))}


def expectations(expected: Iterable[Mapping[str, Any]], models: Mapping[str, Numbers], share: float) -> list[dict]:
    """Of each expectation of the recipe the difference, its interval, and whether it held."""
    found = []
    for one in expected:
        measured = models[one["of"]][one["measure"]]
        if one["of"] != one["against"]:
            measured = measured - models[one["against"]][one["measure"]]
        about = interval(measured, share)
        held = about["low"] > one["above"] if "above" in one else about["high"] < one["below"]
        found.append({**one, **about, "held": bool(held)})
    return found
