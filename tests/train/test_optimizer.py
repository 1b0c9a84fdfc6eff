"""The schedules by their corners, and AdamW by its definition. (The steps of torch's: test_against_torch.py.)"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
from flax import nnx
from tiny import raw_config

import smollm3_jax as s3
from smollm3_jax.train.optimizer import adamw, schedule
from smollm3_jax.train.state import split


@pytest.mark.parametrize(
    ("kind", "at"),
    [
        ("constant", {0: 0, 5: 0.5, 10: 1, 60: 1, 110: 1}),
        ("linear", {0: 0, 5: 0.5, 10: 1, 60: 0.55, 110: 0.1, 200: 0.1}),
        ("cosine", {0: 0, 5: 0.5, 10: 1, 60: 0.55, 110: 0.1, 200: 0.1}),
        ("wsd", {0: 0, 5: 0.5, 10: 1, 80: 1, 90: 1, 100: 0.55, 110: 0.1, 200: 0.1}),
    ],
)
def test_a_rate_goes_through_its_corners(kind, at):
    rate = schedule(kind, 2.0, 110, warmup_steps=10, decay_steps=20, end=0.1)
    for step, expected in at.items():
        # Numbers up to 2: a share of the steps, its cosine (of up to pi, three roundings) and two products and sums.
        np.testing.assert_allclose(rate(step), 2 * expected, rtol=0, atol=2 * 16 * 2.0**-24)


def test_a_decay_longer_than_the_run_begins_after_the_warm_up():
    rate = schedule("wsd", 1.0, 20, warmup_steps=5, decay_steps=100)
    np.testing.assert_allclose(rate(5), 1.0, rtol=16 * 2.0**-24)
    assert np.asarray(rate(6)) < 0.995


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_two_updates_are_adamws(clip_norm):
    """m and v by hand, in float64; the embedding alone does not decay."""
    config = s3.ModelConfig.from_hf(raw_config("one_layer"))
    params: Any = s3.SmolLM3(config, rngs=nnx.Rngs(0))
    rule = adamw(0.1, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2, clip_norm=clip_norm)
    state = rule.init(params)
    start, tree = jax.tree.flatten(params)
    decay = [0 if "embed" in jax.tree_util.keystr(path) else 0.2 for path, _ in jax.tree.leaves_with_path(params)]
    by_hand = [np.asarray(x, np.float64) for x in start]
    longest = max(x.size for x in start) + len(start)
    m, v, size, allowed = ([np.zeros(x.shape) for x in start] for _ in range(4))
    for step in (1, 2):
        random = np.random.RandomState(step)
        gradients = [random.standard_normal(x.shape).astype(np.float32) for x in start]
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with its int32 count
            updates, state = jax.jit(rule.update)(jax.tree.unflatten(tree, map(jnp.asarray, gradients)), state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in gradients))
        scale = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for i, gradient in enumerate(gradients):
            g = gradient.astype(np.float64) * scale
            m[i], v[i] = 0.8 * m[i] + 0.2 * g, 0.9 * v[i] + 0.1 * g**2
            adam = m[i] / (1 - 0.8**step) / (np.sqrt(v[i] / (1 - 0.9**step)) + 1e-3)
            by_hand[i] = by_hand[i] - 0.1 * (adam + decay[i] * by_hand[i])
            # m and v add up; 1 - 0.9 has ten times the rounding of 0.9, and of its powers; a root, a ratio: forty of
            # what m adds up. The norm of n numbers is off by n / 2 roundings, which beside epsilon alone counts.
            root = np.sqrt(v[i] / (1 - 0.9**step)) + 1e-3
            size[i] = 0.8 * size[i] + 0.2 * abs(g)
            clipped = longest / 2 * 1e-3 / root * abs(adam) if clip_norm else 0
            error = 40 * size[i] / (1 - 0.8**step) / root + clipped
            allowed[i] += (0.1 * error + 4 * abs(by_hand[i]) + abs(adam)) * rounding.FLOAT32
    for got, exact, error, before in zip(jax.tree.leaves(params), by_hand, allowed, start, strict=True):
        assert rounding.within(got, (exact, error)) <= 1
        # Not so without a hundredth of the decay of the weights.
        assert rounding.within(got - 0.1 * 0.2 * 0.01 * np.asarray(before), (exact, error)) > 1


def test_a_frozen_embedding_has_no_moments():
    config = s3.ModelConfig.from_hf(raw_config("one_layer"))
    model: Any = s3.SmolLM3(config, rngs=nnx.Rngs(0))
    trained, _ = split(model, r"layers\..*")
    rule = adamw(0.1)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = rule.update(jax.tree.map(jnp.zeros_like, trained), rule.init(trained), trained)
    assert jax.tree.structure(updates) == jax.tree.structure(trained)
    assert len(jax.tree.leaves(optax.tree.get(state, "mu"))) == len(jax.tree.leaves(trained)) == 9
