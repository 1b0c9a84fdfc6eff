"""Topologies of devices that are not there, and the compilers for them."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from proxies import needs_cuda, needs_libtpu

from sharding import hlo
from sharding.arrays import shapes, spec
from sharding.hardware import CHIPS, chip_of
from sharding.mesh import make_mesh
from sharding.rules import Sharding
from smollm3_jax import support
from smollm3_jax.commands.main import main
from smollm3_jax.errors import OptionError, SupportError
from smollm3_jax.plan import devices
from smollm3_jax.plan.devices import DoesNotFit, compile_for, topology

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:", "v5e:3x5"])
@needs_libtpu
def test_a_topology_that_is_not_there_is_named(name, capsys):
    assert main(["plan", "train", "--topology", name]) == 2
    assert name in capsys.readouterr().err


def test_without_the_compiler_an_error_says_where_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SupportError, match=r"pip install 'jax\[tpu\]"):
        topology("v5e:4x4")


@needs_libtpu
def test_a_program_that_takes_more_than_there_is_does_not_fit(monkeypatch):
    """Also where the compiler has let it pass: of a chip that has less memory than the compiler knows."""
    chip, found = topology("v5e:1x1")
    sharding = Sharding.of(make_mesh({"data": 1}, found), "fsdp")
    numbers = shapes(spec(jnp.float32, x=1024), sharding)
    twice = jax.jit(lambda x: 2 * x)
    needed = hlo.memory(compile_for(twice, numbers, sharding=sharding)).total
    assert needed > 2 * 4 * 1024
    monkeypatch.setattr(devices, "chip_of", lambda device: dataclasses.replace(chip, hbm=needed - 1))
    with pytest.raises(DoesNotFit) as refusal:
        compile_for(twice, numbers, sharding=sharding)
    assert (refusal.value.needed, refusal.value.limit) == (needed, needed - 1)


@needs_cuda
@pytest.mark.parametrize(("name", "kind", "count"), [("h100:1", "H100 80GB HBM3", 1), ("h200:8", "H200", 8)])
def test_hosts_of_gpus(name, kind, count):
    chip, devices = topology(name)
    assert [device.device_kind for device in devices] == [f"NVIDIA {kind}"] * count
    assert chip_of(devices[0]) == chip == CHIPS[name[:4]]


@pytest.mark.parametrize("shape", ["0", "0x4", "4x", "-1", "", "9" * 5000, "1e3", "\u0663", "4x4\n"])
@pytest.mark.parametrize("chip", ["v5e", "h100"])
def test_shapes_that_are_none(chip, shape):
    with pytest.raises(OptionError, match="is unknown; it reads CHIP:SHAPE"):
        topology(f"{chip}:{shape}")


@needs_cuda
def test_more_gpus_than_a_plan_is_of():
    with pytest.raises(OptionError, match="has 999,999 GPUs"):
        topology("h100:999999")


@needs_cuda
def test_there_is_one_host_of_gpus():
    with pytest.raises(OptionError, match="h100:8 is one host"):
        topology("h100:8", slices=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        pytest.param(["plan", "train", "--topology", "h100:2", "--batch", "3"], 2, marks=needs_cuda),
        pytest.param(["plan", "train", "--topology", "v5e:1x1", "--mesh", "fsdp=5"], 2, marks=needs_libtpu),
        (["doctor"], 0),
    ],
)
def test_plugins_that_only_compile_are_not_asked_for_devices(arguments, code):
    """The command as a user starts it, who has not told jax which platform to take."""
    if support._has_gpu() or support._has_tpu():
        pytest.skip("an accelerator is attached")
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-m", "smollm3_jax", *arguments],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    # libtpu has warnings of its own before ours.
    assert done.stderr.splitlines()[-1].startswith("smollm3: ") if code else not done.stderr
