"""The two modes: the tasks and their checker, what is measured, and the whole command on a tiny model."""

import io
import json
import random
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from proxies import FULL
from rich.console import Console
from tiny import chat_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import dual_mode
from modes import dialogues, report, stages
from modes.checker import check
from modes.data import make_data, pairs_of, read_lines, write_lines
from modes.measure import THINKING, draws, expectations, interval, nats, rates
from modes.tasks import DAYS, KINDS, draw_tasks, modes

from smollm3_jax.chat.template import normalize, render, render_spans
from smollm3_jax.commands.main import main
from smollm3_jax.errors import OptionError, TrainingError
from smollm3_jax.train.settings_file import read_settings

RECIPE = tomllib.loads(dual_mode.RECIPE.read_text())
TEMPLATE = stages.TEMPLATE.read_text()


# The tasks


def solved(kind: str, question: str) -> str:
    """The answer by another way than the tasks' own."""
    numbers = [int(x) for x in re.findall(r"\d+", question)]
    words = re.findall(r"\b[a-z]\b", question)
    match kind:
        case "sum" | "difference" | "product":
            return str(eval(question.removeprefix("What is ").removesuffix("?")))
        case "largest":
            return str(max(numbers))
        case "sort":
            return " ".join(sorted(words))
        case "reverse":
            return " ".join(words[::-1])
        case "count":
            return str(words[1:].count(words[0]))
    start = DAYS.index(re.findall("|".join(DAYS), question)[0])
    return DAYS[(start + (numbers[0] if " in " in question else -numbers[0])) % 7]


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_right_and_the_steps_lead_to_them(kind):
    draw = random.Random(kind)
    for _ in range(200):
        task = KINDS[kind](draw)
        assert task.kind == kind
        assert task.answer == solved(kind, task.question)
        # Of letters, the steps give one after the other, and the last of them leaves one.
        letters = [step.split()[1].rstrip(",") for step in task.steps]
        given = " ".join([*letters, task.steps[-1].split()[-1]]) if kind in ("sort", "reverse") else task.steps[-1]
        assert given.endswith(task.answer)
        assert all(eval(a) == int(b) for a, _, b in (step.partition(" = ") for step in task.steps if " = " in step))


def test_no_question_is_drawn_twice_and_a_seed_draws_the_same():
    taken = set()
    first, second = draw_tasks(160, 0, taken), draw_tasks(160, 1, taken)
    questions = [task.question for task in [*first, *second]]
    assert len(set(questions)) == 320 == len(taken)
    assert draw_tasks(160, 0, set()) == first
    assert {task.kind for task in first[:8]} == set(KINDS)
    with pytest.raises(ValueError, match=r"no more questions like: Today is"):
        draw_tasks(2000, 2, taken)


def test_each_kind_comes_in_both_modes_equally_often():
    tasks = draw_tasks(160, 0, set())
    seen = [(task.kind, mode) for task, mode in zip(tasks, modes(160), strict=True)]
    assert {seen.count((kind, mode)) for kind in KINDS for mode in (True, False)} == {10}


# The checker


@pytest.mark.parametrize("thinking", [True, False])
def test_what_is_fine_tuned_on_passes(thinking):
    for task in draw_tasks(80, 3, set()):
        text = normalize(task.record(thinking)["messages"])[-1]["content"]
        assert check(task.kind, task.answer, text, thinking, finished=True).passes, text
        assert not check(task.kind, task.answer, text, not thinking, finished=True).obeyed
        assert not check(task.kind, task.answer, text, thinking, finished=False).passes


@pytest.mark.parametrize(
    ("kind", "answer", "thinking", "text", "obeyed", "correct"),
    [
        ("sum", "124", True, "<think>\n60 + 64\n</think>\nThe answer is 124.", True, True),
        ("sum", "124", True, "<think>\n124\n</think>\nThe answer is 125.", True, False),
        ("sum", "124", True, "<think>\n\n</think>\nThe answer is 124.", False, True),
        ("sum", "124", True, "<think>\n124\n</think>\n", False, False),
        ("sum", "124", True, "The answer is 124.", False, True),
        ("sum", "124", True, "Well. <think>\n1\n</think>\n124", False, True),
        ("sum", "124", True, "<think>\n1\n</think>\n<think>\n2\n</think>\n124", False, True),
        ("sum", "124", True, "<think>\n124", False, True),
        ("sum", "124", False, "60 + 64 = 124", True, True),
        ("sum", "124", False, "60 is one.\nSo it is 124.", False, True),
        ("sum", "124", False, "124 </think>", False, False),
        ("sum", "124", False, "", False, False),
        ("sum", "1240", False, "It is 1,240.", True, True),
        ("difference", "12", False, "It is 112.", True, False),
        ("sort", "a b d q", False, "The letters are a, b, d, and q.", True, True),
        ("sort", "a b d q", False, "A b d q", True, True),
        ("reverse", "a b d q", False, "a -> b -> d", True, False),
        ("day", "Friday", False, "Monday and four days: Friday", True, True),
        ("day", "Friday", False, "Friday comes after Thursday", True, False),
    ],
)
def test_verdicts(kind, answer, thinking, text, obeyed, correct):
    verdict = check(kind, answer, text, thinking, finished=True)
    assert (verdict.obeyed, verdict.correct, verdict.passes) == (obeyed, correct, obeyed and correct)


def test_pairs_are_made_where_one_sample_passes_and_one_does_not():
    def line(index, *texts, thinking=False):
        known = {"kind": "sum", "question": "What is 1 + 1?", "answer": "2", "thinking": thinking}
        return {"index": index, "id": known, "samples": [{"text": x, "finish_reason": "stop"} for x in texts]}

    answers = [line(2, "3", "2"), line(0, "2", "2"), line(1, "3", "4"), line(3, "<think>\n1\n</think>\n2", "2")]
    pairs = list(pairs_of(answers, lambda messages: messages[0]["content"]))
    assert pairs == [
        {"prompt": "/no_think", "chosen": "2", "rejected": "3"},
        {"prompt": "/no_think", "chosen": "2", "rejected": "<think>\n1\n</think>\n2"},
    ]


# The template


@pytest.mark.parametrize("thinking", [True, False])
def test_the_template_has_two_modes_as_smollm3s_has(thinking, release):
    """Set by the system message or enable_thinking, with what the released template puts before an answer."""
    released = (release / "chat_template.jinja").read_text()
    word = "/think" if thinking else "/no_think"
    user = {"role": "user", "content": "1 + 1?"}
    by_system = [{"role": "system", "content": word}, user]
    text = render(TEMPLATE, by_system, add_generation_prompt=True)
    assert text == render(TEMPLATE, [user], add_generation_prompt=True, enable_thinking=thinking)
    assert text != render(TEMPLATE, [user], add_generation_prompt=True, enable_thinking=not thinking)
    assert f"Reasoning Mode: {word}\n" in text
    opened = text.partition("1 + 1?")[2]
    assert opened == render(released, by_system, add_generation_prompt=True).partition("1 + 1?")[2]
    whole, spans = render_spans(TEMPLATE, [*by_system, {"role": "assistant", "content": "2"}])
    theirs, released_spans = render_spans(released, [*by_system, {"role": "assistant", "content": "2"}])
    assert [whole[a:b] for a, b in spans] == [theirs[a:b] for a, b in released_spans]


# What is measured


def answered(question, thinking, text):
    known = {"kind": "sum", "question": question, "answer": "2", "thinking": thinking}
    return {"id": known, "text": text, "finish_reason": "stop"}


def test_rates_are_the_shares_of_prompts():
    thought = "<think>\n1 + 1\n</think>\n"
    lines = [answered("a", True, thought + "2"), answered("a", False, "3"), answered("b", False, "2\n2")]
    lines += [answered("b", True, "2")]
    found = rates(lines, resamples=500, seed=0)
    first = {name: float(values[0]) for name, values in found.items()}
    assert first == {
        "obeyed": 0.5,
        "accuracy with thinking": 1.0,
        "accuracy without": 0.5,
        "passed": 0.25,
        THINKING: 0.5,
    }
    assert interval(found["accuracy without"], 0.95) == {"value": 0.5, "low": 0.0, "high": 1.0}
    same = rates(lines[::-1], resamples=500, seed=0)
    assert all(np.array_equal(found[name], same[name]) for name in found)


def test_the_interval_of_a_share_is_the_binomials():
    drawn = draws(400, 4000, 0)
    values = (np.arange(400) < 100).astype(float)[drawn].mean(axis=1)
    about = interval(values, 0.95)
    error = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert about["value"] == 0.25
    assert abs(about["low"] - (0.25 - error)) < 0.006
    assert abs(about["high"] - (0.25 + error)) < 0.006


def test_perplexity_counts_tokens_within_a_language_and_languages_alike():
    texts = {"german 0": (1.0, 30), "german 1": (3.0, 10), "french 0": (2.0, 5), "french 1": (2.0, 5)}
    languages = {name: {"nats_per_token": mean, "tokens": count} for name, (mean, count) in texts.items()}
    found = nats({"languages": languages}, resamples=200, seed=0)
    assert {name: float(values[0]) for name, values in found.items()} == {
        "french": 2.0,
        "german": 1.5,
        "perplexity": 1.75,
    }
    about = interval(found["german"], 0.95, np.exp)
    assert (about["value"], about["low"], about["high"]) == pytest.approx((np.exp(1.5), np.e, np.exp(3)))


def test_an_expectation_holds_where_the_whole_interval_does():
    draw = np.random.default_rng(0)
    base, better = draw.normal(0.5, 0.01, 1000), draw.normal(0.6, 0.01, 1000)
    models = {"a": {"passed": base}, "b": {"passed": better}}
    one = {"measure": "passed", "of": "b", "against": "a"}
    expected = [one | bound for bound in ({"above": 0.0}, {"above": 0.1}, {"below": 0.2}, {"below": 0.1})]
    found = expectations(expected, models, 0.95)
    assert [x["held"] for x in found] == [True, False, True, False]
    alone = {"measure": "passed", "of": "b", "against": "b", "above": 0.5}
    assert expectations([alone], models, 0.95)[0]["value"] == better[0]


# Dialogues


def write_corpus(path):
    files = {
        "english/greetings": [["Hello", "Hi"], ["Hello", "Hi"], ["What?", 42], ["Alone"], ["x" * 400, "long"]],
        "english/science": [["What is it?", "It is.", "Is it?"]] + [[f"Is {i}?", f"{i} is."] for i in range(40)],
        "german/food": [[f"Was ist {i}?", f"Das ist {i}."] for i in range(40)],
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, talks in files.items():
            archive.writestr(f"chatterbot_corpus/data/{name}.yml", json.dumps({"conversations": talks}))
    return path


def test_dialogues_are_read_once_each_and_texts_are_of_whole_ones(tmp_path):
    wheel = write_corpus(tmp_path / "corpus.whl")
    assert dialogues.read_dialogues(wheel, "english", ("greetings",)) == [["Hello", "Hi"]]
    talks = dialogues.read_dialogues(wheel, "english")
    assert len(talks) == 42
    texts = dialogues.texts(talks, 50)
    assert texts[0] == "Hello\nHi\nWhat is it?\nIt is.\nIs it?\nIs 0?\n0 is.\nIs 1?\n1 is."
    assert all(len(text) >= 50 for text in texts)


# The whole command


def small(recipe, model):
    """The recipe with little of everything, for a model of letters."""
    small = {
        "model": str(model),
        "max_new_tokens": 4,
        "tasks": {"sft": 16, "preferences": 4, "held_out": 2, "held_out_seed": 1},
        "dialogues": recipe["dialogues"]
        | {"sft": 1, "sft_files": ["greetings"], "languages": ["english", "german"], "english_files": ["science"]}
        | {"texts": 2, "characters": 30, "tokens": 16},
        "measure": recipe["measure"] | {"resamples": 50},
    }
    for name, steps in (("sft", 2), ("apo", 4)):
        of = recipe[name]
        small[name] = of | {
            "run": {"steps": steps},
            "data": of["data"] | {"length": 512, "rows": 1},
            "checkpoint": {"every": 2, "keep": 2},
        }
    return recipe | small


def test_the_recipe_is_one_that_smollm3_train_reads(tmp_path):
    for name in ("sft", "apo"):
        words = [f"{key}={json.dumps(value)}" for key, value in stages.flat(RECIPE[name])]
        (tmp_path / "empty.toml").write_text("")
        settings = read_settings(
            str(tmp_path / "empty.toml"), [*words, "run.dir=x", "model.path=demo", "data.path=y.jsonl"]
        )
        assert settings.run.steps % settings.checkpoint.every == 0
    assert RECIPE["apo"]["run"]["steps"] // RECIPE["apo"]["checkpoint"]["every"] >= RECIPE["merge"]["soup"]


def test_a_folder_of_another_seed_or_recipe_is_refused(tmp_path):
    stages.begin(tmp_path / "run", RECIPE, 0)
    stages.begin(tmp_path / "run", RECIPE, 0)
    with pytest.raises(OptionError, match=r"was begun with another seed: name another folder by --out"):
        stages.begin(tmp_path / "run", RECIPE, 1)
    with pytest.raises(OptionError, match=r"another model"):
        stages.begin(tmp_path / "run", RECIPE | {"model": "x"}, 0)


def test_seeds_share_held_out_questions_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(dialogues, "corpus", lambda: write_corpus(tmp_path / "corpus.whl"))
    recipe = small(RECIPE, "demo")
    for seed in (0, 1):
        make_data(recipe, seed, tmp_path / str(seed))
    first, second = (
        [read_lines(tmp_path / seed / f"{name}.jsonl") for name in ("held-out", "sft", "prompts")] for seed in "01"
    )
    assert first[0] == second[0]
    assert first[1] != second[1]
    held_out = {line["id"]["question"] for line in first[0]}
    for _, trained, asked in (first, second):
        assert not held_out & {record["messages"][1]["content"] for record in trained}
        assert not held_out & {line["id"]["question"] for line in asked}


@FULL
def test_the_whole_command_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    """It stops where the checker passes nothing, as of random weights; with pairs from elsewhere it goes on there."""
    monkeypatch.setattr(dialogues, "corpus", lambda: write_corpus(tmp_path / "corpus.whl"))
    model = chat_checkpoint(tmp_path / "model", stages.TEMPLATE)
    trained = []

    def here(*words, output=None):
        """In this process, but for training, which ends its own."""
        words = [str(word) for word in words]
        if words[0] == "train":
            trained.append(words)
            command = [sys.executable, "-m", "smollm3_jax", *words]
            assert subprocess.run(command, capture_output=True).returncode == 0
            return
        capsys.readouterr()
        assert main(words) == 0
        if output:
            output.write_text(capsys.readouterr().out)

    monkeypatch.setattr(stages, "smollm3", here)
    run = stages.begin(tmp_path / "run", small(RECIPE, model), 0)
    with pytest.raises(TrainingError, match=r"no prompt of which one sample passes and another does not"):
        stages.run_stages(run)
    prompt = render(TEMPLATE, [{"role": "user", "content": "1 + 1?"}], add_generation_prompt=True)
    pairs = [{"prompt": prompt, "chosen": f"{i}", "rejected": f"no {i}"} for i in range(3)]
    write_lines(tmp_path / "run" / "pairs.jsonl", pairs)
    stages.run_stages(run)
    assert [Path(words[2]).stem for words in trained] == ["sft", "apo"]
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    assert list(found["models"]) == list(stages.MODELS)
    assert found["pairs"] == 3
    assert found["models"]["merged"]["perplexity"]["all"]["value"] > 1
    # The soup is not the last checkpoint, and the merge is neither.
    languages = [row["perplexity"]["german"]["value"] for row in found["models"].values()]
    assert len(set(languages)) == 5
    done = [line for line in read_lines(tmp_path / "run" / "stages.jsonl") if line["done"]]
    assert len(done) == len(list(stages.stages(run))) - 1
    console = Console(record=True, width=200, file=io.StringIO())
    report.show(found, console)
    text = console.export_text()
    assert "4 prompts" in text
    assert text.count("held: ") + text.count("did not hold: ") == len(RECIPE["expected"])
