"""Runs that train a part of the parameters: what is saved, gone on from and exported."""

import dataclasses
import json
import re

import numpy as np
import pytest
import tiny
from etils import epath
from runs import checkpoint_digests, losses, write_corpus
from safetensors.numpy import load_file

from smollm3_jax.errors import TrainingError
from smollm3_jax.train.run import checkpoint, loop
from smollm3_jax.train.run.dry_run import describe
from smollm3_jax.train.run.export import export
from smollm3_jax.train.run.loop import train
from smollm3_jax.train.settings_file import parse

NORMS = r"norm|layers\..*_norm"


@pytest.fixture
def settings(tmp_path):
    tiny.talking_checkpoint(tmp_path / "model", num_hidden_layers=1)
    write_corpus(tmp_path / "corpus.jsonl")
    table = {
        "run": {"dir": str(tmp_path / "run"), "steps": 4},
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "data": {"path": str(tmp_path / "corpus.jsonl"), "length": 16, "rows": 8},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"},
        "checkpoint": {"every": 2},
    }
    return parse(table)


def in_folder(settings, folder, steps=4):
    return dataclasses.replace(settings, run=dataclasses.replace(settings.run, dir=str(folder), steps=steps))


@pytest.mark.slow
def test_a_run_of_the_norms_alone(settings, tmp_path):
    whole, parts = tmp_path / "run", tmp_path / "parts"
    train(settings, trainable=NORMS)
    arrays, _ = checkpoint_digests(whole, 4)
    moments = {name for name in arrays if ".mu." in name or ".nu." in name}
    assert len(moments) == 6 and all("norm" in name for name in moments)
    # What is frozen has in all checkpoints the same digest, what is trained another one.
    before, _ = checkpoint_digests(whole, 2)
    models = [name for name in arrays if name.startswith("model.")]
    assert {name for name in models if arrays[name] != before[name]} == {name for name in models if "norm" in name}

    train(in_folder(settings, parts, 2), trainable=NORMS)
    train(in_folder(settings, parts), resume=True, trainable=NORMS)
    assert losses(parts) == losses(whole) and checkpoint_digests(parts, 4) == checkpoint_digests(whole, 4)

    # Another part is refused, changes allowed or not; the same in other words goes on.
    with pytest.raises(TrainingError, match=rf"trainable is None, .* made with {re.escape(repr(NORMS))}, which trains"):
        train(in_folder(settings, parts, 5), resume=True, allow_changes=True)
    assert train(in_folder(settings, parts, 5), resume=True, trainable=r".*norm")["step"] == 5
    # A folder of before does not say what it trained.
    file = parts / "checkpoints" / "00000005" / "about" / "metadata"
    content = {k: x for k, x in json.loads(file.read_text()).items() if k not in ("seal", "trainable")}
    file.write_text(json.dumps(checkpoint._sealed(content)))
    with pytest.raises(TrainingError, match=r"holds other arrays than this run: .*mu"):
        train(in_folder(settings, parts, 6), resume=True)
    assert train(in_folder(settings, parts, 6), resume=True, trainable=NORMS)["step"] == 6

    assert export(epath.Path(whole), tmp_path / "out") == [4]
    was, now = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", tmp_path / "out"))
    assert was.keys() == now.keys()
    for name, x in now.items():
        assert np.array_equal(x, was[name]) == ("norm" not in name), name
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_processes_agree_on_what_is_trained(settings, monkeypatch):
    """T14."""

    def agree(what, value):
        raise TrainingError(json.dumps(value))

    monkeypatch.setattr(loop, "agree", agree)
    said = []
    for trainable in (NORMS, None):
        with pytest.raises(TrainingError) as error:
            train(settings, trainable=trainable)
        said.append(str(error.value))
    assert said[0] != said[1]


def test_a_dry_run_counts_moments_of_what_is_trained(settings):
    norms, every = describe(settings, NORMS)["memory"], describe(settings)["memory"]
    assert norms["parameters"] == every["parameters"] and 2 * every["parameters"] == every["optimizer"]
    assert norms["optimizer"] == 8 * 3 * 64
