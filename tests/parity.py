"""The reference: transformers on the same files, and the bounds of the comparison."""

from pathlib import Path
from typing import Any

import numpy as np


def bound(logits: np.ndarray) -> float:
    """How far float32 logits may be from the reference's.

    Measured: for every small configuration, logits of up to 6, ours and transformers' are each within 1.3e-5 of
    transformers' in float64, so that they are at most 2.6e-5 apart. This is four times as much: on another processor
    the same sums, of up to 160 products, are rounded in another order and as often, and what many roundings of either
    sign add up to does not differ four times in its maximum.
    """
    return 2e-5 * float(np.abs(logits).max()) + 1e-5


def as_good_in_bfloat16(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether errors of logits are of the size of another library's.

    Both add up in float32 and round to bfloat16, whose roundings are 65,536 times as large: on another processor one in
    thousands of them goes the other way, which the root mean square of some ten thousand errors does not show. (Of the
    small configurations ours is 0.90 to 0.97 times transformers'.) The largest error comes of few roundings, and so
    differs more (0.8 to 1.35 times).
    """
    return rms(ours) <= 1.1 * rms(theirs) and np.abs(ours).max() <= 2 * np.abs(theirs).max()


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


def reference_model(folder: Path, dtype: str = "float32") -> Any:
    """transformers' model of a folder, with the attention that spells the formula out."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()


def peft_model(base: Path, folder: Path, dtype: str = "float32") -> Any:
    """PEFT's model of an adapter's folder. No key may be missing or unexpected, of which PEFT itself only warns."""
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    model = get_peft_model(reference_model(base, dtype), PeftConfig.from_pretrained(str(folder)))
    found = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    assert not [name for name in found.missing_keys if "lora" in name] and not found.unexpected_keys
    return model.eval()


def reference_logits(model: Any, tokens: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
    """float32 [B, T, V]."""
    import torch

    mask = None if attention_mask is None else torch.tensor(attention_mask)
    with torch.no_grad():
        return (
            model(torch.tensor(tokens, dtype=torch.long), attention_mask=mask, use_cache=False).logits.float().numpy()
        )


def rope_rounding(scaling: Any) -> float:
    """How far two libraries' frequencies may lie apart, relative, with 2**-24 for each rounding.

    A power is within 2 roundings and its reciprocal adds one: 6 between two libraries, and 2 for what scales them.
    llama3 blends f / factor and f by a share s that is linear in f itself: s = (L f / 2 pi - low) / (high - low). So a
    relative error of f comes out 1 + f s'(f) (1 - 1 / factor) / ((1 - s) / factor + s) times as large, where
    f s'(f) = s + low / (high - low); the fraction has its maximum at s = 0 or at s = 1. The share's own roundings, 3 of
    each library, go the same way.
    """
    if scaling is None or scaling.rope_type != "llama3":
        return 8 * 2.0**-24
    offset = scaling.low_freq_factor / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = max(offset * (scaling.factor - 1), (1 + offset) * (1 - 1 / scaling.factor))
    return (8 * (1 + share) + 6 * share) * 2.0**-24
