"""What a run writes in its folder: through no link, as private as it was, and nothing in place."""

import dataclasses
import json
import os
import stat
from pathlib import Path

import pytest
from etils import epath
from tiny import talking_checkpoint, tiny_checkpoint

from smollm3_jax.config import ModelConfig
from smollm3_jax.errors import CheckpointFormatError, OptionError, TrainingError
from smollm3_jax.tokenizer import load_tokenizer
from smollm3_jax.train.run.export import names_in
from smollm3_jax.train.run.folder import TOKENIZER, keep_texts, only_one
from smollm3_jax.train.run.monitor import Monitor
from smollm3_jax.train.settings_file import parse

ABOUT = {"parameters": 1, "devices": 1, "steps": 9, "tokens_per_step": 8, "weights": {"a": 1.0}, "documents": {"a": 1}}
LINE = {"step": 1, "loss": 1.0, "seconds": 0.1, "bad": 0, "tokens": 8.0}
LINE |= {"learning_rate": 1e-3, "tokens_per_second": 8.0, "grad_norm": 1.0}
LOGS = ("settings.json", "environment.json", "metrics.jsonl", "events.jsonl", "report.html")


@pytest.fixture
def victim(tmp_path):
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "diary.txt").write_text("dear diary")
    yield folder
    assert [path.name for path in folder.iterdir()] == ["diary.txt"]
    assert (folder / "diary.txt").read_text() == "dear diary"


@pytest.fixture
def run(tmp_path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


def log_a_step(run: Path) -> None:
    settings = parse({"run": {"dir": str(run), "steps": 9}})
    settings = dataclasses.replace(settings, log=dataclasses.replace(settings.log, tensorboard=False, wandb=False))
    of_run = Monitor(epath.Path(run), settings, {})
    of_run.begin(0, False, ABOUT)
    of_run.step(dict(LINE))
    of_run.event({"event": "rollback"})
    of_run.close("complete", 1)


@pytest.mark.parametrize("name", LOGS)
def test_logs_that_are_links(name, run, victim, caplog):
    """Training goes on without them, and says so."""
    (run / name).symlink_to(victim / "diary.txt")
    log_a_step(run)
    assert f"{name} could not be written" in caplog.text and "it is a link" in caplog.text
    others = set(LOGS) - {name, "report.html"}  # which is made of the others
    assert all((run / other).is_file() and not (run / other).is_symlink() for other in others)


@pytest.mark.parametrize("name", [f".{name}.new" for name in LOGS])
def test_links_where_temporary_files_were(name, run, victim, caplog):
    (run / name).symlink_to(victim / "diary.txt")
    log_a_step(run)
    assert "could not be written" not in caplog.text and (run / name).is_symlink()


def test_logs_stay_private(run):
    log_a_step(run)
    for name in LOGS:
        (run / name).chmod(0o600)
    log_a_step(run)
    assert {stat.S_IMODE((run / name).stat().st_mode) for name in LOGS} == {0o600}


@pytest.mark.parametrize("what", ["file", "nothing", "folder", "pipe"])
def test_a_lock_that_is_none(what, run, victim):
    lock = run / "lock"
    if what == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to({"file": victim / "diary.txt", "nothing": victim / "new", "folder": victim}[what])
    with (
        pytest.raises(OptionError, match=r"run\.dir=.*(it is a link|not a regular file)"),
        only_one(epath.Path(run)),
    ):
        pass


def test_one_run_at_a_time(run):
    second = pytest.raises(OptionError, match="another process trains in")
    with only_one(epath.Path(run)), second, only_one(epath.Path(run)):
        pass
    with only_one(epath.Path(run)):
        pass


def test_the_text_files_are_replaced_as_one(tmp_path, run, monkeypatch):
    """All or none of them, private as they were; what else lies there stays."""
    model = tiny_checkpoint(tmp_path / "model")
    (model / "tokenizer.json").write_text("new")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "x.jinja").write_text("new")
    texts = run / TOKENIZER
    texts.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "notes.txt"):
        (texts / name).write_text("old")
        (texts / name).chmod(0o600)

    def fail(*_):
        raise OSError(28, "No space left on device")

    # A full disk is no mistake of the command: exit code 3.
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="No space left"):
        patch.setattr(os, "fsync", fail)
        keep_texts(model, epath.Path(texts))
    assert {path.name: path.read_text() for path in texts.iterdir()} == dict.fromkeys(
        ("tokenizer.json", "chat_template.jinja", "notes.txt"), "old"
    )
    keep_texts(model, epath.Path(texts))
    assert {str(path.relative_to(texts)): path.read_text() for path in texts.rglob("*") if path.is_file()} == {
        "tokenizer.json": "new",
        "notes.txt": "old",
        "additional_chat_templates/x.jinja": "new",
    }
    assert stat.S_IMODE((texts / "tokenizer.json").stat().st_mode) == 0o600
    # An export takes along what is below, too.
    assert {"tokenizer.json", "additional_chat_templates/x.jinja"} <= set(names_in(epath.Path(texts)))
    assert [path.name for path in run.iterdir()] == [TOKENIZER]


def test_the_template_of_the_training_is_the_only_one(tmp_path, run):
    """Wherever the model had its own: in tokenizer_config.json, which some readers ask first, or one more for tools."""
    model, texts = talking_checkpoint(tmp_path / "model"), epath.Path(run / TOKENIZER)
    (model / "tokenizer_config.json").write_text('{"chat_template": "config", "pad_token": "w7"}')
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    keep_texts(model, texts)
    assert len(names_in(texts)) == 4 and (texts / "tokenizer_config.json").read_text().startswith('{"chat')
    keep_texts(model, texts, "trained {{ messages[0].content }}")
    assert names_in(texts) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert json.loads((texts / "tokenizer_config.json").read_text()) == {"pad_token": "w7"}
    tokenizer = load_tokenizer(Path(texts), ModelConfig.from_hf(model))
    assert tokenizer.template([{"type": "function"}]) == "trained {{ messages[0].content }}"


def test_text_files_are_not_written_through_a_link(tmp_path, run, victim):
    (run / TOKENIZER).symlink_to(victim)
    with pytest.raises(OptionError, match="it is a link"):
        keep_texts(tiny_checkpoint(tmp_path / "model"), epath.Path(run / TOKENIZER))


def test_text_files_that_lead_out_of_the_model(tmp_path, run, victim):
    model = tiny_checkpoint(tmp_path / "model")
    (model / "merges.txt").symlink_to(victim / "diary.txt")
    with pytest.raises(CheckpointFormatError, match=r"merges\.txt is a link that leads out"):
        keep_texts(model, epath.Path(run / TOKENIZER))
    assert not list(run.iterdir())
