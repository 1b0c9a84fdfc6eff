"""Adapters beside one base: each sequence has the numbers of its own model; what cannot be served is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import random_tokens, raw_config, tiny_adapter, tiny_checkpoint

import smollm3_jax as s3
from smollm3_jax.errors import CheckpointFormatError, OptionError
from smollm3_jax.lora import LoraStack, for_each
from smollm3_jax.weights import peft
from smollm3_jax.weights.key_map import abstract_model, parameters
from smollm3_jax.weights.load import load, open_checkpoint, with_adapters
from smollm3_jax.weights.served import attach, check_served, planned, read_served

RAW = raw_config("plain")
# Of several ranks, weights and scales; the base between them.
KINDS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"rank": 2, "targets": ("q_proj", "o_proj"), "use_rslora": True},
    "three": {"rank": 7, "targets": ("down_proj", "v_proj"), "alpha_pattern": {"v_proj": 3}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("base") / "base", "plain")


@pytest.fixture(scope="module")
def folders(base):
    return [tiny_adapter(base.parent / name, base, seed=i, **kind) for i, (name, kind) in enumerate(KINDS.items())]


def words(folders):
    return [str(folders[0]), f"second={folders[1]}:0.5", f"{folders[2]}:-1"]


@pytest.mark.parametrize("weights", [None, "int8"])
def test_each_sequence_has_the_numbers_of_its_model(base, folders, weights):
    served = read_served(words(folders), "base")
    assert [(one.name, one.scale) for one in served] == [("one", 1.0), ("second", 0.5), ("three", -1.0)]
    model = load(open_checkpoint(base), weights=weights)
    own = attach(model, served)
    assert own.adapters == ("one", "second", "three") and model.adapters == ()
    stack = own.layers[0].v
    assert isinstance(stack, LoraStack) and stack.a.shape == (3, 7, 64) and stack.b.shape == (2, 8, 3, 7)
    assert own.layers[0].q.a.shape == (3, 4, 64) and own.layers[0].o.a.shape == (3, 4, 8, 8)
    tokens = jnp.asarray(np.repeat(random_tokens(RAW, 1, 40), 5, axis=0))
    got = np.asarray(jax.jit(lambda model, number: for_each(model, number)(tokens))(own, jnp.array([2, 0, 3, 1, 1])))
    plain = np.asarray(model(tokens))[1]
    np.testing.assert_allclose(got[1], plain, rtol=0, atol=1e-5 * np.abs(plain).max())
    np.testing.assert_array_equal(got[3], got[4])
    np.testing.assert_array_equal(np.asarray(own(tokens))[1], plain)  # by itself it is the base
    if weights is not None:
        assert min(np.abs(got[i] - plain).max() for i in (0, 2, 3)) > 0.1 * np.abs(plain).max()
        return
    for row, one in ((0, served[1]), (2, served[2]), (3, served[0])):
        folded = with_adapters(open_checkpoint(base), [(one.adapter, one.scale)])
        want = np.asarray(load(folded)(tokens[:1]))[0]
        assert np.abs(want - plain).max() > 0.1 * np.abs(want).max()  # it matters
        np.testing.assert_allclose(got[row], want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("weights", [None, "int8"])
def test_a_plan_is_of_the_arrays_that_are_served(base, folders, weights):
    model = load(open_checkpoint(base), weights=weights)
    served = parameters(attach(model, read_served([str(folders[0]), f"again={folders[0]}"], "base")))
    without = abstract_model(model.config, model.dtype, stacked=False)
    own = planned(without, 2, 4)
    assert len(own.adapters) == 2 and without.adapters == ()

    def described(parameters):
        return {name: (x.shape, x.dtype, x.get_metadata("axes")) for name, x in parameters.items()}

    assert described(parameters(own)) == described(served)
    assert sum(name.endswith((".a", ".b")) for name in served) == 2 * 7 * RAW["num_hidden_layers"]


def test_names_that_two_models_have_are_refused(folders):
    with pytest.raises(OptionError, match="two models are called 'one'; name this one: NAME="):
        read_served([str(folders[0]), f"one={folders[1]}"], "base")
    with pytest.raises(OptionError, match="two models are called 'one'"):
        read_served([str(folders[0])], "one")


def test_what_cannot_lie_beside_a_base_is_refused(base, folders, tmp_path):
    config = open_checkpoint(base).config
    dora = tiny_adapter(tmp_path / "dora", base, use_dora=True)
    with pytest.raises(CheckpointFormatError, match=r"dora is a DoRA adapter.*smollm3 merge BASE --adapter .*dora"):
        check_served(config, read_served([str(dora)], "base"))
    raw = RAW | {"intermediate_size": 128}
    wide = tiny_adapter(tmp_path / "wide", base, raw)
    with pytest.raises(CheckpointFormatError, match=r"wide is an adapter of another model: it has .* \[128, 64\]"):
        check_served(config, read_served([str(folders[0]), str(wide)], "base"))
    tensors = load_file(wide / peft.WEIGHTS)
    odd = tiny_adapter(tmp_path / "odd", base)
    tensors = load_file(odd / peft.WEIGHTS)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, odd / peft.WEIGHTS)
    with pytest.raises(CheckpointFormatError, match=r"odd: what it has of .* is not finite, or too large for float32"):
        attach(s3.from_pretrained(base), read_served([str(odd)], "base"))
