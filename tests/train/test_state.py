"""A state with a frozen part: what is trained, what is kept, what is saved."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from etils import epath
from flax import nnx

import smollm3_jax as s3
from sharding.mesh import make_mesh
from sharding.rules import Sharding
from smollm3_jax.errors import OptionError
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.run.checkpoint import Checkpoints, named_arrays, restore
from smollm3_jax.train.state import Batch, count, init_state, merge, split, state_shardings, updates_of
from smollm3_jax.train.step import train_step
from smollm3_jax.weights.key_map import parameters

NORMS = r"norm|layers\..*_norm"
OPTIONS = StepOptions(dtype="float32", micro_batches=2)


@pytest.fixture
def model():
    return s3.SmolLM3(s3.ModelConfig.from_hf(tiny.raw_config("one_layer")), rngs=nnx.Rngs(0))


@pytest.fixture
def batches():
    random = np.random.RandomState(0)
    return [Batch(jnp.asarray(random.randint(3, 160, (4, 16)), jnp.int32), jnp.ones((4, 16), jnp.int32))] * 4


def arrays(tree):
    return {name: np.asarray(x) for name, x in named_arrays(tree).items()}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


def test_the_parts_are_the_model_and_share_nothing(model):
    trained, frozen = split(model, NORMS)
    names, norms = arrays(model).keys(), {name for name in arrays(model) if re.fullmatch(NORMS, name)}
    assert len(norms) == 3 and arrays(trained).keys() == norms and arrays(frozen).keys() == names - norms
    assert count(trained) == 3 * 64 and count(trained) + count(frozen) == count(model)
    assert parameters(model).keys() == names  # the names are those of the table
    assert_equal(arrays(merge(trained, frozen)), arrays(model))


def test_without_a_pattern_all_is_trained(model):
    trained, frozen = split(model, None)
    assert jax.tree.structure(trained) == jax.tree.structure(model) and not jax.tree.leaves(frozen)
    assert_equal(arrays(merge(trained, frozen)), arrays(model))


def test_frozen_parameters_stay_bit_for_bit_and_have_no_moments(model, batches):
    before = arrays(model)
    optimizer = adamw(1e-2)
    state = init_state(model, optimizer, NORMS)
    moments = [name for name in arrays(state.optimizer) if ".mu." in name or ".nu." in name]
    assert len(moments) == 6 and all("norm" in name for name in moments)
    for batch in batches:
        state, metrics = train_step(state, batch, optimizer=optimizer, options=OPTIONS)
        assert np.isfinite(metrics["loss"])
    assert updates_of(state) == 4
    for name, x in arrays(state.model).items():
        assert (x == before[name]).all() == ("norm" not in name), name


def test_what_is_trained_does_not_depend_on_what_is_frozen_having_moments(model, batches):
    """The first step of SGD-like AdamW without clipping: norms move as they do where all is trained."""
    optimizer = adamw(1e-2, clip_norm=0.0, weight_decay=0.0)
    whole = init_state(jax.tree.map(jnp.copy, model), optimizer)
    whole, _ = train_step(whole, batches[0], optimizer=optimizer, options=OPTIONS)
    part, _ = train_step(init_state(model, optimizer, NORMS), batches[0], optimizer=optimizer, options=OPTIONS)
    wanted = arrays(split(whole.model, NORMS)[0])
    for name, x in arrays(split(part.model, NORMS)[0]).items():
        # A norm's 1 less 0.01 times the gradient's sign, which is within some fifty roundings: one and a half of the
        # result's own on each side.
        np.testing.assert_allclose(x, wanted[name], rtol=4 * 2.0**-24, err_msg=name)


def test_a_checkpoint_holds_both_parts_and_is_gone_on_from_bit_for_bit(model, batches, tmp_path):
    optimizer = adamw(1e-2)
    like = jax.eval_shape(lambda model: init_state(model, optimizer, NORMS), model)
    at = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), like)
    state = init_state(model, optimizer, NORMS)
    checkpoints = Checkpoints(epath.Path(tmp_path))
    for step, batch in enumerate(batches):
        if step == 2:
            checkpoints.save(step, state, {})
            checkpoints.close()
        state, _ = train_step(state, batch, optimizer=optimizer, options=OPTIONS)
    again = restore(epath.Path(tmp_path), 2, like)
    assert again.trainable == NORMS
    for batch in batches[2:]:
        again, _ = train_step(again, batch, optimizer=optimizer, options=OPTIONS)
    assert_equal(arrays(again), arrays(state))


def test_on_a_mesh_too(model, batches):
    sharding = Sharding.of(make_mesh({"fsdp": 1}, jax.devices()[:1]), "fsdp").fitted(model.config.axis_sizes)
    state = init_state(model, adamw(1e-2), NORMS)
    shardings = state_shardings(state, sharding)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    assert_equal(arrays(jax.device_put(state, shardings)), arrays(state))


@pytest.mark.parametrize(
    ("pattern", "said"), [("model.layers.q", "matches no parameter; they are embed, "), ("(", "no regular expression")]
)
def test_a_pattern_that_trains_nothing_is_refused(model, pattern, said):
    with pytest.raises(OptionError, match=said):
        init_state(model, adamw(1e-3), pattern)
