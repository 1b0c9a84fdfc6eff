"""What a run would do, without doing it."""

import json

import pytest
import tiny

from smollm3_jax.commands.main import main


@pytest.fixture
def dry(tmp_path, capsys):
    """The output of a dry run, with these words."""
    tiny.talking_checkpoint(tmp_path / "model")
    (tmp_path / "run.toml").write_text("[run]\nsteps = 3\n[data]\nlength = 16\nrows = 2\n")

    def run(*words):
        options = ["--config", str(tmp_path / "run.toml"), f"run.dir={tmp_path / 'run'}"]
        assert main(["train", *options, f"model.path={tmp_path / 'model'}", *words, "--dry-run"]) == 0
        return capsys.readouterr().out

    return run


def test_paths_that_are_not_there_are_told_of(dry, tmp_path):
    (tmp_path / "there.txt").write_text("w5")
    assert "warning" not in dry(f"data.path={tmp_path / 'there.txt'}")
    assert "warning: data.path=/nowhere/to/be is not there" in dry("data.path=/nowhere/to/be")
    words = ["data.sources.a.path=/nowhere/[/x]", "data.sources.b.path=gs://bucket/c", "data.eval_path=/nowhere/e"]
    words += ["data.sources.c.path=org/name", "data.sources.c.format=hf", f"data.sources.d.path={tmp_path}"]
    assert json.loads(dry(*words, "--json"))["missing"] == [
        "data.eval_path=/nowhere/e",
        "data.sources.a.path=/nowhere/[/x]",
    ]
    assert "warning: data.sources.a.path=/nowhere/[/x] is not there" in dry(*words)
    assert not (tmp_path / "run").exists()


def test_names_of_sources_are_no_markup(dry):
    shown = dry("data.sources.[/x].path=/nowhere", "data.sources.[red].path=/nowhere")
    assert "[/x]" in shown and "[red]" in shown
