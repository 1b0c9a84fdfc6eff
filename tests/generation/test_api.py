import dataclasses
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from tiny import random_tokens, raw_config, tiny_checkpoint

import smollm3_jax as s3
from smollm3_jax.config import GenerationConfig
from smollm3_jax.errors import OptionError
from smollm3_jax.generation import engine as module
from smollm3_jax.generation import prompts
from smollm3_jax.generation.api import complete, stream
from smollm3_jax.generation.prompts import piece_sizes, pieces
from smollm3_jax.generation.requests import Request

PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> s3.SmolLM3:
    return s3.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "m"))


@pytest.fixture(autouse=True)
def endless(request):
    """No end-of-sequence token, unless a test sets some."""
    if "model" in request.fixturenames:
        stop_at(request.getfixturevalue("model"))


def stop_at(model: s3.SmolLM3, *ids: int) -> None:
    model.generation_config = GenerationConfig(eos_token_id=ids)


class Letters:
    """A tokenizer in which every id is a character; 1 and 2 open and close thinking, 3 and 4 are halves of one."""

    class backend:
        @staticmethod
        def token_to_id(text):
            return {"<think>": 1, "</think>": 2}.get(text)

    @staticmethod
    def special_id(text):
        return None

    @staticmethod
    def decode_stream(prompt):
        half = False

        def step(token):
            nonlocal half
            if token is None:
                half, piece = False, "�" if half else ""
                return piece
            piece = "" if token == 3 else "é" if half and token == 4 else chr(0x4E00 + token)
            half = token == 3
            return piece

        return step


LETTERS: Any = Letters()


def letters(tokens) -> str:
    return "".join(chr(0x4E00 + token) for token in tokens)


def test_greedy_is_the_argmax_of_the_whole_forward(model):
    (new,) = s3.generate(model, [PROMPTS[0]], s3.SamplingParams(max_new_tokens=40))
    row = PROMPTS[0] + new
    choices = jnp.argmax(model(jnp.array([row]))[0], axis=-1).tolist()
    assert new == choices[len(PROMPTS[0]) - 1 : -1]
    assert len(new) == 40


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_row_does_not_depend_on_its_neighbours(model, temperature):
    params = s3.SamplingParams(max_new_tokens=10, temperature=temperature, seed=3)
    together = s3.generate(model, PROMPTS, params)
    for row, prompt in enumerate(PROMPTS):
        assert s3.generate(model, [prompt], dataclasses.replace(params, seed=3 + row))[0] == together[row]


def test_slots_are_taken_again(model):
    """Five requests of all kinds through two slots, each as if it were alone."""
    requests = [
        Request(PROMPTS[0], s3.SamplingParams(max_new_tokens=25)),
        Request(PROMPTS[1], s3.SamplingParams(max_new_tokens=3, temperature=1.0, seed=4)),
        Request(PROMPTS[2], s3.SamplingParams(max_new_tokens=18, repetition_penalty=1.5)),
        Request(PROMPTS[1], s3.SamplingParams(max_new_tokens=1)),
        Request(PROMPTS[0], s3.SamplingParams(max_new_tokens=7, logit_bias={8: 100.0})),
    ]
    together = complete(model, requests, max_slots=2)
    assert [len(completion.token_ids) for completion in together] == [25, 3, 18, 1, 7]
    for request, completion in zip(requests, together, strict=True):
        assert complete(model, [request], max_slots=2)[0].token_ids == completion.token_ids
    assert together[4].token_ids == [8] * 7


def test_requests_are_read_as_slots_become_free(model):
    read = []

    def requests():
        for i in range(6):
            read.append(i)
            yield Request(PROMPTS[0], s3.SamplingParams(max_new_tokens=2))

    deltas = stream(model, requests(), max_slots=2, capacity=32)
    next(deltas)
    assert read == [0, 1]
    assert len(list(deltas)) == 5


def test_stops_at_any_end_of_sequence_token_and_includes_it(model):
    params = s3.SamplingParams(max_new_tokens=20)
    free = s3.generate(model, PROMPTS, params)
    # One id that ends the first row early, and one that ends the second.
    ends = {free[0][4], free[1][7]}
    stop_at(model, *ends)
    for row, whole in zip(s3.generate(model, PROMPTS, params), free, strict=True):
        first = next((i for i, token in enumerate(whole) if token in ends), len(whole) - 1)
        assert row == whole[: first + 1]
    assert s3.generate(model, PROMPTS, dataclasses.replace(params, ignore_eos=True)) == free
    stop_at(model)
    assert s3.generate(model, PROMPTS, dataclasses.replace(params, stop_token_ids=list(ends)))[0] == free[0][:5]


def test_the_seed_decides(model):
    def draw(seed):
        return s3.generate(model, [PROMPTS[0]], s3.SamplingParams(max_new_tokens=16, temperature=1.5, seed=seed))

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)[0]) for seed in range(5)}) > 1


def test_samples_of_one_prompt_share_its_prefill(model, monkeypatch):
    params = s3.SamplingParams(max_new_tokens=6, temperature=1.0, seed=2)
    alone = [s3.generate(model, [PROMPTS[2]], dataclasses.replace(params, seed=2 + i))[0] for i in range(3)]
    prefills, prefill = [], module.prefill
    monkeypatch.setattr(module, "prefill", lambda *args, **kwargs: prefills.append(1) or prefill(*args, **kwargs))
    assert s3.generate(model, [PROMPTS[2]], dataclasses.replace(params, n=3)) == alone
    assert len(prefills) == 1
    # With fewer slots than samples the rest follow when there is room.
    crowded = complete(model, [Request(PROMPTS[2], dataclasses.replace(params, n=3))], max_slots=2)
    assert [completion.token_ids for completion in crowded] == alone


def test_top_k_1_and_tiny_top_p_are_greedy(model):
    greedy = s3.generate(model, PROMPTS, s3.SamplingParams(max_new_tokens=8))
    one_is_left: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]
    for params in one_is_left:
        assert s3.generate(model, PROMPTS, s3.SamplingParams(max_new_tokens=8, temperature=2.0, **params)) == greedy


def test_log_probabilities_are_those_of_the_whole_forward(model):
    params = s3.SamplingParams(max_new_tokens=5, logprobs=3, prompt_logprobs=True, repetition_penalty=1.4)
    (completion,) = complete(model, [Request(PROMPTS[2], params)])
    row = np.array(PROMPTS[2] + completion.token_ids)
    ((expected, allowed),) = rounding.shaken(lambda m: jax.nn.log_softmax(m(jnp.array(row)[None])[0], axis=-1), model)

    def off(found, *at):
        return rounding.within(found, (expected[at], allowed[at]))

    start = len(PROMPTS[2]) - 1
    assert completion.logprobs is not None and completion.prompt_logprobs is not None
    assert off(completion.prompt_logprobs, np.arange(start), row[1 : start + 1]) <= 1
    assert off(completion.prompt_logprobs, np.arange(start), row[:start]) > 1
    for i, found in enumerate(completion.logprobs):
        assert found.token_id == completion.token_ids[i]
        assert off(found.logprob, start + i, found.token_id) <= 1
        likeliest = np.argsort(-expected[start + i])[:3]
        assert [token for token, _ in found.top] == likeliest.tolist()
        assert off([value for _, value in found.top], start + i, likeliest) <= 1
    (without,) = complete(model, [Request(PROMPTS[0], s3.SamplingParams(max_new_tokens=2))])
    assert without.logprobs is None and without.prompt_logprobs is None


def test_text_ends_before_a_stop_text_however_tokens_cut_it(model):
    """C9."""
    free = s3.generate(model, [PROMPTS[0]], s3.SamplingParams(max_new_tokens=30))[0]
    whole = letters(free)
    for start, length in ((4, 1), (14, 4), (0, 2), (26, 4)):
        stop = whole[start : start + length]
        end = whole.find(stop)
        for steps in (1, 16):
            params = s3.SamplingParams(max_new_tokens=30, stop=["never", stop])
            deltas = list(stream(model, [Request(PROMPTS[0], params)], tokenizer=LETTERS, steps=steps))
            assert "".join(delta.text for delta in deltas) == whole[:end]
            assert [token for delta in deltas for token in delta.token_ids] == free[: end + length]
            assert [delta.finish_reason for delta in deltas][-1] == "stop"
            assert all(delta.finish_reason is None for delta in deltas[:-1])


def test_what_could_begin_a_stop_text_comes_out_at_the_end(model):
    """C9."""
    free = s3.generate(model, [PROMPTS[0]], s3.SamplingParams(max_new_tokens=6))[0]
    params = s3.SamplingParams(max_new_tokens=6, stop=[letters(free) + "x"])
    deltas = list(stream(model, [Request(PROMPTS[0], params)], tokenizer=LETTERS, steps=2))
    assert [delta.text for delta in deltas] == ["", "", letters(free)]
    assert deltas[-1].finish_reason == "length"


def test_a_thinking_budget_closes_the_thought(model):
    close, bias = 2, {1: 1000.0}

    def think(budget, prompt, **params):
        params = s3.SamplingParams(max_new_tokens=8, max_thinking_tokens=budget, **params)
        return complete(model, [Request(prompt, params)], tokenizer=LETTERS)[0].token_ids

    # A model that always opens a thought: it is closed after the budget, and again when it opens the next.
    assert think(2, [5], logit_bias=bias) == [1, 1, 1, close, 1, close, 1, close]
    assert think(0, [5], logit_bias=bias)[:2] == [1, close]
    # The prompt may have opened it, and may have closed it again.
    free = s3.generate(model, [[5, 1]], s3.SamplingParams(max_new_tokens=8))[0]
    assert not {1, 2} & set(free)
    assert think(3, [5, 1])[:4] == [*free[:3], close]
    assert close not in think(3, [5, 1, 2])


def test_budgets_and_stop_texts_need_a_tokenizer(model):
    wanting: list[dict[str, Any]] = [{"max_thinking_tokens": 1}, {"stop": ["x"]}]
    for params in wanting:
        with pytest.raises(OptionError, match="tokenizer"):
            s3.generate(model, [[1]], s3.SamplingParams(**params))


def test_closing_the_stream_ends_it(model):
    deltas = stream(model, [Request(PROMPTS[0], s3.SamplingParams(max_new_tokens=100))], steps=2)
    assert len(next(deltas).token_ids) == 2
    assert isinstance(deltas, Generator)
    deltas.close()
    assert list(deltas) == []


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 100, 512, 513, 1500])
def test_pieces_cover_a_prompt_in_few_sizes(length):
    sizes = piece_sizes("cpu", 2048)
    assert sizes == (16, 32, 64, 128, 256, 512)
    found = list(pieces(length, sizes))
    assert [start for start, *_ in found] == [sum(count for _, count, *_ in found[:i]) for i in range(len(found))]
    assert sum(count for _, count, *_ in found) == length
    for start, count, padded in found:
        assert count <= padded < max(2 * count, 17) and padded in sizes and start % 512 == 0


def test_a_prompt_in_pieces_is_the_prompt_at_once(model, monkeypatch):
    prompt = random_tokens(raw_config("plain"), 1, 150)[0].tolist()
    params = s3.SamplingParams(max_new_tokens=6, prompt_logprobs=True)
    (whole,) = complete(model, [Request(prompt, params)])
    monkeypatch.setitem(prompts.CHUNK, "cpu", 32)
    (parts,) = complete(model, [Request(prompt, params)])
    assert parts.token_ids == whole.token_ids
    assert parts.prompt_logprobs and whole.prompt_logprobs

    def said(model):
        row = np.array(prompt)
        return jax.nn.log_softmax(model(jnp.array(row)[None])[0])[np.arange(149), row[1:]]

    # Both are: the definition's, as any way to compute it may say it.
    bounded = rounding.shaken(said, model)
    assert max(rounding.worst([x.prompt_logprobs], bounded)[0] for x in (parts, whole)) <= 1


def test_an_int8_cache_is_close(model):
    prompt = random_tokens(raw_config("plain"), 1, 60)[0].tolist()
    params = s3.SamplingParams(max_new_tokens=1, logprobs=0)
    (exact,) = complete(model, [Request(prompt, params)])
    (close,) = complete(model, [Request(prompt, params)], cache_dtype="int8")
    assert exact.logprobs is not None and close.logprobs is not None
    difference = abs(exact.logprobs[0].logprob - close.logprobs[0].logprob)
    assert 0 < difference < 0.02


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "prompt 1 is empty"), ([160], "160"), ([-1], "-1"), ([1] * 500, "500 tokens.*context of 512")],
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
