"""What the stages of a run change."""

import numpy as np
import tiny
from flax import nnx

import smollm3_jax as s3
from smollm3_jax.train.optimizer import adamw
from smollm3_jax.train.run.stages import begin_of, config_in, rate_of, with_config
from smollm3_jax.train.settings import stage_at
from smollm3_jax.train.settings_file import parse
from smollm3_jax.train.state import init_state

OPTIMIZER = {"learning_rate": 1.0, "schedule": "linear", "warmup_steps": 2, "end": 0.5}
STAGES = [{"start": 4, "rope_theta": 5e5}, {"start": 10, "reset_optimizer": True}]


def settings_of(stages=STAGES):
    data = {"path": "corpus", "length": 16, "rows": 4}
    return parse({"run": {"steps": 20}, "data": data, "optimizer": OPTIMIZER, "stages": stages})


def test_a_schedule_goes_from_one_reset_of_the_moments_to_the_next():
    settings = settings_of()
    assert [begin_of(settings, stage) for stage in (0, 1, 2)] == [0, 0, 10]
    for stage in (0, 1, 2):  # ten updates each: two of warm-up, eight of decay to the half
        rate = rate_of(settings, stage)
        assert [np.asarray(rate(updates)).item() for updates in (0, 1, 2, 6, 10)] == [0.0, 0.5, 1.0, 0.75, 0.5]


def test_without_a_reset_there_is_one_schedule():
    settings = settings_of([{"start": 4}])
    assert begin_of(settings, 1) == 0 and np.asarray(rate_of(settings, 1)(11)) == 0.75


def test_a_state_takes_on_the_theta_of_its_stage_in_all_of_its_parts():
    model = s3.SmolLM3(s3.ModelConfig.from_hf(tiny.raw_config("one_layer")), rngs=nnx.Rngs(0))
    state = init_state(model, adamw(1e-3))
    config = config_in(model.config, stage_at(settings_of(), 5)[1])
    assert config.rope_theta == 5e5 and config_in(model.config, stage_at(settings_of(), 0)[1]) == model.config
    changed = with_config(state, config)
    assert changed.model.config == config and changed.optimizer[1][0].mu.config == config
    assert state.model.config == model.config and changed.model.embed is state.model.embed
