"""The reference: transformers on the same files, and the bounds of the comparison."""

from pathlib import Path
from typing import Any

import numpy as np


def bound(logits: np.ndarray) -> float:
    """How far float32 logits may be from the reference's."""
    return 2e-5 * float(np.abs(logits).max()) + 1e-5


def reference_model(folder: Path, dtype: str = "float32") -> Any:
    """transformers' model of a folder, with the attention that spells the formula out."""
    import torch
    import transformers

    transformers.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager"
    ).eval()


def reference_logits(model: Any, tokens: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
    """float32 [B, T, V]."""
    import torch

    mask = None if attention_mask is None else torch.tensor(attention_mask)
    with torch.no_grad():
        return (
            model(torch.tensor(tokens, dtype=torch.long), attention_mask=mask, use_cache=False).logits.float().numpy()
        )
