"""SmolLM3-3B compiled for NVIDIA GPUs that are not there: settings, programs, and what to look for in them.

For an H100, with all layers where a bound is of the whole model. Bytes and launches are those of `smollm3 plan`:
kernels count as what they read at full capacity. Bounds are those that the design was made for.
"""

import dataclasses
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from jax.stages import Compiled

from sharding import hlo
from sharding.products import product
from smollm3_jax.config import SMOLLM3_3B, ModelConfig
from smollm3_jax.plan.decode import DecodeSetting
from smollm3_jax.plan.devices import sharding_for, topology
from smollm3_jax.plan.train import TrainSetting
from smollm3_jax.train.options import StepOptions
from smollm3_jax.weights.quantized import with_scheme

# Where jax is new enough and the compiler is missing, these tests fail.
MARKS = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(jax.__version_info__ < (0, 11, 2), reason="kernels for GPUs need jax 0.11.2"),
]

# SmolLM3-3B's layers.
DEEP = 36
GB, GIB, MIB = 1e9, 2**30, 2**20
CAPACITY = 8192


@dataclasses.dataclass(frozen=True)
class Program:
    """A setting, what was compiled for it, and what that is made of."""

    setting: DecodeSetting | TrainSetting
    compiled: Compiled
    operations: list[hlo.Operation] = dataclasses.field(init=False)
    model: Any = dataclasses.field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "operations", hlo.operations(self.compiled))
        object.__setattr__(self, "model", self.setting.model_of(self.compiled))
        assert not self.model.opaque


def cut(layers: int) -> ModelConfig:
    """SmolLM3 with its first layers."""
    return ModelConfig.from_hf(
        {**SMOLLM3_3B, "num_hidden_layers": layers, "no_rope_layers": SMOLLM3_3B["no_rope_layers"][:layers]}
    )


def decoding(layers: int, batch: int, weights: str | None = None, name: str = "h100:1", **options) -> DecodeSetting:
    config = cut(layers) if weights is None else with_scheme(cut(layers), weights)
    _, devices = topology(name)
    return DecodeSetting(config, sharding_for(config, devices, "serve_tp", None), batch, CAPACITY, **options)


def training(layers: int, name: str, rules: str, axes: dict[str, int] | None, batch: int, length: int) -> Program:
    config = cut(layers)
    chip, devices = topology(name)
    sharding = sharding_for(config, devices, rules, axes)
    setting = TrainSetting(config, chip, sharding, batch, length, StepOptions(remat="dots"))
    return Program(setting, setting.compile())


def scores(program: Program, queries: int, keys: int) -> list[hlo.Operation]:
    """What has scores in memory or computes them outside of a kernel: arrays of all queries and keys of a row, and
    products over the head width alone, which is what queries and keys are multiplied over."""
    by_name = {(op.computation, op.name): op for op in program.operations}

    def multiplies_heads(op: hlo.Operation) -> bool:
        found = product(op, by_name)
        return found is not None and found.flops == 2 * np.prod(op.shapes[0].dims) * program.setting.config.head_dim

    whole = Counter([queries, keys])
    return [
        op
        for op in program.operations
        if multiplies_heads(op) or any(Counter(shape.dims) >= whole for shape in op.shapes)
    ]
