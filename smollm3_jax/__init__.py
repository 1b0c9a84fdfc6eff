"""SmolLM3 in JAX: run it, train it, convert it."""

import importlib
from typing import TYPE_CHECKING, Any

from .support import is_the_command, keep_to_the_cpu_without_accelerator, require_supported, version

if not is_the_command():  # which says it in a line, and lets the doctor look
    require_supported()
    keep_to_the_cpu_without_accelerator()

if TYPE_CHECKING:
    from .config import GenerationConfig, ModelConfig, RopeScaling
    from .errors import SmolLM3Error
    from .generation.api import generate, stream
    from .generation.requests import Request
    from .generation.sampling import SamplingParams
    from .model import SmolLM3
    from .on_ray import SmolLM3Predictor
    from .pretrained import convert, from_pretrained, load_tokenizer, save_pretrained
    from .tokenizer import Tokenizer

__all__ = [
    "GenerationConfig",
    "ModelConfig",
    "Request",
    "RopeScaling",
    "SamplingParams",
    "SmolLM3",
    "SmolLM3Error",
    "SmolLM3Predictor",
    "Tokenizer",
    "convert",
    "from_pretrained",
    "generate",
    "load_tokenizer",
    "save_pretrained",
    "stream",
]

# Where each name comes from. They are imported when they are asked for: `smollm3 --help` needs no jax.
_HOME = {
    "config": ("GenerationConfig", "ModelConfig", "RopeScaling"),
    "errors": ("SmolLM3Error",),
    "generation.api": ("generate", "stream"),
    "generation.requests": ("Request",),
    "generation.sampling": ("SamplingParams",),
    "model": ("SmolLM3",),
    "on_ray": ("SmolLM3Predictor",),
    "pretrained": ("convert", "from_pretrained", "load_tokenizer", "save_pretrained"),
    "tokenizer": ("Tokenizer",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("smollm3-jax") or "unknown"
    for module, names in _HOME.items():
        if name in names:
            value = getattr(importlib.import_module(f".{module}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
