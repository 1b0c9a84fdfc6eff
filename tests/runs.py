"""`smollm3 train` as a process of its own."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PATH = os.pathsep.join([str(ROOT), str(Path(__file__).parent / "without_pictures")])

# Settings of a short run.
TOML = """
[run]
steps = 8
[model]
dtype = "float32"
[data]
length = 16
rows = 4
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
[checkpoint]
every = 2
"""


def write_corpus(path, documents=50, seed=0):
    draw = random.Random(seed)
    texts = [" ".join(f"w{draw.randint(3, 30)}" for _ in range(draw.randint(3, 30))) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def write_pairs(path, count=400, seed=0):
    draw = random.Random(seed)

    def words(least, most):
        return " ".join(f"w{draw.randint(3, 159)}" for _ in range(draw.randint(least, most)))

    lines = ({"prompt": words(1, 4), "chosen": f" {words(1, 4)}", "rejected": f" {words(1, 4)}"} for _ in range(count))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def command(place, run, *words, corpus="corpus.jsonl"):
    settings = [f"run.dir={run}", f"model.path={place / 'model'}", f"data.path={place / corpus}"]
    return [sys.executable, "-m", "smollm3_jax", "train", "--config", place / "run.toml", *settings, *words]


def environment(**more):
    # Tiny models take longer to compile than to run.
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    if "JAX_NUM_CPU_DEVICES" in more:
        quick["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # see compile_cache.enable
    return {**os.environ, "PYTHONPATH": PATH, "JAX_PLATFORMS": "cpu", **quick, **more}


def limited(limit):
    """What to put before a command that may not pass a (resource, bytes)."""
    if limit is None:
        return []
    code = "import os, resource, sys; resource.setrlimit({0}, ({1}, {1})); os.execv(sys.argv[1], sys.argv[1:])"
    return [sys.executable, "-c", code.format(*limit)]


def train(place, run, *words, code=0, env=None, limit=None, **options) -> Any:
    """What it prints as JSON, or what it says of its end; limit: a (resource, bytes) that the process may not pass."""
    done = subprocess.run(
        [*limited(limit), *command(place, run, *words, "--json", **options)],
        env=env or environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout) if code in (0, 75) else done.stderr


def start(place, run, *words, steps=3, **options):
    """A run that has taken so many steps, and goes on."""
    process = subprocess.Popen(
        command(place, run, "run.steps=100000", *words, **options),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(run, steps)
    return process


def losses(run):
    whole = (run / "metrics.jsonl").read_text().rpartition("\n")[0]  # the last line may be half written
    lines = [json.loads(line) for line in whole.splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def checkpoint_digests(run, step):
    about = json.loads((run / "checkpoints" / f"{step:08d}" / "about" / "metadata").read_text())
    return about["arrays"], about["data"]


def same_end(run, whole, step=8):
    assert losses(run) == losses(whole)
    assert checkpoint_digests(run, step) == checkpoint_digests(whole, step)


def wait_for_step(run, step, seconds=120):
    wait_for(lambda: (run / "metrics.jsonl").exists() and max(losses(run), default=0) >= step, seconds)


def wait_for(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)
