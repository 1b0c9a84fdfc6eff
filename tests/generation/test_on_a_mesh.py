"""Four devices say what one does: prompts in several pieces, samples, a cache split by heads or context."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from flax import nnx
from jax.sharding import Mesh
from proxies import FULL
from tiny import letters, raw_config

import smollm3_jax as s3
from sharding.mesh import make_mesh
from sharding.rules import STRATEGIES, Sharding
from smollm3_jax import rope
from smollm3_jax.compile_cache import compilations
from smollm3_jax.generation import prompts
from smollm3_jax.generation.api import complete
from smollm3_jax.generation.device_loop import decode
from smollm3_jax.generation.engine import Engine
from smollm3_jax.generation.grammar import json_schema
from smollm3_jax.generation.requests import Completion, Request
from smollm3_jax.kv_cache import empty_cache
from smollm3_jax.model import with_sharding

SMALL = {"num_key_value_heads": 4, "num_hidden_layers": 2, "no_rope_layers": [1, 0]}
CONFIG = s3.ModelConfig.from_hf(raw_config("untied") | SMALL)
PROMPTS = np.random.RandomState(0).randint(3, 160, (2, 70))
COMMON = {"max_new_tokens": 12, "logprobs": 0, "ignore_eos": True}
LETTERS = letters()
END = LETTERS.backend.token_to_id("<|im_end|>")
REQUESTS = [
    Request(PROMPTS[0].tolist(), s3.SamplingParams(**COMMON, n=2, temperature=0.7, top_p=0.9, seed=7)),
    Request(PROMPTS[1][:33].tolist(), s3.SamplingParams(**COMMON, repetition_penalty=1.1)),
    Request(
        LETTERS.encode("Which?</think>\n"),
        s3.SamplingParams(max_new_tokens=12, logprobs=0, temperature=1.0),
        ends=(END,),
        grammar=json_schema({"enum": ["abc", "xyz"]}),
    ),
]


def new_model():
    model = s3.SmolLM3(CONFIG, rngs=nnx.Rngs(0))
    assert isinstance(model.head, nnx.Param)
    model.head.set_value(model.head[...] * 20)  # neither all tokens alike nor one of them certain
    return model


def on_mesh(model, sharding):
    def put(param):
        value = param[...]
        return param.replace(jax.device_put(value, sharding.named("", param.get_metadata("axes"), value.shape)))

    return with_sharding(jax.tree.map(put, model, is_leaf=lambda x: isinstance(x, nnx.Variable)), sharding)


def outcome(model, cache_dtype):
    """Tokens, their log-probabilities, and logits: in pieces with a cache, then of the whole."""
    tokens = jnp.asarray(PROMPTS[:, :24])
    programs = decode._cache_size()
    done = complete(model, REQUESTS, tokenizer=LETTERS, cache_dtype=cache_dtype)
    assert decode._cache_size() <= programs + 1 and done[-1].text in ('"abc"', '"xyz"')
    logits, cache = [], empty_cache(CONFIG, 2, 32, jnp.dtype("float32"), model.sharding)
    for start, end in ((0, 13), (13, 14), (14, 20)):
        some, cache = model(tokens[:, start:end], cache=cache)
        logits.append(some)
    said = [token for completion in done for token in completion.token_ids]
    return np.array(said), np.array([x.logprob for c in done for x in c.logprobs or ()]), *logits, model(tokens)


@pytest.mark.slow
def test_heads_of_pages_lie_on_several_devices():
    """As rows have it, preempted or not; nothing is compiled after the engine is warm."""
    mesh = Mesh(np.array(jax.devices()[:2]).reshape(1, 2), ("data", "tensor"))
    model, found = on_mesh(new_model(), Sharding.of(mesh, "serve_tp")), []
    # Two samples that share a page, and take two more each, of four.
    long = s3.SamplingParams(max_new_tokens=60, logprobs=0, ignore_eos=True, n=2, temperature=0.7, seed=3)
    growing = Request(PROMPTS[1][:33].tolist(), long)
    for cache_tokens in (None, 128):
        engine = Engine(
            model,
            tokenizer=LETTERS,
            slots=4,
            context=100,
            piece_sizes=(16, 32),
            prefix_tokens=64,
            cache_tokens=cache_tokens,
        )
        engine.warm_up()
        warm = compilations()
        for request in [*REQUESTS, *REQUESTS[:2], growing]:
            engine.submit(request)
        answers: dict[tuple[int, int], Completion] = {}
        for delta in engine.drain():
            answers.setdefault((delta.request, delta.sample), Completion.empty()).add(delta)
        assert compilations() == warm and engine.prefixes is not None and engine.prefixes.hits
        assert (engine.preemptions > 0) == (cache_tokens is not None)
        found.append(answers)
    assert found[0] == found[1] and len(found[0]) == 9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache_dtype", "rules"),
    [
        (None, "serve_tp"),
        (None, "serve_tp_long"),
        ("int8", "serve_tp_long"),
        (None, "serve_cp"),
        pytest.param("int8", "serve_cp", marks=FULL),
    ],
)
def test_four_devices_say_what_one_does(cache_dtype, rules, monkeypatch):
    monkeypatch.setattr(prompts, "CHUNK", {"cpu": 16})  # prompts in several pieces
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("context" if rules == "serve_cp" else "data", "tensor"))
    model = new_model()
    bounded = rounding.shaken(functools.partial(outcome, cache_dtype=cache_dtype), model)
    # What is drawn is not so near to another token that rounding chooses.
    (tokens, same), *_ = bounded
    assert same.max() < 0.01 and len(set(tokens)) > 8
    if rules == "serve_cp":  # in the same pieces: what is before one int8 rounds
        monkeypatch.setattr(prompts, "CHUNK", {"cpu": 8})
        monkeypatch.setattr(prompts, "MIN_PIECE", 8)
    assert max(rounding.worst(outcome(on_mesh(model, Sharding.of(mesh, rules)), cache_dtype), bounded)) <= 1


def said_of(model, monkeypatch, parts=1):
    """Of a prompt in three pieces, of which the last is padded: each token's log-probability; then greedy tokens, and
    theirs."""
    monkeypatch.setattr(prompts, "CHUNK", {"cpu": 16 // parts})
    monkeypatch.setattr(prompts, "MIN_PIECE", 16 // parts)
    params = s3.SamplingParams(max_new_tokens=6, temperature=0, ignore_eos=True, logprobs=0, prompt_logprobs=True)
    (done,) = complete(model, [Request(PROMPTS[0, :40].tolist(), params)])
    return np.array(done.token_ids), np.array(
        [*(done.prompt_logprobs or ()), *(x.logprob for x in done.logprobs or ())]
    )


@pytest.mark.slow
def test_prompts_split_over_eight_devices_say_what_one_does(monkeypatch):
    """Two tokens of a piece on each, which are not neighbours; every other layer has no positions."""
    model = new_model()
    bounded = rounding.shaken(functools.partial(said_of, monkeypatch=monkeypatch), model)
    (tokens, same), (logprobs, _) = bounded
    assert same.max() < 0.01 and len(set(tokens)) > 2 and len(logprobs) == 39 + 6
    split = on_mesh(model, Sharding.of(make_mesh({"context": 8}), "serve_cp"))
    assert max(rounding.worst(said_of(split, monkeypatch, 8), bounded)) <= 1
    # Positions in the order in which tokens came, not in that in which they lie; by rules that nothing is compiled for.
    cos_sin = rope.cos_sin
    monkeypatch.setattr(rope, "cos_sin", lambda config, positions: cos_sin(config, jnp.sort(positions, axis=-1)))
    others = Sharding.of(make_mesh({"context": 8}), {**STRATEGIES["serve_cp"], "rank": None})
    assert max(rounding.worst(said_of(with_sharding(split, others), monkeypatch, 8), bounded)) > 1
