import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from parity import rope_rounding
from tiny import CONFIGS, raw_config

from smollm3_jax.config import ModelConfig
from smollm3_jax.rope import cos_sin, inverse_frequencies, rotate


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("theta", [10000.0, 2000000.0, 5000000.0])
def test_frequencies_equal_transformers(name, theta):
    """To the rounding of numpy's and torch's float32."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    raw: dict[str, Any] = raw_config(name) | {"hidden_size": 1024, "head_dim": 128}
    raw |= (
        {"rope_theta": theta}
        if "rope_theta" in raw
        else {"rope_parameters": raw["rope_parameters"] | {"rope_theta": theta}}
    )
    config = ModelConfig.from_hf(raw)
    classes = {"smollm3": transformers.SmolLM3Config, "llama": transformers.LlamaConfig}
    theirs = classes[config.model_type](**config.to_hf())
    frequencies, factor = inverse_frequencies(config)
    if config.rope_scaling is None:
        from transformers.models.smollm3.modeling_smollm3 import SmolLM3RotaryEmbedding

        expected, expected_factor = SmolLM3RotaryEmbedding.compute_default_rope_parameters(theirs)
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[config.rope_scaling.rope_type](theirs)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, expected.numpy(), rtol=rope_rounding(config.rope_scaling))
    assert factor == pytest.approx(expected_factor, rel=1e-12)


def test_yarn_of_the_model_card(release):
    """Figures computed from the formulas by hand: ramp from pair 24 to 39, attention factor 0.1 ln 2 + 1."""
    raw = json.loads((release / "config.json").read_text())
    plain, _ = inverse_frequencies(ModelConfig.from_hf(raw))
    raw |= {"rope_scaling": {"factor": 2.0, "original_max_position_embeddings": 65536, "type": "yarn"}}
    stretched, factor = inverse_frequencies(ModelConfig.from_hf(raw))
    assert factor == pytest.approx(1.0693147, abs=1e-7)
    np.testing.assert_array_equal(stretched[:25], plain[:25])
    # Of the same powers; halving is exact, and each side takes at most three roundings more.
    np.testing.assert_allclose(stretched[39:], plain[39:] / 2, rtol=6 * 2.0**-24)
    assert (stretched[25:39] < plain[25:39]).all() and (stretched[25:39] > plain[25:39] / 2).all()


def test_nope_is_the_exact_identity_and_rope_is_not():
    config = ModelConfig.from_hf(raw_config("yarn"))
    positions = jnp.arange(7)[None]
    cos, sin = cos_sin(config, positions)
    x = jnp.asarray(np.random.RandomState(0).standard_normal((1, 7, 2, config.head_dim)), jnp.float32)
    np.testing.assert_array_equal(rotate(x, cos, sin, jnp.array(False)), x)
    assert np.abs(np.asarray(rotate(x, cos, sin, jnp.array(True)) - x)).max() > 0.1


def test_only_differences_of_positions_matter():
    config = ModelConfig.from_hf(raw_config("plain"))
    random = np.random.RandomState(1)
    q, k = (jnp.asarray(random.standard_normal((1, 1, 1, config.head_dim)), jnp.float32) for _ in range(2))

    def score(at_q, at_k):
        turned = [rotate(x, *cos_sin(config, jnp.array([[at]])), jnp.array(True)) for x, at in ((q, at_q), (k, at_k))]
        return float((turned[0] * turned[1]).sum())

    # An angle, of up to its position, is rounded once; its cosine and sine are within 4 roundings, and 3 more turn a
    # pair by them. A score is the sum of one product for each number. All of it beside the pairs' lengths.
    lengths = (np.linalg.norm(np.asarray(x).reshape(2, -1), axis=0) for x in (q, k))
    allowed = sum(at + 4 + 3 for at in (5, 2, 105, 102)) + 2 * 2 * config.head_dim
    allowed *= 2.0**-24 * np.prod(list(lengths), axis=0).sum()
    assert abs(score(5, 2) - score(105, 102)) <= allowed < abs(score(5, 2) - score(5, 3)) / 100
