import dataclasses
import functools
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
import tiny
from flax import nnx
from h100 import cut

import smollm3_jax as s3
from sharding import hlo
from smollm3_jax.plan.devices import compile_for, sharding_for, topology
from smollm3_jax.plan.train import TrainSetting
from smollm3_jax.train.objectives.pretrain import Pretrain
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.options import REMAT, StepOptions, compiler_options
from smollm3_jax.train.state import Batch, init_state
from smollm3_jax.train.step import train_step

FLOAT32 = StepOptions(dtype="float32")


@pytest.fixture(scope="module")
def config():
    return s3.ModelConfig.from_hf(tiny.raw_config("plain"))


def new_model(config):
    return s3.SmolLM3(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batch():
    random = np.random.RandomState(0)
    segments = np.sort(random.randint(1, 4, (4, 24)), axis=1)
    segments[1, 20:] = 0
    return Batch(jnp.asarray(random.randint(3, 160, (4, 24)), jnp.int32), jnp.asarray(segments, jnp.int32))


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def test_the_loss_is_the_cross_entropy_of_the_models_logits(config, batch):
    def expected(model):
        logits = jax.nn.log_softmax(model(batch.tokens, segment_ids=batch.segment_ids))
        same = (batch.segment_ids[:, :-1] == batch.segment_ids[:, 1:]) & (batch.segment_ids[:, :-1] != 0)
        said = jnp.take_along_axis(logits[:, :-1], batch.tokens[:, 1:, None], axis=-1)[..., 0]
        return -jnp.where(same, said, 0).sum(), same.sum()

    def off(options):
        total, sums = Pretrain()(model, batch, options)
        return max(rounding.worst([total, sums["tokens"]], bounded) + rounding.worst([sums["loss"]], bounded[:1]))

    model = new_model(config)
    bounded = rounding.shaken(jax.jit(expected), model)
    assert off(FLOAT32) <= 1 < off(dataclasses.replace(FLOAT32, dtype="bfloat16"))


@pytest.mark.slow
def test_what_the_backward_pass_computes_again_changes_nothing(config, batch):
    def gradients(model, **changed):
        options = dataclasses.replace(FLOAT32, **changed)
        return leaves(jax.jit(jax.grad(lambda model: Pretrain()(model, batch, options)[0]))(model))

    model = new_model(config)
    bounded = rounding.shaken(functools.partial(gradients, remat="none"), model)
    for remat in REMAT:
        assert max(rounding.worst(gradients(model, remat=remat), bounded)) <= 1, remat
    assert min(rounding.worst(gradients(model, dtype="bfloat16"), bounded)) > 1


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_products_have_operands_in_the_compute_dtype_and_sums_in_float32(config, batch, remat):
    """All of a step: forward, recomputed and backward, the layers', attention's and the loss's."""
    optimizer = optax.sgd(1.0)
    found = {}
    for dtype in ("bfloat16", "float32"):
        options = StepOptions(dtype=dtype, remat=remat)
        state = init_state(new_model(config), optimizer)
        text = train_step.lower(state, batch, optimizer=optimizer, options=options).as_text()
        types = re.findall(r"dot_general.*: \(tensor<[^>]*x(\w+)>, tensor<[^>]*x(\w+)>\) -> tensor<[^>]*x(\w+)>", text)
        assert len(types) == text.count("stablehlo.dot_general") > 20
        found[dtype] = set(types)
    assert found == {"bfloat16": {("bf16", "bf16", "f32")}, "float32": {("f32", "f32", "f32")}}


@pytest.mark.slow
def test_micro_batches_equal_the_batch(config, batch):
    def step(model, batch=batch, micro_batches=1):
        """A great rate's update, beside which the parameters' own rounding is small, and the metrics."""
        before = leaves(model)
        options, optimizer = dataclasses.replace(FLOAT32, micro_batches=micro_batches), optax.sgd(1024.0)
        state = init_state(jax.tree.map(jnp.copy, model), optimizer)  # which the step takes
        state, metrics = train_step(state, batch, optimizer=optimizer, options=options)
        return [x - y for x, y in zip(before, leaves(state.model), strict=True)], metrics

    def off(*changed):
        return rounding.worst(jax.tree.leaves(step(model, *changed)), bounded)

    model = new_model(config)
    bounded = rounding.shaken(step, model)
    assert max(off(batch, 2)) <= 1 and max(off(batch, 4)) <= 1
    # Not so if one token of a micro-batch is another one.
    assert sum(x > 1 for x in off(dataclasses.replace(batch, tokens=batch.tokens.at[3, 9].set(5)), 2)) > len(
        leaves(model)
    )


@pytest.mark.slow
def test_a_micro_batch_that_is_not_finite_is_left_out(batch):
    """T5: Token 7, whose embedding is infinite, stands in one of two micro-batches' rows, then in all."""
    config = s3.ModelConfig.from_hf(tiny.raw_config("untied"))
    optimizer, two = adamw(1e-2), dataclasses.replace(FLOAT32, micro_batches=2)
    tokens = jnp.where(batch.tokens == 7, 8, batch.tokens)

    def step(tokens, segments, options):
        model = new_model(config)
        model.embed.set_value(model.embed[...].at[7].set(jnp.inf))
        state, metrics = train_step(
            init_state(model, optimizer), Batch(tokens, segments), optimizer=optimizer, options=options
        )
        return leaves(state), metrics

    # The same program, on the other micro-batch's rows and on padding, to which no gradient comes: the same bits.
    got, metrics = step(tokens.at[1, 3].set(7), batch.segment_ids, two)
    want, alone = step(tokens, batch.segment_ids.at[1::2].set(0), two)
    whole, _ = step(tokens, batch.segment_ids, two)
    assert (metrics.pop("bad"), alone.pop("bad")) == (1, 0)
    assert jax.device_get(metrics) == jax.device_get(alone)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert not any(np.array_equal(a, b) for a, b in zip(got[:-1], whole[:-1], strict=True) if a.ndim)
    before = leaves(init_state(new_model(config), optimizer))
    for options, bad in ((FLOAT32, 1), (two, 2)):
        after, metrics = step(tokens.at[:, 3].set(7), batch.segment_ids, options)
        assert metrics["bad"] == bad and np.isnan(metrics["loss"])
        assert after[-1] == 1  # a step all the same
        for a, b in zip(after[:-1], before[:-1], strict=True):
            np.testing.assert_array_equal(np.where(np.isinf(a), 0, a), np.where(np.isinf(a), 0, b))


def test_a_model_learns(config, batch):
    optimizer = adamw(3e-3)
    state, losses = init_state(new_model(config), optimizer), []
    for _ in range(30):
        state, metrics = train_step(state, batch, optimizer=optimizer, options=StepOptions())
        losses.append(float(metrics["loss"]))
    assert losses[0] > 4.9
    assert losses[-1] < 2.5
    assert int(state.step) == 30
    assert {x.dtype.name for x in jax.tree.leaves(state.model)} == {"float32"}


def test_the_embedding_does_not_decay_and_all_else_does(config, batch):
    """Without gradients weight decay is all that there is."""
    nothing = Batch(batch.tokens, jnp.zeros_like(batch.segment_ids))
    optimizer = adamw(0.5, weight_decay=0.1)
    model = new_model(config)
    before = dict(zip(["embed", "down"], leaves((model.embed, model.layers.down)), strict=True))
    norm = np.asarray(model.norm[...])
    state, _ = train_step(init_state(model, optimizer), nothing, optimizer=optimizer, options=FLOAT32)
    np.testing.assert_array_equal(state.model.embed[...], before["embed"])
    # A twentieth, of three roundings, is taken off, and the rest rounded; on the other side 0.95 and a product are.
    np.testing.assert_allclose(state.model.layers.down[...], 0.95 * before["down"], rtol=4 * 2.0**-24)
    np.testing.assert_allclose(state.model.norm[...], 0.95 * norm, rtol=4 * 2.0**-24)


def test_the_old_state_is_donated(config, batch):
    optimizer = adamw(1e-3)
    state = init_state(new_model(config), optimizer)
    train_step(state, batch, optimizer=optimizer, options=FLOAT32)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.model))


def test_equal_steps_give_equal_bits_on_a_cpu_whether_asked_to_or_not(config, batch):
    assert compiler_options("cpu", deterministic=True) is None  # there is nothing to change
    assert compiler_options("cpu", devices=8) and compiler_options("tpu", devices=8) == compiler_options("tpu")
    assert compiler_options("tpu", deterministic=True) == compiler_options("tpu")
    assert compiler_options("gpu", deterministic=True)["xla_gpu_exclude_nondeterministic_ops"]
    optimizer = adamw(1e-3)
    state = init_state(new_model(config), optimizer)
    lowered = train_step.lower(state, batch, optimizer=optimizer, options=FLOAT32)
    found = []
    for deterministic in (False, True, True):
        step = lowered.compile(compiler_options("cpu", deterministic))
        found.append(leaves(step(init_state(new_model(config), optimizer), batch)))
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="kernels for GPUs need jax 0.11.2")
def test_on_a_gpu_a_deterministic_step_sorts_before_it_adds_up():
    """Compiled for an H100, run nowhere: without the setting the embedding's gradient is a scatter in any order."""
    chip, devices = topology("h100:1")
    config, options = cut(1), StepOptions(remat="dots")
    setting = TrainSetting(config, chip, sharding_for(config, devices, "fsdp", None), 1, 512, options)
    state, batch = setting.arguments
    static = {"optimizer": adamw(1e-3), "options": options, "sharding": setting.sharding}
    found = {}
    for deterministic in (False, True):
        told = compiler_options("gpu", deterministic)
        compiled = compile_for(train_step, state, batch, compiler_options=told, **static)
        operations = hlo.operations(compiled)
        found[deterministic] = Counter(op.opcode for op in operations)
        # Attention is cuDNN's in both, which is asked for its deterministic algorithm: no text shows that.
        assert any("fmhaSoftmaxBackward" in (op.target or "") for op in operations)
    assert found[False]["scatter"] and not found[False]["sort"]
    assert found[True]["sort"]
