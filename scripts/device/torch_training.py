"""A training step by PyTorch: transformers' model, autocast over float32 weights, checkpointing, compiled layers."""

import time

from . import shape, torch_model
from .run import Run, timed
from .training import LENGTH, TINY_LENGTH, name_of

ENGINE = "transformers"
LOSS_TOKENS = 1024  # whose logits are there at once


def part(run: Run) -> None:
    if not torch_model.usable(run):
        return
    case = name_of(run, 1)
    run.attempt(case, one, run, case)


def one(run: Run, case: str) -> None:
    """One document a row: of packed ones PyTorch's fused attention knows nothing."""
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    begin = time.perf_counter()
    model = torch_model.random_peer(run, "float32").train()
    # transformers calls it "activation" from 5.23 on, and warns of the other name.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    settings: dict = {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.1, "fused": not run.tiny}
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    length, vocab = TINY_LENGTH if run.tiny else LENGTH, shape.raw_config(run.tiny)["vocab_size"]
    ids = torch.randint(3, vocab, (1, length), device=model.device)
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    if not run.tiny:
        torch._dynamo.config.cache_size_limit = 64
        for layer in model.model.layers:
            layer.compile(dynamic=False)

    def step() -> float:
        with torch.autocast(model.device.type, torch.bfloat16), sdpa_kernel(backends, set_priority=True):
            states = model.model(ids, use_cache=False).last_hidden_state[0, :-1]
            pieces = zip(states.split(LOSS_TOKENS), ids[0, 1:].split(LOSS_TOKENS), strict=True)
            losses = [
                functional.cross_entropy(model.lm_head(x).float(), labels, reduction="sum") for x, labels in pieces
            ]
            loss = torch.stack(losses).sum() / (length - 1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    losses = [step()]
    first = time.perf_counter() - begin
    times = timed(lambda: losses.append(step()), 3 if run.tiny else 5, warm_up=1)
    run.say(
        "speed",
        case,
        engine=ENGINE,
        **times,
        tokens_per_second=1e3 * length / times["ms"],
        losses=losses,
        version=torch.__version__,
        first_seconds=first,
    )
