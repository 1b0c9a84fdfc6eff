"""The optimizer: AdamW through optax, as SmolLM3 was trained."""

import jax
import optax

from ..model import SmolLM3


def adamw(
    learning_rate: float | optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW behind clipping by the global norm (0: none); weight decay on everything but the embedding.

    The defaults are those of SmolLM3's pretraining (its stage files in huggingface/smollm).
    """
    rule = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_decayed)
    return optax.chain(optax.clip_by_global_norm(clip_norm), rule) if clip_norm else rule


def _decayed(params: SmolLM3) -> SmolLM3:
    decayed = jax.tree.map(lambda _: True, params)
    decayed.embed.set_value(False)
    return decayed
