"""Runs of preferences, from the reference's sums to the last step; and what disturbs them."""

import json
import os
import random
import shutil
import signal
import subprocess

import pytest
import tiny
from etils import epath
from proxies import FULL
from runs import checkpoint_digests, command, environment, losses, same_end, start, train, wait_for, write_pairs

from smollm3_jax.train.reference import Sums
from smollm3_jax.train.run import loop
from smollm3_jax.train.settings_file import parse

STEPS = 60
WORDS = ["objective.kind=preference", "objective.beta=0.05", "data.length=32", f"run.steps={STEPS}"]
WORDS += ["checkpoint.every=10", "objective.loss=apo_zero"]
SEEDS = [0, *(pytest.param(seed, marks=FULL) for seed in (1, 2, 3))]


@pytest.fixture(scope="module")
def corpus(place):
    write_pairs(place / "pairs.jsonl")
    return "pairs.jsonl"


def lines_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def sums_of(run):
    folder = epath.Path(run / "reference")
    about = json.loads((folder / "about.json").read_text())
    return Sums(folder, {name: value for name, value in about.items() if name != "model"})


@pytest.fixture(scope="module")
def undisturbed(place, corpus):
    train(place, place / "preferred", *WORDS, corpus=corpus)
    return place / "preferred"


@pytest.mark.slow
def test_a_run_begins_at_its_reference_and_prefers_what_was_chosen(undisturbed):
    first, *_, last = lines_of(undisturbed)
    assert abs(first["loss"] - 1) <= 1e-6 and abs(first["rewards/margins"]) <= 1e-5
    assert last["loss"] < first["loss"] and last["rewards/margins"] > 0 and last["saturated"] == 0
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "pairs", "tokens"} <= first.keys()
    assert (undisturbed / "reference" / "done.json").exists()
    about = json.loads((undisturbed / "reference" / "about.json").read_text())
    assert about["length"] == 32 and about["dtype"] == "float32" and about["model"]["model.embed"]


@pytest.mark.slow
def test_each_completion_has_its_own_sum_in_each_order_and_packing(place, corpus):
    """trl #2423, #7083, #3985: a policy that stays where it is stays at a loss of 1, in each step of three epochs that
    are shuffled and packed anew."""
    write_pairs(place / "few.jsonl", count=100)
    still = ["optimizer.learning_rate=0", "optimizer.weight_decay=0", "data.epochs=3"]
    run = place / "still"
    train(place, run, *WORDS, *still, corpus="few.jsonl")
    lines = lines_of(run)
    assert len(lines) > 30
    assert max(abs(line["loss"] - 1) for line in lines) <= 1e-6
    assert len(sums_of(run).known) >= 190  # of 100 pairs, some completions alike


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_kill_in_the_reference_pass_changes_no_bit(place, corpus, undisturbed, seed):
    draw = random.Random(seed)
    run = place / f"killed-in-pass-{seed}"
    whole = len(list((undisturbed / "reference").glob("*.sums")))
    process = subprocess.Popen(command(place, run, *WORDS, corpus=corpus), env=environment(), stderr=subprocess.DEVNULL)
    pieces = draw.randrange(whole)
    wait_for(lambda: len(list((run / "reference").glob("*.sums"))) >= pieces and (run / "lock").exists())
    try:
        process.wait(draw.random() * 0.3)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.wait()
    train(place, run, *WORDS, "--resume", "auto", corpus=corpus)
    assert sums_of(run).digest() == sums_of(undisturbed).digest()
    same_end(run, undisturbed, step=STEPS)


@FULL
@pytest.mark.parametrize("seed", SEEDS)
def test_a_kill_between_steps_changes_no_bit(place, corpus, undisturbed, seed):
    """Nor is the reference computed again: the model that it was of may be gone."""
    run = place / f"killed-in-steps-{seed}"
    process = start(place, run, *WORDS, steps=random.Random(seed).randrange(1, STEPS - 5), corpus=corpus)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # closes its pipe
    before = {path.name: path.stat().st_mtime_ns for path in (run / "reference").iterdir()}
    train(place, run, *WORDS, "--resume", "auto", corpus=corpus)
    assert {path.name: path.stat().st_mtime_ns for path in (run / "reference").iterdir()} == before
    same_end(run, undisturbed, step=STEPS)


@pytest.mark.slow
def test_a_signal_in_the_reference_pass_stops_the_run_and_it_goes_on(place, corpus, undisturbed):
    run = place / "asked-in-pass"
    process = subprocess.Popen(
        command(place, run, *WORDS, "--json", corpus=corpus),
        env=environment(),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    wait_for(lambda: any((run / "reference").glob("*.sums")))
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75
    train(place, run, *WORDS, "--resume", "auto", corpus=corpus)
    same_end(run, undisturbed, step=STEPS)


@pytest.mark.slow
def test_an_adapters_reference_is_its_frozen_base(place, tmp_path):
    """The sums are those of a separate reference, the whole model; the first loss is 1; and the run goes on from its
    adapter and its sums bit for bit."""
    write_pairs(tmp_path / "few.jsonl", count=20)
    config = {
        "model": {"path": str(place / "model"), "dtype": "float32"},
        "data": {"path": str(tmp_path / "few.jsonl"), "length": 32, "rows": 8},
        "objective": {"kind": "preference"},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"},
        "checkpoint": {"every": 3},
    }

    def run_in(name, more, steps=6, resume=False):
        run = {"dir": str(tmp_path / name), "steps": steps}
        loop.train(parse({**config, **more, "run": run}), resume=resume)
        return tmp_path / name

    adapted = {"lora": {"rank": 4, "dropout": 0.1}}
    whole = run_in("adapted", adapted)
    first, *_, last = lines_of(whole)
    assert abs(first["loss"] - 1) <= 1e-6 and first["difference"] <= 1e-4
    assert last["rewards/margins"] > 0 and last["difference"] > 0.01
    separate, own = (sums_of(x).known for x in (run_in("separate", {}, steps=1), whole))
    assert own.keys() >= separate.keys() and len(separate) > 10
    assert max(abs(own[key] - x) / abs(x) for key, x in separate.items()) <= 1e-6

    parts = run_in("parts", adapted, steps=3)
    before = {path.name: path.stat().st_mtime_ns for path in (parts / "reference").glob("*.sums")}
    run_in("parts", adapted, resume=True)
    pieces = {path.name: path.stat().st_mtime_ns for path in (parts / "reference").glob("*.sums")}
    assert before.items() <= pieces.items()
    assert losses(parts) == losses(whole) and checkpoint_digests(parts, 6) == checkpoint_digests(whole, 6)
    arrays, _ = checkpoint_digests(whole, 6)
    assert all(name.split(".")[-1] in ("a", "b") for name in arrays if name.startswith("model."))


@pytest.mark.slow
def test_held_out_pairs_are_measured_as_a_step_measures_them(place, tmp_path):
    """Each batch is all pairs, a row each, and so are the held-out ones: what is measured after a step is what the next
    one finds. A run that goes on with others computes the sums that it lacks."""
    for name, seed in (("pairs", 0), ("others", 1)):
        draw = random.Random(seed)
        words = [[f"w{draw.randint(3, 159)}" for _ in range(8)] for _ in range(8)]
        sides = {"prompt": slice(0, 2), "chosen": slice(2, 5), "rejected": slice(5, 8)}
        lines = [{side: " ".join(["", *x[of]]) for side, of in sides.items()} for x in words]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {
        "model": {"path": str(place / "model"), "dtype": "float32"},
        "data": {"path": str(tmp_path / "pairs.jsonl"), "length": 16, "rows": 8},
        "objective": {"kind": "preference"},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant"},
    }

    def run(held_out, steps, **options):
        data = config["data"] | {"eval_path": str(tmp_path / f"{held_out}.jsonl")}
        more = {"data": data, "eval": {"every": 1}, "run": {"dir": str(tmp_path / "run"), "steps": steps}}
        loop.train(parse(config | more), **options)
        lines = lines_of(tmp_path / "run")
        held = {line["step"]: line["held_out"]["held out"] for line in lines if "held_out" in line}
        return {line["step"]: line for line in lines if "loss" in line}, held

    steps, held = run("pairs", 4)
    assert list(held) == [0, 1, 2, 3, 4] and held[0]["pairs"] == 8
    assert abs(held[0]["loss"] - 1) <= 1e-6 and held[4]["rewards/margins"] > 0.01
    for step in range(4):
        # Both programs add up float32 log-probabilities of at most some hundred nats.
        for name, value in held[step].items():
            assert abs(value - steps[step + 1][name]) <= 1e-5, (step, name)
    known = sums_of(tmp_path / "run").known
    _, held = run("others", 6, resume=True)
    assert list(held) == [*range(7)] and held[5]["loss"] != held[4]["loss"]
    assert len(sums_of(tmp_path / "run").known) == len(known) + 16 == 32
    assert "held-out pairs, loss: held out" in (tmp_path / "run" / "report.html").read_text()


@FULL
def test_sums_of_another_model_are_not_gone_on_with(place, corpus):
    """Though it has the same name."""
    folder = place / "other-model"
    shutil.copytree(place / "model", folder)
    run = place / "other-reference"
    words = [*WORDS, f"objective.reference={folder}"]
    train(place, run, *words, corpus=corpus)
    assert abs(losses(run)[1] - 1) <= 1e-6  # it is the start, by another name
    for left in ("reference/done.json", "checkpoints"):
        path = run / left
        shutil.rmtree(path) if path.is_dir() else os.unlink(path)
    raw = tiny.raw_config("plain")
    tiny.write_checkpoint(folder, raw, {name: x * 2 for name, x in tiny.random_tensors(raw).items()})
    said = train(place, run, *words, "--resume", "auto", corpus=corpus, code=3)
    assert "are of another reference: model" in said
    shutil.rmtree(run / "reference")
    train(place, run, *words, "--resume", "auto", corpus=corpus)
    assert abs(losses(run)[1] - 1) > 1e-4
    # Whose tokenizer is another one is none.
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    said = train(place, place / "no-reference", *words, corpus=corpus, code=2)
    assert "its tokenizer.json is not the model's" in said


@FULL
def test_devices_and_micro_batches_train_the_same(place, corpus, undisturbed):
    """Packed over eight devices, and in two parts: the losses of one device within float32's rounding."""
    for name, words, env in (
        ("eight", ["data.rows=8", "run.steps=20"], {"JAX_NUM_CPU_DEVICES": "8"}),
        ("one", ["data.rows=8", "run.steps=20"], {}),
        ("parts", ["data.rows=8", "run.steps=20", "step.micro_batches=4"], {}),
    ):
        train(place, place / f"alike-{name}", *WORDS, *words, corpus=corpus, env=environment(**env))
    one = losses(place / "alike-one")
    for name in ("eight", "parts"):
        found = losses(place / f"alike-{name}")
        assert found.keys() == one.keys() and max(abs(found[step] - one[step]) for step in one) <= 1e-5
        assert abs(found[1] - 1) <= 1e-6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["objective.loss=ipo"], "objective.loss is 'ipo'; choose one of apo_zero, apo_down, sigmoid"),
        (["objective.beta=0"], "objective.beta is 0"),
        (["data.overflow=split"], "choose drop or truncate"),
        (["step.z_loss=0.1"], "step.z_loss=0"),
    ],
)
def test_what_preferences_have_not_is_refused(place, words, said):
    from smollm3_jax.errors import OptionError
    from smollm3_jax.train.settings_file import read_settings

    with pytest.raises(OptionError, match=said):
        read_settings(place / "run.toml", ["run.dir=x", "model.path=m", "data.path=p", *WORDS, *words])
