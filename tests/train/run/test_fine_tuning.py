"""Runs of `smollm3 train` on conversations that end, are killed, and go on."""

import json
import random
import subprocess
import time

import pytest
import tiny
from etils import epath
from proxies import FULL
from runs import checkpoint_digests, command, environment, losses, same_end, train, wait_for_step
from talks import SFT_TEMPLATE, talks, turn, write_talks

from smollm3_jax.train.run.export import export

pytestmark = pytest.mark.slow

TOML = """
[run]
steps = 10
[model]
dtype = "float32"
[data]
length = 512
rows = 4
[objective]
kind = "sft"
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
[step]
micro_batches = 2
[checkpoint]
every = 2
"""


@pytest.fixture(scope="module")
def place(release, tmp_path_factory):
    """A model, its conversations, of which two cannot be trained on, and settings: an epoch is a window of a few rows,
    and steps end in the middle of windows."""
    folder = tmp_path_factory.mktemp("fine-tuning")
    tiny.chat_checkpoint(folder / "model", release / "chat_template.jinja")
    (folder / "run.toml").write_text(TOML)
    unfit = [{"messages": [turn("user", "a")]}, {"messages": [turn("user", "a" * 300), turn("assistant", "b")]}]
    write_talks(folder / "corpus.jsonl", [*talks(12, longest=40), *unfit])
    return folder


@pytest.fixture(scope="module")
def whole(place):
    train(place, place / "whole")
    return place / "whole"


@pytest.mark.parametrize(("seed", "kills"), [(0, 1), *(pytest.param(seed, 4, marks=FULL) for seed in (1, 2, 3))])
def test_kills_at_random_points(whole, place, seed, kills):
    """After as many kills the end is that of the run that nothing disturbs, bit for bit."""
    run, draw = place / f"killed{seed}", random.Random(seed)
    for kill in range(kills):
        process = subprocess.Popen(
            command(place, run, "--resume", "auto", "checkpoint.every=1"), env=environment(), stderr=subprocess.DEVNULL
        )
        wait_for_step(run, 1 + 2 * kill)
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        assert process.wait() == -9 or max(losses(run)) == 10
    train(place, run, "--resume", "auto")
    same_end(run, whole, step=10)


def test_what_a_run_on_conversations_keeps(whole):
    """How far it is: the window and the row; what was left out; nothing of the texts."""
    _, data = checkpoint_digests(whole, 10)
    rows = data["rows"]["data"]
    assert rows["window"] > 1 and rows["length"] == 512
    counted = {name: rows["tally"][name] for name in ("records", "no trained token", "too long")}
    assert counted == {"records": 14, "no trained token": 1, "too long": 1}
    assert losses(whole)[10] < losses(whole)[1]


@FULL
def test_the_last_batch_of_the_last_epoch_is_a_batch(place):
    """Rows that the data does not fill are empty: each record is trained on in each epoch."""
    tokens = {}
    for rows in (1, 2, 64):
        run = place / f"once{rows}"
        train(place, run, "data.epochs=1", f"data.rows={rows}", f"step.micro_batches={min(rows, 2)}", "run.steps=50")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        tokens[rows] = [line["tokens"] for line in lines]
    assert len(tokens[64]) == 1 < len(tokens[2]) < len(tokens[1])
    assert tokens[64][0] == sum(tokens[2]) == sum(tokens[1])


def test_the_template_is_a_setting_and_held_out_conversations_are_evaluated(whole, place):
    """And it goes with the model."""
    run = place / "template"
    words = [f"data.template={SFT_TEMPLATE}", "eval.every=1", f"data.eval_path={place / 'corpus.jsonl'}", "run.steps=2"]
    train(place, run, *words)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["held_out"]["held out"]["tokens"] > 100 for line in lines if "held_out" in line] == [True] * 3
    for trained, template in ((run, SFT_TEMPLATE), (whole, place / "model" / "chat_template.jinja")):
        out = place / f"{trained.name}-exported"
        export(epath.Path(trained), out)
        assert (out / "chat_template.jinja").read_bytes() == template.read_bytes()
    said = train(place, run, "--resume", "auto", "run.steps=3", code=3)
    assert "data.template: " in said
    assert "data.template=none cannot be read" in train(place, place / "none", "data.template=none", code=2)


def test_records_that_are_no_conversations_end_a_run(place):
    (place / "texts.jsonl").write_text('{"text": "a"}\n' * 3)
    said = train(place, place / "texts", corpus="texts.jsonl", code=3)
    assert "nothing of its 3 records is to be trained" in said and "3 unreadable" in said
