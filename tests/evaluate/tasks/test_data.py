"""The tasks that need no hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from proxies import FULL

from smollm3_jax.commands.main import main
from smollm3_jax.errors import OptionError

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra eval has it)")

from smollm3_jax.evaluate.tasks import data

LANGUAGES = ("en", "fr", "es", "de", "it", "pt")


@pytest.fixture(scope="module")
def small(tmp_path_factory, release) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "small"
    return tiny.chat_checkpoint(folder, release / "chat_template.jinja", max_position_embeddings=2048)


def test_needles_lie_in_texts_of_their_length(small):
    found = data.niah_single_1(tokenizer=str(small), max_seq_lengths=[512, 1024])["test"]
    assert [entry["max_length"] for entry in found][:4] == [512, 1024, 512, 1024]
    tokenizer = tiny.letters()
    for entry in found:
        length = len(tokenizer.encode(entry["input"])) + data.ANSWER
        assert 0.8 * entry["max_length"] <= length <= entry["max_length"]
        assert entry["input"].count(entry["outputs"][0]) == 1 and entry["gen_prefix"].split()[6] in entry["input"]
        assert data.by_length(entry, [f"{entry['outputs'][0]}."]) == {str(entry["max_length"]): 1.0}
        assert data.by_length(entry, ["1234"]) == {str(entry["max_length"]): 0.0}
    places = {entry["input"].index(entry["outputs"][0]) * 4 // len(entry["input"]) for entry in found}
    assert places == {0, 1, 2, 3}
    assert (
        data.niah_single_1(tokenizer=str(small), max_seq_lengths=[1024])["test"][:5]["input"]
        == [entry["input"] for entry in found if entry["max_length"] == 1024][:5]
    )
    with pytest.raises(OptionError, match="max_seq_lengths is"):
        data.niah_single_1(tokenizer=str(small), max_seq_lengths=[1000])
    with pytest.raises(OptionError, match="of which model"):
        data.niah_single_1()


@pytest.mark.parametrize("task", ["smollm3_niah_single_1", "smollm3_fwe"])
def test_a_length_that_the_model_is_not_given_is_refused(small, capsys, task):
    """Cut, its questions would be other ones: short, and with the needle or without."""

    def refused(lengths: list[int], *options: str) -> str:
        told = json.dumps({"max_seq_lengths": lengths})
        assert main(["eval", str(small), "--tasks", task, "--limit", "1", "--metadata", told, *options]) == 2
        return capsys.readouterr().err

    said = refused([512, 131072])
    assert "max_seq_lengths has 131072, and the model is given 2048 tokens at most" in said
    assert '"max_seq_lengths": [2048]' in said and "--yarn FACTOR" in said and "--max-length" in said
    assert "is given 1000 tokens at most" in refused([1024], "--max-length", "1000")
    assert "is given 4096 tokens at most" in refused([8192], "--yarn", "2")
    assert "Give --yarn FACTOR" in refused([512], "--max-length", "511")
    words = {"tokenizer": str(small), "max_length": 2048}
    assert data.tokenizer_and_lengths(max_seq_lengths=[512, 2048], **words)[1] == [512, 2048]


def test_there_are_texts_in_six_languages():
    for language in LANGUAGES:
        found = data.texts(language)["test"]
        assert len(found) == 3 and all(len(entry["text"]) > 200 for entry in found)


@pytest.mark.slow
def test_the_command_finds_them(small, tmp_path, capsys):
    lengths = json.dumps({"max_seq_lengths": [512]})
    common = ["eval", str(small), "--limit", "2", "--json", "--metadata", lengths]
    names = "smollm3_languages,smollm3_niah_single_1"
    assert main([*common, "--tasks", names, "--gen-kwargs", "max_gen_toks=4"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["smollm3_niah_single_1"]["512,none"] == 0.0
    parts = [results[f"smollm3_languages_{language}"]["bits_per_byte,none"] for language in LANGUAGES]
    assert results["smollm3_languages"]["bits_per_byte,none"] == pytest.approx(sum(parts) / 6)


@FULL
@pytest.mark.torch
def test_the_demo_model_finds_needles_as_in_transformers(demo_folder, programs_as_users_run_them):
    pytest.importorskip("torch")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    import smollm3_jax as s3
    from smollm3_jax.evaluate import harness, suite
    from smollm3_jax.evaluate.answers import Answers

    name = ["smollm3_niah_single_1"]
    manager, tasks = suite.load_tasks(name, metadata={"tokenizer": str(demo_folder), "max_seq_lengths": [1024]})
    model, tokenizer = s3.from_pretrained(demo_folder, "float32"), s3.load_tokenizer(demo_folder)
    ours = suite.evaluate(harness.EngineLM(model, tokenizer, Answers(None, {})), (manager, tasks), limit=8)
    reference = HFLM(pretrained=str(demo_folder), dtype="float32", device="cpu", batch_size=4)
    theirs: Any = simple_evaluate(model=reference, tasks=list[Any](tasks), task_manager=manager, limit=8)
    assert theirs is not None
    score = "smollm3_niah_single_1", "1024,none"
    assert ours["results"][score[0]][score[1]] == theirs["results"][score[0]][score[1]] > 0
