"""What the plan says of what is launched."""

import dataclasses
import re

import pytest
import tiny

from smollm3_jax.config import SMOLLM3_3B, ModelConfig
from smollm3_jax.errors import OutOfMemoryError, SupportError
from smollm3_jax.launch import fit
from smollm3_jax.launch.machines import machine
from smollm3_jax.train.settings import Stage
from smollm3_jax.train.settings_file import read_settings
from smollm3_jax.weights.key_map import count_parameters

WHOLE = ModelConfig.from_hf(SMOLLM3_3B)
QUICK = read_settings("quick", ["run.dir=gs://b/r"])
HBM = {"total": 3 * 2**30, "limit": 15.75 * 2**30}


def test_a_model_that_is_not_here_is_taken_for_the_released_one(tmp_path):
    assert fit.config_of("HuggingFaceTB/SmolLM3-3B-Base") == (WHOLE, "")
    config, remark = fit.config_of("gs://bucket/model")
    assert config == WHOLE and remark == "gs://bucket/model is not on this machine: taken for a SmolLM3-3B"
    config, remark = fit.config_of(str(tiny.talking_checkpoint(tmp_path / "model")))
    assert config.num_hidden_layers < 10 and remark == ""


def test_a_save_writes_what_is_trained_and_its_moments():
    assert fit.state_bytes(QUICK, WHOLE) == 12 * count_parameters(WHOLE)
    adapter = read_settings("quick", ["run.dir=gs://b/r", "lora.rank=16"])
    assert fit.state_bytes(adapter, WHOLE) == 12 * 30_228_480


def test_the_largest_stage_is_planned():
    """Of 16 rows of 8,192 tokens at once, 4 of 65,536 in two goes, and 64 of 8,192 in eight, the second."""
    stages = (Stage(2, {}, 8192, 16, 1), Stage(4, {}, 65536, 4, 2), Stage(6, {}, 8192, 64, 8))
    assert fit.largest_stage(dataclasses.replace(QUICK, stages=stages)).start in (2, 4)
    assert fit.largest_stage(dataclasses.replace(QUICK, stages=(*stages, Stage(8, {}, 65536, 8, 2)))).start == 8


def plans(monkeypatch, report):
    asked = {}

    def plan(config, topology, *args, **options):
        asked.update(options, topology=topology, args=args)
        if isinstance(report, Exception):
            raise report
        return report

    monkeypatch.setattr(fit, "plan_train", plan)
    monkeypatch.setattr(fit, "plan_serve", plan)
    return asked


def test_what_does_not_fit_is_refused_in_the_words_of_a_run(monkeypatch):
    refused = [{"remat": "dots", "micro_batches": 1, "needed": 20 * 2**30, "limit": HBM["limit"]}]
    plans(monkeypatch, {"fits": False, "refused": refused, "change": "--micro-batches 4 --remat full fits"})
    with pytest.raises(OutOfMemoryError, match=re.escape("; step.micro_batches=4 step.remat=full fits; --no-plan")):
        fit.train_fits(QUICK, WHOLE, machine("v5e:4x4"))
    plans(monkeypatch, {"fits": False, "hbm": HBM, "change": "--context 4096"})
    with pytest.raises(OutOfMemoryError, match=re.escape("3.0 GiB of 15.8 a device; --context 4096; --no-plan prints")):
        fit.serve_fits(WHOLE, machine("v5e:2x2"), {})


def test_the_plan_is_of_the_settings(monkeypatch):
    asked = plans(monkeypatch, {"fits": True})
    words = ["run.dir=gs://b/r", "data.rows=32", "data.length=128", "step.micro_batches=2", "mesh.axes=data=2,fsdp=-1"]
    fit.train_fits(read_settings("quick", words), WHOLE, machine("v5e:4x4"), 2)
    assert asked["topology"] == "v5e:4x4" and asked["args"] == ("fsdp", 32, 128)
    assert asked["micro_batches"] == 2 and asked["slices"] == 2 and asked["axes"] == {"data": 2, "fsdp": -1}


def test_where_no_compiler_is_the_way_out_is_named(monkeypatch):
    plans(monkeypatch, SupportError("libtpu is not installed"))
    for fits in (
        lambda: fit.train_fits(QUICK, WHOLE, machine("v5e:4x4")),
        lambda: fit.serve_fits(WHOLE, machine("v5e:2x2"), {}),
    ):
        with pytest.raises(SupportError, match="libtpu is not installed; or leave the plan out, --no-plan"):
            fits()
