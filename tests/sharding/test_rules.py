from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from sharding.rules import Sharding, ShardingError

AXES, SHAPE = ("layers", "mlp", "embed"), (4, 96, 64)


class Device:
    """Enough of a device for a Mesh; nothing is placed in these tests."""

    platform, process_index, device_kind = "fake", 0, "fake"

    def __init__(self, number):
        self.id = number


def mesh(**axes):
    devices = np.array([Device(i) for i in range(int(np.prod(list(axes.values()))))]).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes))


def named_sharding(name, axes, shape, mesh, rules="fsdp"):
    return Sharding.of(mesh, rules).named(name, axes, shape)


def test_fsdp_splits_the_width_over_all_axes():
    assert named_sharding("w", AXES, SHAPE, mesh(data=8)).spec == PartitionSpec(None, None, "data")
    assert named_sharding("w", AXES, SHAPE, mesh(a=2, b=4)).spec == PartitionSpec(None, None, ("a", "b"))
    assert named_sharding("w", AXES, SHAPE, mesh(data=8), "single").spec == PartitionSpec(None, None, None)


def test_a_table_of_ones_own():
    rules: Any = {"mlp": "tensor", "embed": ("x", "y")}
    assert named_sharding("w", AXES, SHAPE, mesh(tensor=2, x=2, y=2), rules).spec == PartitionSpec(
        None, "tensor", ("x", "y")
    )


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ("zero", "no sharding strategy 'zero'"),
        ({"mlp": "model"}, "the rule mlp -> model names no axis"),
        ({"mlp": "x", "embed": "x"}, "w: mlp and embed both lie on the mesh axis x"),
        ({"layers": ("x", "y")}, "w: layers has length 4"),
    ],
)
def test_rules_that_do_not_fit_are_named(rules, words):
    with pytest.raises(ShardingError, match=words):
        named_sharding("w", AXES, SHAPE, mesh(x=4, y=2), rules)


def test_one_real_device():
    device_mesh = Mesh(np.array(jax.devices()[:1]), ("all",))
    sharding = named_sharding("w", AXES, SHAPE, device_mesh)
    assert jax.device_put(np.zeros(SHAPE), sharding).sharding == sharding
