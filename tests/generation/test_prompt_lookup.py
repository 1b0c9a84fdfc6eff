import logging

import jax.numpy as jnp
import pytest
from tiny import tiny_checkpoint

import smollm3_jax as s3
from smollm3_jax.config import GenerationConfig
from smollm3_jax.errors import OptionError
from smollm3_jax.generation.api import complete
from smollm3_jax.generation.prompt_lookup import _draft
from smollm3_jax.generation.requests import Request

# A tiny random model soon repeats itself, so its own text is drafted from.
PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 3, 4, 5, 6, 7, 3, 4]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> s3.SmolLM3:
    model = s3.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "m"))
    model.generation_config = GenerationConfig(eos_token_id=())
    return model


@pytest.mark.parametrize("limits", [(90, 90, 90), (1, 2, 17)])
def test_the_text_is_that_of_greedy_decoding(model, limits, caplog):
    requests = [
        Request(prompt, s3.SamplingParams(max_new_tokens=limit)) for prompt, limit in zip(PROMPTS, limits, strict=True)
    ]
    expected = [completion.token_ids for completion in complete(model, requests)]
    with caplog.at_level(logging.INFO, logger="smollm3_jax.generation.api"):
        found = complete(model, requests, lookup=6)
    assert [completion.token_ids for completion in found] == expected
    assert [completion.finish_reason for completion in found] == ["length"] * 3
    if limits[0] == 90:
        (line,) = [record for record in caplog.records if "drafted" in record.msg]
        accepted, drafted, _ = line.args
        assert 0 < accepted <= drafted


def test_ends_with_the_first_stop_token_inside_a_draft(model):
    (free,) = s3.generate(model, [PROMPTS[2]], s3.SamplingParams(max_new_tokens=60))
    for at in (3, 20, 41):
        params = s3.SamplingParams(max_new_tokens=60, stop_token_ids=[free[at]])
        (found,) = complete(model, [Request(PROMPTS[2], params)], lookup=6)
        assert found.token_ids == free[: free.index(free[at]) + 1]
        assert found.finish_reason == "stop"


@pytest.mark.parametrize(
    ("history", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], [4, 5, 1, 2]),
        ([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], [8, 1, 2, 3]),  # the latest
        ([7, 7, 7, 7], [7, -1, -1, -1]),  # it may reach into itself, but not past what is known
        ([1, 2, 3, 4], [-1] * 4),
        ([1, 2], [-1] * 4),
        ([1], [-1] * 4),
    ],
)
def test_drafts_are_what_followed_last_time(history, expected):
    padded = jnp.array(history + [-1] * (16 - len(history)))
    assert _draft(padded, jnp.array(len(history) - 1), 4).tolist() == expected


@pytest.mark.parametrize(
    "params", [{"temperature": 0.5}, {"repetition_penalty": 1.2}, {"logprobs": 2}, {"logit_bias": {1: 1.0}}]
)
def test_what_cannot_be_verified_is_refused(model, params):
    with pytest.raises(OptionError, match="prompt lookup"):
        complete(model, [Request([1], s3.SamplingParams(**params))], lookup=4)


@pytest.mark.parametrize("lookup", [-1, 65])
def test_a_draft_of_absurd_length_is_refused(model, lookup):
    with pytest.raises(OptionError, match="lookup is"):
        complete(model, [Request([1])], lookup=lookup)
