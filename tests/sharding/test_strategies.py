"""Eight devices compute what one does, under every strategy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from flax import nnx
from jax.sharding import NamedSharding
from proxies import FULL
from tiny import YARN, random_tensors, raw_config, write_checkpoint

import smollm3_jax as s3
from sharding.mesh import DEFAULT_AXES, make_mesh
from sharding.rules import STRATEGIES, Sharding
from smollm3_jax.generation.api import complete
from smollm3_jax.generation.requests import Request
from smollm3_jax.model import with_sharding
from smollm3_jax.train.objectives.pretrain import Pretrain
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.state import Batch, init_state, state_shardings
from smollm3_jax.train.step import train_step

RAW = raw_config("plain") | {"rope_scaling": YARN}
CONFIG = s3.ModelConfig.from_hf(RAW)


# Training

TRAINING_AXES = {
    **DEFAULT_AXES,
    "fsdp_tp": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp_tp_cp": {"fsdp": 2, "context": 2, "tensor": 2},
    "serve_tp": {"data": 4, "tensor": 2},
    "tp": {"data": 1, "tensor": 8},
    "serve_tp_long": {"tensor": 2, "data": 4},
    "serve_cp": {"context": 4, "tensor": 2},
    "own": {"fsdp": 8},
}
OWN = {"vocab": "fsdp", "mlp": "fsdp", "batch": "fsdp"}  # words lie where rows do
# With its own epsilon AdamW's first step divides a gradient by itself: where one is near zero, rounding shows. Of a
# step at this rate the parameters' own rounding is a small part.
OPTIMIZER = adamw(1.0, eps=1e-3)


def new_batch():
    random = np.random.RandomState(0)
    segments = np.sort(random.randint(1, 4, (8, 32)), axis=1)
    segments[1, 20:] = 0
    return Batch(*(jnp.asarray(x, jnp.int32) for x in (random.randint(3, 160, (8, 32)), segments)))


@jax.jit
def logits_of(model, batch):
    return model(batch.tokens, segment_ids=batch.segment_ids)


loss_and_gradients = jax.jit(jax.value_and_grad(Pretrain(), has_aux=True), static_argnums=2)


def trained(model, batch, sharding=None, remat="dots"):
    """Logits, loss, gradients, the model after a step, and the step's metrics."""
    options = StepOptions(dtype="float32", remat=remat)
    # A copy, which the step takes.
    state = init_state(with_sharding(jax.tree.map(jnp.copy, model), sharding), OPTIMIZER)
    if sharding is not None:
        state = jax.device_put(state, state_shardings(state, sharding))
        batch = jax.device_put(batch, NamedSharding(sharding.mesh, sharding.spec("batch", None)))
        for x, at in zip(jax.tree.leaves(state), jax.tree.leaves(state_shardings(state, sharding)), strict=True):
            assert x.addressable_shards[0].data.shape == at.shard_shape(x.shape)
    logits = logits_of(state.model, batch)
    (total, _), gradients = loss_and_gradients(state.model, batch, options)
    gradients = jax.device_get(gradients)
    before = jax.tree.map(lambda x: x.sharding, state)
    state, metrics = train_step(state, batch, optimizer=OPTIMIZER, options=options)
    if sharding is not None:  # what comes out lies where it went in
        for x, at in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
            assert x.sharding.is_equivalent_to(at, x.ndim), (x.sharding, at)
    return logits, float(total), gradients, jax.device_get(state.model), jax.device_get(metrics)


@pytest.fixture(scope="module")
def trained_alone():
    """A model, and what one device makes of it, with how far other orders of its sums may be from that."""
    model, batch = s3.SmolLM3(CONFIG, rngs=nnx.Rngs(0)), new_batch()
    bounded = rounding.shaken(functools.partial(trained, batch=batch), model)
    # One other token of 256 is more than that, in all arrays but counts.
    other = trained(model, dataclasses.replace(batch, tokens=batch.tokens.at[3, 9].set(5)))
    assert np.mean(np.array(rounding.worst(jax.tree.leaves(other), bounded)) > 1) > 0.8
    return model, bounded


@pytest.mark.parametrize(
    "name",
    [
        name if name == "fsdp" else pytest.param(name, marks=pytest.mark.slow)
        for name in dict.fromkeys([*STRATEGIES, "own"])
    ],
)
def test_a_training_step_is_that_of_one_device(name, trained_alone):
    devices = jax.devices()[:1] if name == "single" else jax.devices()
    mesh = make_mesh(TRAINING_AXES[name], devices)
    sharding = Sharding.of(mesh, OWN if name == "own" else name).fitted(CONFIG.axis_sizes)
    model, bounded = trained_alone
    found = jax.tree.leaves(trained(model, new_batch(), sharding, remat="full" if name == "fsdp_tp" else "dots"))
    assert max(rounding.worst(found, bounded)) <= 1


# Inference

SERVING_AXES = {
    "dp": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tp": {"tensor": 8},
    "fsdp_tp": {"fsdp": 4, "tensor": 2},
    "serve_tp": {"data": 4, "tensor": 2},
    "serve_cp": {"context": 4, "tensor": 2},
}
TOKENS = np.random.RandomState(0).randint(3, 160, (8, 20)).astype(np.int32)
GREEDY = s3.SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
REQUESTS = [Request(TOKENS[i, : 5 + 3 * i].tolist(), GREEDY) for i in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Neither all tokens alike nor one certain.
    tensors = {name: x * 8 if "embed" in name else x for name, x in random_tensors(RAW).items()}
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", RAW, tensors)


def answered(model):
    """Logits, and of the answers to REQUESTS each token and its log-probability."""
    answers = complete(model, REQUESTS)
    logprobs = np.array([[each.logprob for each in answer.logprobs or ()] for answer in answers])
    return model(jnp.asarray(TOKENS)), np.array([answer.token_ids for answer in answers]), logprobs


@pytest.fixture(scope="module")
def alone(request, folder):
    """How weights are stored, and what one device says with them, with how far others may be from that."""
    bounded = rounding.shaken(answered, s3.from_pretrained(folder, weights=request.param, stacked=True))
    # No two tokens are so close that rounding chooses between them; other prompts are other text.
    _, (tokens, allowed), _ = bounded
    assert allowed.max() < 0.01 and len(set(tokens.flat)) > 4
    return request.param, bounded


@pytest.mark.slow
@pytest.mark.parametrize(
    ("alone", "rules"),
    [
        *((None, rules) for rules in SERVING_AXES),
        *(pytest.param("int8", rules, marks=[] if rules == "serve_tp" else FULL) for rules in SERVING_AXES),
    ],
    indirect=["alone"],
)
def test_text_and_logits_are_those_of_one_device(rules, alone, folder):
    """Plain and quantized weights, from the file to where they lie, with the cache on the mesh."""
    weights, bounded = alone
    sharding = Sharding.of(make_mesh(SERVING_AXES[rules]), rules).fitted(CONFIG.axis_sizes)
    model = s3.from_pretrained(folder, weights=weights, mesh=sharding.mesh, rules=rules)
    assert model.sharding == sharding
    # What is told none finds the mesh by itself.
    for given in [sharding, None] if (rules, weights) == ("fsdp_tp", None) else [sharding]:
        assert max(rounding.worst(answered(with_sharding(model, given)), bounded)) <= 1
