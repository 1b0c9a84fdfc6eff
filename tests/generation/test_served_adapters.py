"""An engine whose slots use several adapters of one base: each answer is the one that its model gives alone."""

import functools
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from proxies import FULL
from tiny import letters, random_tokens, raw_config, tiny_adapter, tiny_checkpoint

import smollm3_jax as s3
from smollm3_jax.compile_cache import compilations
from smollm3_jax.errors import OptionError
from smollm3_jax.generation.engine import Engine
from smollm3_jax.generation.requests import Completion, Request, as_json, from_json
from smollm3_jax.weights.load import load, open_checkpoint
from smollm3_jax.weights.served import attach, read_served

RAW, LETTERS = raw_config("plain"), letters()
NAMES = (None, "a", "b")
SHAPE: dict[str, Any] = {"tokenizer": LETTERS, "slots": 2, "context": 100, "steps": 4, "piece_sizes": (16, 32)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "base", "plain")


@pytest.fixture(scope="module")
def adapters(folder):
    a = tiny_adapter(folder.parent / "a", folder)
    b = tiny_adapter(folder.parent / "b", folder, rank=2, targets=("q_proj", "o_proj", "up_proj"), seed=1)
    return read_served([str(a), f"{b}:0.5"], "base")


@pytest.fixture(scope="module")
def base(folder) -> s3.SmolLM3:
    return load(open_checkpoint(folder))


@pytest.fixture(scope="module")
def model(base, adapters) -> s3.SmolLM3:
    return attach(base, adapters)


@functools.cache
def request(kind: int) -> Request:
    """Greedy ones and draws, of three lengths, by turns of each model; some of several samples."""
    params = s3.SamplingParams(
        max_new_tokens=5 + 6 * (kind % 2),
        temperature=0.8 * (kind % 2),
        seed=kind,
        n=1 + (kind % 4 == 3),
        logprobs=1,
        prompt_logprobs=kind % 5 == 0,
        ignore_eos=True,
    )
    # All of a length begin alike, so that one model's beginnings would be found by another.
    tokens = random_tokens(RAW, 1, (1, 17, 70)[kind % 3])[0].tolist()
    return Request(tokens, params, adapter=NAMES[kind // 3 % 3])


def answers(engine: Engine, requests: list[Request]) -> dict[int, list[Completion]]:
    """By number, of each sample."""
    found = {engine.submit(one): [Completion.empty() for _ in range(one.params.n)] for one in requests}
    for delta in engine.drain():
        found[delta.request][delta.sample].add(delta)
    return found


@pytest.fixture(scope="module")
def alone(model):
    return functools.cache(lambda kind: answers(Engine(model, **SHAPE), [request(kind)])[0])


@pytest.mark.slow
@settings(max_examples=10)
@given(
    kinds=st.lists(st.integers(0, 17), min_size=2, max_size=7),
    prefix_tokens=st.sampled_from([0, 256]),
    cache_tokens=st.sampled_from([None, 128]),
)
def test_an_answer_is_the_one_its_model_gives_alone(model, alone, kinds, prefix_tokens, cache_tokens):
    """S22, S23: bit for bit, greedy and drawn, with kept beginnings, and where the youngest gives way."""
    engine = Engine(model, **SHAPE, prefix_tokens=prefix_tokens, cache_tokens=cache_tokens)
    found = answers(engine, [request(kind) for kind in kinds])
    assert list(found.values()) == [alone(kind) for kind in kinds]


def test_the_models_differ_and_the_base_is_as_without_adapters(model, base):
    """On a CPU without an adapter the bits are those of an engine that has none: what is added is exactly 0."""
    params = s3.SamplingParams(max_new_tokens=30, logprobs=2, temperature=1.0)
    same = Request(random_tokens(RAW, 1, 40)[0].tolist(), params)
    asked = [Request(same.prompt, same.params, adapter=name) for name in NAMES]
    found = answers(Engine(model, **SHAPE), asked)
    assert len({tuple(one.token_ids) for (one,) in found.values()}) == 3
    assert found[0] == answers(Engine(base, **SHAPE), [same])[0]


def test_beginnings_are_shared_within_a_model_alone(model):
    engine = Engine(model, **SHAPE, prefix_tokens=256)
    prompt, params = random_tokens(RAW, 1, 70)[0].tolist(), s3.SamplingParams(max_new_tokens=2, ignore_eos=True)
    cached = []
    for name in ("a", "b", None, "a", "b", None):
        engine.submit(Request(prompt, params, adapter=name, cache_salt="same"))
        cached.append(next(engine.drain()).cached_tokens)
        list(engine.drain())
    assert cached == [0, 0, 0, 64, 64, 64]


def test_an_adapter_that_is_not_there(model, base):
    one = Request([5], s3.SamplingParams(max_new_tokens=5), adapter="x")
    with pytest.raises(OptionError, match=r"adapter is 'x', and the model has no adapter of this name: it has a, b"):
        Engine(model, **SHAPE).submit(one)
    with pytest.raises(OptionError, match="no adapter of this name: it has none"):
        Engine(base, **SHAPE).submit(one)
    assert from_json(as_json(one)) == one  # as other processes of a job hear of it


def test_drafts_are_verified_by_the_own_model(model):
    prompt, greedy = [5, 6, 7, 8] * 8, s3.SamplingParams(max_new_tokens=20, temperature=0, ignore_eos=True)
    asked = [Request(prompt, greedy, adapter=name) for name in NAMES]
    more: list[dict[str, Any]] = [{"lookup": 4}, {}]
    drafted, plain = (answers(Engine(model, **SHAPE, **own), asked) for own in more)
    assert [one.token_ids for (one,) in drafted.values()] == [one.token_ids for (one,) in plain.values()]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor"), [pytest.param(1, 2, marks=FULL), pytest.param(2, 1, marks=FULL)])
def test_two_devices_say_what_one_does(folder, adapters, model, data, tensor):
    """By heads, and by slots; of no more than 12 programs nothing is compiled after the engine is warm."""
    asked = [request(kind) for kind in (2, 5, 8, 7, 4)]
    one = answers(Engine(model, **SHAPE), asked)
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(data, tensor), ("data", "tensor"))
    split = attach(load(open_checkpoint(folder), mesh=mesh, rules="serve_tp"), adapters)
    stacks = split.layers[0].q, split.layers[0].o
    assert stacks[0].b[...].sharding.is_equivalent_to(NamedSharding(mesh, P("tensor")), 4)
    assert stacks[1].a[...].sharding.is_equivalent_to(NamedSharding(mesh, P(None, None, "tensor")), 4)
    before = compilations()
    engine = Engine(split, **SHAPE, prefix_tokens=256)
    engine.warm_up()
    warm = compilations()
    assert sum(warm) - sum(before) <= 12 + 2  # and what makes the empty cache
    two = answers(engine, asked)
    assert compilations() == warm
    for number, samples in one.items():
        for mine, theirs in zip(samples, two[number], strict=True):
            assert mine.token_ids == theirs.token_ids
            logprobs, others = ([x.logprob for x in done.logprobs or ()] for done in (mine, theirs))
            np.testing.assert_allclose(logprobs, others, atol=1e-4)
