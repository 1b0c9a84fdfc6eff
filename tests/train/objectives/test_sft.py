"""Fine-tuning's loss: by the trained tokens of a whole step, wherever they lie."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
import tiny
from flax import nnx

import smollm3_jax as s3
from sharding.mesh import make_mesh
from sharding.rules import Sharding
from smollm3_jax.model import with_sharding
from smollm3_jax.train.objectives.pretrain import Pretrain, _within
from smollm3_jax.train.objectives.sft import Sft
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.state import Batch, init_state
from smollm3_jax.train.step import train_step

FLOAT32 = StepOptions(dtype="float32")
ROWS, LENGTH = 8, 24


@pytest.fixture(scope="module")
def config():
    return s3.ModelConfig.from_hf(tiny.raw_config("one_layer"))


@pytest.fixture(scope="module")
def batch():
    """Rows of three documents; the first rows have one trained token each, the last ones ten times as many."""
    random = np.random.RandomState(0)
    tokens = random.randint(3, 160, (ROWS, LENGTH))
    segments = np.repeat([[1, 2, 3]], ROWS, axis=0).repeat(8, axis=1)
    weights = np.zeros((ROWS, LENGTH))
    weights[:4, 3] = 1
    weights[4:, [0, 1, 2, 3, 8, 9, 10, 16, 17, 18]] = 1
    return Batch(*(jnp.asarray(x, t) for x, t in ((tokens, jnp.int32), (segments, jnp.int32), (weights, jnp.float32))))


def sums(model, batch, objective=None):
    run = jax.jit(objective or Sft(), static_argnums=2)
    return jax.device_get(run(model, batch, FLOAT32))


def test_the_loss_is_of_the_trained_tokens_alone(config, batch):
    """Beside the mean of their own log-probabilities."""

    def expected(model):
        logps = jax.nn.log_softmax(model(batch.tokens, segment_ids=batch.segment_ids))
        said = jnp.take_along_axis(logps, jnp.roll(batch.tokens, -1, axis=1)[..., None], -1)[..., 0]
        return -(said * batch.weights).sum()

    model = s3.SmolLM3(config, rngs=nnx.Rngs(0))
    (bounded,) = rounding.shaken(expected, model)
    total, found = sums(model, batch)
    assert found["tokens"] == 44 and rounding.within(total, bounded) <= 1
    without_one = dataclasses.replace(batch, weights=batch.weights.at[7, 18].set(0))
    assert rounding.within(sums(model, without_one)[0], bounded) > 1


def test_documents_do_not_see_each_other(config, batch):
    """trl #1230, #3067, #5316: other words in the first document change nothing of what the others learn."""
    model = s3.SmolLM3(config, rngs=nnx.Rngs(0))
    weights = batch.weights.at[:, :8].set(0)
    other = batch.tokens.at[:, :8].set(7)
    gradient = jax.jit(jax.grad(Sft(), has_aux=True), static_argnums=2)
    found = [
        gradient(model, dataclasses.replace(batch, tokens=tokens, weights=weights), FLOAT32)[0]
        for tokens in (batch.tokens, other)
    ]
    # To the bit: what is not seen has a weight of exactly 0.
    jax.tree.map(np.testing.assert_array_equal, *found)


@pytest.mark.parametrize(("devices", "micro_batches"), [(1, 2), (1, 8), (2, 1), (2, 2), (8, 1)])
def test_a_step_is_the_same_however_it_is_divided(config, batch, devices, micro_batches):
    """trl #2604, transformers #34242, unsloth #1178: a token counts as much in a part with few trained tokens as in one
    with many."""
    rule = adamw(1.0, eps=1e-3)  # of which step the parameters' rounding, and that of gradients near 0, is a small part

    def after(model, devices=1, micro_batches=1, batch=batch):
        sharding = None
        if devices > 1:
            mesh = make_mesh({"fsdp": devices}, devices=jax.devices()[:devices])
            sharding = Sharding.of(mesh, "fsdp").fitted(config.axis_sizes)
        model = with_sharding(jax.tree.map(jnp.copy, model), sharding)
        options = StepOptions(dtype="float32", micro_batches=micro_batches)
        state, metrics = train_step(init_state(model, rule), batch, objective=Sft(), optimizer=rule, options=options)
        assert metrics["tokens"] == batch.weights.sum()
        return jax.tree.leaves(jax.device_get((state.model, metrics["loss"])))

    model = s3.SmolLM3(config, rngs=nnx.Rngs(0))
    bounded = rounding.shaken(after, model)
    assert max(rounding.worst(after(model, devices, micro_batches), bounded)) <= 1
    # Not so where a token counts less.
    batch = dataclasses.replace(batch, weights=batch.weights.at[0, 3].set(0))
    assert min(rounding.worst(after(model, batch=batch), bounded)) > 1


def test_positions_by_document_change_nothing_but_rounding(config, batch):
    model = s3.SmolLM3(config, rngs=nnx.Rngs(0))
    assert _within(batch.segment_ids).tolist() == [[*range(8)] * 3] * ROWS
    (bounded,) = rounding.shaken(lambda model: sums(model, batch)[0], model)
    assert rounding.within(sums(model, batch, Sft(by_document=True))[0], bounded) <= 1


def test_a_batch_without_weights_is_none_for_it(config, batch):
    model = s3.SmolLM3(config, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="has weights"):
        Sft()(model, dataclasses.replace(batch, weights=None), FLOAT32)
    assert Pretrain() != Sft()
