"""Which compilers are here for devices that are not, and SmolLM3 with few layers, whose programs compile sooner."""

import importlib.util

import pytest

from smollm3_jax.config import SMOLLM3_3B, ModelConfig

SHORT = {"vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FULL = pytest.mark.full
needs_cuda = pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None, reason="the compiler for NVIDIA GPUs is not installed"
)
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


def proxy(layers: int, **changed: int) -> ModelConfig:
    """SmolLM3 with fewer layers, and with the fields of config.json that are changed."""
    rope = [1, 1, 1, 0][:layers]
    return ModelConfig.from_hf({**SMOLLM3_3B, **changed, "num_hidden_layers": layers, "no_rope_layers": rope})
