"""The released protocols, and the scores beside results."""

import importlib.util
import re
from pathlib import Path

import pytest

from smollm3_jax.evaluate.protocols import PUBLISHED, RECIPES, published


def test_each_task_of_a_recipe_has_a_score_of_its_kind():
    for name, modes in (("smollm3-base", ["base"]), ("smollm3-instruct", ["no_think", "think"])):
        for task in RECIPES[name].tasks:
            assert all(0 < getattr(PUBLISHED[task], mode) < 100 for mode in modes)


def test_a_score_stands_beside_its_metric_and_mode_alone():
    assert published("gsm8k", "exact_match,flexible-extract", "base") == "67.63 (GSM8K)"
    assert published("aime25", "exact_match,none", "think") == "36.70 (AIME 2025)"
    for task, metric, mode in (
        ("gsm8k", "exact_match,strict-match", "base"),
        ("gsm8k", "exact_match,flexible-extract", "think"),
        ("mine", "acc,none", "base"),
    ):
        assert published(task, metric, mode) == ""


@pytest.mark.slow
def test_lm_eval_has_the_tasks():
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        pytest.skip("lm-eval is not installed")
    left = set(PUBLISHED)
    for file in (Path(found.origin).parent / "tasks").rglob("*.yaml"):
        left -= set(re.findall(r"^(?:task|group): *[\"']?([\w-]+)", file.read_text(), re.M))
    assert left == set()
