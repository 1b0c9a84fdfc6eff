"""Decoding by transformers itself: a static cache, torch.compile(mode="reduce-overhead"), greedy."""

import inspect
import time

from . import shape, torch_model
from .decode import MAX_STEPS, ROUNDS, name_of
from .run import Run, scaled, timed

ENGINE = "transformers"
CASE, TINY_CASE = (1, 512, 1024), (1, 64, 128)


def part(run: Run) -> None:
    if not torch_model.usable(run):
        return
    batch, held, capacity = TINY_CASE if run.tiny else CASE
    case = name_of(batch, held)
    run.attempt(case, one, run, case, batch, held, capacity)


def one(run: Run, case: str, batch: int, held: int, capacity: int) -> None:
    import torch
    import transformers

    begin = time.perf_counter()
    model = torch_model.random_peer(run, "bfloat16").eval()
    vocab = shape.raw_config(run.tiny)["vocab_size"]
    mode = "reduce-overhead" if run.cuda_graphs else "default"
    forward = model.forward if run.tiny else torch.compile(model.forward, mode=mode)
    # Versions differ in whether they take it beside position_ids.
    wants_place = "cache_position" in inspect.signature(model.forward).parameters
    with torch.no_grad():
        cache = transformers.StaticCache(config=model.config, max_cache_len=capacity)
        ids = torch.randint(3, vocab, (batch, held), device=model.device)
        state = {"token": model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)}
        position = torch.full((batch, 1), held, device=model.device)

        def step() -> None:
            place = {"cache_position": position[0]} if wants_place else {}
            out = forward(state["token"], position_ids=position, past_key_values=cache, use_cache=True, **place)
            state["token"] = out.logits[:, -1:].argmax(-1).clone()
            position.add_(1)

        def call() -> None:
            for _ in range(MAX_STEPS):
                step()
            torch_model.synchronize(run)

        for _ in range(3):
            step()
        first = time.perf_counter() - begin
        # Its cache counts for itself how many tokens it holds: it is left to grow.
        rounds = min(3 if run.tiny else ROUNDS, (capacity - held) // MAX_STEPS - 3)
        times = scaled(timed(call, rounds, warm_up=1), 1 / MAX_STEPS)
    run.say(
        "speed",
        case,
        engine=ENGINE,
        **times,
        tokens_per_second=1e3 * batch / times["ms"],
        version=transformers.__version__,
        first_seconds=first,
    )
