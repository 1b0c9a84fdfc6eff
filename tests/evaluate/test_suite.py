"""Tasks by their names, and what is said where one cannot be had."""

import importlib.util
import sys
from pathlib import Path

import pytest
import tiny

from smollm3_jax import evaluate
from smollm3_jax.commands.main import main
from smollm3_jax.errors import DataError, HubError, OptionError, SupportError

pytestmark = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
{more}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """With the task `mine`. lm-eval's own are few, as looking through all of them takes long."""
    import datasets

    own = tmp_path / "lm_eval" / "tasks"
    own.mkdir(parents=True)
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(own / "manager.py"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "data.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    write(folder, "mine")
    for name in ("gsm8k", "gsm_plus", "hellaswag"):
        (own / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder, more=""))
    return folder


def write(folder: Path, name: str, more: str = "", **other: str) -> None:
    text = TASK.format(name=name, folder=folder, more=more)
    for old, new in other.items():
        text = text.replace(old, new)
    (folder / f"{name}.yaml").write_text(text)


def loaded(names: list[str], folder: Path) -> list[str]:
    from smollm3_jax.evaluate.suite import load_tasks

    return [task.task_name for task in load_tasks(names, [folder])[1]]


def test_names_patterns_files_and_groups(folder):
    write(folder, "mine_too")
    (folder / "group.yaml").write_text("group: both\ntask: [mine, hellaswag]\n")
    assert loaded(["mine_*", "gsm8k", str(folder / "mine.yaml")], folder) == ["mine_too", "gsm8k", "mine"]
    from smollm3_jax.evaluate.suite import load_tasks

    [group] = load_tasks(["both"], [folder])[1]
    assert [task.task_name for task in group.get_all_tasks()] == ["mine", "hellaswag"]


def test_lm_evals_own_are_looked_through_only_where_one_of_them_is_asked_for(folder, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", None)
    assert loaded(["mine"], folder) == ["mine"]


def test_an_unknown_name_is_answered_with_those_near(folder):
    with pytest.raises(OptionError, match=r"no task gsm8; did you mean gsm8k"):
        loaded(["mine", "gsm8"], folder)
    with pytest.raises(OptionError, match=r"no task zzz_\* \("):
        loaded(["zzz_*"], folder)
    with pytest.raises(OptionError, match="is no folder"):
        loaded(["mine"], folder / "nowhere")


def test_what_a_task_lacks_is_named_with_the_way_out(folder, monkeypatch):
    write(folder, "gone", dataset_kwargs="dataset_path: json\nignored", json="nobody/nothing")
    write(folder, "broken", **{"data.jsonl": "nowhere.jsonl"})
    (folder / "functions.py").write_text("import a_package_that_nobody_has\n")
    write(folder, "needs", "process_docs: !function functions.change")
    with pytest.raises(DataError, match="task broken cannot be loaded: FileNotFoundError"):
        loaded(["broken"], folder)
    with pytest.raises(SupportError, match="task needs needs the package a_package_that_nobody_has: pip install"):
        loaded(["needs"], folder)

    def fetch(*_, **__):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("datasets.load_dataset", fetch)
    with pytest.raises(HubError, match=r"data of the task mine cannot be fetched: Couldn't reach.*HF_HOME"):
        loaded(["mine"], folder)


def test_the_command_says_what_is_wrong_in_a_line(folder, tmp_path, release, capsys, monkeypatch):
    write(folder, "runs_code", "unsafe_code: true")
    model = tiny.chat_checkpoint(tmp_path / "model", release / "chat_template.jinja")
    common = [str(model), "--include-path", str(folder)]

    def refused(*options: str, code: int = 2) -> str:
        assert main(["eval", *common, *options]) == code
        return capsys.readouterr().err

    assert "give --tasks" in refused()
    assert "--recipe has no name smollm3-bas; use smollm3-base" in refused("--recipe", "smollm3-bas")
    assert "--think or --no-think" in refused("--recipe", "smollm3-instruct")
    assert "'temperature' is not K=V" in refused("--tasks", "mine", "--gen-kwargs", "temperature")
    assert "--num-fewshot is -1" in refused("--tasks", "mine", "--num-fewshot", "-1")
    assert "max_length is 100000" in refused("--tasks", "mine", "--max-length", "100000")
    assert "max_gen_toks is 5000" in refused("--tasks", "mine", "--gen-kwargs", "max_gen_toks=5000")
    assert "generation_kwargs.beams is 3" in refused("--tasks", "mine", "--gen-kwargs", "max_gen_toks=5,beams=3")
    assert "--confirm-run-unsafe-code" in refused("--tasks", "runs_code")
    assert "did you mean" in refused("--tasks", "mime")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused("--tasks", "mine", "--output", str(tmp_path / "file"), code=3)

    for name in ("harness", "suite"):
        monkeypatch.delitem(sys.modules, f"smollm3_jax.evaluate.{name}", raising=False)
        monkeypatch.delattr(evaluate, name, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = refused("--tasks", "mine", code=3)
    assert "evaluation needs lm-eval (lm_eval" in said and "pip install" in said
