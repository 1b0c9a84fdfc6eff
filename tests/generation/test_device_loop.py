"""The device's loop against a loop in Python over the whole model, one token at a time."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from tiny import random_tokens, raw_config, tiny_checkpoint

import smollm3_jax as s3
from smollm3_jax.generation.device_loop import MAX_STEPS, Slots, copy, decode, insert, prefill
from smollm3_jax.generation.sampling import MAX_STOP_IDS, SamplingParams, SamplingState
from smollm3_jax.kv_cache import empty_cache

VOCAB, CAPACITY, SLOTS = 160, 64, 3
PROMPTS = [random_tokens(raw_config("one_layer"), 1, length, seed=length)[0].tolist() for length in (9, 5, 12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> s3.SmolLM3:
    return s3.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "m", "one_layer"))


def slot(prompt, limit, stop=(), think=(-1, -1), budget=-1) -> Slots:
    """A greedy sequence's state, without the leading B."""
    fields: dict[str, Any] = dict(
        token=np.int32(prompt[-1]),
        active=np.bool_(True),
        generated=np.int32(0),
        limit=np.int32(limit),
        stop_ids=np.array([*stop, *[-1] * (MAX_STOP_IDS - len(stop))], np.int32),
        think_ids=np.array(think, np.int32),
        thinking=np.bool_(budget >= 0),
        think_left=np.int32(budget),
        choice=SamplingState.of(SamplingParams(logprobs=1), prompt, 0, VOCAB),
    )
    return Slots(**fields)


def started(model, prompts, given):
    """A cache and slots in which each prompt waits for its first token."""
    slots = jax.tree.map(lambda x: np.zeros((SLOTS, *np.shape(x)), np.asarray(x).dtype), given[0])
    cache = empty_cache(model.config, SLOTS, CAPACITY, model.dtype)
    for i, (prompt, one) in enumerate(zip(prompts, given, strict=True)):
        cache, _ = prefilled(model, cache, i, prompt[:-1])
        cache, slots = insert(cache, slots, np.int32(i), one, np.int32(len(prompt) - 1))
    return cache, slots


def prefilled(model, cache, at, tokens):
    """In pieces of four, with the log-probability of what follows each token."""
    said = []
    for start in range(0, len(tokens), 4):
        piece, following = tokens[start : start + 4], [*tokens[start + 1 :], 0][:4]
        padded, after = (np.array([*x, *[0] * (4 - len(x))], np.int32) for x in (piece, following))
        place = np.int32(at), np.int32(start)
        cache, found = prefill(model, cache, *place, padded[None], after, np.int32(len(piece)), logprobs=True)
        said += np.asarray(found.next)[: len(piece)].tolist()
    return cache, said[:-1]


@pytest.fixture(scope="module")
def by_hand(model):
    """(prompt, count) -> the likeliest tokens after it, each chosen by the model's logits of all before."""

    def loop(prompt, count):
        tokens = list(prompt)
        for _ in range(count):
            padded = np.zeros((1, 40), np.int32)
            padded[0, : len(tokens)] = tokens
            tokens.append(int(model(jnp.asarray(padded))[0, len(tokens) - 1].argmax()))
        return tokens[len(prompt) :]

    return loop


def off(model, row, said):
    """How far from the model's log-probabilities of a row's last tokens are those that were said, 1 being allowed."""

    def compute(model):
        found = jax.nn.log_softmax(model(jnp.asarray([row], jnp.int32))[0, :-1])
        return found[np.arange(len(row) - 1), np.array(row[1:])][-len(said) :]

    return rounding.within(said, rounding.shaken(compute, model)[0])


def test_every_slot_says_what_the_model_says_alone(model, by_hand):
    """Over two calls; each ends at its own limit, and -1 stands after it."""
    limits = [20, 3, 11]
    cache, slots = started(model, PROMPTS, [slot(p, n) for p, n in zip(PROMPTS, limits, strict=True)])
    found, logprobs = [[], [], []], [[], [], []]
    for steps in (7, MAX_STEPS):
        cache, slots, chosen = decode(model, cache, slots, np.int32(steps))
        tokens = np.asarray(chosen.tokens)
        assert (tokens[:, steps:] == -1).all()
        for i in range(SLOTS):
            count = int((tokens[i] >= 0).sum())
            assert (tokens[i, count:] == -1).all()
            found[i] += tokens[i, :count].tolist()
            logprobs[i] += np.asarray(chosen.logprobs)[i, :count].tolist()
            assert np.asarray(chosen.top_ids)[i, :count, 0].tolist() == tokens[i, :count].tolist()
    assert not np.asarray(slots.active).any()
    for i, (prompt, limit) in enumerate(zip(PROMPTS, limits, strict=True)):
        tokens = by_hand(prompt, limit)
        assert found[i] == tokens
        assert off(model, [*prompt, *tokens], logprobs[i]) <= 1 < off(model, [*prompt, 7, *tokens[1:]], logprobs[i])
        # The last token was chosen and not fed.
        assert int(cache.length[i]) == len(prompt) - 1 + limit
    np.testing.assert_array_equal(slots.generated, limits)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_token_is_written_into_the_cache_as_it_lies(tmp_path, dtype, rows):
    """XLA:CPU does not copy a layer's cache to write a token into it, neither in the loop nor around it."""
    model = s3.from_pretrained(tiny_checkpoint(tmp_path / "m", "one_layer"), dtype)
    one = slot(PROMPTS[0], 9)
    slots = jax.tree.map(lambda x: np.stack([x] * rows), one)
    cache = empty_cache(model.config, rows, CAPACITY, model.dtype)
    compiled = decode.lower(model, cache, slots, np.int32(MAX_STEPS)).compile().as_text() or ""
    of_layer = ",".join(str(size) for size in cache.layers[0].k.shape)
    assert re.search(rf"\[{of_layer}\]\S* parameter\(", compiled)
    assert not re.findall(rf"\[{of_layer}\]\S* copy\(.*", compiled)
    entry = compiled[compiled.index("\nENTRY") :]
    assert not re.findall(rf"= \w+\[{of_layer}\]\S* (?!parameter|get-tuple-element).*", entry)


def test_prefill_says_how_likely_the_prompt_is(model):
    prompt = PROMPTS[2]
    _, said = prefilled(model, empty_cache(model.config, SLOTS, CAPACITY, model.dtype), 1, prompt)
    assert off(model, prompt, said) <= 1 < off(model, [7, *prompt[1:]], said)


def test_a_stop_id_ends_a_slot_and_is_said(model, by_hand):
    tokens = by_hand(PROMPTS[0], 12)
    end = tokens[5]
    cache, slots = started(model, PROMPTS, [slot(p, 12, stop=[end]) for p in PROMPTS])
    _, slots, chosen = decode(model, cache, slots, np.int32(MAX_STEPS))
    count = tokens.index(end) + 1
    assert np.asarray(chosen.tokens)[0, : count + 1].tolist() == [*tokens[:count], -1]
    assert not slots.active[0]


def test_a_slot_that_is_freed_says_nothing_and_another_starts_from_a_copy(model, by_hand):
    cache, slots = started(model, PROMPTS, [slot(p, 20) for p in PROMPTS])
    nothing = dataclasses.replace(slot(PROMPTS[1], 0), active=np.bool_(False))
    cache, slots = insert(cache, slots, np.int32(1), nothing, np.int32(len(PROMPTS[1]) - 1))
    # The row that is copied must hold the prompt alone: slot 1, which did not decode.
    cache, slots, chosen = decode(model, cache, slots, np.int32(4))
    assert (np.asarray(chosen.tokens)[1] == -1).all()
    again = slot(PROMPTS[1], 6)
    cache = copy(cache, np.int32(1), np.int32(0))
    cache, slots = insert(cache, slots, np.int32(0), again, np.int32(len(PROMPTS[1]) - 1))
    _, slots, chosen = decode(model, cache, slots, np.int32(MAX_STEPS))
    assert np.asarray(chosen.tokens)[0, :7].tolist() == [*by_hand(PROMPTS[1], 6), -1]
    assert np.asarray(chosen.tokens)[2, :MAX_STEPS].tolist() == by_hand(PROMPTS[2], 20)[4:]


def test_thinking_is_closed_after_its_budget(model, by_hand):
    """The closing token is put there at the fourth place; the rest follows from it."""
    close = 77
    cache, slots = started(model, PROMPTS, [slot(p, 8, think=(-1, close), budget=3) for p in PROMPTS])
    _, slots, chosen = decode(model, cache, slots, np.int32(MAX_STEPS))
    for i, prompt in enumerate(PROMPTS):
        first = by_hand(prompt, 3)
        rest = by_hand([*prompt, *first, close], 4)
        assert close not in first and np.asarray(chosen.tokens)[i, :8].tolist() == [*first, close, *rest]
    assert not np.asarray(slots.thinking).any()
