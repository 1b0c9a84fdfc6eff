import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
import tiny
from flax import nnx

import smollm3_jax as s3
from smollm3_jax.train.objectives.pretrain import Pretrain
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.state import Batch, init_state
from smollm3_jax.train.step import train_step

FLOAT32 = StepOptions(dtype="float32")
ROWS, LENGTH = 4, 24


@pytest.fixture(scope="module")
def model():
    return s3.SmolLM3(s3.ModelConfig.from_hf(tiny.raw_config("one_layer")), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batch():
    """Documents 1 to 3 in each row; one row ends in padding."""
    random = np.random.RandomState(0)
    segments = np.sort(random.randint(1, 4, (ROWS, LENGTH)), axis=1)
    segments[1, 20:] = 0
    return Batch(jnp.asarray(random.randint(3, 160, (ROWS, LENGTH)), jnp.int32), jnp.asarray(segments, jnp.int32))


def weighted(batch, weights):
    return dataclasses.replace(batch, weights=jnp.asarray(weights, jnp.float32))


@pytest.fixture(scope="module")
def found(model):
    """((what is minimised, sums), gradients) of a batch."""
    gradient = jax.jit(jax.value_and_grad(Pretrain(), has_aux=True), static_argnums=2)
    return lambda batch, options=FLOAT32: jax.device_get(gradient(model, batch, options))


def assert_equal(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_weights_of_one_are_no_weights_bit_for_bit(found, batch, dtype, remat):
    options = StepOptions(dtype=dtype, remat=remat)
    assert_equal(found(weighted(batch, np.ones((ROWS, LENGTH))), options), found(batch, options))


def test_a_weight_of_zero_drops_a_token_as_padding_does(found, batch):
    """Bit for bit: the second documents, by weights or as padding, of which nobody else's loss depends."""
    second = batch.segment_ids == 2
    assert second.any()
    without = dataclasses.replace(batch, segment_ids=jnp.where(second, 0, batch.segment_ids))
    assert_equal(found(weighted(batch, ~second)), found(without))


def test_a_weight_belongs_to_the_token_that_predicts(found, model, batch):
    """The loss of one prediction alone, and none from where no label follows."""
    row, t = 2, 5
    assert batch.segment_ids[row, t] == batch.segment_ids[row, t + 1]
    alone = np.zeros((ROWS, LENGTH))
    alone[row, t] = 0.5
    (total, sums), gradients = found(weighted(batch, alone))

    def want(model, token):
        logits = model(batch.tokens, segment_ids=batch.segment_ids)
        return -0.5 * jax.nn.log_softmax(logits)[row, t, token]

    (bounded,) = rounding.shaken(functools.partial(want, token=batch.tokens[row, t + 1]), model)
    assert max(rounding.within(x, bounded) for x in (total, sums["loss"])) <= 1
    assert rounding.within(want(model, batch.tokens[row, t]), bounded) > 1
    assert sums["tokens"] == 0.5 and any(x.any() for x in jax.tree.leaves(gradients))
    last = np.zeros((ROWS, LENGTH))
    last[:, -1] = 1
    (total, sums), gradients = found(weighted(batch, last))
    assert total == sums["loss"] == sums["tokens"] == 0 and not any(x.any() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_sums_and_gradients_are_those_of_the_definition(model, batch, z_loss):
    weights = np.random.RandomState(1).rand(ROWS, LENGTH).astype(np.float32) * 3

    def plain(model):
        logits = model(batch.tokens, segment_ids=batch.segment_ids)[:, :-1]
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        nll = normalizer - jnp.take_along_axis(logits, batch.tokens[:, 1:, None], axis=-1)[..., 0]
        same = (batch.segment_ids[:, :-1] == batch.segment_ids[:, 1:]) & (batch.segment_ids[:, :-1] != 0)
        w = jnp.where(same, weights[:, :-1], 0)
        return (w * (nll + z_loss * normalizer**2)).sum(), {"loss": (w * nll).sum(), "tokens": w.sum()}

    compute = jax.jit(jax.value_and_grad(Pretrain(z_loss), has_aux=True), static_argnums=2)

    def off(weights):
        return rounding.worst(jax.tree.leaves(compute(model, weighted(batch, weights), FLOAT32)), bounded)

    bounded = rounding.shaken(jax.jit(jax.value_and_grad(plain, has_aux=True)), model)
    assert max(off(weights)) <= 1 < min(off(1.001 * weights))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_loss_of_a_step_is_the_weighted_mean(model, batch, micro_batches):
    """So that weights in a fixed ratio to others give the same step, also where their sum is below one."""
    weights = np.random.RandomState(1).rand(ROWS, LENGTH)
    optimizer, options = optax.sgd(1.0), dataclasses.replace(FLOAT32, micro_batches=micro_batches)
    steps = []
    for scale in (1, 4, 2.0**-10):
        state = init_state(jax.tree.map(jnp.copy, model), optimizer)
        state, metrics = train_step(state, weighted(batch, scale * weights), optimizer=optimizer, options=options)
        assert metrics["tokens"] == pytest.approx(steps[0][1] * scale if steps else float(metrics["tokens"]))
        steps.append((float(metrics["loss"]), float(metrics["tokens"]), jax.device_get(state.model)))
    assert steps[2][1] < 1
    for loss, _, trained in steps[1:]:  # powers of two round nothing
        assert loss == steps[0][0]
        assert_equal(trained, steps[0][2])
