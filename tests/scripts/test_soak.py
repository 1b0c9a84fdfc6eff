"""The soaks: one fault of a kind each on a tiny model, and that they tell where something does not hold."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from proxies import FULL
from tiny import talking_checkpoint

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import soak as script
from soaks import serving, training
from soaks.common import Disk, Soak


def soak(tmp_path, what: str, *words: str) -> tuple[int, dict, str]:
    command = [sys.executable, script.__file__, what, "--out", str(tmp_path / "out"), "--json", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.parametrize("module", [training, serving])
def test_a_seed_draws_the_same_schedule(module):
    first, same, other = (module.draw(random.Random(seed)) for seed in (0, 0, 1))
    assert first == same != other
    assert {fault["kind"] for life in first for fault in life} == {*module.KINDS, *getattr(module, "ENDS", ())}


def test_what_is_found_is_kept(tmp_path):
    one = Soak(tmp_path, "model", Disk(tmp_path / "disk", 0), Disk(tmp_path / "logs", 0), 0.0, lambda text: None)
    (tmp_path / "log").write_text("why")
    with one.fault({"kind": "kill"}):
        one.check(True, "holds")
        one.check(False, "does not hold", tmp_path / "log", tmp_path / "nothing")
    assert one.findings == ["does not hold"] and one.done[0]["findings"] == 1
    assert (tmp_path / "findings" / "0" / "log").read_text() == "why"


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "serve"])
def test_a_minute_of_it(tmp_path, what):
    model = talking_checkpoint(tmp_path / "model")
    code, report, said = soak(tmp_path, what, "--model", str(model), "--minutes", "0.1", "--seed", "1")
    assert (code, report["findings"]) == (0, []), said
    assert report["faults"] and report["seconds"] > 1
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report


@FULL
@pytest.mark.parametrize("what", ["train", "serve"])
def test_each_kind_of_fault(tmp_path, what):
    model = talking_checkpoint(tmp_path / "model")
    code, report, said = soak(tmp_path, what, "--model", str(model), "--each", "1", "--minutes", "20")
    module = {"train": training, "serve": serving}[what]
    assert (code, report["findings"]) == (0, []), said
    assert {fault["kind"] for fault in report["faults"]} >= {*module.KINDS, *getattr(module, "ENDS", ())}
