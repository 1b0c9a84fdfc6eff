import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm3_jax.errors import OptionError
from smollm3_jax.generation import sampling
from smollm3_jax.generation.sampling import MAX_BIASES, SamplingParams, SamplingState

VOCAB = 40
cut, choose = jax.jit(sampling.cut), jax.jit(sampling.choose)
log_probabilities = jax.jit(sampling.log_probabilities)


def choice_of(*slots: tuple[SamplingParams, list[int], list[int]]) -> SamplingState:
    """The device's state of slots, each given as parameters, prompt, and tokens generated so far."""
    rows = []
    for params, prompt, said in slots:
        one = SamplingState.of(params, prompt, 0, VOCAB)
        rows.append(dataclasses.replace(one, counts=np.bincount(said, minlength=VOCAB).astype(np.int32)))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def kept_by_hand(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Which ids stay, one row, from the definitions."""
    order = np.argsort(-logits, kind="stable")
    order = order[: top_k or len(order)]
    weights = np.exp(logits[order] - logits.max())
    weights /= weights.sum()
    order = order[: int((np.cumsum(weights) - weights < top_p).sum())] if top_p < 1 else order
    order = order[np.exp(logits[order] - logits.max()) >= min_p]
    return np.isin(np.arange(len(logits)), order)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    top_k=st.sampled_from([0, 1, 3, 39, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    scale=st.sampled_from([0.1, 3.0, 100.0]),
)
def test_cuts_are_the_definitions(seed, top_k, top_p, min_p, scale):
    logits = np.random.RandomState(seed).standard_normal((2, VOCAB)).astype(np.float32) * np.float32(scale)
    got = cut(jnp.asarray(logits), jnp.array([top_k, 0]), jnp.array([top_p, 1.0]), jnp.array([min_p, 0.0]))
    np.testing.assert_array_equal(np.isfinite(got)[0], kept_by_hand(logits[0].astype(np.float64), top_k, top_p, min_p))
    np.testing.assert_array_equal(got[1], logits[1])  # what asks for no cut is not touched
    np.testing.assert_array_equal(np.asarray(got)[0][np.isfinite(got)[0]], logits[0][np.isfinite(got)[0]])


def test_equal_logits_stay_together():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0]])
    kept = cut(logits, jnp.array([1]), jnp.array([1.0]), jnp.array([0.0]))
    assert np.isfinite(kept).tolist() == [[False, True, True, False]]


@pytest.mark.torch
def test_equals_transformers_processors():
    """Penalties, temperature and cuts against the classes behind transformers' `generate`."""
    import torch
    from transformers.generation import logits_process as hf

    random = np.random.RandomState(1)
    logits = random.standard_normal((1, VOCAB)).astype(np.float32) * 4
    prompt, said = [3, 5, 5, 9], [7, 3, 3, 12]
    params = SamplingParams(temperature=0.7, top_k=12, top_p=0.9, min_p=0.02, repetition_penalty=1.3)
    expected, ids = torch.from_numpy(logits), torch.LongTensor([prompt + said])
    for process in (
        hf.RepetitionPenaltyLogitsProcessor(1.3),
        hf.TemperatureLogitsWarper(0.7),
        hf.TopKLogitsWarper(12),
        hf.TopPLogitsWarper(0.9),
        hf.MinPLogitsWarper(0.02),
    ):
        expected = process(ids, expected)
    weights = torch.softmax(expected, dim=-1)[0].numpy()
    assert 2 < (weights > 0).sum() < 12
    choice = choice_of((params, prompt, said))
    assert_drawn_with(weights, jnp.asarray(logits), choice)


def assert_drawn_with(weights: np.ndarray, logits_1V: jax.Array, choice: SamplingState) -> None:
    """5,000 draws within five standard deviations; what has no weight never comes."""
    draws = 5_000
    many = jax.tree.map(lambda x: jnp.broadcast_to(x, (draws, *x.shape[1:])), choice)
    many = dataclasses.replace(many, seed=jnp.arange(draws, dtype=jnp.uint32))
    drawn = choose(jnp.broadcast_to(logits_1V, (draws, VOCAB)), many, jnp.zeros(draws, jnp.int32))
    found = np.bincount(np.asarray(drawn), minlength=VOCAB) / draws
    assert (np.abs(found - weights) <= 5 * np.sqrt(weights * (1 - weights) / draws)).all()


@pytest.mark.parametrize(
    "params", [{"temperature": 1.0}, {"temperature": 0.5, "top_k": 3}, {"temperature": 1.3, "top_p": 0.6}]
)
def test_frequencies_are_the_definitions(params):
    logits = np.random.RandomState(0).standard_normal(VOCAB) * 2
    params = SamplingParams(**params)
    scaled = logits / params.temperature
    weights = np.where(kept_by_hand(scaled, params.top_k, params.top_p, params.min_p), np.exp(scaled), 0)
    assert_drawn_with(weights / weights.sum(), jnp.asarray(logits, jnp.float32)[None], choice_of((params, [0], [])))


def test_a_tiny_temperature_is_greedy():
    logits = jnp.zeros((1, VOCAB)).at[0, 7].set(1.0)
    choice = choice_of((SamplingParams(temperature=1e-37), [0], []))
    assert int(choose(logits, choice, jnp.zeros(1, jnp.int32))[0]) == 7


def test_presence_frequency_and_bias_are_subtracted_and_added():
    logits = jnp.zeros((1, VOCAB)).at[0, 4].set(1.0).at[0, 6].set(0.9)
    greedy = SamplingParams()

    def first(said=(), **params) -> int:
        choice = choice_of((dataclasses.replace(greedy, **params), [6], list(said)))
        return int(choose(logits, choice, jnp.zeros(1, jnp.int32))[0])

    assert first() == 4
    assert first(said=[4], presence_penalty=0.05) == 4
    assert first(said=[4], presence_penalty=0.2) == 6
    assert first(said=[4, 4, 4], frequency_penalty=0.05) == 6
    assert first(said=[4], frequency_penalty=0.05) == 4
    assert first(logit_bias={9: 2.0, 4: 0.5}) == 9
    assert first(logit_bias={4: -0.2}) == 6
    assert first(said=[6], presence_penalty=-0.2) == 6


def test_slots_with_all_kinds_of_parameters_do_not_touch_each_other():
    logits = jnp.asarray(np.random.RandomState(2).standard_normal((1, VOCAB)), jnp.float32) * 3
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=1.5, seed=5),
        SamplingParams(temperature=1.0, top_p=0.5, seed=6),
        SamplingParams(repetition_penalty=2.0),
        SamplingParams(logit_bias={1: 50.0}),
    ]
    steps = jnp.array([0, 3, 4, 0, 0])
    many = choice_of(*((params, [2], [3]) for params in kinds))
    together = choose(jnp.broadcast_to(logits, (len(kinds), VOCAB)), many, steps)
    for i, params in enumerate(kinds):
        alone = choose(logits, choice_of((params, [2], [3])), steps[i : i + 1])
        assert int(alone[0]) == int(together[i])
    assert int(together[0]) == int(jnp.argmax(logits))
    assert int(together[4]) == 1


def forbidding(choice: SamplingState, *allowed: list[int] | None) -> SamplingState:
    """The same with grammars that have these ids alone next; None is no grammar."""
    rows = [np.zeros(VOCAB, bool) if ids is None else ~np.isin(np.arange(VOCAB), ids) for ids in allowed]
    constrained = jnp.array([ids is not None for ids in allowed])
    return dataclasses.replace(choice, constrained=constrained, forbidden=jnp.asarray(rows))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sets(st.integers(0, VOCAB - 1), min_size=1), st.booleans())
def test_grammars_hold_back_what_they_do_not_have(seed, allowed, draws):
    """The likeliest of the others is chosen, or it is drawn from them; whoever has no grammar does not notice."""
    logits = np.random.RandomState(seed).standard_normal((2, VOCAB)).astype(np.float32) * 3
    steps, ids = jnp.array([3, 4]), sorted(allowed)
    params = SamplingParams(temperature=float(draws), top_p=0.7, seed=seed)
    plain = choice_of((params, [2], [3]), (params, [2], [3]))
    got = choose(logits, forbidding(plain, ids, None), steps)
    assert int(got[1]) == int(choose(logits, plain, steps)[1])
    logits[0, [token for token in range(VOCAB) if token not in allowed]] = -np.inf
    assert int(got[0]) == int(choose(logits, plain, steps)[0]) and int(got[0]) in allowed


def test_a_grammar_is_kept_by_a_token_that_is_suppressed():
    """If it has no other."""
    logits = jnp.asarray(np.random.RandomState(4).standard_normal((1, VOCAB)), jnp.float32)
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, suppress_tokens=[7, 33])
        choice = choice_of((params, [2], []))
        assert int(choose(logits, forbidding(choice, [33]), jnp.zeros(1, jnp.int32))[0]) == 33
        assert int(choose(logits, forbidding(choice, [9, 33]), jnp.zeros(1, jnp.int32))[0]) == 9


def test_log_probabilities_are_the_definition():
    logits = jnp.asarray(np.random.RandomState(3).standard_normal((2, VOCAB)), jnp.float32)
    expected, allowed = rounding.log_softmax(logits)
    order = np.argsort(-expected[0])[:20]
    at = [0, 1], [4, 9]
    chosen, ids, values = log_probabilities(logits, jnp.array([4, 9]), jnp.array([3, -1]))
    assert (
        rounding.within(chosen, (expected[at], allowed[at]))
        <= 1
        < rounding.within(logits[at], (expected[at], allowed[at]))
    )
    np.testing.assert_array_equal(ids[0], order)
    assert rounding.within(values[0], (expected[0, order], allowed[0, order])) <= 1
    nothing = log_probabilities(logits, jnp.array([4, 9]), jnp.array([0, -1]))
    assert not np.asarray(nothing[1]).any()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("max_new_tokens", True),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("nan")),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
        ("logit_bias", {1: float("nan")}),
        ("logit_bias", [1]),
        ("logit_bias", dict.fromkeys(range(MAX_BIASES + 1), 1.0)),
        ("stop", "text"),
        ("stop", [""]),
        ("stop", ["end \udcff"]),
        ("stop_token_ids", list(range(17))),
        ("seed", -1),
        ("seed", 2**32),
        ("n", 0),
        ("n", 10**6),
        ("logprobs", -1),
        ("logprobs", 21),
        ("max_thinking_tokens", -1),
    ],
)
def test_what_is_out_of_range_is_named(field, value):
    with pytest.raises(OptionError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("logit_bias", {VOCAB: 1.0}), ("stop_token_ids", [-1]), ("logit_bias", {"a": 1.0})]
)
def test_ids_outside_the_vocabulary_are_named(field, value):
    with pytest.raises(OptionError, match=field):
        SamplingParams(**{field: value}).check_ids(VOCAB)
