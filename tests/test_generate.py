import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_tokens, raw_config, tiny_checkpoint

import smollm3_jax as s3
from smollm3_jax.config import GenerationConfig
from smollm3_jax.errors import OptionError
from smollm3_jax.generate import sample

PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> s3.SmolLM3:
    return s3.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "m"))


def stop_at(model: s3.SmolLM3, *ids: int) -> None:
    model.generation_config = GenerationConfig(eos_token_id=ids)


def test_greedy_is_the_argmax_of_the_whole_forward(model):
    stop_at(model)
    (new,) = s3.generate(model, [PROMPTS[0]], s3.SamplingParams(max_new_tokens=12))
    row = PROMPTS[0] + new
    choices = jnp.argmax(model(jnp.array([row]))[0], axis=-1).tolist()
    assert new == choices[len(PROMPTS[0]) - 1 : -1]
    assert len(new) == 12


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_does_not_depend_on_its_neighbours(model, temperature):
    stop_at(model)
    together = s3.generate(model, PROMPTS, s3.SamplingParams(max_new_tokens=10, temperature=temperature, seed=3))
    for row, prompt in enumerate(PROMPTS):
        alone = s3.SamplingParams(max_new_tokens=10, temperature=temperature, seed=3 + row)
        assert s3.generate(model, [prompt], alone)[0] == together[row]


def test_stops_at_any_end_of_sequence_token_and_includes_it(model):
    stop_at(model)
    params = s3.SamplingParams(max_new_tokens=20)
    free = s3.generate(model, PROMPTS, params)
    # One id that ends the first row early, and one that ends the second.
    ends = {free[0][4], free[1][7]}
    stop_at(model, *ends)
    for row, whole in zip(s3.generate(model, PROMPTS, params), free, strict=True):
        first = next((i for i, token in enumerate(whole) if token in ends), len(whole) - 1)
        assert row == whole[: first + 1]


def test_the_seed_decides(model):
    stop_at(model)

    def draw(seed):
        return s3.generate(model, [PROMPTS[0]], s3.SamplingParams(max_new_tokens=16, temperature=1.5, seed=seed))

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)[0]) for seed in range(5)}) > 1


def test_top_k_1_and_tiny_top_p_are_greedy(model):
    stop_at(model)
    greedy = s3.generate(model, PROMPTS, s3.SamplingParams(max_new_tokens=8))
    for params in ({"top_k": 1}, {"top_p": 1e-6}):
        assert s3.generate(model, PROMPTS, s3.SamplingParams(max_new_tokens=8, temperature=2.0, **params)) == greedy


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.6), (1.3, 4, 0.8)]
)
def test_frequencies_are_the_definitions(temperature, top_k, top_p):
    """20,000 draws against probabilities worked out by hand in transformers' order."""
    logits = np.array([2.0, 1.0, 0.5, -0.3, 0.9, -2.0])
    scaled = logits / temperature
    order = np.argsort(-scaled)
    kept = order[: top_k or len(order)]
    weights = np.exp(scaled[kept]) / np.exp(scaled[kept]).sum()
    kept = kept[: int((np.cumsum(weights) - weights < top_p).sum())]
    expected = np.zeros(len(logits))
    expected[kept] = np.exp(scaled[kept]) / np.exp(scaled[kept]).sum()
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = jax.vmap(lambda key: sample(jnp.asarray(logits), key, temperature, jnp.array(top_k), jnp.array(top_p)))(
        keys
    )
    counts = np.bincount(np.asarray(drawn), minlength=len(logits)) / len(keys)
    # Five standard deviations; what is cut off is never drawn.
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected * (1 - expected) / len(keys))).all()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("seed", -1),
    ],
)
def test_bad_parameters_are_named(field, value):
    with pytest.raises(OptionError, match=field):
        s3.SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("prompt", "words"), [([], "prompt 1 is empty"), ([160], "160"), ([-1], "-1"), ([1] * 500, "context of 512")]
)
def test_bad_prompts_are_named(model, prompt, words):
    with pytest.raises(OptionError, match=words):
        s3.generate(model, [[1], prompt], s3.SamplingParams(max_new_tokens=16))


def test_no_prompts_give_nothing(model):
    assert s3.generate(model, []) == []


@pytest.mark.torch
@pytest.mark.parametrize("name", ["plain", "sliding", "yarn", "llama"])
def test_greedy_equals_transformers(name, tmp_path):
    import torch
    from parity import reference_model

    folder = tiny_checkpoint(tmp_path, name)
    reference, ours = reference_model(folder), s3.from_pretrained(folder)
    for length in (1, 40):
        prompt = random_tokens(raw_config(name), 1, length, seed=length)
        ids = torch.tensor(prompt, dtype=torch.long)
        expected = reference.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
        (new,) = s3.generate(ours, prompt.tolist(), s3.SamplingParams(max_new_tokens=24))
        assert new == expected[0, length:].tolist()
