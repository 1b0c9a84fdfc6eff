"""transformers' SmolLM3 beside ours: of the same shape, or with the same weights, on the same device.

PyTorch and transformers are peers, not needs: where they or a GPU for them are missing, their parts say so and end.
"""

import functools
import importlib.util
from typing import Any

import jax
import numpy as np

from smollm3_jax.model import SmolLM3
from smollm3_jax.weights.save import tensors_of

from . import shape
from .run import Run


def usable(run: Run) -> bool:
    """Whether the peer can be run: installed and, unless all is tiny, on a GPU; if not, a line says so."""
    reason = None
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        reason = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    elif not run.tiny and not _has_gpu():
        reason = "PyTorch finds no GPU"
    if reason is not None:
        run.say("skipped", run.part, reason=reason)
    return reason is None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def device(run: Run) -> str:
    """PyTorch's: "cuda" (which it also calls AMD's), and the CPU where all is tiny."""
    return "cpu" if run.tiny else "cuda"


def synchronize(run: Run) -> None:
    """Waits for the device."""
    import torch

    if not run.tiny:
        torch.cuda.synchronize()


@functools.cache
def _modules() -> tuple[Any, Any]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("highest")
    return torch, transformers


def random_peer(run: Run, dtype: str, layers: int | None = None) -> Any:
    """transformers' model of our shape with its own random weights, on the device, with torch's fused attention."""
    torch, transformers = _modules()
    raw = shape.raw_config(run.tiny, layers)
    fields = {key: value for key, value in raw.items() if key not in ("architectures", "model_type", "torch_dtype")}
    config = transformers.SmolLM3Config(**fields, attn_implementation="sdpa")
    with torch.device(device(run)):
        return transformers.SmolLM3ForCausalLM(config).to(getattr(torch, dtype))


def peer_of(run: Run, model: SmolLM3, layers: int) -> Any:
    """transformers' model with the weights of ours, float32."""
    torch, _ = _modules()
    peer = random_peer(run, "float32", layers)
    with torch.no_grad():
        for name, array in tensors(model).items():
            peer.get_parameter(name).copy_(torch.from_numpy(array.copy()))
    return peer


def tensors(model: SmolLM3) -> dict[str, np.ndarray]:
    """A tree of parameters, or of their gradients, by Hugging Face's names and in their shapes."""
    return {tensor.name: tensor.read() for tensor in tensors_of(jax.device_get(model))}
