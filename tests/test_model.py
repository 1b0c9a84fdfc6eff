"""Parity with transformers, of logits and gradients; and that errors of the known kinds would be seen."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import rounding
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from parity import as_good_in_bfloat16, bound, reference_logits, reference_model
from proxies import FULL
from tiny import (
    BASE,
    CONFIGS,
    LLAMA3,
    SAME,
    YARN,
    random_tensors,
    random_tokens,
    raw_config,
    tiny_checkpoint,
    without_nulls,
    write_checkpoint,
)

import smollm3_jax as s3
from sharding.mesh import make_mesh
from sharding.rules import Sharding
from smollm3_jax.kv_cache import empty_cache
from smollm3_jax.model import where_it_lies, with_sharding
from smollm3_jax.weights.key_map import hf_tensors, parameters
from smollm3_jax.weights.save import tensors_of

GOLDENS = Path(__file__).parent / "goldens" / "logits.npz"
LENGTH, STORED = 300, 8  # goldens hold the last positions of a long row: past YaRN's original length

# Compiling is what takes the time here, so that one batch asks for everything: a whole row, a short one
# with padding on the right, and one with padding on the left.
SHORT, LEFT = 17, 40
INDEX = np.arange(LENGTH)
REAL = np.stack([INDEX < LENGTH, INDEX < SHORT, INDEX >= LENGTH - LEFT])


def batch(name: str) -> np.ndarray:
    return random_tokens(raw_config(name), len(REAL), LENGTH)


def batch_logits(model: s3.SmolLM3, name: str) -> np.ndarray:
    return np.asarray(model(jnp.asarray(batch(name)), segment_ids=jnp.asarray(REAL, jnp.int32)))


def last(logits: np.ndarray) -> np.ndarray:
    """What goldens hold of a batch's logits."""
    return logits[:1, -STORED:]


def golden(name: str) -> np.ndarray:
    with np.load(GOLDENS) as stored:
        return stored[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return functools.cache(lambda name, dtype="float32": tiny_checkpoint(root / f"{name}-{dtype}", name, dtype=dtype))


@pytest.fixture(scope="module")
def computed(folder):
    """name -> this package's logits of the batch."""
    return functools.cache(lambda name: batch_logits(s3.from_pretrained(folder(name), stacked=True), name))


@pytest.fixture(scope="module")
def expected(folder):
    """name -> transformers' logits of the batch's rows, each of them alone; what is padding stays NaN."""

    def compute(name: str) -> np.ndarray:
        model, tokens = reference_model(folder(name)), batch(name)
        logits = np.full((*tokens.shape, raw_config(name)["vocab_size"]), np.nan, np.float32)
        logits[:1] = reference_logits(model, tokens[:1])
        logits[1:2, :SHORT] = reference_logits(model, tokens[1:2, :SHORT])
        logits[2:, -LEFT:] = reference_logits(model, tokens[2:], REAL[2:].astype(np.int64))[:, -LEFT:]
        return logits

    return functools.cache(compute)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_stored_goldens(name, computed):
    assert np.abs(last(computed(name)) - golden(name)).max() <= bound(golden(name))


@pytest.mark.torch
def test_goldens_are_what_transformers_computes(expected):
    fresh = {name: last(expected(name)) for name in CONFIGS}
    if os.environ.get("WRITE_GOLDENS"):
        GOLDENS.parent.mkdir(exist_ok=True)
        np.savez_compressed(GOLDENS, **fresh)  # pyright: ignore[reportArgumentType] (no name is allow_pickle)
    for name, logits in fresh.items():
        assert np.abs(logits - golden(name)).max() <= bound(logits), name


@pytest.mark.torch
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, computed, expected):
    """Padding on either side changes nothing for the tokens beside it."""
    for got, wanted, real in zip(computed(name), expected(name), REAL, strict=True):
        assert np.abs(got - wanted)[real].max() <= bound(wanted[real])


@pytest.mark.torch
@pytest.mark.parametrize(("name", "rows", "length"), [("plain", 1, 1), ("sliding", 3, 17), ("yarn", 2, 300)])
def test_logits_without_segments_equal_transformers(name, rows, length, folder):
    tokens = random_tokens(raw_config(name), rows, length, seed=length)
    wanted = reference_logits(reference_model(folder(name)), tokens)
    got = np.asarray(s3.from_pretrained(folder(name), stacked=True)(jnp.asarray(tokens)))
    assert np.abs(got - wanted).max() <= bound(wanted)


@jax.jit
@jax.grad
def gradient_of_mean_cross_entropy(model: s3.SmolLM3, tokens) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(tokens[:, :-1]), tokens[:, 1:]).mean()


# Whatever a gradient passes through: the rest of CONFIGS differs from these in constants alone.
DIFFERENTIATED = ["plain", "untied", "head_dim", "all_biases", "nope_pattern", "yarn", "multi_head", "multi_query"]
DIFFERENTIATED += ["llama_biased", "large_eps"]  # no padding id; sliding windows


@pytest.mark.torch
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients_equal_transformers(name, folder):
    import torch

    # Padding ids are among the tokens: torch gives that row no gradient as an input.
    tokens = random_tokens(raw_config(name), 2, 64)
    model, reference = s3.from_pretrained(folder(name), stacked=True), reference_model(folder(name))

    def by_name(model):
        gradients = gradient_of_mean_cross_entropy(model, jnp.asarray(tokens))
        return {x.name: x.read() for x in tensors_of(jax.device_get(gradients))}

    ids = torch.tensor(tokens, dtype=torch.long)
    logits = reference(ids[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {key: parameter.grad.numpy() for key, parameter in reference.named_parameters()}
    assert expected.keys() == by_name(model).keys() == hf_tensors(model.config).keys()
    bounded = rounding.shaken(by_name, model)
    assert max(rounding.worst(jax.tree.leaves(expected), bounded)) <= 1
    # That is little of a gradient, but for one that is 0: of the keys' bias in a layer without RoPE.
    assert sorted(np.linalg.norm(allowed) / np.linalg.norm(x) for x, allowed in bounded)[-2] < 0.01


@pytest.mark.torch
@pytest.mark.parametrize("name", ["plain", "untied", "all_biases", "yarn", "llama"])
def test_bfloat16_is_as_good_as_transformers_own(name, folder):
    tokens = random_tokens(raw_config(name), 2, 64)
    path = folder(name, "bfloat16")
    exact = reference_logits(reference_model(path), tokens)
    theirs = reference_logits(reference_model(path, "bfloat16"), tokens) - exact
    ours = np.asarray(s3.from_pretrained(path, stacked=True)(jnp.asarray(tokens))) - exact
    assert as_good_in_bfloat16(ours, theirs)


@pytest.mark.parametrize("name", ["plain", "sliding", "yarn", "all_biases"])
def test_cached_decoding_equals_the_whole_forward(name, folder, computed):
    model, whole = s3.from_pretrained(folder(name)), computed(name)[:2, :16]
    tokens = jnp.asarray(batch(name)[:2, :16])
    cache = empty_cache(model.config, 2, 24, jnp.float32)
    pieces = []
    for start, end in [(0, 5), (5, 10), *((i, i + 1) for i in range(10, 16))]:
        logits, cache = model(tokens[:, start:end], cache=cache)
        pieces.append(np.asarray(logits))
    assert np.abs(np.concatenate(pieces, axis=1) - whole).max() <= bound(whole)
    assert cache.length.tolist() == [16, 16]


def test_right_padded_prefill_is_overwritten(folder):
    """Rows of different length share a prefill; each continues at its own end."""
    model = s3.from_pretrained(folder("plain"))
    tokens = jnp.asarray(random_tokens(raw_config("plain"), 2, 12))
    lengths = np.array([5, 9])
    segments = jnp.asarray((np.arange(9) < lengths[:, None]).astype(np.int32))
    _, cache = model(tokens[:, :9], segment_ids=segments, cache=empty_cache(model.config, 2, 16, jnp.float32))
    assert cache.length.tolist() == lengths.tolist()
    following = jnp.stack([tokens[0, 5:8], tokens[1, 9:12]])
    logits, _ = model(following, cache=cache)
    whole = np.asarray(model(tokens))
    for row, length in enumerate(lengths):
        alone = whole[row, length : length + 3]
        assert np.abs(np.asarray(logits[row]) - alone).max() <= bound(alone)


def test_documents_in_a_row_do_not_see_each_other(folder):
    model = s3.from_pretrained(folder("plain"), stacked=True)
    (row,) = random_tokens(raw_config("plain"), 1, 30)
    documents = [(0, 11), (11, 25)]
    # The packed row, and below it each document alone at the beginning of a row.
    tokens, segments = np.zeros((3, 30), np.int32), np.zeros((3, 30), np.int32)
    tokens[0], segments[0] = row, [1] * 11 + [2] * 14 + [0] * 5
    for i, (start, end) in enumerate(documents, start=1):
        tokens[i, : end - start], segments[i, : end - start] = row[start:end], 1
    onwards = np.tile(np.arange(30, dtype=np.int32), (3, 1))
    restarting = onwards.copy()
    restarting[0] = [*range(11), *range(14), *range(5)]
    for positions in (onwards, restarting):
        packed, *alone = np.asarray(model(jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments)))
        for (start, end), one in zip(documents, alone, strict=True):
            one = one[: end - start]
            assert np.abs(packed[start:end] - one).max() <= bound(one)
        assert np.isfinite(packed).all()


def invert_nope(model):
    model.config = dataclasses.replace(model.config, rope_layers=tuple(not r for r in model.config.rope_layers))


def rope_everywhere(model):
    model.config = dataclasses.replace(model.config, rope_layers=(True,) * model.config.num_hidden_layers)


def wrong_theta(model):
    model.config = dataclasses.replace(model.config, rope_theta=model.config.rope_theta * 1.5)


def permute_q_and_k(model):
    """Rows in llama.cpp's order: the pairs side by side."""
    for param in (model.layers.q, model.layers.k):
        left, right = jnp.split(param[...], 2, axis=2)
        param.set_value(jnp.stack([left, right], axis=3).reshape(param.shape))


def swap_gate_and_up(model):
    gate, up = model.layers.gate[...], model.layers.up[...]
    model.layers.gate.set_value(up)
    model.layers.up.set_value(gate)


def untie_head(model):
    head = jax.random.normal(jax.random.key(1), model.embed.shape) * jnp.std(model.embed[...])
    model.head = nnx.data(nnx.Param(head, axes=("vocab", "embed")))


def flip_one_bit(model):
    """The lowest bit of the exponent of one weight: it doubles or halves."""
    weights = np.array(model.layers.down[...])
    weights.view(np.uint32)[2, 3, 5] ^= 1 << 23
    model.layers.down.set_value(jnp.asarray(weights))


@pytest.mark.parametrize(
    "spoil",
    [invert_nope, rope_everywhere, wrong_theta, permute_q_and_k, swap_gate_and_up, untie_head, flip_one_bit],
    ids=lambda spoil: spoil.__name__,
)
def test_a_wrong_model_is_seen(spoil, folder, computed):
    model, expected = s3.from_pretrained(folder("release_like"), stacked=True), golden("release_like")
    assert np.abs(last(computed("release_like")) - expected).max() <= bound(expected)
    spoil(model)
    assert np.abs(last(batch_logits(model, "release_like")) - expected).max() > 2 * bound(expected)


def test_compiled_once_for_equal_shapes(folder):
    from smollm3_jax.model import _logits

    model = s3.from_pretrained(folder("plain"), stacked=True)
    tokens = jnp.asarray(random_tokens(raw_config("plain"), 1, 13))
    model(tokens)
    before = _logits._cache_size()
    model(tokens + 1)
    s3.from_pretrained(folder("plain"), stacked=True)(tokens)
    assert _logits._cache_size() == before


def test_every_parameter_names_its_axes():
    config = s3.ModelConfig.from_hf(raw_config("all_biases") | {"tie_word_embeddings": False})
    from smollm3_jax.weights.key_map import abstract_model

    for path, param in parameters(abstract_model(config, "float32")).items():
        axes = param.get_metadata("axes")
        assert tuple(config.axis_sizes[axis] for axis in axes) == param.shape, path


def test_wrong_shapes_are_refused(folder):
    model = s3.from_pretrained(folder("plain"), stacked=True)
    with pytest.raises(AssertionError):
        model(jnp.zeros(5, jnp.int32))
    with pytest.raises(AssertionError):
        model(jnp.zeros((1, 5), jnp.int32), segment_ids=jnp.ones((1, 4), jnp.int32))


def test_float16_parameters_stay_float16(tmp_path):
    raw = raw_config("plain") | {"torch_dtype": "float16"}
    path = write_checkpoint(tmp_path, raw, random_tensors(raw, dtype="float16"))
    model = s3.from_pretrained(path, stacked=True)
    assert model.embed.dtype == jnp.float16
    assert model(jnp.asarray([[1, 2, 3]])).dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("name", [name for name, (change, _) in SAME.items() if change.get("pad_token_id") is None])
def test_other_words_for_the_same_config_give_transformers_logits(name, tmp_path):
    """W18: what is derivable, redundant or without effect is what transformers makes of it."""
    raw = without_nulls(BASE | SAME[name][0]) | {"num_hidden_layers": 2, "no_rope_layer_interval": 2}
    folder = write_checkpoint(tmp_path, raw, random_tensors(without_nulls(BASE) | {"num_hidden_layers": 2}))
    tokens = random_tokens(raw, 1, 200)
    expected = reference_logits(reference_model(folder), tokens)
    got = np.asarray(s3.from_pretrained(folder, "float32")(jnp.asarray(tokens)))
    assert np.abs(got - expected).max() <= bound(expected)


@FULL
@pytest.mark.filterwarnings("error")
def test_odd_numbers_of_a_config_give_finite_logits_or_an_error(tmp_path):
    """W18, over every number of config.json: what is not refused computes numbers."""
    base = raw_config("plain") | {"num_hidden_layers": 1, "no_rope_layer_interval": 2}
    yarn = YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
    numbers = ("rms_norm_eps", "rope_theta", "sliding_window", "max_position_embeddings", "pad_token_id")
    odd = [-1, 1, 2**31 - 1, 2**62, 1e-6, 1e3, 1e30]
    raws = [base | {"use_sliding_window": True, "sliding_window": 5} | {name: x} for name in numbers for x in odd]
    raws += [base | {"rope_scaling": yarn | {name: x}} for name in (*yarn, "attention_factor") for x in odd]
    raws += [base | {"rope_scaling": LLAMA3 | {name: x}} for name in LLAMA3 for x in odd]
    folder = write_checkpoint(tmp_path, base, random_tensors(base))
    seen = set()
    for raw in raws:
        (folder / "config.json").write_text(json.dumps(raw))
        try:
            model = s3.from_pretrained(folder)
        except s3.SmolLM3Error:
            continue
        if model.config not in seen:
            assert np.isfinite(np.asarray(model(jnp.asarray(random_tokens(base, 1, 8))))).all(), raw
            seen.add(model.config)
    assert len(seen) > 20


def test_a_model_that_was_moved_is_computed_where_it_lies():
    """`sharding` says where the loader put it; what somebody does with the arrays later counts."""
    model = s3.SmolLM3(s3.ModelConfig.from_hf(raw_config("one_layer")), rngs=nnx.Rngs(0))
    tokens = jnp.asarray(random_tokens(raw_config("one_layer"), 2, 9))
    (bounded,) = rounding.shaken(lambda model: model(tokens), model)
    sharding = Sharding.of(make_mesh({"data": 4, "tensor": 2}), "serve_tp").fitted(model.config.axis_sizes)
    everywhere = jax.device_put(model, NamedSharding(sharding.mesh, PartitionSpec()))
    assert where_it_lies(with_sharding(everywhere, sharding)).sharding == sharding
    for moved in (with_sharding(model, sharding), everywhere, with_sharding(everywhere, sharding)):
        assert rounding.within(moved(tokens), bounded) <= 1 < rounding.within(moved(tokens[::-1]), bounded)
    assert where_it_lies(with_sharding(model, sharding)).sharding is None
