"""Prompts with instructions that a program can check, as IFEval's (arXiv 2311.07911) are, made up here, and judged by
IFEval's own checkers, which lm-evaluation-harness has. Those that want nltk's models are left out."""

import functools
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from smollm3_jax.evaluate.tasks.data import SAMPLES, dataset

TASKS = (
    "Write a short story about {topic}.",
    "Write a poem about {topic}.",
    "Explain to a child what is special about {topic}.",
    "Write an email to a friend about {topic}.",
    "Give advice to somebody who wants to know more about {topic}.",
    "Write an advertisement for {topic}.",
)
TOPICS = (
    "a lighthouse",
    "the night train",
    "a garden in winter",
    "an old bicycle",
    "a small bakery",
    "the first snow",
    "a lost umbrella",
    "the town library",
    "a mountain lake",
    "a clever cat",
)
WORDS = ("window", "music", "yellow", "river", "morning", "letter", "quiet", "bread", "stone", "travel")
Draw = random.Random
# IFEval's name of a kind -> what one of it says.
KINDS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "keywords:existence": lambda draw: {"keywords": draw.sample(WORDS, 2)},
    "keywords:frequency": lambda draw: {
        "keyword": draw.choice(WORDS),
        "frequency": draw.randint(2, 4),
        "relation": "at least",
    },
    "keywords:forbidden_words": lambda draw: {"forbidden_words": draw.sample(WORDS, 3)},
    "length_constraints:number_words": lambda draw: {
        "num_words": draw.choice((40, 60, 80, 120)),
        "relation": draw.choice(("at least", "less than")),
    },
    "length_constraints:number_paragraphs": lambda draw: {"num_paragraphs": draw.randint(2, 4)},
    "detectable_content:number_placeholders": lambda draw: {"num_placeholders": draw.randint(1, 3)},
    "detectable_content:postscript": lambda _: {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": lambda draw: {"num_bullets": draw.randint(2, 5)},
    "detectable_format:number_highlighted_sections": lambda draw: {"num_highlights": draw.randint(1, 3)},
    "detectable_format:title": lambda _: {},
    "startend:end_checker": lambda draw: {"end_phrase": draw.choice(("That is all.", "The end.", "Goodbye!"))},
    "startend:quotation": lambda _: {},
    "change_case:english_lowercase": lambda _: {},
    "change_case:english_capital": lambda _: {},
    "punctuation:no_comma": lambda _: {},
}


def questions(**_: Any) -> dict[str, Any]:
    """Each asks for something, and for one to three kinds of form that do not exclude each other."""
    return dataset([_question(number) for number in range(SAMPLES)])


def _question(number: int) -> dict[str, Any]:
    draw = random.Random(f"instructions {number}")
    kinds = _some_kinds(draw, 1 + number % 3)
    said = [{name: value for name, value in KINDS[kind](draw).items()} for kind in kinds]
    asked = draw.choice(TASKS).format(topic=draw.choice(TOPICS))
    words = [
        _checkers().INSTRUCTION_DICT[kind](kind).build_description(**own) for kind, own in zip(kinds, said, strict=True)
    ]
    # As a text: the columns of a dataset have one type.
    return {"key": number, "prompt": " ".join([asked, *words]), "kinds": kinds, "kwargs": json.dumps(said)}


def _some_kinds(draw: Draw, count: int) -> list[str]:
    found: list[str] = []
    names = sorted(KINDS)
    while len(found) < count:
        kind = draw.choice(names)
        excluded = _checkers().INSTRUCTION_CONFLICTS
        if not any(kind in excluded[one] or one in excluded[kind] or one == kind for one in found):
            found.append(kind)
    return found


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """IFEval's four: of the prompt and of each instruction; strict, or without first and last lines and asterisks."""
    _checkers()
    from lm_eval.tasks.ifeval.utils import process_results

    known = {"key": doc["key"], "prompt": doc["prompt"], "instruction_id_list": doc["kinds"]}
    return process_results(known | {"kwargs": json.loads(doc["kwargs"])}, results)


def mean_of_all(items: Sequence[Sequence[bool]]) -> float:
    """Over the instructions of all prompts."""
    flat = [item for some in items for item in some]
    return sum(flat) / len(flat)


@functools.cache
def _checkers() -> ModuleType:
    """IFEval's. At their import they would fetch nltk's models, which the kinds here have no use for: the variable
    makes them take themselves for a second process, which does not."""
    import langdetect

    langdetect.DetectorFactory.seed = 0  # or it would say now this, now that of a short text
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = "1"
    try:
        from lm_eval.tasks.ifeval import instructions_registry
    finally:
        os.environ.pop("LOCAL_RANK")
        if before is not None:
            os.environ["LOCAL_RANK"] = before
    return instructions_registry
