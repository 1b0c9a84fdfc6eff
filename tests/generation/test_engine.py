"""The engine: what a request is answered is what it is answered alone, whatever else comes, waits and is cancelled."""

import functools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from proxies import FULL
from tiny import letters, random_tensors, random_tokens, raw_config, tiny_checkpoint, write_checkpoint

import smollm3_jax as s3
from smollm3_jax.config import GenerationConfig
from smollm3_jax.errors import OptionError
from smollm3_jax.generation import engine as module
from smollm3_jax.generation.device_loop import decode
from smollm3_jax.generation.engine import Engine
from smollm3_jax.generation.grammar import json_schema
from smollm3_jax.generation.places import Pages
from smollm3_jax.generation.requests import Completion, Delta, Request
from smollm3_jax.generation.sampling import SamplingParams

CONTEXT, SLOTS, PIECES = 100, 2, (16, 32)
LENGTHS = (1, 3, 17, 40, 70)  # in pieces of 32: none, one, one, two, three
LETTERS = letters()
END, OPEN, CLOSE = (LETTERS.backend.token_to_id(tag) for tag in ("<|im_end|>", "<think>", "</think>"))
GRAMMARS = [
    json_schema({"enum": ["abcdefgh", 12, [None]]}),
    json_schema({"type": "array", "items": {"type": "integer"}}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> s3.SmolLM3:
    # Of the last layer's keys nothing depends on what attention made of a prompt: with one layer no answer would.
    loaded = s3.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "m", "plain"))
    loaded.generation_config = GenerationConfig(eos_token_id=())
    return loaded


@functools.cache
def request(kind: int) -> Request:
    """Greedy ones and draws, of five lengths, some of several samples, with log-probabilities or grammars."""
    length = LENGTHS[kind % len(LENGTHS)]
    grammar = GRAMMARS[kind % len(GRAMMARS)] if kind % 3 == 1 else None
    params = s3.SamplingParams(
        max_new_tokens=5 + 7 * (kind % 3),
        temperature=0.8 * (kind % 2),
        seed=kind,
        n=1 + (kind % 4 == 3),
        logprobs=1,
        prompt_logprobs=kind % 3 == 0,
    )
    tokens = random_tokens(raw_config("one_layer"), 1, length, seed=kind)[0].tolist()
    return Request(tokens, params, ends=() if grammar is None else (END,), grammar=grammar)


def engine(model: s3.SmolLM3, prefill_tokens: int | None = 1, **options) -> Engine:
    return Engine(
        model,
        tokenizer=LETTERS,
        slots=SLOTS,
        context=CONTEXT,
        steps=4,
        prefill_tokens=prefill_tokens,
        piece_sizes=PIECES,
        **options,
    )


def collected(deltas: Iterable[Delta], into: dict | None = None) -> dict[tuple[int, int], Completion]:
    found = {} if into is None else into
    for delta in deltas:
        found.setdefault((delta.request, delta.sample), Completion.empty()).add(delta)
    return found


@pytest.fixture(scope="module")
def alone(model):
    @functools.cache
    def answers(kind: int) -> list[Completion]:
        own = engine(model)
        own.submit(request(kind))
        return list(collected(own.drain()).values())

    return answers


SUBMIT = st.tuples(st.just("submit"), st.integers(0, 11))
OTHER = st.tuples(st.sampled_from(["step", "cancel"]), st.integers(0, 5))
EVENTS = st.lists(SUBMIT | OTHER, min_size=1, max_size=14)


@settings(max_examples=20)
@given(
    events=EVENTS,
    prefill_tokens=st.sampled_from([1, 40, None]),
    prefix_tokens=st.sampled_from([0, 64, 256]),
    cache_tokens=st.sampled_from([None, 128, 160, 256]),
)
def test_an_answer_is_the_one_given_alone(model, alone, events, prefill_tokens, prefix_tokens, cache_tokens):
    """S15, S22, S23: bit for bit, log-probabilities too; beginnings of prompts are kept, dropped and used again, in
    rows or in pages, of which there may be no more than one sequence takes."""
    shared = engine(model, prefill_tokens, prefix_tokens=prefix_tokens, cache_tokens=cache_tokens)
    kinds, cancelled, found = {}, set(), {}
    for event, value in events:
        if event == "submit":
            kinds[shared.submit(request(value))] = value
        elif event == "step":
            collected(shared.step(), found)
        elif shared.cancel(value):
            cancelled.add(value)
    collected(shared.drain(), found)
    assert shared.is_idle and sorted(shared._free) == list(range(shared.slots)) and not shared.usage
    for number, kind in kinds.items():
        for sample, expected in enumerate(alone(kind)):
            got = found.get((number, sample), Completion.empty())
            if number in cancelled:
                assert got.token_ids == expected.token_ids[: len(got.token_ids)]
            else:
                assert got == expected, (number, sample)


@pytest.mark.parametrize("cache_dtype", [None, pytest.param("int8", marks=FULL)])
def test_what_gives_way_to_others_answers_the_same(model, cache_dtype):
    """Three pages beside those of the oldest: the younger ones begin again, some of them often."""
    budget = s3.SamplingParams(max_new_tokens=60, temperature=0.9, seed=3, n=2, logprobs=2, max_thinking_tokens=30)
    wanted = [
        Request(LETTERS.encode("abc <think>"), budget),
        Request([5] * 30, s3.SamplingParams(max_new_tokens=60, temperature=0, logprobs=1, prompt_logprobs=True)),
        Request([9, 8], s3.SamplingParams(max_new_tokens=70, seed=1, repetition_penalty=1.3, stop=("zq",))),
        Request(
            LETTERS.encode("x</think>\n"),
            s3.SamplingParams(max_new_tokens=80, seed=2, temperature=2.0),
            ends=(END,),
            grammar=json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 30}),
        ),
    ]
    options: dict[str, Any] = {"slots": 4, "context": CONTEXT, "steps": 4, "piece_sizes": PIECES}
    options |= {"tokenizer": LETTERS, "cache_dtype": cache_dtype, "prefix_tokens": 64}
    rows, pages = (Engine(model, **options, cache_tokens=tokens) for tokens in (None, 128))
    found = []
    for own in (rows, pages):
        for one in wanted:
            own.submit(one)
        found.append(collected(own.drain()))
    assert found[0].keys() == found[1].keys() and len(found[0]) == 5
    # What is gathered are the same numbers in the same places: on a CPU even the bits are.
    assert found[0] == found[1]
    assert pages.preemptions > 3 and rows.preemptions == 0
    assert pages.usage == 0 and isinstance(pages.prefixes, Pages)


def test_the_oldest_is_never_preempted(model):
    """So that something always gets on; and nothing that is younger begins before one that had to give way."""
    shared = engine(model, cache_tokens=128)
    numbers = [shared.submit(Request([7, kind], s3.SamplingParams(max_new_tokens=90))) for kind in range(4)]
    ends, patient = [], 0
    while not shared.is_idle:
        ended = [delta.request for delta in shared.step() if delta.finish_reason]
        # Who waits for pages is not about to begin: calls of decoding need not be short for it.
        patient += bool(
            shared._waiting and shared._free and not ended and not shared.is_filling and not shared.has_room
        )
        ends += ended
    assert ends == numbers and shared.preemptions >= 3 and patient > 3


def test_a_long_prompt_keeps_nobody_waiting(model, monkeypatch):
    """While something decodes there is at most one piece between two calls; without anything, all at once."""
    calls: list[str] = []
    for name in ("prefill", "decode"):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name, **kw: (calls.append(n), f(*a, **kw))[1])
    shared = engine(model)
    shared.submit(Request([5, 6, 7], s3.SamplingParams(max_new_tokens=30)))
    shared.step()
    shared.submit(request(4))
    for _ in range(4):
        shared.step()
    assert calls == ["prefill", "decode", *["prefill", "decode"] * 3, "decode"]
    calls.clear()
    whole = engine(model, None)
    whole.submit(Request([5, 6, 7], s3.SamplingParams(max_new_tokens=30)))
    whole.submit(request(4))
    whole.step()
    assert calls == ["prefill"] * 4 + ["decode"]


@pytest.mark.parametrize("cache_dtype", [None, pytest.param("int8", marks=FULL)])
def test_a_beginning_that_is_kept_is_not_computed_again(model, cache_dtype, monkeypatch):
    prompt = random_tokens(raw_config("one_layer"), 1, 80)[0].tolist()
    params = s3.SamplingParams(max_new_tokens=5, logprobs=2)
    others = [prompt, prompt[:70] + [5] * 8, prompt[:40], [5, *prompt[1:]], prompt[:64], prompt[:65]]

    def answers(prefix_tokens: int, salts: str = "aaaaaa", **options: Any) -> list[tuple[list[int], list]]:
        shared, found = engine(model, prefix_tokens=prefix_tokens, cache_dtype=cache_dtype, **options), []
        for tokens, salt in zip(others, salts, strict=True):
            shared.submit(Request(tokens, params, cache_salt=salt))
            deltas = list(shared.drain())
            assert [delta.cached_tokens is None for delta in deltas] == [False, *[True] * (len(deltas) - 1)]
            (completion,) = collected(deltas).values()
            found.append((deltas[0].cached_tokens, completion))
        assert (shared.prefixes.hits if shared.prefixes else 0) == sum(cached for cached, _ in found)
        return found

    kept, anew = answers(256), answers(0)
    assert answers(256, cache_tokens=256) == kept
    assert [completion for _, completion in kept] == [completion for _, completion in anew]
    assert [cached for cached, _ in kept] == [0, 64, 32, 0, 32, 64]
    assert [cached for cached, _ in anew] == [0] * 6
    # What one salt has kept no other finds.
    assert [cached for cached, _ in answers(256, "abcabc")] == [0, 0, 0, 0, 32, 32]
    assert [cached for cached, _ in answers(256, "abcabc", cache_tokens=512)] == [0, 0, 0, 0, 32, 32]


@pytest.mark.parametrize("cache_tokens", [None, 256])
def test_cancelling_gives_slots_back(model, cache_tokens):
    shared = engine(model, cache_tokens=cache_tokens)
    numbers = [shared.submit(request(kind)) for kind in (3, 4, 9)]  # two samples, a long prompt, one that waits
    shared.step()
    assert all(shared.cancel(number) for number in numbers)
    assert shared.is_idle and shared.has_room and not shared.cancel(numbers[0]) and not shared.cancel(99)
    assert not shared.usage
    assert shared.step() == []


def test_a_request_that_cannot_run_is_refused_at_once(model):
    shared = engine(model)
    with pytest.raises(
        OptionError, match="line 7 has 90 tokens; with max_new_tokens 20 that exceeds the room of a slot"
    ):
        shared.submit(Request([5] * 90, s3.SamplingParams(max_new_tokens=20)), "line 7")
    assert shared.is_idle


def test_drafts_beside_a_prompt_that_goes_in(model):
    """Calls that verify drafts leave a prompt alone that is half in its slot."""
    prompt = [5, 6, 7, 8] * 10
    greedy = s3.SamplingParams(max_new_tokens=20, temperature=0)
    requests = [Request(prompt[:9], greedy), Request(prompt * 2, s3.SamplingParams(max_new_tokens=10, temperature=0))]
    shared = engine(model, lookup=4)
    shared.submit(requests[0])
    found = collected(shared.step())
    shared.submit(requests[1])
    collected(shared.drain(), found)
    for number, one in enumerate(requests):
        own = engine(model, lookup=4)
        own.submit(one)
        (expected,) = collected(own.drain()).values()
        assert np.array_equal(found[number, 0].token_ids, expected.token_ids)


def answered(model: s3.SmolLM3, prompt: str, schema: dict, **params: Any) -> Completion:
    own = engine(model)
    settings = s3.SamplingParams(**{"max_new_tokens": 40, **params})
    own.submit(Request(LETTERS.encode(prompt), settings, ends=(END,), grammar=json_schema(schema)))
    (found,) = collected(own.drain()).values()
    return found


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_an_answer_keeps_to_its_grammar_and_ends(model, temperature):
    """With the model's own log-probabilities, of tokens that it would not have chosen."""
    schema = {"enum": ["abc", "abd", [1, 2]]}
    found = answered(model, "x</think>\n", schema, temperature=temperature, logprobs=1, max_new_tokens=90)
    assert found.text in ('"abc"', '"abd"') or json.loads(found.text) == [1, 2]
    assert found.finish_reason == "stop" and found.token_ids[-1] == END and found.logprobs is not None
    assert (
        all(one.logprob <= one.top[0][1] for one in found.logprobs)
        and found.logprobs[0].token_id != found.logprobs[0].top[0][0]
    )


def test_what_does_not_fit_is_cut_off(model):
    found = answered(model, "</think>\n", {"enum": ["a" * 60]}, max_new_tokens=9)
    assert (found.text, found.finish_reason) == ('"aaaaaaaa', "length")


def test_a_grammar_that_grows_too_large_on_the_way_is_an_error(model):
    many = {"type": "object", "properties": {f"field_{i}": {} for i in range(600)}}
    schema = {"type": "object", "properties": {"a": many}, "required": ["a"], "additionalProperties": False}
    bias = {token: 50.0 for token in LETTERS.encode('{"a":')}  # and no line break
    found = answered(model, "</think>\n", schema, logit_bias=bias)
    assert found.text.startswith('{"a":') and found.finish_reason == "error"


@pytest.mark.parametrize("prompt", ["Hm<think>", "Hm"])
def test_thinking_comes_before_the_grammar(model, prompt):
    """Inside it no end is chosen, though it is likelier than all else; the budget closes it."""
    bias = {END: 1000.0, CLOSE: -1000.0} | (
        {OPEN: 50.0} if prompt == "Hm" else {}
    )  # which lets the answer open it by itself
    found = answered(model, prompt, {"enum": [7]}, max_thinking_tokens=5, logit_bias=bias)
    opened = [OPEN] * (prompt == "Hm")
    thought = found.token_ids[len(opened) : len(opened) + 5]
    assert found.token_ids[: len(opened)] == opened and END not in thought and CLOSE not in thought
    rest = found.token_ids[len(opened) + 5 :]
    assert rest[0] == CLOSE and LETTERS.decode(rest[1:]).lstrip("\n") == "7" and rest[-1] == END
    assert found.finish_reason == "stop"


def test_nothing_is_compiled_for_grammars_but_their_mask(model):
    schema = {"enum": ["abc"]}
    answered(model, "</think>", schema)
    before = decode._cache_size()
    shared = engine(model)
    shared.submit(request(0))
    shared.step()
    shared.submit(request(4))
    collected(shared.drain())
    assert decode._cache_size() == before


def test_grammars_that_cannot_be_kept_are_refused_at_once(model):
    grammar, greedy = json_schema({}), s3.SamplingParams(max_new_tokens=5)
    one = Request([5], greedy, ends=(END,), grammar=grammar)
    with pytest.raises(OptionError, match=r"prompt lookup .* or grammar"):
        engine(model, lookup=4).submit(one)
    with pytest.raises(OptionError, match="needs a token to end with"):
        engine(model).submit(Request([5], greedy, grammar=grammar))
    with pytest.raises(OptionError, match="the grammar cannot be kept"):
        engine(model).submit(Request([5], greedy, ends=(END,), grammar="start: nothing"))
    with pytest.raises(OptionError, match="a grammar needs a tokenizer"):
        Engine(model, slots=SLOTS, context=CONTEXT).submit(one)


@pytest.mark.parametrize("options", [{}, {"piece_sizes": (16, 32), "prefix_tokens": 64}, {"cache_dtype": "int8"}])
def test_numbers_that_are_none_end_their_own_answer_alone(tmp_path, options):
    """S16: whoever decodes beside it, and has its slot and its places in the cache after it, is none the wiser."""
    raw = raw_config("untied")
    tensors = random_tensors(raw)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.embed_tokens.weight"][9] = np.nan
    engine = Engine(
        s3.from_pretrained(write_checkpoint(tmp_path / "model", raw, tensors)), slots=2, context=128, **options
    )

    def answers(*prompts):
        numbers = [engine.submit(Request(prompt, SamplingParams(max_new_tokens=8, logprobs=0))) for prompt in prompts]
        found = {number: Completion.empty() for number in numbers}
        for delta in engine.drain():
            found[delta.request].add(delta)
        return [found[number] for number in numbers]

    sound = [[5, 6, 7] * 4, [8, 4]]
    alone = answers(*sound)
    wrong, beside = answers([5, 9, 7] * 20, sound[0])
    assert (wrong.finish_reason, wrong.token_ids, wrong.text) == ("error", [], "") and beside == alone[0]
    assert answers(*sound) == alone
