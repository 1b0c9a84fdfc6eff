"""Tensor names as other programs write them, read as Hugging Face's.

What is redundant may be there or not: buffers that the config determines, `model.` before a decoder's names, a
prefix of whatever wrapped the model when it was saved, a tied output head. Nothing else is guessed.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from .key_map import HEAD_NAME
from .stored import StoredTensor

# What torch, its trainers and PEFT put before the names of a model that they wrap.
_WRAPPERS = re.compile(
    r"((module|base_model|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.)*"
)

log = logging.getLogger(__name__)


def is_head(name: str) -> bool:
    """Whether a name is the output head's, whatever stands before it."""
    return name == HEAD_NAME or name.endswith(f".{HEAD_NAME}")


def canonical(path: Path, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors under Hugging Face's names for the whole model, as far as one rule for all of them leads there."""
    prefix, decoder_alone = _prefix(found)
    if not prefix and not decoder_alone:
        return dict(found)
    if prefix:
        log.warning("%s: all tensors' names begin with %r, of what wrapped the model: read without it", path, prefix)
    renamed = {}
    for name, tensor in found.items():
        own = name.removeprefix(prefix)
        own = f"model.{own}" if decoder_alone and own != HEAD_NAME else own
        renamed[own] = replace(tensor, name=own)
    return renamed


def _prefix(names: Iterable[str]) -> tuple[str, bool]:
    """(what all names begin with and Hugging Face's do not, whether they lack `model.`)."""
    first = next((name for name in names if re.search(r"(^|\.)layers\.0\.", name)), "")
    before = re.sub(r"(^|\.)layers\.0\..*", r"\1", first)
    prefix = before.removesuffix("model.")
    whole = before.endswith("model.") and (not prefix or prefix.endswith("."))
    if not first or not all(name.startswith(prefix if whole else before) for name in names):
        return "", False
    if whole:
        return prefix, False
    return (before, True) if _WRAPPERS.fullmatch(before) else ("", False)
