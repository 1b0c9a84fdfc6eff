import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sharding.arrays import ArraySpec, shapes, shardings, spec, total_bytes, zeros
from sharding.mesh import make_mesh
from sharding.rules import Sharding
from sharding.strategies import ShardingError

SPECS = {
    "k": spec("bfloat16", cache_heads=4, batch=4, context=6),
    "count": (spec(jnp.int32), spec(bool, batch=8, marks=3)),
}


def mesh():
    return Sharding.of(make_mesh({"data": 4, "tensor": 2}), "serve_tp")


def test_a_name_that_is_no_logical_axis_is_never_split():
    assert SPECS["count"][1] == ArraySpec((8, 3), jnp.dtype(bool), ("batch", None))


@pytest.mark.parametrize("sharded", [False, True])
def test_empty_arrays_lie_where_the_description_says(sharded):
    made = zeros(SPECS, mesh() if sharded else None)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), SPECS)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(made))
    if sharded:
        for x, at in zip(jax.tree.leaves(made), jax.tree.leaves(shardings(SPECS, mesh())), strict=True):
            assert x.sharding.is_equivalent_to(at, x.ndim)
        assert made["k"].addressable_shards[0].data.shape == (2, 1, 6)


def test_bytes_count_each_array_once():
    assert (
        total_bytes(SPECS) == 4 * 4 * 6 * 2 + 4 + 8 * 3 == sum(x.nbytes for x in jax.tree.leaves(zeros(SPECS, mesh())))
    )


def test_shapes_carry_shardings():
    shape = shapes(SPECS, mesh())["k"]
    assert (shape.shape, shape.dtype, shape.sharding.spec) == (
        (4, 4, 6),
        jnp.bfloat16,
        mesh().spec("cache_heads", "batch", None),
    )


def test_rules_that_do_not_fit_name_the_array():
    with pytest.raises(ShardingError, match=r"^layers\.0: batch has length 6, which 4 devices do not divide"):
        zeros({"layers": [spec(jnp.int32, batch=6)]}, mesh())
