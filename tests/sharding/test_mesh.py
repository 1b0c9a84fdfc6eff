import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
import tiny
from hypothesis import given
from hypothesis import strategies as st
from proxies import FULL

import smollm3_jax as s3
from sharding import mesh as mesh_module
from sharding.mesh import AXES, filled, make_mesh, parse_axes, refuse_alone, start
from sharding.rules import ShardingError
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.state import Batch, init_state
from smollm3_jax.train.step import train_step

ROOT = Path(__file__).parents[2]


class Device:
    """Enough of a device for a mesh."""

    platform, process_index, device_kind = "fake", 0, "fake"

    def __init__(self, number, per_slice):
        self.id, self.slice_index = number, number // per_slice


def test_axes_are_read():
    assert parse_axes("fsdp=-1, tensor=4") == {"fsdp": -1, "tensor": 4}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "'' is not AXIS=LENGTH"),
        ("fsdp", "'fsdp' is not AXIS=LENGTH"),
        ("fsdp=0", "'fsdp=0' is not AXIS=LENGTH"),
        ("model=2", "the axis 'model' is unknown; choose one of data, fsdp, context, tensor"),
        ("fsdp=2,fsdp=2", "fsdp is given twice"),
    ],
)
def test_mistakes_in_axes_are_named(text, words):
    with pytest.raises(ShardingError, match=words):
        parse_axes(text)


@given(st.text(max_size=40))
def test_any_text_is_axes_or_a_mistake(text):
    try:
        axes = parse_axes(text)
    except ShardingError:
        return
    assert set(axes) <= set(AXES)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"fsdp": -1, "data": -1}, "only one axis can take what is left"),
        ({"fsdp": -1, "tensor": 3}, "do not divide 8"),
        ({"fsdp": 4}, "4 devices, but there are 8"),
    ],
)
def test_a_mesh_has_all_devices(axes, words):
    with pytest.raises(ShardingError, match=words):
        filled(axes, 8)


def test_minus_one_fills():
    assert filled({"fsdp": -1, "tensor": 2}, 8) == {"data": 1, "fsdp": 4, "context": 1, "tensor": 2}


def test_only_data_spans_slices():
    devices = [Device(i, 4) for i in range(8)]
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2}, devices)
    assert mesh.axis_names == AXES
    for slice_devices in mesh.devices:
        assert len({device.slice_index for device in slice_devices.flat}) == 1
    with pytest.raises(ShardingError, match="2 slices do not divide the mesh axis data of 1"):
        make_mesh({"fsdp": 8}, devices)


def test_neighbours_share_the_last_axis():
    mesh = make_mesh({"fsdp": 2, "tensor": 4}, [Device(i, 8) for i in range(8)])
    assert [device.id for device in mesh.devices[0, 1, 0]] == [4, 5, 6, 7]


def test_half_of_an_address_is_a_mistake():
    with pytest.raises(ShardingError, match="together, or none"):
        start(address="localhost:1")


def test_one_process_needs_no_start(monkeypatch):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    start()
    assert not jax.distributed.is_initialized()


def test_one_host_of_a_slice_is_refused(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    with pytest.raises(ShardingError, match="one of the 4 of a pod slice"):
        refuse_alone()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a")
    refuse_alone()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


TOGETHER = """
import json, sys
index, port, count = map(int, sys.argv[1:4])
import jax
jax.config.update("jax_num_cpu_devices", 8 // count)
from sharding.mesh import DEFAULT_AXES, make_mesh, process_map, start
start(f"127.0.0.1:{port}", count, index, timeout=120)
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
import smollm3_jax as s3
from sharding.rules import Sharding
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.state import Batch, init_state, state_shardings
from smollm3_jax.train.step import train_step

optimizer, options = adamw(1e-3), StepOptions(dtype="float32")
random = np.random.RandomState(0)
tokens = random.randint(3, 160, (8, 32)).astype(np.int32)
mesh = make_mesh({"fsdp": 4, "tensor": 2})
model = s3.from_pretrained(sys.argv[4], mesh=mesh, rules="fsdp_tp", stacked=True)
sharding = Sharding.of(mesh, "fsdp_tp").fitted(model.config.axis_sizes)
shapes = jax.eval_shape(lambda: init_state(model, optimizer))
state = jax.jit(lambda model: init_state(model, optimizer), out_shardings=state_shardings(shapes, sharding))(model)

def put(x, at):
    return jax.make_array_from_callback(x.shape, at, lambda index: x[index])

at = NamedSharding(sharding.mesh, sharding.spec("batch", None))
batch = Batch(put(tokens, at), put(np.ones_like(tokens), at))
losses = []
for _ in range(3):
    state, metrics = train_step(state, batch, optimizer=optimizer, options=options)
    losses.append(float(metrics["loss"]))
print(json.dumps({"losses": losses, "processes": len(process_map())}))
"""


def run_together(code, count, *arguments, timeout=300):
    port = free_port()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # processes compile together, and must all do so
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(index), str(port), str(count), *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    outputs = [process.communicate(timeout=timeout) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]


def losses_of(model, tokens):
    """What TOGETHER's processes print, of one device."""
    optimizer, options, losses = adamw(1e-3), StepOptions(dtype="float32"), []
    state = init_state(jax.tree.map(jnp.copy, model), optimizer)
    batch = Batch(jnp.asarray(tokens), jnp.ones_like(tokens))
    for _ in range(3):
        state, metrics = train_step(state, batch, optimizer=optimizer, options=options)
        losses.append(metrics["loss"])
    return losses


@FULL
def test_two_processes_train_as_one(tmp_path):
    """From one checkpoint, of which each process reads its own parts. (`smollm3 train`: test_several_processes.py.)"""
    folder = tiny.tiny_checkpoint(tmp_path)
    tokens = np.random.RandomState(0).randint(3, 160, (8, 32)).astype(np.int32)
    model = s3.from_pretrained(folder, stacked=True)
    bounded = rounding.shaken(functools.partial(losses_of, tokens=tokens), model)
    for result in run_together(TOGETHER, 2, folder):
        assert result["processes"] == 2
        assert max(rounding.worst(result["losses"], bounded)) <= 1
    tokens[3, 9] = 5  # another one
    assert min(rounding.worst(losses_of(model, tokens), bounded)) > 1


@pytest.mark.slow
def test_who_did_not_come_is_named():
    """Two of three come: both say who is missing."""
    code = """
import sys
from sharding.mesh import start
from sharding.rules import ShardingError
try:
    start(f"127.0.0.1:{sys.argv[2]}", 3, int(sys.argv[1]), timeout=4)
except ShardingError as error:
    print(error)
    sys.exit(7)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    port = str(free_port())
    come = [
        subprocess.Popen([sys.executable, "-c", code, i, port], env=environment, stdout=subprocess.PIPE, text=True)
        for i in "01"
    ]
    for process in come:
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 7
        assert "process 2 of 3 did not come to 127.0.0.1" in said


def test_the_usual_mesh_of_every_strategy_is_known():
    assert all(set(axes) <= set(AXES) for axes in mesh_module.DEFAULT_AXES.values())
