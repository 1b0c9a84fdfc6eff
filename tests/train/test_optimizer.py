import jax
import numpy as np
import optax
import pytest
import tiny
from flax import nnx

import smollm3_jax as s3
from smollm3_jax.train.optimizer import adamw, schedule
from smollm3_jax.train.state import split

PEAK, STEPS = 2e-3, 20


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("constant", {0: 0, 2: 0.5, 4: 1, 19: 1}),
        ("wsd", {0: 0, 4: 1, 15: 1, 18: 0.55, 20: 0.1}),
        ("cosine", {0: 0, 4: 1, 12: 0.55, 20: 0.1}),
        ("linear", {0: 0, 4: 1, 12: 0.55, 20: 0.1}),
    ],
)
def test_a_schedule_by_the_updates_before(kind, wanted):
    """Shares of the peak: four steps of warm-up, and for wsd the last four to fall in."""
    rate = schedule(kind, PEAK, STEPS, warmup_steps=4, decay_steps=4, end=0.1)
    for step, share in wanted.items():
        np.testing.assert_allclose(rate(step), share * PEAK, rtol=1e-6, atol=1e-12, err_msg=str(step))


def model_of(value):
    model = s3.SmolLM3(s3.ModelConfig.from_hf(tiny.raw_config("one_layer")), rngs=nnx.Rngs(0))
    return jax.tree.map(lambda x: jax.numpy.full_like(x, value), model)


def test_all_but_the_embedding_decays():
    params, nothing = model_of(2.0), model_of(0.0)
    rule = adamw(0.1, weight_decay=0.5)
    updates, _ = rule.update(nothing, rule.init(params), params)
    updated = optax.apply_updates(params, updates)
    assert np.all(updated.embed[...] == 2.0)
    np.testing.assert_allclose(updated.layers.down[...], 2.0 * (1 - 0.1 * 0.5), rtol=1e-6)
    np.testing.assert_allclose(updated.norm[...], 2.0 * (1 - 0.1 * 0.5), rtol=1e-6)


def test_gradients_are_clipped_by_their_norm_all_together():
    params, gradients = model_of(1.0), model_of(10.0)
    clipped, whole = adamw(1.0, clip_norm=1.0), adamw(1.0, clip_norm=0.0)
    first = optax.tree.get(clipped.update(gradients, clipped.init(params), params)[1], "mu")
    other = optax.tree.get(whole.update(gradients, whole.init(params), params)[1], "mu")
    # The first moment is 1 - b1 of the gradient.
    np.testing.assert_allclose(optax.tree.norm(first), 0.1, rtol=1e-5)
    np.testing.assert_allclose(other.norm[...], 1.0, rtol=1e-5)


def test_a_frozen_embedding_is_no_matter():
    trained, _ = split(model_of(2.0), r"layers\..*")
    rule = adamw(0.1)
    updates, _ = rule.update(jax.tree.map(jax.numpy.zeros_like, trained), rule.init(trained), trained)
    assert jax.tree.structure(updates) == jax.tree.structure(trained)
