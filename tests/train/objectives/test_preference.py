import dataclasses
import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
import tiny
from flax import nnx
from jax.sharding import NamedSharding
from proxies import FULL

import smollm3_jax as s3
from sharding.mesh import make_mesh
from sharding.rules import Sharding
from smollm3_jax.model import with_sharding
from smollm3_jax.train.objectives.preference import Preference, completion_sums, of_rewards, segment_sums
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.settings import LOSSES
from smollm3_jax.train.state import Batch, init_state, state_shardings
from smollm3_jax.train.step import train_step

FLOAT32 = StepOptions(dtype="float32")
BETA = 0.3
CONFIG = s3.ModelConfig.from_hf(tiny.raw_config("plain"))
OPTIMIZER = adamw(1e-2, eps=1e-2, clip_norm=0)  # a large epsilon, so that rounding of small gradients does not show


def drawn_pairs(count=16, seed=0):
    """(chosen, rejected, the first token of either that is learned), of 4 to 15 tokens each."""
    draw = np.random.RandomState(seed)

    def one():
        prompt = draw.randint(3, 160, draw.randint(2, 7))
        sides = [np.concatenate([prompt, draw.randint(3, 160, draw.randint(2, 9))]) for _ in range(2)]
        return *sides, len(prompt)

    return [one() for _ in range(count)]


def laid(rows, length, references=None):
    """A batch of rows of pairs; references: (chosen's, rejected's) sums of each, in the same order."""
    tokens, segments = np.zeros((2, len(rows), length), np.int32)
    weights, reference = np.zeros((2, len(rows), length), np.float32)
    for i, row in enumerate(rows):
        at = 0
        for j, (chosen, rejected, first) in enumerate(row):
            for side, ids in enumerate((chosen, rejected)):
                place = slice(at, at + len(ids))
                tokens[i, place], segments[i, place] = ids, 2 * j + 1 + side
                weights[i, at + first - 1 : at + len(ids) - 1] = 1
                if references is not None:
                    reference[i, place] = references[i][j][side]
                at += len(ids)
    return Batch(*map(jnp.asarray, (tokens, segments, weights)), None if references is None else jnp.asarray(reference))


def new_model(seed=0, sharding=None):
    return with_sharding(s3.SmolLM3(CONFIG, rngs=nnx.Rngs(seed)), sharding)


@functools.cache
def sums_of():
    return jax.jit(completion_sums, static_argnums=2)


def referred(rows, length, model):
    """The batch of these rows with the sums that a model gives them."""
    sums = np.asarray(sums_of()(model, laid(rows, length), FLOAT32))
    return laid(rows, length, sums)


@pytest.fixture(scope="module")
def pairs():
    return drawn_pairs()


def packed(pairs):
    """Two pairs a row."""
    return [pairs[i : i + 2] for i in range(0, len(pairs), 2)], 64


def padded(pairs):
    return [[pair] for pair in pairs], 32


def permuted(pairs):
    shuffled = pairs[:]
    random.Random(0).shuffle(shuffled)
    return packed(shuffled)


def stepped(objective, batch, sharding=None, micro_batches=1, model=None):
    """(the metrics, the model after a step)."""
    state = init_state(model or new_model(1, sharding), OPTIMIZER)
    if sharding is not None:
        state = jax.device_put(state, state_shardings(state, sharding))
        batch = jax.device_put(batch, NamedSharding(sharding.mesh, sharding.spec("batch", None)))
    options = dataclasses.replace(FLOAT32, micro_batches=micro_batches)
    state, metrics = train_step(state, batch, objective=objective, optimizer=OPTIMIZER, options=options)
    return jax.device_get((metrics, state.model))


def assert_close(got, want, within=1e-6):
    """Of numbers as they are, of arrays by the largest of each."""
    metrics, model = got
    for name in want[0].keys() - {"bad", "updates"}:
        assert metrics[name] == pytest.approx(float(want[0][name]), rel=within, abs=within), name
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(want[1]), strict=True):
        assert np.abs(a - b).max() <= within * max(1, np.abs(b).max())


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_those_of_the_definition(loss):
    """In float64, and so are the slopes that count as saturated."""
    with jax.enable_x64(True):
        won, lost = (jnp.asarray(x, jnp.float64) for x in np.random.RandomState(0).normal(size=(2, 1000)) * 4)
        value, saturated = of_rewards(loss, won, lost)

        def s(x):
            return 1 / (1 + np.exp(-np.asarray(x)))

        want = {
            "apo_zero": (1 - s(won)) + s(lost),
            "apo_down": s(won) + (1 - s(won - lost)),
            "sigmoid": -np.log(s(won - lost)),
        }[loss]
        np.testing.assert_allclose(value, want, rtol=1e-12, atol=1e-14)
        slopes = {
            "apo_zero": [4 * s(x) * (1 - s(x)) for x in (won, lost)],
            "apo_down": [4 * s(x) * (1 - s(x)) for x in (won, won - lost)],
            "sigmoid": [2 * (1 - s(won - lost))],
        }[loss]
        flat = np.mean([slope < 0.01 for slope in slopes], axis=0)
        np.testing.assert_array_equal(saturated, flat)
        assert 0 < float(saturated.mean()) < 1


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_begin_where_they_should(loss):
    """At a reward of 0: APO's at exactly 1, each of its logistic functions with a slope of a quarter of beta."""
    zero = jnp.zeros((), jnp.float32)
    value, saturated = of_rewards(loss, zero, zero)
    assert value == (jnp.log(jnp.float32(2)) if loss == "sigmoid" else 1) and saturated == 0
    slopes = jax.grad(lambda won, lost: of_rewards(loss, won, lost)[0], argnums=(0, 1))(zero, zero)
    assert slopes == {"apo_zero": (-0.25, 0.25), "apo_down": (0, 0.25), "sigmoid": (-0.5, 0.5)}[loss]


@pytest.mark.slow
def test_a_sum_is_of_its_own_segment_and_grows_no_error_with_its_length():
    draw = np.random.RandomState(0)
    values = draw.normal(size=(2, 4096)).astype(np.float32) - 3
    segments = np.zeros((2, 4096), np.int32)
    segments[0, :4000] = np.repeat([1, 2], [3900, 100])
    segments[1, 5:] = np.repeat([1, 2, 3, 4], [2, 1000, 89, 3000])
    found = np.asarray(segment_sums(jnp.asarray(values), jnp.asarray(segments)))
    assert found.shape == (2, 2048)
    for row in range(2):
        for n in range(2048):
            own = segments[row] == n + 1
            exact = values[row, own].astype(np.float64).sum()
            # Each number goes through twice as many additions as its tree is high, at most.
            assert abs(found[row, n] - exact) <= 24 * rounding.FLOAT32 * np.abs(values[row, own]).sum()


def test_sums_and_gradients_are_those_of_each_completion_alone(pairs):
    """The log-probability of what follows the prompt, from the logits of the completion as a text of its own."""
    model = s3.SmolLM3(s3.ModelConfig.from_hf(tiny.raw_config("one_layer")), rngs=nnx.Rngs(0))
    batch = laid([pairs[:2]], 64)
    texts = [(ids, first) for *sides, first in pairs[:2] for ids in sides]
    alone = np.zeros((4, 16), np.int32)
    for row, (ids, _) in enumerate(texts):
        alone[row, : len(ids)] = ids

    def plain(model):
        logps = jax.nn.log_softmax(model(jnp.asarray(alone)))
        said = jnp.take_along_axis(logps[:, :-1], jnp.asarray(alone)[:, 1:, None], axis=2)[..., 0]
        return jnp.stack([said[row, first - 1 : len(ids) - 1].sum() for row, (ids, first) in enumerate(texts)])

    def with_gradient(sums):
        weights = jnp.array([0.3, -1.0, 0.7, 2.0])
        return jax.jit(lambda model: (sums(model), jax.grad(lambda model: (weights * sums(model)).sum())(model)))

    bounded = rounding.shaken(with_gradient(plain), model)

    def off(batch):
        got = with_gradient(lambda model: completion_sums(model, batch, FLOAT32)[0, :2].reshape(-1))(model)
        return rounding.worst(jax.tree.leaves(got), bounded)

    assert max(off(batch)) <= 1
    count = jnp.maximum(batch.weights.sum(axis=1, keepdims=True), 1)
    assert min(off(dataclasses.replace(batch, weights=batch.weights / count))) > 1  # sums, not means


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["apo_zero", *(pytest.param(x, marks=FULL) for x in LOSSES[1:])])
def test_packed_is_padded_is_permuted_is_split_into_micro_batches(pairs, loss):
    objective = Preference(loss, BETA)
    batches = {how.__name__: referred(*how(pairs), new_model(0)) for how in (packed, padded, permuted)}
    want = stepped(objective, batches["padded"])
    assert want[0]["pairs"] == len(pairs)
    for batch in batches.values():
        assert_close(stepped(objective, batch), want)
    assert_close(stepped(objective, batches["packed"], micro_batches=4), want)
    # Of which the mean is a pair's, not a row's: another batch is not close.
    other = referred(*packed(pairs[:15]), new_model(0))
    with pytest.raises(AssertionError):
        assert_close(stepped(objective, other), want)
    rest, uneven = iter(pairs), []
    for count in (4, 1, 1, 1, 1, 2, 2, 4):
        uneven.append([next(rest) for _ in range(count)])
    assert_close(stepped(objective, referred(uneven, 128, new_model(0)), micro_batches=4), want)


STRATEGIES = {
    "single": {},
    "dp": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tp": {"data": 4, "tensor": 2},
    "fsdp_tp": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp_tp_cp": {"fsdp": 2, "context": 2, "tensor": 2},
}


@pytest.fixture(scope="module")
def alone(pairs):
    return functools.cache(lambda loss: stepped(Preference(loss, BETA), referred(*packed(pairs), new_model(0))))


@pytest.mark.parametrize(
    ("rules", "loss"),
    [
        pytest.param(rules, loss, marks=[] if (rules, loss) == ("fsdp", "apo_zero") else pytest.mark.slow)
        for rules in STRATEGIES
        for loss in LOSSES
    ],
)
def test_every_strategy_gives_the_same_step(rules, loss, pairs, alone):
    mesh = make_mesh(STRATEGIES[rules] or {"data": 1}, jax.devices() if STRATEGIES[rules] else jax.devices()[:1])
    sharding = Sharding.of(mesh, rules).fitted(CONFIG.axis_sizes)
    batch = referred(*packed(pairs), new_model(0))
    assert_close(stepped(Preference(loss, BETA), batch, sharding), alone(loss))


@pytest.mark.parametrize(
    ("rules", "loss"),
    [
        pytest.param(rules, loss, marks=[] if (rules, loss) == ("single", "apo_zero") else pytest.mark.slow)
        for rules in STRATEGIES
        for loss in ("apo_zero", "apo_down")
    ],
)
def test_apo_begins_at_one(rules, loss, pairs):
    """Where the reference is the start: in float32 within 1e-6, under each strategy, packed in another way than it was
    when the reference's sums were computed."""
    mesh = make_mesh(STRATEGIES[rules] or {"data": 1}, jax.devices() if STRATEGIES[rules] else jax.devices()[:1])
    sharding = Sharding.of(mesh, rules).fitted(CONFIG.axis_sizes)
    batch = referred(*packed(pairs), new_model(1))
    metrics, _ = stepped(Preference(loss, 0.05), batch, sharding)
    assert abs(metrics["loss"] - 1) <= 1e-6
    assert abs(metrics["rewards/margins"]) <= 1e-5 and metrics["saturated"] == 0
    other, _ = stepped(Preference(loss, 0.05), referred(*packed(pairs), new_model(0)), sharding)
    assert abs(other["loss"] - 1) > 1e-6


@pytest.mark.slow
def test_in_bfloat16_the_first_step_says_what_rounding_makes_of_it(pairs):
    """The reference is the start, packed in another way, and its dtype is that of the step."""
    options, model = StepOptions(dtype="bfloat16"), new_model(1)
    sums = np.asarray(sums_of()(model, laid(*padded(pairs)), options))
    rows, length = packed(pairs)
    batch = laid(rows, length, sums[:, :1].reshape(len(rows), 2, 2))
    metrics = jax.device_get(Preference("apo_zero", BETA)(model, batch, options)[1])
    off = metrics["difference"] / metrics["pairs"]
    assert 0 <= off < 0.5
    # Logistic functions are nowhere steeper than a quarter.
    assert abs(metrics["loss"] / metrics["pairs"] - 1) <= BETA / 2 * off + 1e-6
    again = np.asarray(sums_of()(model, batch, options))
    there = np.asarray(batch.segment_ids).max(axis=1, keepdims=True) // 2 > np.arange(again.shape[1])
    assert off == pytest.approx(np.abs(again[there]).mean(), rel=1e-5)


def test_a_pair_that_went_wrong_is_counted_as_saturated(pairs):
    """And rewards, margins and accuracies are those of the reference's sums."""
    rows, length = packed(pairs[:2])
    sums = np.asarray(sums_of()(new_model(1), laid(rows, length), FLOAT32))
    moved = sums.copy()
    moved[0, 0] += (40, -10)  # D = -40 and 10
    moved[0, 1] -= (1, 2)  # D = 1 and 2
    metrics, _ = stepped(Preference("apo_zero", 0.3), laid(rows, length, moved))
    assert metrics["pairs"] == 2 and metrics["tokens"] == sum(
        len(ids) - first for *sides, first in rows[0] for ids in sides
    )
    assert metrics["rewards/chosen"] == pytest.approx(0.3 * (-40 + 1) / 2, rel=1e-5)
    assert metrics["rewards/rejected"] == pytest.approx(0.3 * (10 + 2) / 2, rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(0.3 * (-50 - 1) / 2, rel=1e-5)
    assert metrics["rewards/accuracies"] == 0
    assert metrics["difference"] == pytest.approx((40 + 1 + 10 + 2) / 4, rel=1e-5)
    assert metrics["saturated"] == 0.25  # of four functions that of b D = -12
