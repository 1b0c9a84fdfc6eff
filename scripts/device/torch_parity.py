"""Logits and gradients beside transformers', with the same random weights on the same device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from smollm3_jax.model import SmolLM3
from smollm3_jax.train.options import StepOptions
from smollm3_jax.train.state import Batch

from . import shape, torch_model
from .parity import FLOAT32, exact_logits
from .parity_gradients import exact_gradients, gradients
from .run import Run, relative

LENGTH, TINY_LENGTH = 512, 64
# How many times as far from float32 as PyTorch's own bfloat16 ours may be.
TIMES_TORCH = 1.5
# float32 gradients: of all parameters together.
GRADIENTS = 3e-4


def part(run: Run) -> None:
    if not torch_model.usable(run):
        return
    stored = shape.random_model(shape.config(run.tiny, shape.PARITY_LAYERS), stacked=True)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    peer = torch_model.peer_of(run, exact, shape.PARITY_LAYERS)
    tokens = shape.random_tokens(exact.config, 1, TINY_LENGTH if run.tiny else LENGTH)
    # Gradients first: the logits' check turns the peer to bfloat16.
    run.attempt("gradients", compare_gradients, run, exact, peer, tokens)
    run.attempt("logits", compare_logits, run, stored, exact, peer, tokens)


def compare_logits(run: Run, stored: SmolLM3, exact: SmolLM3, peer: Any, tokens: jax.Array) -> None:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    ids = torch.from_numpy(np.array(tokens)).long().to(peer.device)
    with torch.no_grad():
        with sdpa_kernel([SDPBackend.MATH]):
            expected = peer(ids, use_cache=False).logits.float().cpu().numpy()
        theirs = peer.to(torch.bfloat16)(ids, use_cache=False).logits.float().cpu().numpy()
    run.check("float32 logits: against transformers", relative(exact_logits(exact, tokens), expected), FLOAT32)
    say_ratio(run, "bfloat16 logits", relative(stored(tokens), expected), relative(theirs, expected))


def compare_gradients(run: Run, exact: SmolLM3, peer: Any, tokens: jax.Array) -> None:
    """Of the summed cross-entropy of one document; PyTorch's bfloat16 is autocast's."""
    batch = Batch(tokens, jnp.ones_like(tokens))
    expected, theirs = peer_gradients(peer, tokens, autocast=False), peer_gradients(peer, tokens, autocast=True)
    ours_exact, ours = (
        torch_model.tensors(x) for x in (exact_gradients(exact, batch), gradients(exact, batch, StepOptions()))
    )
    run.check("float32 gradients: against transformers", distance(ours_exact, expected), GRADIENTS)
    say_ratio(run, "bfloat16 gradients", distance(ours, expected), distance(theirs, expected))


def say_ratio(run: Run, what: str, ours: float, theirs: float) -> None:
    """Both errors against PyTorch's float32, and their ratio as what is checked."""
    case = f"{what}: our error in times of PyTorch's own"
    run.check(case, ours / theirs, TIMES_TORCH, ours=ours, theirs=theirs)


def peer_gradients(peer: Any, tokens: jax.Array, autocast: bool) -> dict[str, np.ndarray]:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    ids = torch.from_numpy(np.array(tokens)).long().to(peer.device)
    peer.zero_grad(set_to_none=True)
    fused = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION] if autocast else []
    backends = [*fused, SDPBackend.MATH]
    with torch.autocast(peer.device.type, torch.bfloat16, enabled=autocast), sdpa_kernel(backends, set_priority=True):
        logits = peer(ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum")
    loss.backward()
    return {name: param.grad.float().cpu().numpy() for name, param in peer.named_parameters()}


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The error of all parameters' gradients together."""
    missing = expected.keys() - found.keys()
    assert not missing, missing
    error = sum(float(np.square(found[name] - expected[name], dtype=np.float64).sum()) for name in expected)
    return (error / sum(float(np.square(x, dtype=np.float64).sum()) for x in expected.values())) ** 0.5
