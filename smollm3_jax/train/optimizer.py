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
    """AdamW after clipping by the global norm (0: none); weight decay on everything but the embedding.

    The defaults are those of SmolLM3's pretraining (its stage files in huggingface/smollm).
    """
    rule = optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=_decayed)
    return optax.chain(optax.clip_by_global_norm(clip_norm), rule) if clip_norm else rule


def _decayed(params: SmolLM3) -> SmolLM3:
    decayed = jax.tree.map(lambda _: True, params)
    if decayed.embed.get_value() is not None:  # it is trained
        decayed.embed.set_value(False)
    return decayed


def schedule(
    kind: str, peak: float, steps: int, warmup_steps: int = 0, decay_steps: int = 0, end: float = 0.0
) -> optax.Schedule:
    """The learning rate by the number of updates before: linear warm-up from 0, then one of four.

    Args:
      kind: "constant"; "wsd", which stays at the peak and falls linearly over the last `decay_steps`; "cosine" and
        "linear", which fall from the warm-up on.
      steps: updates in all.
      end: the rate at the end, as a share of the peak.
    """
    warm = optax.linear_schedule(0.0, peak, warmup_steps)
    left = max(1, steps - warmup_steps)
    if kind == "wsd":
        return optax.join_schedules(
            [warm, optax.constant_schedule(peak), optax.linear_schedule(peak, end * peak, max(1, decay_steps))],
            [warmup_steps, max(warmup_steps, steps - decay_steps)],
        )
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, left, end),
        "linear": optax.linear_schedule(peak, end * peak, left),
    }[kind]
    return optax.join_schedules([warm, after], [warmup_steps])
