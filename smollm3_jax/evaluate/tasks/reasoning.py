"""Puzzles of the package reasoning-gym, which makes them up and scores their answers; with --think and --no-think they
compare a model's two modes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from smollm3_jax.evaluate.tasks.data import SAMPLES, dataset

# Easy ones of several kinds: arithmetic, order, letters, families.
PUZZLES = ("chain_sum", "leg_counting", "number_sorting", "letter_counting", "spell_backward", "family_relationships")
SEED = 0
FORM = "\nGive the final answer between <answer> and </answer>."


def questions(puzzles: Sequence[str] = PUZZLES, **_: Any) -> dict[str, Any]:
    """One of each kind in turn.

    Args:
      puzzles: names of reasoning-gym's datasets.
    """
    import reasoning_gym  # pyright: ignore[reportMissingImports]

    made = [reasoning_gym.create_dataset(name, size=SAMPLES, seed=SEED) for name in puzzles]
    # As texts: the columns of a dataset have one type.
    return dataset(
        [
            {"puzzle": name, "question": one[i]["question"] + FORM, "entry": json.dumps(one[i], default=str)}
            for i in range(SAMPLES)
            for name, one in zip(puzzles, made, strict=True)
        ]
    )


def score(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """reasoning-gym's own, from 0 to 1, of what stands between the last tags, or else of the whole answer."""
    from reasoning_gym import get_score_answer_fn  # pyright: ignore[reportMissingImports]
    from reasoning_gym.utils import extract_answer  # pyright: ignore[reportMissingImports]

    found = extract_answer(results[0])
    answer = results[0].strip() if found is None else found
    return {"score": min(1.0, get_score_answer_fn(doc["puzzle"])(answer, json.loads(doc["entry"])))}
