"""Prompts with instructions, and answers that follow them or not."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from smollm3_jax.commands.main import main

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval has it)")
pytest.importorskip("langdetect", reason="lm-eval's extra ifeval is not installed (the extra eval has it)")

from smollm3_jax.evaluate.tasks import data, instructions


def test_prompts_are_always_the_same_and_say_what_is_judged():
    found = list(instructions.questions()["test"])
    assert len(found) == data.SAMPLES and list(instructions.questions()["test"]) == found
    assert {kind for doc in found for kind in doc["kinds"]} == instructions.KINDS.keys()
    assert {len(doc["kinds"]) for doc in found} == {1, 2, 3}
    for doc in found:
        assert all(
            str(value) in doc["prompt"]
            for own in json.loads(doc["kwargs"])
            for name, value in own.items()
            if name in ("num_words", "keyword", "end_phrase", "postscript_marker")
        )


def of(kind: str, answer: str, **kwargs: Any) -> bool:
    doc = {"key": 0, "prompt": "Write something.", "kinds": [kind], "kwargs": json.dumps([kwargs])}
    return instructions.score(doc, [answer])["prompt_level_strict_acc"]


@pytest.mark.parametrize(
    ("kind", "kwargs", "right", "wrong"),
    [
        ("punctuation:no_comma", {}, "One and two.", "One, two."),
        ("keywords:existence", {"keywords": ["river", "bread"]}, "Bread by the river.", "Bread."),
        ("keywords:forbidden_words", {"forbidden_words": ["music"]}, "Silence.", "Music!"),
        (
            "keywords:frequency",
            {"keyword": "river", "frequency": 2, "relation": "at least"},
            "A river, a river.",
            "A river.",
        ),
        ("length_constraints:number_words", {"num_words": 4, "relation": "at least"}, "One two three four", "One"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", "One."),
        ("detectable_content:number_placeholders", {"num_placeholders": 1}, "Dear [name]", "Dear you"),
        ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Hi.\nP.S. Bye.", "Hi."),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a"),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*This* here", "This"),
        ("detectable_format:title", {}, "<<A title>>\nText.", "Text."),
        ("startend:end_checker", {"end_phrase": "The end."}, "So. The end.", "The end. So."),
        ("startend:quotation", {}, '"All of it."', "All of it."),
        ("change_case:english_lowercase", {}, "this is all in english letters.", "This is all in English letters."),
        ("change_case:english_capital", {}, "THIS IS ALL IN ENGLISH LETTERS.", "This is all in English letters."),
    ],
)
def test_answers_are_judged(kind, kwargs, right, wrong):
    assert of(kind, right, **kwargs) and not of(kind, wrong, **kwargs) and kind in instructions.KINDS


def test_all_of_a_prompt_and_each_of_its_instructions():
    doc = {"key": 0, "prompt": "", "kinds": ["punctuation:no_comma", "startend:quotation"], "kwargs": "[{}, {}]"}
    found = instructions.score(doc, ["One."])
    assert found["prompt_level_strict_acc"] is False and found["inst_level_strict_acc"] == [True, False]
    assert instructions.mean_of_all([[True, False], [True], [True]]) == 0.75


@pytest.mark.slow
def test_the_command_asks_them_outside_of_any_repository(tmp_path: Path, release, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = tiny.chat_checkpoint(tmp_path / "small", release / "chat_template.jinja", max_position_embeddings=4096)
    command = ["eval", str(small), "--tasks", "smollm3_instructions", "--limit", "2", "--no-think", "--json"]
    assert main([*command, "--gen-kwargs", "max_gen_toks=8"]) == 0
    screen = capfd.readouterr()
    assert "fatal" not in screen.err
    results = json.loads(screen.out)["results"]["smollm3_instructions"]
    assert all(0 <= results[f"{name}_acc,none"] <= 1 for name in ("prompt_level_strict", "inst_level_loose"))
