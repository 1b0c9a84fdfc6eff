"""A small model and corpus for runs of `smollm3 train`, and a run that nothing disturbs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import rounding
import tiny
from runs import TOML, train, write_corpus

import smollm3_jax as s3
from smollm3_jax.tokenizer import load_tokenizer
from smollm3_jax.train.data.encode import encoder
from smollm3_jax.train.data.mixture import Batches, expanded
from smollm3_jax.train.objectives.pretrain import Pretrain
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.run.stages import rate_of
from smollm3_jax.train.settings_file import read_settings
from smollm3_jax.train.state import init_state
from smollm3_jax.train.step import train_step


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A model of 160 words, a corpus, and settings."""
    folder = tmp_path_factory.mktemp("train")
    tiny.talking_checkpoint(folder / "model")
    (folder / "run.toml").write_text(TOML)
    write_corpus(folder / "corpus.jsonl")
    return folder


@pytest.fixture(scope="session")
def whole(place):
    """A run that nothing disturbs. Several files of tests have it; each names its own runs in `place` otherwise."""
    train(place, place / "whole")
    return place / "whole"


@pytest.fixture(scope="session")
def bounded(place):
    """The losses of `whole`'s steps, and how far off a run may be that adds up in another order: in each step by what
    rounding does to it, and to the parameters in the steps before."""
    words = [f"run.dir={place / 'none'}", f"model.path={place / 'model'}", f"data.path={place / 'corpus.jsonl'}"]
    settings = expanded(read_settings(str(place / "run.toml"), words))
    o, options = settings.optimizer, StepOptions(settings.model.dtype, settings.step.remat)
    optimizer = adamw(
        rate_of(settings, 0), b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay, clip_norm=o.clip_norm
    )
    model = s3.from_pretrained(place / "model", dtype="float32", stacked=True)
    batches = Batches(settings, encoder(load_tokenizer(place / "model", model.config), model.config))
    made = [jax.tree.map(jnp.asarray, batches.next(step)) for step in range(settings.run.steps)]

    def run_from(model, made=made):
        state, found = init_state(jax.tree.map(jnp.copy, model), optimizer), []
        for batch in made:
            state, metrics = train_step(
                state, batch, objective=Pretrain(settings.step.z_loss), optimizer=optimizer, options=options
            )
            found.append(metrics["loss"])
        return found

    found = rounding.shaken(run_from, model)
    # One other token in the first batch is more than that, in each of the steps but the second: the first's rate is 0.
    first = dataclasses.replace(made[0], tokens=made[0].tokens.at[1, 5].set(9))
    off = rounding.worst(run_from(model, [first, *made[1:]]), found)
    assert min(off[:1] + off[2:]) > 1 >= off[1]
    return found
