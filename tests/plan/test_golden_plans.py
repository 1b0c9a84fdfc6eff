"""Four pairs of a topology and a strategy, compiled: their collectives and memory are held by files."""

import json
import os
from pathlib import Path

import pytest
from proxies import FULL, needs_libtpu, proxy

from sharding.rules import Sharding
from smollm3_jax.plan.decode import plan_decode
from smollm3_jax.plan.train import plan_train

GOLDENS = Path(__file__).parents[1] / "goldens" / "plan"
PAIRS = {
    "v5e-4x4-fsdp": lambda: plan_train(proxy(4), "v5e:4x4", "fsdp", 16, 4096, remat="dots"),
    "v5p-2x2x2-fsdp_tp": lambda: plan_train(
        proxy(4), "v5p:2x2x2", "fsdp_tp", 8, 2048, axes={"fsdp": 4, "tensor": 2}, remat="qkv"
    ),
    "v6e-2x2-fsdp_tp_cp": lambda: plan_train(
        proxy(4), "v6e:2x2", "fsdp_tp_cp", 2, 4096, axes={"fsdp": 2, "context": 2}, remat="attention"
    ),
    "v5e-2x2-serve_tp": lambda: plan_decode(proxy(2), "v5e:2x2", "serve_tp", 16, 4096, prompt=1024),
}
QUICK = {"v5e-2x2-serve_tp"}


def held(report):
    """What a change of the code, and nothing else, may change."""
    assert report["fits"], report["refused"]
    kinds = [{k: row[k] for k in ("kind", "hidden", "count", "bytes")} for row in report["collectives"]]
    return {"collectives": kinds, "hbm": {k: v for k, v in report["hbm"].items() if k not in ("code", "limit")}}


def compare(found, golden):
    assert len(found["collectives"]) == len(golden["collectives"])
    for row, wanted in zip(found["collectives"], golden["collectives"], strict=True):
        assert row == {**wanted, "bytes": pytest.approx(wanted["bytes"], rel=0.01)}
    assert found["hbm"] == pytest.approx(golden["hbm"], rel=0.02)


@needs_libtpu
@pytest.mark.parametrize("pair", [pytest.param(pair, marks=[] if pair in QUICK else FULL) for pair in PAIRS])
def test_collectives_and_memory_are_those_of_the_golden_files(pair):
    """WRITE_GOLDENS=1 writes them anew."""
    found, file = held(PAIRS[pair]()), GOLDENS / f"{pair}.json"
    if os.environ.get("WRITE_GOLDENS"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1) + "\n")
    compare(found, json.loads(file.read_text()))


@needs_libtpu
@FULL
def test_the_golden_files_see_a_lost_axis(monkeypatch):
    """Activations whose constraint forgets that rows are split."""
    constrain = Sharding.constrain
    monkeypatch.setattr(Sharding, "constrain", lambda self, x, _, *axes: constrain(self, x, None, *axes))
    with pytest.raises(AssertionError):
        compare(held(PAIRS["v5e-4x4-fsdp"]()), json.loads((GOLDENS / "v5e-4x4-fsdp.json").read_text()))
