"""How the released models were evaluated, as far as lm-eval has the tasks, and the scores that were published.

The release used lighteval and vLLM, so the same names stand for prompts that differ: the scores are what to be near to,
not what to meet. Zero shots but where a task says otherwise (GSM8K 5, MATH 4), greedy for the base model; zero shots at
temperature 0.6, top_p 0.95 and at most 32,768 tokens for the other, with and without thinking.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class Recipe:
    """tasks: names of lm-eval's; chat: in the model's template; shots: None is the tasks' own; generation: over the
    tasks' generation_kwargs."""

    tasks: tuple[str, ...]
    chat: bool = False
    shots: int | None = None
    generation: Mapping[str, Any] = dataclasses.field(default_factory=dict)


RECIPES = {
    "smollm3-base": Recipe(
        (
            *("hellaswag", "arc_easy", "arc_challenge", "winogrande", "mmlu_continuation", "piqa", "openbookqa"),
            *("boolq", "minerva_math", "gsm8k"),
        )
    ),
    "smollm3-instruct": Recipe(
        ("aime25", "gsm_plus", "gpqa_diamond_cot_zeroshot", "ifeval"),
        chat=True,
        shots=0,
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.95, "max_gen_toks": 32768},
    ),
}


class Score(NamedTuple):
    """A score of the model card, in percent, and what it is called there; metric: which of lm-eval's is nearest."""

    metric: str
    name: str
    base: float | None = None
    no_think: float | None = None
    think: float | None = None


PUBLISHED = {
    "hellaswag": Score("acc_norm,none", "HellaSwag", 76.15),
    "arc_easy": Score("acc_norm,none", "ARC-CF, easy and challenge", 65.61),
    "arc_challenge": Score("acc_norm,none", "ARC-CF, easy and challenge", 65.61),
    "winogrande": Score("acc,none", "Winogrande", 58.88),
    "mmlu_continuation": Score("acc,none", "MMLU-CF", 44.13),
    "piqa": Score("acc_norm,none", "PIQA", 78.89),
    "openbookqa": Score("acc_norm,none", "OpenBookQA", 40.60),
    "boolq": Score("acc,none", "BoolQ", 78.99),
    "humaneval_plus": Score("pass@1,create_test", "HumanEval+", 30.48),
    "mbpp_plus": Score("pass_at_1,none", "MBPP+", 52.91),
    "minerva_math": Score("math_verify,none", "MATH", 46.10),
    "gsm8k": Score("exact_match,flexible-extract", "GSM8K", 67.63),
    "aime25": Score("exact_match,none", "AIME 2025", None, 9.3, 36.7),
    "gsm_plus": Score("exact_match,flexible-extract", "GSM-Plus", None, 72.8, 83.4),
    "gpqa_diamond_cot_zeroshot": Score("exact_match,flexible-extract", "GPQA Diamond", None, 35.7, 41.7),
    "ifeval": Score("prompt_level_strict_acc,none", "IFEval", None, 76.7, 71.2),
}


def published(task: str, metric: str, mode: str) -> str:
    """What the model card says of a task's metric ("acc,none"), or nothing; mode: "base", "no_think" or "think"."""
    score = PUBLISHED.get(task)
    value = None if score is None or score.metric != metric else getattr(score, mode)
    return "" if score is None or value is None else f"{value:.2f} ({score.name})"
