"""Adapters in training: what they begin as, what a step changes, what their base is kept in."""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rounding
import tiny
from proxies import FULL

from sharding.mesh import make_mesh
from sharding.rules import Sharding
from smollm3_jax.errors import OptionError
from smollm3_jax.train import lora
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.run.checkpoint import named_arrays
from smollm3_jax.train.settings import LoraSettings, check
from smollm3_jax.train.settings_file import parse
from smollm3_jax.train.state import Batch, init_state, split, state_shardings
from smollm3_jax.train.step import train_step
from smollm3_jax.weights.load import open_checkpoint
from smollm3_jax.weights.save import quantize

WIDE = tiny.raw_config("one_layer") | {"head_dim": 32, "num_attention_heads": 4}
OPTIMIZER = adamw(1e-2, weight_decay=0.0)
SETTINGS = LoraSettings(rank=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "model"
    return open_checkpoint(tiny.write_checkpoint(folder, WIDE, tiny.random_tensors(WIDE)))


@pytest.fixture(scope="module")
def batch():
    random = np.random.RandomState(0)
    return Batch(jnp.asarray(random.randint(3, 160, (8, 16)), jnp.int32), jnp.ones((8, 16), jnp.int32))


def model_of(checkpoint, settings, sharding=None):
    return lora.attach(lora.load_base(checkpoint, checkpoint.config, settings, sharding), settings, seed=1)


def arrays(tree):
    return {name: np.asarray(x) for name, x in named_arrays(tree).items()}


def steps(model, batch, count=2, **options):
    """(state, losses) after some steps."""
    state, losses = init_state(model, OPTIMIZER, lora.TRAINED), []
    if model.sharding is not None:
        at = state_shardings(state, model.sharding)
        state = jax.jit(lambda x: x, out_shardings=at)(state)
    for _ in range(count):
        state, metrics = train_step(state, batch, optimizer=OPTIMIZER, options=StepOptions("float32", **options))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_begins_as_nothing(checkpoint, batch, dora):
    settings = dataclasses.replace(SETTINGS, dora=dora, targets=("q_proj", "o_proj", "down_proj"))
    base, model = lora.load_base(checkpoint, checkpoint.config, settings, None), model_of(checkpoint, settings)
    names = {name for name in arrays(model) if re.fullmatch(lora.TRAINED, name)}
    parts = ("a", "b", "magnitude")[: 3 if dora else 2]
    assert names == {f"layers.{name}.{part}" for name in ("q", "o", "down") for part in parts}
    np.testing.assert_allclose(model(batch.tokens), base(batch.tokens), rtol=0, atol=2e-5)
    a = arrays(model)["layers.down.a"]
    assert a.shape == (1, 4, 96) and 0.9 < np.abs(a).max() * 96**0.5 <= 1 and np.abs(a.mean()) < 0.01


@pytest.mark.parametrize(
    ("base", "dtypes"),
    [
        ("", {"float32"}),
        ("bfloat16", {"bfloat16"}),
        ("int8", {"int8", "float32"}),
        pytest.param("int4", {"uint8", "float16", "float32"}, marks=pytest.mark.slow),
    ],
)
def test_a_step_changes_the_adapter_alone_whatever_its_base_is_kept_in(checkpoint, batch, base, dtypes):
    settings = dataclasses.replace(SETTINGS, base=base, dora=base == "int4")
    before = arrays(model := model_of(checkpoint, settings))
    frozen = arrays(split(model, lora.TRAINED)[1])
    assert {x.dtype.name for x in frozen.values()} == dtypes
    state, losses = steps(model, batch, 3)
    assert losses[2] < losses[0]
    after = arrays(state.model)
    for name, x in after.items():
        assert np.array_equal(x, before[name]) == (name in frozen), name
        assert x.dtype == before[name].dtype
    moments = {name for name in arrays(state.optimizer) if ".mu." in name or ".nu." in name}
    assert len(moments) == 2 * (len(before) - len(frozen))


def test_what_is_frozen_takes_no_product_for_its_gradient(checkpoint, batch):
    """Those of the head's and of a layer's weight are there where the whole model is trained."""
    shapes = ("[160,64]", "[96,64]")

    def products(model, trainable):
        state = init_state(model, OPTIMIZER, trainable)
        compiled = train_step.lower(state, batch, optimizer=OPTIMIZER, options=StepOptions("float32")).compile()
        return Counter(re.findall(r"= f32(\[[\d,]+\])\S* (?:dot|custom-call)\(", compiled.as_text() or ""))

    whole = products(lora.load_base(checkpoint, checkpoint.config, SETTINGS, None), None)
    adapted = products(model_of(checkpoint, SETTINGS), lora.TRAINED)
    for shape in shapes:
        assert whole[shape] > 0 == adapted[shape], (shape, whole, adapted)


def test_a_quantized_folder_is_a_base_as_it_is(checkpoint, tmp_path):
    folder = tmp_path / "model"
    tiny.write_checkpoint(folder, WIDE, tiny.random_tensors(WIDE))
    quantize(folder, tmp_path / "q", "int8")
    opened = open_checkpoint(tmp_path / "q")
    model = model_of(opened, SETTINGS)
    found = arrays(model)
    assert np.array_equal(found["layers.q.base.values"].reshape(-1), opened.tensors[Q].read().reshape(-1))
    assert found["embed"].dtype == np.float32 and model.config.quantization is None
    plain = lora.base_tensors(opened, SETTINGS)
    np.testing.assert_allclose(plain[Q].read(), checkpoint.tensors[Q].read(), atol=0.02)


Q = "model.layers.0.self_attn.q_proj.weight"


@FULL
def test_dropout_is_drawn_anew_in_each_step_and_again_in_the_same(checkpoint, batch):
    settings = dataclasses.replace(SETTINGS, dropout=0.5)
    first, second = (steps(model_of(checkpoint, settings), batch, 3) for _ in range(2))
    assert first[1] == second[1]
    for name, x in arrays(first[0].model).items():
        np.testing.assert_array_equal(x, arrays(second[0].model)[name], err_msg=name)
    assert "layers.q.seed" not in arrays(first[0].model)  # no part of the state
    assert first[1][1:] != steps(model_of(checkpoint, SETTINGS), batch, 3)[1][1:]
    assert first[1][1:] != steps(model_of(checkpoint, settings), batch, 3, seed=1)[1][1:]
    assert first[1][1:] != steps(model_of(checkpoint, settings), batch, 3, micro_batches=2)[1][1:]


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["fsdp", "tp", "fsdp_tp"])
@pytest.mark.parametrize("settings", [SETTINGS, pytest.param(LoraSettings(rank=4, dora=True, base="int8"), marks=FULL)])
def test_every_strategy_computes_the_same(checkpoint, batch, rules, settings):
    want, _ = steps(model_of(checkpoint, settings), batch, 2)
    losses = rounding.shaken(
        lambda model: steps(jax.tree.map(jnp.copy, model), batch, 2)[1], model_of(checkpoint, settings)
    )
    axes = {"fsdp": {"fsdp": 8}, "tp": {"data": 4, "tensor": 2}, "fsdp_tp": {"fsdp": 4, "tensor": 2}}[rules]
    sharding = Sharding.of(make_mesh(axes), rules).fitted(checkpoint.config.axis_sizes)
    model = model_of(checkpoint, settings, sharding)
    state, found = steps(model, batch, 2)
    assert max(rounding.worst(found, losses)) <= 1
    trained = split(state.model, lora.TRAINED)[0]
    assert any(any(x.sharding.spec) for x in jax.tree.leaves(trained))  # laid out by the table
    for name, x in arrays(trained).items():
        was = arrays(want.model)[name]
        # AdamW divides a gradient by its size: of one that is nearly 0, rounding is a part of the update.
        np.testing.assert_allclose(x, was, rtol=0, atol=1e-2 * np.abs(was).max(), err_msg=name)


def test_micro_batches_add_up_to_the_same(checkpoint, batch):
    assert np.allclose(
        *(steps(model_of(checkpoint, SETTINGS), batch, 2, micro_batches=n)[1] for n in (1, 4)), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"rank": 4, "targets": ["q_proj", "lm_head"]}, "lora.targets: lm_head is not adapted"),
        ({"rank": 4, "targets": ["q"]}, "there is no 'q'; choose among q_proj, k_proj"),
        ({"rank": 4, "base": "int3"}, "lora.base is 'int3'; choose one of float32, bfloat16, int8, int4"),
        ({"rank": 4, "dropout": 1.0}, "dropout is from 0 to below 1"),
        ({"alpha": 16.0}, "lora.rank=0 means no adapter"),
        ({"rank": -1}, "rank and alpha are at least 0"),
    ],
)
def test_settings_that_are_refused(table, said):
    rest = {"run": {"dir": "x", "steps": 1}, "model": {"path": "m"}, "data": {"path": "d"}}
    with pytest.raises(OptionError, match=re.escape(said)):
        check(parse({**rest, "lora": table}))
    with pytest.raises(OptionError, match="trained on a model that is there"):
        check(parse({**rest, "model": {"config": "m"}, "lora": {"rank": 4}}))


def test_the_scale_is_pefts():
    assert lora.scale_of(LoraSettings(rank=16, alpha=8)) == 0.5
    assert lora.scale_of(LoraSettings(rank=16, alpha=8, rslora=True)) == 2.0
    assert lora.scale_of(LoraSettings(rank=16)) == 2.0
