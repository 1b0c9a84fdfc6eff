"""What the stages of a run change: the learning rate, and the model's theta."""

import copy
import dataclasses
from typing import TypeVar

import jax
import optax

from ...config import ModelConfig
from ...model import SmolLM3
from ..optimizer import schedule
from ..settings import Settings, Stage, starts

T = TypeVar("T")


def begin_of(settings: Settings, stage: int) -> int:
    """The step at which a stage's moments were fresh: there its schedule begins, too."""
    return max(x for x in _fresh(settings) if x <= starts(settings)[stage])


def rate_of(settings: Settings, stage: int) -> optax.Schedule:
    """The learning rate of a stage by the number of updates since its moments were fresh."""
    begin, o = begin_of(settings, stage), settings.optimizer
    end = min([x for x in _fresh(settings) if x > begin], default=settings.run.steps)
    return schedule(o.schedule, o.learning_rate, end - begin, o.warmup_steps, o.decay_steps, o.end)


def _fresh(settings: Settings) -> list[int]:
    return [0, *(s.start for s in settings.stages if s.reset_optimizer)]


def with_config(tree: T, config: ModelConfig) -> T:
    """The same arrays, in models of another config: of a state those of the optimizer too."""

    def swapped(x: object) -> object:
        if not isinstance(x, SmolLM3):
            return x
        out = copy.copy(x)
        out.config = config
        return out

    return jax.tree.map(swapped, tree, is_leaf=lambda x: isinstance(x, SmolLM3))


def config_in(config: ModelConfig, stage: Stage) -> ModelConfig:
    """The config of a model in a stage."""
    return dataclasses.replace(config, rope_theta=stage.rope_theta or config.rope_theta)
