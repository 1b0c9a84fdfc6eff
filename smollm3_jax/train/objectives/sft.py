"""Supervised fine-tuning: the cross-entropy of the tokens that a conversation's weights name."""

import dataclasses

from jax import Array

from ...model import SmolLM3
from ..options import StepOptions
from ..state import Batch
from .pretrain import Pretrain


@dataclasses.dataclass(frozen=True)
class Sft(Pretrain):
    """As `Pretrain`, of batches with weights: 1 where the next token is trained, else 0. What is minimised is the sum
    over all trained tokens of a step by their count, whatever micro-batch or device they lie on."""

    def __call__(self, model: SmolLM3, batch: Batch, options: StepOptions) -> tuple[Array, dict[str, Array]]:
        if batch.weights is None:
            raise TypeError("a batch for fine-tuning has weights")
        return super().__call__(model, batch, options)
