"""What a training step minimises: one file an objective."""

from typing import Protocol

from jax import Array

from sharding.rules import PyTree

from ...model import SmolLM3
from ..options import StepOptions
from ..settings import Settings
from .preference import Preference
from .pretrain import Pretrain
from .sft import Sft


class Objective(Protocol):
    """What is minimised over a batch. It is hashable: a compiled step belongs to one objective.

    Sums, not means: micro-batches are added up, and what is minimised is the quotient of all.
    """

    def __call__(self, model: SmolLM3, batch: PyTree, options: StepOptions) -> tuple[Array, dict[str, Array]]:
        """
        Args:
          model: float32 parameters, trained and frozen ones; only the trained ones get gradients.
          batch: a pytree of arrays whose first axis is the rows.

        Returns:
          The sum to minimise, float32; and sums for the metrics, float32. "tokens", or "pairs" where that is given too,
          is what all others are divided by.
        """
        ...


def objective_of(settings: Settings) -> Objective:
    """What the settings minimise."""
    o, by_document = settings.objective, settings.data.positions == "document"
    if o.kind == "preference":
        return Preference(o.loss, o.beta, by_document)
    kind = {"pretrain": Pretrain, "sft": Sft}[o.kind]
    return kind(settings.step.z_loss, by_document=by_document)
