"""Batches as Ray Data hands them over, and a real cluster of two machines, both of them this one; one is killed."""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import talking_checkpoint

import smollm3_jax as s3
from smollm3_jax import on_ray
from smollm3_jax.commands.main import main
from smollm3_jax.errors import OptionError, SupportError
from smollm3_jax.generation.api import complete
from smollm3_jax.generation.requests import Request

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 600  # seconds; a cluster that hangs fails
# Of all processes of a cluster, which would keep a key in the user's home.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def talking(tmp_path_factory) -> Path:
    return talking_checkpoint(tmp_path_factory.mktemp("ray") / "talking")


@pytest.fixture(scope="module")
def predictor(talking) -> s3.SmolLM3Predictor:
    given = {"max_new_tokens": 5, "temperature": 0.0}
    return s3.SmolLM3Predictor(str(talking), given, slots=2, context=64, dtype="float32")


def column(*values: Any) -> np.ndarray:
    """As Ray makes it of values that are no numbers."""
    return np.fromiter(values, object, len(values))


def test_rows_have_the_answers_that_they_have_elsewhere(predictor):
    batch = {
        "prompt": column("w5 w6", "w7", None, "w5 w6", 3),
        "messages": column(None, None, np.array([{"role": "user", "content": "w7", "name": None}]), None, None),
        "max_new_tokens": column(None, 9, None, None, None),
        "temperature": np.array([0.0, 0.0, 0.0, 2.0, 0.0], np.float32),
        "seed": np.array([1, 2, 3, 7, 4]),
        "stop": column(None, None, None, None, np.array(["w1"])),
        "title": column(*"abcde"),
    }
    got = predictor({name: values.copy() for name, values in batch.items()})
    assert got["title"].tolist() == list("abcde")
    wanted = [
        Request("w5 w6", s3.SamplingParams(max_new_tokens=5, temperature=0.0)),
        Request("w7", s3.SamplingParams(max_new_tokens=9, temperature=0.0)),
        Request("w9 w7", s3.SamplingParams(max_new_tokens=5, temperature=0.0)),  # the template's word, and the message
        Request("w5 w6", s3.SamplingParams(max_new_tokens=5, temperature=2.0, seed=7)),
    ]
    options: dict[str, Any] = {"tokenizer": predictor.tokenizer, "max_slots": 2, "capacity": 64}
    done = complete(predictor.model, wanted, **options)
    assert got["text"].tolist() == [*(one.text for one in done), ""]
    assert got["completion_tokens"].tolist() == [5, 9, 5, 5, 0] and got["prompt_tokens"].tolist() == [2, 1, 2, 2, 0]
    assert got["finish_reason"].tolist() == ["length"] * 4 + [""]
    assert got["error"].tolist() == [""] * 4 + ["prompt is a int; it must be a text"]


def test_a_row_does_not_depend_on_its_batch(predictor):
    rows = {"prompt": column(*[f"w{i} w{2 * i}" for i in range(6)]), "index": np.arange(6)}
    rows["temperature"] = np.full(6, 1.5)
    whole = predictor(rows)["text"].tolist()
    apart = [predictor({name: values[i : i + 1] for name, values in rows.items()})["text"][0] for i in range(6)]
    assert apart == whole and len(set(whole)) == 6
    same = predictor(rows | {"prompt": column(*["w5"] * 6)})["text"].tolist()
    assert len(set(same)) == 6  # each index draws for itself
    assert len(set(predictor({"prompt": column("w5", "w5"), "temperature": np.full(2, 1.5)})["text"])) == 1
    assert predictor({"prompt": column()})["text"].shape == (0,)


@pytest.mark.parametrize("params", [{"n": 2}, {"logprobs": 1}, {"prompt_logprobs": True}])
def test_a_row_has_one_text(talking, params):
    with pytest.raises(OptionError, match="leave out n, logprobs"):
        s3.SmolLM3Predictor(str(talking), params)


@pytest.mark.parametrize(
    ("resources", "machines", "actors", "count", "asked"),
    [
        ({"CPU": 64.0, "GPU": 8.0}, 2, None, 8, {"num_gpus": 1}),
        ({"CPU": 64.0, "GPU": 8.0}, 2, 3, 3, {"num_gpus": 1}),
        ({"CPU": 64.0, "TPU": 4.0}, 1, None, 4, {"resources": {"TPU": 1}}),
        ({"CPU": 64.0}, 2, None, 2, {"num_cpus": 1}),
        ({"CPU": 2.0}, 3, None, 2, {"num_cpus": 1}),
    ],
)
def test_actors_lie_where_the_devices_are(resources, machines, actors, count, asked):
    assert on_ray._placed(resources, machines, actors) == (count, asked)


@pytest.mark.parametrize(
    ("resources", "actors", "words"),
    [({"CPU": 4.0}, 5, "has 4 CPUs"), ({"CPU": 4.0}, 0, "0 actors"), ({}, None, "no GPU")],
)
def test_more_than_there_is(resources, actors, words):
    with pytest.raises(OptionError, match=words):
        on_ray._placed(resources, 1, actors)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "w5", "--ray", "local"], "--ray is for many prompts"),
        (["--input", "{in}", "--output", "{out}", "--actors", "2"], "give --ray too"),
        (["--input", "{in}", "--output", "{out}", "--ray", "local", "--mesh", "data=1"], "leave out --mesh"),
    ],
)
def test_mistakes_of_the_command(talking, tmp_path, capsys, arguments, words):
    (tmp_path / "in").write_text('{"prompt": "w5"}\n')
    names = {"{in}": str(tmp_path / "in"), "{out}": str(tmp_path / "out")}
    assert main(["generate", "--model", str(talking), *[names.get(word) or word for word in arguments]]) == 2
    assert words in capsys.readouterr().err


def test_without_ray(talking, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "in").write_text('{"prompt": "w5"}\n')
    command = ["generate", "--model", talking, "--input", tmp_path / "in", "--output", tmp_path / "out"]
    assert main([*map(str, command), "--ray", "local"]) == SupportError.exit_code
    error = capsys.readouterr().err
    assert "--ray needs Ray" in error and re.search(r"pip install '?(ray\[data\]|\.\[ray\])", error)


# --- a cluster -------------------------------------------------------------------------------------------------------

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (the extra ray)")


class Machine:
    """A node of a cluster with one CPU, as `ray start --block` makes it.

    Raises:
      AssertionError: it did not start.
    """

    def __init__(self, log: Path, *arguments: str):
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--block",
            "--num-cpus=1",
            "--node-ip-address=127.0.0.1",
        ]
        command += ["--object-store-memory=100000000", "--disable-usage-stats", *arguments]
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, env=ENVIRONMENT, stdout=file, stderr=file)

    def wait_for(self, words: str) -> None:
        while words not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    def kill(self) -> None:
        """At once, with all that runs on it."""
        for process in [*_descendants(self.process.pid), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()


def _descendants(process: int) -> list[int]:
    files = Path(f"/proc/{process}/task").glob("*/children")
    children = [int(word) for file in files for word in file.read_text().split()]
    return [*children, *(one for child in children for one in _descendants(child))]


# A pipeline of one's own, on the cluster that is named.
PIPELINE = """
import sys
import ray
import smollm3_jax as s3

# Its driver shows what libtpu logs, too, in whatever process of the machine.
ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
rows = ray.data.from_items([{"prompt": f"w{i}", "place": i} for i in range(3)])
given = {"model": sys.argv[2], "params": {"max_new_tokens": 4, "temperature": 0.0}, "slots": 2, "context": 64}
found = rows.map_batches(s3.SmolLM3Predictor, fn_constructor_kwargs=given, compute=ray.data.ActorPoolStrategy(size=1))
print(sorted((row["place"], row["text"]) for row in found.take_all()))
"""


@needs_ray
@pytest.mark.slow
def test_two_machines_of_which_one_is_lost(talking, predictor, tmp_path):
    lines = [{"prompt": f"w{i} w{i % 7}", "max_new_tokens": 1 + 13 * i % 60, "ignore_eos": True} for i in range(90)]
    lines = [line | ({"temperature": 1.5, "id": i} if i % 3 else {}) for i, line in enumerate(lines)]
    source, target = tmp_path / "in", tmp_path / "out"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines) + "no JSON\n")
    command = [sys.executable, "-m", "smollm3_jax", "generate", "-m", talking, "--input", source, "--slots", "2"]
    command = [*map(str, command), "--temperature", "0", "--output"]
    run: dict[str, Any] = {"env": ENVIRONMENT, "text": True}
    alone = subprocess.run([*command, str(tmp_path / "alone")], stderr=subprocess.PIPE, **run)
    assert alone.returncode == 3, alone.stderr

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    head = "--head", f"--port={address.partition(':')[2]}", "--include-dashboard=false"
    machines = [Machine(tmp_path / "head.log", *head)]
    try:
        machines[0].wait_for("Ray runtime started")
        machines.append(Machine(tmp_path / "other.log", f"--address={address}"))
        machines[1].wait_for("Ray runtime started")
        cluster = [*command, str(target), "--ray", address, "--actors", "2"]
        process = subprocess.Popen(cluster, stderr=subprocess.PIPE, **run)
        deadline = time.monotonic() + PATIENCE
        while process.poll() is None and not (target.exists() and b"\n" in target.read_bytes()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert process.poll() is None and target.read_bytes().count(b"\n") < 91
        machines[1].kill()
        error = process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 3, error
        pipeline = subprocess.run(
            [sys.executable, "-c", PIPELINE, address, str(talking)], stdout=subprocess.PIPE, timeout=PATIENCE, **run
        )
    finally:
        for machine in machines:
            machine.kill()
    found, wanted = target.read_bytes().splitlines(), (tmp_path / "alone").read_bytes().splitlines()
    assert [json.loads(line)["index"] for line in found] == list(range(91))
    assert sorted(found) == sorted(wanted)
    texts = predictor({"prompt": column("w0", "w1", "w2"), "max_new_tokens": np.full(3, 4)})["text"]
    assert pipeline.stdout == f"{[(i, text) for i, text in enumerate(texts.tolist())]}\n"
