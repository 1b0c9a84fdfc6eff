"""The measuring run, on a tiny model and a CPU: every part of it, how they are scheduled, and what is kept."""

import importlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import on_device
from device import (
    benchmarks,
    decode,
    modelled,
    prefill,
    report,
    schedule,
    torch_decode,
    torch_training,
    training,
)
from device.aims import AIMS, FLOOR, MFU
from device.run import RESULTS, Run, append, lines, relative, timed
from device.schedule import PARTS, Part

from sharding.hardware import CHIPS

ROOT = Path(__file__).parents[2]
NO_PEERS = any(importlib.util.find_spec(name) is None for name in ("torch", "transformers"))


def kinds(out: Path, kind: str) -> list[dict]:
    return [line for line in lines(out) if line["kind"] == kind]


# Every part does what it is for


# Part -> how many comparisons, times and profiles it gives where all is tiny.
OURS = {
    "machine": (0, 0, 0),
    "parity": (12, 0, 0),
    "parity_cache": (5, 0, 0),
    "parity_quantized": (12, 0, 0),
    "parity_gradients": (3, 0, 0),
    "decode": (0, 2, 0),
    "decode_quantized": (0, 3, 0),
    "decode_stacked": (0, 1, 0),
    "prefill": (0, 4, 0),
    "profile_decode": (0, 0, 1),
    "profile_training": (0, 0, 1),
    "training": (0, 1, 0),
    "training_deterministic": (1, 2, 0),
}
PEERS = {"torch_parity": 4, "torch_decode": 0, "torch_transformers": 0, "torch_training": 0}  # -> comparisons


def test_every_part_is_tried():
    assert OURS.keys() | PEERS.keys() == {part.name for part in PARTS}


@pytest.mark.slow
@pytest.mark.parametrize("part", OURS)
def test_a_part_on_a_tiny_model(part, tmp_path):
    importlib.import_module(f"device.{part}").part(Run(part, tmp_path, tiny=True))
    assert not kinds(tmp_path, "error")
    checks, speeds, profiles = OURS[part]
    assert [line["passed"] for line in kinds(tmp_path, "parity")] == [True] * checks
    measured = kinds(tmp_path, "speed")
    assert len(measured) == speeds
    assert all(0 < x["ms_min"] <= x["ms"] <= x["ms_max"] and x["tokens_per_second"] > 0 for x in measured)
    assert all(line["tiny"] for line in lines(tmp_path))
    found = kinds(tmp_path, "profile")
    assert len(found) == profiles
    for profile in found:
        assert 0 < len(profile["kernels"]) <= 25
        taken = [kernel["microseconds"] for kernel in profile["kernels"]]
        assert taken == sorted(taken, reverse=True) and taken[-1] > 0
        assert (tmp_path / f"{part}.xplane.pb.gz").stat().st_size > 0
    if part == "machine":
        assert {line["case"] for line in kinds(tmp_path, "ceiling")} == {"copy", "read", "product"}
        (machine,) = kinds(tmp_path, "machine")
        assert machine["platform"] == "cpu" and machine["chip"] is None and machine["versions"]["jax"]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["decode", "prefill"])
def test_a_part_is_tried_without_the_graphs_that_its_program_asks_for(part, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "TINY_CASES", decode.TINY_CASES[:1])
    importlib.import_module(f"device.{part}").part(Run(part, tmp_path, tiny=True, cuda_graphs=False))
    assert not kinds(tmp_path, "error")
    assert all(line["cuda_graphs"] is False for line in kinds(tmp_path, "speed"))


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.skipif(NO_PEERS, reason="PyTorch and transformers are not installed")
@pytest.mark.parametrize("part", PEERS)
def test_a_peer_on_a_tiny_model(part, tmp_path):
    importlib.import_module(f"device.{part}").part(Run(part, tmp_path, tiny=True))
    assert not kinds(tmp_path, "error") and not kinds(tmp_path, "skipped")
    assert [line["passed"] for line in kinds(tmp_path, "parity")] == [True] * PEERS[part]
    assert part == "torch_parity" or all(line["engine"] != "ours" for line in kinds(tmp_path, "speed"))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["decode", "prefill"])
def test_what_plan_models_stands_beside_the_measurement(part, tmp_path, monkeypatch):
    """Of a chip that this machine is told to be."""
    for module in (modelled, sys.modules["smollm3_jax.plan.decode"]):
        monkeypatch.setattr(module, "chip_of", lambda device: CHIPS["h100"])
    importlib.import_module(f"device.{part}").part(Run(part, tmp_path, tiny=True))
    models, speeds = kinds(tmp_path, "modelled"), kinds(tmp_path, "speed")
    assert [said["case"] for said in models] == [measured["case"] for measured in speeds] and models
    table = report.table(lines(tmp_path))
    for said, measured in zip(models, speeds, strict=True):
        assert f"{said['ms']:.3g}" in table
        if part == "decode":  # at the least each weight is read once
            assert said["ms"] >= 1e3 * 0.9 * measured["bytes"] / CHIPS["h100"].hbm_bandwidth
        else:  # of all pieces; of the second layer little but keys and values is wanted
            assert said["flops"] >= 0.5 * measured["flops"]


@pytest.mark.slow
def test_from_a_bare_checkout(tmp_path):
    """From another folder, with nothing of this package on the path: two parts, each a process, and the table."""
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "on_device.py", "--tiny", "--only", "machine,prefill", "--out", "found"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = tmp_path / "found"
    assert [(x["part"], x["ended"]) for x in kinds(found, "part")] == [
        (x, "exit code 0") for x in ("machine", "prefill")
    ]
    text = (found / "report.txt").read_text()
    assert done.stdout.endswith(text + "\n") and "TINY" in text and "prefill 64 after 128" in text
    assert kinds(found, "speed")[0]["floor_ms"] > 0  # the ceilings came from the other process


# How results are written


def test_a_case_that_failed_is_told_and_tried_again_alone(tmp_path):
    run, tried = Run("part", tmp_path), []
    assert run.attempt("good", tried.append, 1)
    assert not run.attempt("bad", lambda: [][0])
    (error,) = kinds(tmp_path, "error")
    assert error["case"] == "bad" and "IndexError" in error["error"]
    again = replace(run, cuda_graphs=False)
    assert again.attempt("good", tried.append, 2) and again.attempt("bad", tried.append, 3)
    assert tried == [1, 3]
    assert kinds(tmp_path, "done")[-1] == {"part": "part", "kind": "done", "case": "bad", "cuda_graphs": False}
    assert "failed" not in report.table(lines(tmp_path))


@pytest.mark.parametrize(("found", "passed"), [([1.0, 2.0], True), ([1.0, 2.1], False), ([1.0, float("nan")], False)])
def test_a_comparison_has_a_verdict(found, passed, tmp_path):
    run = Run("part", tmp_path)
    run.check("case", relative(found, [1.0, 2.0]), 1e-3)
    assert kinds(tmp_path, "parity")[0]["passed"] is passed
    assert ("FAIL" in report.table(lines(tmp_path))) is not passed


def test_times_are_a_median_with_its_spread():
    taken = timed(lambda: None, rounds=5)
    assert 0 <= taken["ms_min"] <= taken["ms"] <= taken["ms_max"]


# How parts are run


def run_parts(out, parts, code, budget=600.0):
    """Parts whose processes run `code`, which finds its part's name and whether there are CUDA graphs in `part`."""

    def command(part, graphs):
        return [sys.executable, "-c", f"import os, sys, time\npart = {part.name!r}, {graphs!r}\n{code}"]

    return schedule.run_parts([Part(*part) for part in parts], out, budget, command)


def test_what_fails_loses_nothing_and_is_tried_once_more_without_cuda_graphs(tmp_path):
    code = "print('XLA_FLAGS', os.environ.get('XLA_FLAGS')); sys.exit(part == ('a', True) or part[0] == 'b')"
    assert not run_parts(tmp_path, [("a", "first", 60), ("b", "first", 60), ("c", "first", 60)], code)
    ended = [(x["part"], x.get("cuda_graphs", True), x["ended"]) for x in kinds(tmp_path, "part")]
    assert ended == [
        ("a", True, "exit code 1"),
        ("b", True, "exit code 1"),
        ("c", True, "exit code 0"),
        ("a", False, "exit code 0"),
        ("b", False, "exit code 1"),
    ]
    logs = (tmp_path / "logs.txt").read_text().split("=====")
    assert [schedule.NO_GRAPHS in log for log in logs[1:]] == [False] * 3 + [True] * 2


def test_a_part_past_its_limit_is_ended_and_the_budget_is_kept(tmp_path):
    parts = [("slow", "first", 1), ("late", "first", 60)]
    assert not run_parts(tmp_path, parts, "time.sleep(60 * (part[0] == 'slow'))", budget=schedule.LEAST_SECONDS + 0.5)
    (part,) = kinds(tmp_path, "part")
    assert part["ended"] == "past its limit" and part["seconds"] < 10
    assert [(x["part"], x.get("cuda_graphs", True)) for x in kinds(tmp_path, "skipped")] == [
        ("late", True),
        ("slow", False),
    ]
    text = report.table(lines(tmp_path))
    assert "slow: past its limit" in text and "skipped: late" in text


def test_a_part_gets_its_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--own")
    part = next(part for part in PARTS if part.name == "torch_parity")
    env = schedule.environment(part, tmp_path, graphs=False, tiny=False)
    assert env["XLA_FLAGS"] == f"--own {schedule.NO_GRAPHS}" and env["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.45"
    assert env["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path))
    assert schedule.environment(PARTS[0], tmp_path, True, False)["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.93"


def test_halves_begin_with_the_ceilings_and_hold_every_part():
    halves = [schedule.chosen(half, ()) for half in schedule.HALVES]
    assert [half[0].name for half in halves] == ["machine", "machine"]
    names = [part.name for part in schedule.chosen(None, ())]
    assert len(names) == len(set(names)) and set(names) == {part.name for half in halves for part in half}
    assert [part.name for part in schedule.chosen(None, ("decode", "machine"))] == ["machine", "decode"]
    for name in names:
        assert importlib.util.find_spec(f"device.{name}"), name


def test_the_command_itself_loads_no_jax(capsys):
    """It must not: a GPU's memory is its parts'."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import on_device; on_device.main(['--list']);"
    done = subprocess.run(
        [sys.executable, "-c", f"{code} sys.exit('jax' in sys.modules)"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "parity" in done.stdout
    with pytest.raises(SystemExit):
        on_device.main(["--only", "party"])
    assert "there is no part 'party'; choose of machine" in capsys.readouterr().err


def test_results_are_not_written_over(tmp_path, capsys):
    results(tmp_path, MACHINE)
    assert on_device.main(["--tiny", "--out", str(tmp_path)]) == 2
    assert "holds results already: name another folder" in capsys.readouterr().err
    assert lines(tmp_path) == [MACHINE]


# What is kept of a machine

MACHINE = {"part": "machine", "kind": "machine", "case": "machine", "platform": "gpu", "devices": 1, "host": "Linux"}
MACHINE |= {"device": "NVIDIA H100 80GB HBM3", "versions": {"jax": "0.11.2", "torch": "2.11.0"}, "xla_flags": ""}
MACHINE |= {"gpus_as_found": "580.1, 1980 MHz"}
SPEED = {"part": "decode", "kind": "speed", "case": "decode 1 x 512", "engine": "ours", "ms": 2.5, "ms_min": 2.4}
SPEED |= {"ms_max": 2.75, "tokens_per_second": 400.0, "floor_ms": 2.0}
PEER = SPEED | {"engine": "gpt-fast's way", "ms": 3.125, "tokens_per_second": 320.0, "floor_ms": None}
TRAINING = SPEED | {"part": "training", "case": "training 1 x 4,096", "mfu": 0.41}
MODEL = {"part": "decode", "kind": "modelled", "case": "decode 1 x 512", "ms": 2.06}
CHECK = {"part": "parity", "kind": "parity", "case": "logits", "error": 1e-6, "bound": 1e-4, "passed": True}


def results(folder: Path, *found: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in found))
    return folder


def test_a_machines_results_are_kept_and_become_the_table(tmp_path):
    first = results(tmp_path / "first", MACHINE, SPEED | {"ms": 99.0}, MODEL, CHECK)
    second = results(tmp_path / "second", MACHINE, SPEED, PEER, TRAINING)
    file = benchmarks.merge([first, second], tmp_path / "kept")
    assert file.name == "nvidia-h100-80gb-hbm3.json"
    table = benchmarks.markdown(tmp_path / "kept")
    assert "**1 x NVIDIA H100 80GB HBM3**, jax 0.11.2, torch 2.11.0. Parity: 1 of 1 checks passed." in table
    assert "| training 1 x 4,096, MFU 0.41 |" in table
    row = "| decode 1 x 512 | 2.5 (2.4 to 2.75) | 400 | 0.80 | 2.06 | 320 (gpt-fast's way) | 1.25 |"
    assert row in table.splitlines()
    results(first, MACHINE, SPEED, CHECK | {"error": 0.5, "passed": False})
    benchmarks.merge([first], tmp_path / "kept")
    assert "- failed: logits: 0.5, bound 0.0001" in benchmarks.markdown(tmp_path / "kept")


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([MACHINE | {"tiny": True}], "--tiny"),
        ([MACHINE, SPEED | {"tiny": True}], "--tiny"),
        ([MACHINE | {"platform": "cpu"}], "a CPU's"),
        ([MACHINE, MACHINE | {"device": "NVIDIA H200"}], "several machines: nvidia-h100-80gb-hbm3, nvidia-h200"),
        ([SPEED], r"no results\.jsonl with a machine"),
    ],
)
def test_what_is_no_result_is_not_kept(found, said, tmp_path):
    with pytest.raises(benchmarks.MergeError, match=said):
        benchmarks.merge([results(tmp_path / "out", *found)], tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_report_fits_a_terminal(tmp_path):
    for line in (MACHINE, SPEED, PEER, MODEL, CHECK):
        append(tmp_path, line)
    text = report.table(lines(tmp_path))
    rows = [line for line in text.splitlines() if line.startswith("decode 1 x 512")]
    assert rows[0].split() == ["decode", "1", "x", "512", "2.5", "2.4", "2.75", "400", "0.80", "2.06", "0.80>=0.7"]
    assert rows[1].startswith("decode 1 x 512, gpt-fast's way") and "320" in rows[1]
    assert max(map(len, text.splitlines())) <= 100


def test_the_report_says_which_aims_are_met(tmp_path):
    """Of the floor, of the chip, of a peer's rate, and of our own with plain weights; nothing where one is missing."""
    int8 = SPEED | {"case": "int8 decode 1 x 512", "tokens_per_second": 600.0}
    torch_training = PEER | {"case": TRAINING["case"], "engine": "transformers"}
    for line in (MACHINE, SPEED | {"floor_ms": 1.7}, PEER, int8, TRAINING, torch_training):
        append(tmp_path, line)
    text = report.table(lines(tmp_path))
    aims = [line[90:].strip() for line in text.splitlines() if line.startswith(("decode", "int8", "training"))]
    assert aims == ["0.68<0.7", "1.25>=1", "1.50<1.6", "0.41>=0.4", "1.25>=1"]
    alone = report.table([line for line in lines(tmp_path) if line["case"] != SPEED["case"]])
    assert next(line for line in alone.splitlines() if line.startswith("int8")).endswith("0.80")


def test_every_aim_is_of_a_case_that_is_measured():
    cases = {decode.name_of(batch, held) for batch, held, _ in decode.CASES}
    cases |= {f"{weights} {decode.name_of(1, 512)}" for weights in ("int8", "int4")}
    cases |= {prefill.name_of(length, past) for length, past in prefill.CASES}
    cases |= {f"training {rows} x {training.LENGTH:,}" for rows in training.ROWS}
    engines = {"ours", torch_decode.ENGINE, torch_training.ENGINE}
    others = {of for _, of in AIMS.values() if of not in (FLOOR, MFU)}
    assert AIMS.keys() | others <= {(case, engine) for case in cases for engine in engines}


def test_the_readme_has_the_table_of_what_was_measured():
    kept = benchmarks.between_markers((ROOT / "README.md").read_text())
    assert kept is not None, "README.md has no <!-- accelerators --> ... <!-- /accelerators -->"
    assert kept == benchmarks.markdown(), "python scripts/on_device.py --table prints what belongs there"


def test_without_results_the_table_says_so(tmp_path):
    assert benchmarks.markdown(tmp_path) == benchmarks.NOTHING
