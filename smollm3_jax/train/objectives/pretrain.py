"""Pretraining: the cross-entropy of each next token of a document.

Shapes: B rows, T tokens of a row, D model width, V vocabulary.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ...lora import in_dtype
from ...model import SmolLM3
from ..loss import cross_entropy, next_tokens
from ..options import REMAT, StepOptions
from ..state import Batch


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Cross-entropy, weighted where the batch has weights.

    z_loss: the weight of the z-loss beside it (loss.py).
    by_document: positions count from 0 in each document, not through the row.
    """

    z_loss: float = 0.0
    by_document: bool = False

    def __call__(self, model: SmolLM3, batch: Batch, options: StepOptions) -> tuple[Array, dict[str, Array]]:
        """(cross-entropy and z-loss, {"loss": cross-entropy alone in nats, "tokens": labels, or the sum of their
        weights}), all of them sums over the batch, float32."""
        found = predictions(model, batch, options, self.by_document)
        lean = options.remat in ("full", "offload")
        total, nll = cross_entropy(
            found.x_BTD,
            found.head_VD,
            found.labels_BT,
            found.weights_BT,
            z_loss=self.z_loss,
            by_words=lean,
            sharding=model.sharding,
        )
        return total, {"loss": nll, "tokens": found.weights_BT.sum().astype(jnp.float32)}


class Predictions(NamedTuple):
    """What a model makes of a batch, for a loss.

    x_BTD: final hidden states. head_VD: the unembedding. labels_BT: int32. weights_BT: bool, or float32 where the batch
    has weights. order: which token of its row each of the T places holds; None is the order of the batch.
    """

    x_BTD: Array
    head_VD: Array
    labels_BT: Array
    weights_BT: Array
    order: np.ndarray | None


def predictions(model: SmolLM3, batch: Batch, options: StepOptions, by_document: bool = False) -> Predictions:
    """The final hidden states of a batch in the dtype of the products, and what they are to predict.

    by_document: positions count from 0 in each document, not through the row.
    """
    sharding = model.sharding
    cast: Any = in_dtype(model, options.dtype)
    if model.platform == "cpu":
        # Each layer casts its own: XLA:CPU writes gradients into a stack of bfloat16 by way of all of it in float32.
        cast.layers = model.layers
    if model.platform == "gpu":
        # Left to itself XLA for GPU rounds the table after every device has gathered it, at twice the bytes.
        cast.embed = jax.lax.optimization_barrier(cast.embed)
    tokens_BT, segments_BT = batch.tokens, batch.segment_ids
    labels_BT, weights_BT = next_tokens(tokens_BT, segments_BT)
    if batch.weights is not None:
        weights_BT = jnp.where(weights_BT, batch.weights, 0)
    arrays, positions_BT = (tokens_BT, segments_BT, labels_BT, weights_BT), None
    order = None if sharding is None else sharding.row_order(tokens_BT.shape[1])
    if by_document:
        positions_BT = _within(segments_BT)
    if order is not None:
        whole_BT = jnp.broadcast_to(jnp.array(order, jnp.int32), tokens_BT.shape)
        positions_BT = whole_BT if positions_BT is None else positions_BT[:, order]
        tokens_BT, segments_BT, labels_BT, weights_BT = (x[:, order] for x in arrays)
    x_BTD, _ = cast.hidden(tokens_BT, positions_BT, segments_BT, remat=REMAT[options.remat], in_order=True)
    head = cast.embed if cast.head is None else cast.head
    return Predictions(x_BTD, head[...], labels_BT, weights_BT, order)


def _within(segments_BT: Array) -> Array:
    """int32 [B, T]: where each token stands in its document."""
    place = jax.lax.broadcasted_iota(jnp.int32, segments_BT.shape, 1)
    begins = segments_BT != jnp.roll(segments_BT, 1, axis=1)
    return place - jax.lax.cummax(jnp.where(begins, place, 0), axis=1)
