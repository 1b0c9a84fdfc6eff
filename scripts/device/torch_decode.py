"""Decoding by PyTorch in gpt-fast's way: plain functions, a static cache, each layer compiled, the step one CUDA graph.

(https://github.com/pytorch-labs/gpt-fast is the way that is meant; the code is this project's own.)
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import shape, torch_model
from .decode import CASES, MAX_STEPS, ROUNDS, TINY_CASES, name_of
from .run import Run, scaled, timed

if TYPE_CHECKING:
    from torch import Tensor

ENGINE = "gpt-fast's way"


def part(run: Run) -> None:
    if not torch_model.usable(run):
        return
    for batch, held, capacity in TINY_CASES if run.tiny else CASES:
        case = name_of(batch, held)
        run.attempt(case, one, run, case, batch, held, capacity)


def one(run: Run, case: str, batch: int, held: int, capacity: int) -> None:
    import torch

    begin = time.perf_counter()
    with torch.no_grad():
        step, position = decoder(run, batch, held, capacity)
        for _ in range(3):
            step()
        if not run.tiny and run.cuda_graphs:
            step = captured(step)
        first = time.perf_counter() - begin

        def call() -> None:
            for _ in range(MAX_STEPS):
                step()
            torch_model.synchronize(run)

        times = scaled(timed(call, 3 if run.tiny else ROUNDS, before=lambda: position.fill_(held)), 1 / MAX_STEPS)
    run.say(
        "speed",
        case,
        engine=ENGINE,
        **times,
        tokens_per_second=1e3 * batch / times["ms"],
        capacity=capacity,
        version=torch.__version__,
        first_seconds=first,
    )
    if not run.tiny:
        torch.cuda.empty_cache()
        torch._dynamo.reset()


def captured(step: Callable[[], None]) -> Callable[[], None]:
    import torch

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def decoder(run: Run, batch: int, held: int, capacity: int) -> "tuple[Callable[[], None], Tensor]":
    """(chooses one token for every row, the tensor of where it goes); weights and cache are random."""
    import torch
    from torch import Tensor
    from torch.nn import functional

    raw, device = shape.raw_config(run.tiny), torch_model.device(run)
    width, mlp, heads, kv_heads, head = (
        raw[key]
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    sizes = (heads * head, kv_heads * head, kv_heads * head)

    def random(*dims: int) -> Tensor:
        return 0.02 * torch.randn(*dims, device=device, dtype=torch.bfloat16)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (width,), weight, raw["rms_norm_eps"])

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def layer(
        x: Tensor, w: list, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, position: Tensor, mask: Tensor
    ) -> Tensor:
        qkv, o, gate_up, down, attn_norm, mlp_norm = w
        parts = (norm(x, attn_norm) @ qkv.T).split(sizes, -1)
        q, k, v = (part.view(batch, 1, -1, head).transpose(1, 2) for part in parts)
        keys.index_copy_(2, position, rotate(k, cos, sin))
        values.index_copy_(2, position, v)
        mixed = functional.scaled_dot_product_attention(
            rotate(q, cos, sin), keys, values, attn_mask=mask, enable_gqa=True
        )
        x = x + mixed.transpose(1, 2).reshape(batch, 1, -1) @ o.T
        gate, up = (norm(x, mlp_norm) @ gate_up.T).chunk(2, -1)
        return x + (functional.silu(gate) * up) @ down.T

    ones = torch.ones(width, device=device, dtype=torch.bfloat16)
    embed, count = random(raw["vocab_size"], width), raw["num_hidden_layers"]
    shapes = ((sum(sizes), width), (width, heads * head), (2 * mlp, width), (width, mlp))
    weights = [[*(random(*dims) for dims in shapes), ones.clone(), ones.clone()] for _ in range(count)]
    caches = [(random(batch, kv_heads, capacity, head), random(batch, kv_heads, capacity, head)) for _ in range(count)]
    frequency = raw["rope_theta"] ** (-torch.arange(0, head, 2, device=device).float() / head)
    position = torch.tensor([held], device=device)
    token = torch.zeros(batch, 1, dtype=torch.long, device=device)
    index = torch.arange(capacity, device=device)
    still = (torch.ones_like(frequency).bfloat16()[None], torch.zeros_like(frequency).bfloat16()[None])
    run_layer = layer if run.tiny else torch.compile(layer, fullgraph=True, dynamic=False)

    def step() -> None:
        angle = position.float()[:, None] * frequency
        turned, mask = (angle.cos().bfloat16(), angle.sin().bfloat16()), (index <= position)[None, None, None]
        x = embed[token]
        for use_rope, w, cache in zip(raw["no_rope_layers"], weights, caches, strict=True):
            x = run_layer(x, w, *cache, *(turned if use_rope else still), position, mask)
        token.copy_((norm(x, ones) @ embed.T).float().argmax(-1))
        position.add_(1)

    return step, position
