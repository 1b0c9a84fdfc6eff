"""Puzzles of reasoning-gym, where it is installed; and what is said where it is not."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny

from smollm3_jax.commands.main import main
from smollm3_jax.errors import SupportError

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval has it)")

from smollm3_jax.evaluate.tasks import data, reasoning

needs_gym = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)


@pytest.fixture(scope="module")
def small(tmp_path_factory, release) -> Path:
    folder = tmp_path_factory.mktemp("reasoning") / "small"
    return tiny.chat_checkpoint(folder, release / "chat_template.jinja", max_position_embeddings=4096)


def test_without_the_package(small, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert main(["eval", str(small), "--tasks", "smollm3_reasoning", "--think"]) == SupportError.exit_code
    assert "pip install reasoning_gym" in capsys.readouterr().err


@needs_gym
@pytest.mark.slow
def test_right_answers_are_right():
    found = list(reasoning.questions()["test"])
    assert len(found) == data.SAMPLES * len(reasoning.PUZZLES)
    for doc in found[:30]:
        answer = json.loads(doc["entry"])["answer"]
        assert reasoning.score(doc, [f"So it is <answer>{answer}</answer>."]) == {"score": 1.0}
        assert reasoning.score(doc, ["It is <answer>$</answer>."])["score"] < 0.5
    assert next(iter(reasoning.questions(["chain_sum"])["test"])) == found[0]


@needs_gym
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["--think", "--no-think"])
def test_the_command_asks_them(small, capsys, mode):
    command = ["eval", str(small), "--tasks", "smollm3_reasoning", "--limit", "2", mode, "--json"]
    assert main([*command, "--gen-kwargs", "max_gen_toks=8"]) == 0
    assert json.loads(capsys.readouterr().out)["results"]["smollm3_reasoning"]["score,none"] < 1
