"""Damage, bad input and want, done to `smollm3 train` from outside."""

import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from etils import epath
from proxies import FULL
from runs import command, environment, losses, same_end, start, train, wait_for_step, write_corpus, write_pairs

from smollm3_jax.train.run import checkpoint
from smollm3_jax.weights.load import open_checkpoint

pytestmark = pytest.mark.slow
GOLDEN = Path(__file__).parents[2] / "goldens" / "run"


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    elif how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        path.unlink()


EACH = [(how, part) for how in ("flip", "truncate", "delete") for part in ("largest", "about")]
ALWAYS = (("flip", "largest"), ("truncate", "about"), ("delete", "largest"))


@pytest.mark.parametrize(("how", "part"), [pytest.param(*x, marks=[] if x in ALWAYS else FULL) for x in EACH])
def test_damage_is_found_and_the_checkpoint_before_is_taken(whole, place, how, part):
    """C1, C2: In the largest file of the newest checkpoint, or in what it says of itself."""
    files = sorted(x.relative_to(whole) for x in (whole / "checkpoints" / "00000008").rglob("*") if x.is_file())
    largest = max(files, key=lambda x: (whole / x).stat().st_size)
    about = next(x for x in files if "about" in x.parts and x.name == "metadata")
    run = place / f"damaged-{how}-{part}"
    shutil.copytree(whole, run)
    damage(run / {"largest": largest, "about": about}[part], how)
    result = train(place, run, "--resume", "auto")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["step"]) for e in events] == [("damaged checkpoint", 8)]
    assert result["step"] == 8
    same_end(run, whole)


def test_what_is_no_about_at_all_is_damage_too(whole, place):
    """C2: a list, and what is nested too deep: the checkpoint before both is taken."""
    run = place / "no-about"
    shutil.copytree(whole, run)
    for step, content in ((8, "[]"), (6, "[" * 100_000)):
        (run / "checkpoints" / f"{step:08d}" / "about" / "metadata").write_text(content)
    assert train(place, run, "--resume", "auto")["step"] == 8
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events] == [8, 6]
    same_end(run, whole)


@pytest.mark.parametrize("seconds", [pytest.param(-3600, marks=FULL), 3600])
def test_a_clock_that_jumps_changes_nothing(whole, place, seconds):
    """T12: back or forth by an hour at every look at it, so during every save too."""
    clock, run = place / f"clock{seconds}", place / f"clocked{seconds}"
    clock.mkdir()
    jump = "import itertools, time\nnow, jumps = time.time, itertools.count()\n"
    (clock / "sitecustomize.py").write_text(jump + f"time.time = lambda: now() + {seconds} * next(jumps)\n")
    env = environment()
    env["PYTHONPATH"] = f"{clock}{os.pathsep}{env['PYTHONPATH']}"
    done = subprocess.run(command(place, run), env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "the machine's clock jumped by" in done.stderr, done.stderr
    same_end(run, whole)


def test_a_dataset_shorter_than_a_batch(place):
    """T9: it is read again and again; where it may be read once only, what would have to change is said."""
    write_corpus(place / "short.jsonl", documents=2)
    run = place / "short-run"
    said = train(place, run, "data.epochs=1", "data.rows=16", corpus="short.jsonl", code=3)
    assert "data.epochs=1: so often read, the documents do not fill a batch of data.rows=16 rows" in said
    assert train(place, run, "run.steps=3", "data.rows=16", corpus="short.jsonl")["step"] == 3


ADAPTED = ["lora.rank=4", "lora.dropout=0.1", "run.steps=40", "checkpoint.every=5"]
KILLED = {
    "adapter": [*ADAPTED, "lora.dora=true", "lora.base=int8"],
    "preferences": [*ADAPTED, "objective.kind=preference", "data.length=32"],
}


@pytest.fixture(scope="module")
def undisturbed(place):
    """kind -> (the name of its corpus, a run that nothing disturbs)."""
    write_pairs(place / "pairs.jsonl")

    @functools.cache
    def run(kind):
        corpus = {"preferences": "pairs.jsonl"}.get(kind, "corpus.jsonl")
        train(place, place / kind, *KILLED[kind], corpus=corpus)
        return corpus, place / kind

    return run


@pytest.mark.parametrize(
    ("kind", "seed", "kills"),
    [("adapter", 0, 1), *(pytest.param(kind, seed, 2, marks=FULL) for kind in KILLED for seed in (1, 2, 3))],
)
def test_adapters_go_on_after_kills_at_random_points(place, undisturbed, kind, seed, kills):
    """After as many kills the end is that of the run that nothing disturbs, bit for bit."""
    corpus, wanted = undisturbed(kind)
    run, draw = place / f"{kind}-killed{seed}", random.Random(seed)
    for first in (1, 16)[:kills]:
        words = command(place, run, *KILLED[kind], "--resume", "auto", corpus=corpus)
        process = subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL)
        wait_for_step(run, draw.randrange(first, first + 15))
        process.kill()
        assert process.wait() == -9 or max(losses(run)) == 40
    train(place, run, *KILLED[kind], "--resume", "auto", corpus=corpus)
    same_end(run, wanted, step=40)


def test_nothing_begins_anew_where_all_is_damaged(whole, place):
    """C6."""
    run = place / "all-damaged"
    shutil.copytree(whole, run)
    for step in (run / "checkpoints").iterdir():
        damage(step / "about" / "metadata", "truncate")
    said = train(place, run, "--resume", "auto", code=3)
    assert "all 3 checkpoints" in said and "--allow-restart" in said
    # What is damaged takes no place from what is sound.
    train(place, run, "--resume", "auto", "--allow-restart", "run.steps=3", "checkpoint.every=0")
    assert [int(step.name) for step in (run / "checkpoints").iterdir() if int(step.name) < 4] == [3]
    train(place, run, "--resume", "auto")
    same_end(run, whole)


def test_what_is_no_checkpoint_is_passed_over(whole, place):
    """C3."""
    run = place / "litter"
    shutil.copytree(whole, run)
    (run / "checkpoints" / "00000009").mkdir()
    (run / "checkpoints" / "00000010.orbax-checkpoint-tmp").mkdir()
    (run / "checkpoints" / "garbage").write_text("")
    assert train(place, run, "--resume", "auto", "--clean")["step"] == 8
    assert {file.name for file in (run / "checkpoints").iterdir()} == {"00000004", "00000006", "00000008"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer.learning_rate=1e-4"], "optimizer.learning_rate: 0.001 then, 0.0001 now"),
        (["data.length=32"], "data.length: 16 then, 32 now"),
        (["run.seed=1", "model.dtype=bfloat16"], "model.dtype: 'float32' then, 'bfloat16' now; run.seed: 0 then"),
        (["model.nope_interval=2"], "config.json.no_rope_layers"),
    ],
)
def test_changed_settings_are_refused(whole, place, words, said):
    """C8."""
    assert said in train(place, whole, "--resume", "auto", *words, code=3)


def test_changed_data_is_refused(whole, place):
    """C8, T9."""
    write_corpus(place / "other.jsonl", seed=1)
    run = place / "changed"
    shutil.copytree(whole, run)
    said = train(place, run, "--resume", "auto", "run.steps=9", corpus="other.jsonl", code=3)
    assert "corpus.jsonl is gone, other.jsonl is new" in said
    assert train(place, run, "--resume", "auto", "run.steps=9", "--allow-changes", corpus="other.jsonl")["step"] == 9


def test_another_tokenizer_is_refused(whole, place):
    """C8."""
    other = place / "retokenized"
    shutil.copytree(place / "model", other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"w7":', '"seven":'))
    assert "tokenizer.json: " in train(place, whole, "--resume", "auto", f"model.path={other}", code=3)


def test_checkpoints_of_older_versions_are_read(place):
    """C11: A run folder that an earlier commit wrote, of two steps; its model's config and tokenizer are in it."""
    old = place / "old"
    shutil.copytree(GOLDEN, old)
    words = ["--resume", "auto", "run.steps=3", "model.path=", f"model.config={old / 'model'}"]
    assert train(place, old, *words)["step"] == 3
    assert sorted(losses(old)) == [1, 2, 3]
    about = old / "checkpoints" / "00000003" / "about" / "metadata"
    content = json.loads(about.read_text()) | {"format": 99}
    del content["seal"]
    about.write_text(json.dumps(checkpoint._sealed(content)))
    assert "is of format 99; this version reads 1" in train(place, old, *words, code=3)


def test_it_goes_on_where_nobody_reads_what_it_says_and_kills_have_left_much(place):
    """C3, C5: SIGTERM saves, and ends it with 75, too. What earlier processes were ended in the midst of is gone."""
    run = place / "unread"
    left = [run / "checkpoints" / "00000003.orbax-checkpoint-tmp", run / f".metrics.jsonl.{'0' * 16}.tmp"]
    left[0].mkdir(parents=True)
    left[1].write_text("half a")
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "wb") as full:
        words = command(place, run, "run.steps=100000")
        process = subprocess.Popen(words, env=environment(), stdout=full, stderr=writer)
    os.close(writer)
    wait_for_step(run, 3)
    process.terminate()
    assert process.wait(60) == 75
    assert nothing_is_lost(run) and not any(path.exists() for path in left)


def test_a_full_disk_ends_the_run(place):
    """C5: A file where the folder of checkpoints should be."""
    run = place / "full"
    run.mkdir()
    (run / "checkpoints").write_text("")
    assert "a checkpoint could not be written" in train(place, run, code=3)


def test_a_save_that_fails_in_the_background_ends_the_run(place):
    """C5: No file may become longer than the limit, which a checkpoint's arrays need."""
    run = place / "no-room"
    said = train(place, run, "run.steps=100000", limit=(resource.RLIMIT_FSIZE, 100_000), code=3)
    assert "a checkpoint could not be written" in said and "Traceback" not in said
    assert max(losses(run)) <= 4  # the next save at the latest


@FULL
def test_many_saves_take_no_more_memory(place):
    """C10."""
    run = place / "many"
    words = [f"model.config={place / 'large'}", "model.path=", "run.steps=50", "checkpoint.every=1"]
    shutil.copytree(place / "model", place / "large")
    config = json.loads((place / "large" / "config.json").read_text())
    (place / "large" / "config.json").write_text(json.dumps({**config, "intermediate_size": 3000}))
    process = subprocess.Popen(command(place, run, *words), env=environment(), stderr=subprocess.DEVNULL)
    memory = {}
    while process.poll() is None:
        found = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "VmRSS" in line]
        step = max(losses(run), default=0) if (run / "metrics.jsonl").exists() else 0
        if found and step:
            memory.setdefault(step, []).append(int(found[0].split()[1]) * 1024)
        time.sleep(0.02)
    assert process.returncode == 0
    state = sum(x.stat().st_size for x in (run / "checkpoints" / "00000050").rglob("*") if x.is_file())
    early = max(max(x) for step, x in memory.items() if 5 <= step <= 20)
    late = max(max(x) for step, x in memory.items() if step > 35)
    assert state > 20e6 and late < early + 5 * state  # 15 saves and more between them, of a state each
    assert len(list((run / "checkpoints").iterdir())) == 3


def test_what_needs_more_memory_than_there_is_says_what_takes_it(place):
    """T15."""
    (place / "long.jsonl").write_text(json.dumps({"text": "w5 " * 1_000_000}))
    words = ["data.length=4096", "data.rows=256", "step.remat=none", "checkpoint.every=0"]
    said = train(place, place / "large-run", *words, corpus="long.jsonl", limit=(resource.RLIMIT_AS, 12 << 30), code=3)
    assert "the step does not fit" in said and "optimizer" in said and "step.remat=full" in said


def test_nothing_is_wanted_of_temporary_folders(place):
    """E4: 64 KiB for TMPDIR and for shared memory, mounted where nobody else sees it."""
    folder = place / "temporary"
    folder.mkdir()
    mount = f"mount -t tmpfs -o size=64k none {folder} && mount -t tmpfs -o size=64k none /dev/shm"
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*alone, mount], capture_output=True).returncode:
        pytest.skip("no folder can be mounted here")
    words = [*alone, f'{mount} && exec "$@"', "sh", *command(place, place / "no-tmp")]
    subprocess.run(words, env=environment(TMPDIR=str(folder)), check=True)
    assert max(losses(place / "no-tmp")) == 8


def start_reading(place, name, timeout):
    """A run on a corpus of its own: the process and the corpus."""
    corpus = place / f"{name}.jsonl"
    write_corpus(corpus)
    return start(place, place / name, "checkpoint.every=0", f"data.timeout={timeout}", corpus=corpus.name), corpus


def nothing_is_lost(run):
    return max(int(saved.name) for saved in (run / "checkpoints").iterdir()) == max(losses(run))


@pytest.mark.parametrize("terminated", [pytest.param(False, marks=FULL), True])
def test_data_that_hangs_ends_the_run(place, terminated):
    """T10: The file becomes a pipe that nobody writes to."""
    name = f"hangs{terminated}"
    process, corpus = start_reading(place, name, 60.0 if terminated else 3.0)
    os.mkfifo(place / "pipe")
    os.replace(place / "pipe", corpus)
    if terminated:
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == (75 if terminated else 3), said
    assert terminated or "no batch came within data.timeout=3 seconds" in said
    assert nothing_is_lost(place / name)
    assert "is not a plain file" in train(place, place / "pipes", corpus=corpus.name, code=3)


def test_data_that_goes_away_ends_the_run(place):
    """T10."""
    process, corpus = start_reading(place, "goes", 3.0)
    corpus.unlink()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 3 and "goes.jsonl can no longer be read" in said
    assert nothing_is_lost(place / "goes")


@pytest.mark.parametrize("kind", ["parquet", pytest.param("arrayrecord", marks=FULL)])
def test_bad_rows_and_records_are_skipped(place, kind):
    """T8."""
    texts = [json.loads(line)["text"] for line in (place / "corpus.jsonl").read_text().splitlines()]
    path = place / f"bad.{kind}"
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"text": [*texts[:10], None, "", *texts[10:]]}), path)
    else:
        module = pytest.importorskip("array_record.python.array_record_module")
        writer = module.ArrayRecordWriter(str(path), "group_size:1")
        for record in [*(text.encode() for text in texts), b"\xff\xfe", b"{"]:
            writer.write(record)
        writer.close()
    process = subprocess.run(
        command(place, place / kind, "run.steps=30", corpus=path.name),
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0 and "skipped a bad record (2 so far)" in process.stderr


def test_bad_records_are_skipped_up_to_the_limit(place):
    """T8."""
    lines = (place / "corpus.jsonl").read_text().splitlines()
    surrogate = '{"text": "w5 \\ud800 w6"}'
    (place / "bad.jsonl").write_text("\n".join([*lines[:10], "{", surrogate, *lines[10:]]))
    assert train(place, place / "bad1", corpus="bad.jsonl")["step"] == 8
    said = train(place, place / "bad2", "data.bad_records=0", "run.steps=100", corpus="bad.jsonl", code=3)
    assert "more than data.bad_records=0" in said


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=FULL), 2])
def test_steps_that_are_not_finite_are_skipped_then_end_the_run(place, micro_batches):
    """T5, T6: A learning rate that no model survives."""
    run = place / f"nan{micro_batches}"
    words = ["optimizer.learning_rate=1e39", "optimizer.clip_norm=0.0", "optimizer.warmup_steps=0"]
    words += [f"step.micro_batches={micro_batches}", "run.steps=50", "guard.skips=3", "checkpoint.every=0"]
    said = train(place, run, *words, code=3)
    assert "3 steps in a row were not finite" in said
    assert len((run / "skipped.jsonl").read_text().splitlines()) >= 3
    assert "NaN" not in (run / "metrics.jsonl").read_text()  # which JSON does not know


def test_weights_that_are_not_finite_are_refused(place):
    """T7."""
    tensors = {name: t.read().copy() for name, t in open_checkpoint(place / "model").tensors.items()}
    tensors["model.norm.weight"][0] = np.nan
    shutil.copytree(place / "model", place / "broken")
    tiny.write_checkpoint(place / "broken", tiny.raw_config("plain"), tensors)
    said = train(place, place / "from-broken", f"model.path={place / 'broken'}", code=3)
    assert "not all is finite in model.norm" in said


def test_a_rollback_goes_on_behind_the_trouble(place):
    """T6: A document of other words in the middle: the loss jumps, and the run goes back and passes over it."""
    lines = (place / "corpus.jsonl").read_text().splitlines()
    odd = json.dumps({"text": " ".join("w150" if i % 2 else "w151" for i in range(100))})
    (place / "spike.jsonl").write_text("\n".join([*lines * 8, odd, *lines * 2]))
    run = place / "rollback"
    words = ["run.steps=150", "data.shuffle=false", "guard.policy=rollback", "guard.spike=4.0", "guard.window=40"]
    result = train(place, run, *words, "checkpoint.every=10", corpus="spike.jsonl")
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert result["step"] == 150 and any(e["event"] == "rollback" for e in events)
    assert checkpoint.read_about(epath.Path(run / "checkpoints"), 150)["retries"] > 0
