"""Preferences: of two completions of a prompt the chosen one becomes likelier than a reference has it, the other less.

A pair is one unit of a packed row: the chosen completion with its prompt is a document of an odd segment id, the
rejected one that of the next id. So a pair lies in one micro-batch, and no loss needs more than its row.

Shapes: B rows, T tokens of a row, P pairs of a row at most, D model width, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...model import SmolLM3
from ..loss import token_logps
from ..options import StepOptions
from ..state import Batch
from .pretrain import predictions

# A logistic function whose slope is less than this share of that at 0 no longer teaches: its pair stays as it is.
SATURATED = 0.01


@dataclasses.dataclass(frozen=True)
class Preference:
    """Anchored preference optimization (arXiv 2408.06266), and DPO's loss (arXiv 2305.18290).

    With s the logistic function, b = beta, and D the log-probability of all of a completion's tokens less that which
    the reference gives them, of the chosen one (w) and of the rejected one (l); it is not divided by their number:

    apo_zero: [1 - s(b D_w)] + s(b D_l). apo_down: s(b D_w) + [1 - s(b (D_w - D_l))]. sigmoid: -log s(b (D_w - D_l)).

    loss: one of `settings.LOSSES`.
    beta: how closely to stay at the reference; the higher, the closer.
    by_document: positions count from 0 in each completion with its prompt, not through the row.
    """

    loss: str = "apo_zero"
    beta: float = 0.1
    by_document: bool = False

    def __call__(self, model: SmolLM3, batch: Batch, options: StepOptions) -> tuple[Array, dict[str, Array]]:
        """(the loss, {"pairs": how many, "tokens": that their completions have, "loss": as the first; "rewards/chosen"
        and "rewards/rejected": b D; "rewards/margins": their difference; "rewards/accuracies": 1 where it is positive;
        "difference": |D|, the mean of the two completions', which is what rounding makes where the model is still the
        reference; "saturated": the share of a loss's logistic functions whose slope is less than SATURATED of that at
        0}), sums over the pairs of a batch, float32."""
        if batch.reference is None:
            raise TypeError("a batch of preferences has the reference's sums")
        differences_BP2 = completion_sums(model, batch, options, self.by_document)
        rewards_BP2 = self.beta * differences_BP2
        chosen_BP, rejected_BP = rewards_BP2[..., 0], rewards_BP2[..., 1]
        loss_BP, saturated_BP = of_rewards(self.loss, chosen_BP, rejected_BP)
        margin_BP = chosen_BP - rejected_BP
        there_BP = jnp.arange(1, chosen_BP.shape[1] + 1)[None] * 2 <= batch.segment_ids.max(axis=1, keepdims=True)
        each = {
            "loss": loss_BP,
            "rewards/chosen": chosen_BP,
            "rewards/rejected": rejected_BP,
            "rewards/margins": margin_BP,
            "rewards/accuracies": (margin_BP > 0).astype(jnp.float32),
            "difference": jnp.abs(differences_BP2).mean(axis=-1),
            "saturated": saturated_BP,
            "pairs": jnp.ones_like(loss_BP),
        }
        sums = {name: jnp.where(there_BP, x, 0).sum() for name, x in each.items()}
        return sums["loss"], sums | {"tokens": batch.weights.sum()}


def of_rewards(loss: str, chosen: Array, rejected: Array) -> tuple[Array, Array]:
    """(the loss, the share of its logistic functions that are saturated) of rewards b D, float32 of any one shape."""
    s = jax.nn.sigmoid
    slope = lambda x: 4 * s(x) * s(-x)  # noqa: E731 - of what it is at 0
    if loss == "apo_zero":
        value, slopes = s(-chosen) + s(rejected), (slope(chosen), slope(rejected))
    elif loss == "apo_down":
        margin = chosen - rejected
        value, slopes = s(chosen) + s(-margin), (slope(chosen), slope(margin))
    else:
        margin = chosen - rejected
        value, slopes = -jax.nn.log_sigmoid(margin), (2 * s(-margin),)
    return value, jnp.mean(jnp.stack([(x < SATURATED).astype(jnp.float32) for x in slopes]), axis=0)


def completion_sums(model: SmolLM3, batch: Batch, options: StepOptions, by_document: bool = False) -> Array:
    """Float32 [B, P, 2]: the log-probability of the weighted tokens of each pair's chosen and rejected completion, less
    the reference's sum where the batch has it; 0 where there is no pair."""
    found = predictions(model, batch, options, by_document)
    logps_BT = token_logps(found.x_BTD, found.head_VD, found.labels_BT, sharding=model.sharding)
    logps_BT = jnp.where(found.weights_BT != 0, found.weights_BT * logps_BT, 0)
    if found.order is not None:
        logps_BT = logps_BT[:, np.argsort(found.order)]
    sums_BN = segment_sums(logps_BT, batch.segment_ids, batch.reference)
    return sums_BN.reshape(len(sums_BN), -1, 2)


def segment_sums(values_BT: Array, segment_ids_BT: Array, less_BT: Array | None = None) -> Array:
    """Float32 [B, N]: the sum of each segment's values, of segment n + 1 at n; 0 where there is none.

    A tree adds them up, the same one on any platform: of n values the error grows with log n, where one sum after the
    other of a long completion, of 10,000 nats, would be off by hundredths.

    Args:
      segment_ids_BT: int32, each segment's tokens next to each other; two or more of them.
      less_BT: what to take from a segment's sum, at each of its tokens.
    """
    length = values_BT.shape[1]
    count = length // 4 * 2  # two of a pair

    def added(before: tuple[Array, Array], after: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.where(after[1], after[0], before[0] + after[0]), before[1] | after[1]

    def of_row(values_T: Array, segments_T: Array, less_T: Array) -> Array:
        changes_T = segments_T != jnp.roll(segments_T, 1)
        sums_T, _ = jax.lax.associative_scan(added, (values_T, changes_T.at[0].set(True)))
        last_T = jnp.roll(changes_T, -1).at[-1].set(True) & (segments_T > 0)
        # Places past the end are dropped, and are different, as they may not be the same.
        at_T = jnp.where(last_T, segments_T - 1, count + jnp.arange(length, dtype=segments_T.dtype))
        return jnp.zeros(count, jnp.float32).at[at_T].set(sums_T - less_T, mode="drop", unique_indices=True)

    less_BT = jnp.zeros_like(values_BT) if less_BT is None else less_BT
    return jax.vmap(of_row)(values_BT, segment_ids_BT, less_BT)
