"""Eight devices compute what one does, under every strategy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
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


def worst(got, want):
    """The largest difference between two trees, relative to the largest value of each array."""
    pairs = zip(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(jax.device_get(want)), strict=True)
    return max(float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-12)) for x, y in pairs)


# Training

TRAINING_AXES = {
    **DEFAULT_AXES,
    "fsdp_tp": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp_tp_cp": {"fsdp": 2, "context": 2, "tensor": 2},
    "serve_tp": {"data": 4, "tensor": 2},
    "tp": {"data": 1, "tensor": 8},
    "serve_tp_long": {"tensor": 2, "data": 4},
    "own": {"fsdp": 8},
}
OWN = {"vocab": "fsdp", "mlp": "fsdp", "batch": "fsdp"}  # words lie where rows do
# With its own epsilon AdamW's first step divides a gradient by itself: where one is near zero, rounding shows.
OPTIMIZER = adamw(1e-3, eps=1e-3)


def trained(sharding, remat="dots"):
    """Logits (None where rows are split), loss, gradients, the model after a step, and the step's metrics."""
    options = StepOptions(dtype="float32", remat=remat)
    random = np.random.RandomState(0)
    segments = np.sort(random.randint(1, 4, (8, 32)), axis=1)
    segments[1, 20:] = 0
    tokens = random.randint(3, 160, (8, 32))
    batch = Batch(*(jnp.asarray(x, jnp.int32) for x in (tokens, segments)))
    state = init_state(with_sharding(s3.SmolLM3(CONFIG, rngs=nnx.Rngs(0)), sharding), OPTIMIZER)
    if sharding is not None:
        state = jax.device_put(state, state_shardings(state, sharding))
        batch = jax.device_put(batch, NamedSharding(sharding.mesh, sharding.spec("batch", None)))
        for x, at in zip(jax.tree.leaves(state), jax.tree.leaves(state_shardings(state, sharding)), strict=True):
            assert x.addressable_shards[0].data.shape == at.shard_shape(x.shape)
    logits = None
    if sharding is None or sharding.parts("length") == 1:
        logits = state.model(batch.tokens, segment_ids=batch.segment_ids)
    compute = jax.jit(jax.value_and_grad(Pretrain(), has_aux=True), static_argnums=2)
    (total, _), gradients = compute(state.model, batch, options)
    gradients = jax.device_get(gradients)
    before = jax.tree.map(lambda x: x.sharding, state)
    state, metrics = train_step(state, batch, optimizer=OPTIMIZER, options=options)
    if sharding is not None:  # what comes out lies where it went in
        for x, at in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
            assert x.sharding.is_equivalent_to(at, x.ndim), (x.sharding, at)
    return logits, float(total), gradients, jax.device_get(state.model), jax.device_get(metrics)


@pytest.fixture(scope="module")
def trained_alone():
    return trained(None)


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
    found = trained(sharding, remat="full" if name == "fsdp_tp" else "dots")
    for what, got, expected in zip(
        ("logits", "loss", "gradients", "model", "metrics"), found, trained_alone, strict=True
    ):
        assert got is None or worst(got, expected) <= 1e-5, what


# Inference

SERVING_AXES = {
    "dp": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tp": {"tensor": 8},
    "fsdp_tp": {"fsdp": 4, "tensor": 2},
    "serve_tp": {"data": 4, "tensor": 2},
}
TOKENS = np.random.RandomState(0).randint(3, 160, (8, 20)).astype(np.int32)
GREEDY = s3.SamplingParams(max_new_tokens=8, temperature=0, ignore_eos=True, logprobs=0)
REQUESTS = [Request(TOKENS[i, : 5 + 3 * i].tolist(), GREEDY) for i in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Neither all tokens alike nor one certain.
    tensors = {name: x * 8 if "embed" in name else x for name, x in random_tensors(RAW).items()}
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", RAW, tensors)


@pytest.fixture(scope="module", params=[None, "int8"], ids=["plain", "int8"])
def alone(request, folder):
    """How weights are stored, and one device's logits and answers with them."""
    model = s3.from_pretrained(folder, weights=request.param, stacked=True)
    return request.param, np.asarray(model(jnp.asarray(TOKENS))), complete(model, REQUESTS)


@pytest.mark.slow
@pytest.mark.parametrize("rules", SERVING_AXES)
def test_text_and_logits_are_those_of_one_device(rules, alone, folder):
    """Plain and quantized weights, from the file to where they lie, with the cache on the mesh."""
    weights, logits, said = alone
    sharding = Sharding.of(make_mesh(SERVING_AXES[rules]), rules).fitted(CONFIG.axis_sizes)
    model = s3.from_pretrained(folder, weights=weights, mesh=sharding.mesh, rules=rules)
    assert model.sharding == sharding
    # Rounded products may round one of int8's activations to the next of 255 values.
    allowed = 1e-3 if weights == "int8" else 1e-4
    # What is told none finds the mesh by itself.
    for given in [sharding, None] if (rules, weights) == ("fsdp_tp", None) else [sharding]:
        told = with_sharding(model, given)
        got = np.asarray(told(jnp.asarray(TOKENS)))
        answers = complete(told, REQUESTS)
        assert np.abs(got - logits).max() <= 1e-5 * np.abs(logits).max()
        assert [a.token_ids for a in answers] == [a.token_ids for a in said]
        for a, b in zip(answers, said, strict=True):
            for x, y in zip(a.logprobs or (), b.logprobs or (), strict=True):
                assert abs(x.logprob - y.logprob) <= allowed
