"""The engines that bench_inference.py measures, each alone in a process that loads once and then answers.

    python scripts/bench_peers.py '{"engine": "smollm3_jax", "folder": ..., "dtype": ..., "weights": ..., "threads": 2}'

A command is a line of JSON on stdin, its answer a line on stdout; before the first command it reports the load:

    {"do": "prefill", "prompts": [[1, 2, 3]]}          -> {"seconds": ..., "peak_bytes": ...}
    {"do": "decode", "prompts": [[1, 2, 3]], "new": 64} -> {"seconds": ..., "peak_bytes": ..., "tokens": [[...]]}

bench_llama.mjs speaks the same protocol for llama.cpp.
"""

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
Tokens = list[list[int]]


class BenchError(Exception):
    """What keeps the benchmark from running; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """prefill: computes the next token of one prompt; generate: that many greedy tokens for each prompt."""

    prefill: Callable[[Tokens], object]
    generate: Callable[[Tokens, int], Tokens]
    packages: tuple[str, ...]


def smollm3_jax(folder: str, dtype: str, weights: str | None, threads: int) -> Engine:
    """This package: all that touches its interface. XLA takes its threads from the cores that it may run on."""
    import jax

    import smollm3_jax as s3

    quantized: dict[str, Any] = {} if weights is None else {"weights": weights}
    try:
        model = s3.from_pretrained(folder, dtype, **quantized)
    except s3.SmolLM3Error as error:
        raise BenchError(str(error)) from error
    jax.block_until_ready(model)

    def generate(prompts: Tokens, new: int) -> Tokens:
        params = s3.SamplingParams(max_new_tokens=new, temperature=0.0, ignore_eos=True)
        return s3.generate(model, prompts, params)

    return Engine(lambda prompts: generate(prompts, 1), generate, ("jax", "jaxlib"))


def transformers(folder: str, dtype: str, weights: str | None, threads: int) -> Engine:
    """transformers with its defaults (sdpa attention, dynamic cache); int8 weights it has none for a CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.inference_mode():  # the file is only mapped: touch every page of it, so that loading is loading
        sum(float(parameter.flatten()[::1024].sum()) for parameter in model.parameters())

    def prefill(prompts: Tokens) -> int:
        with torch.inference_mode():
            return int(model(torch.tensor(prompts), use_cache=True, logits_to_keep=1).logits[0, -1].argmax())

    def generate(prompts: Tokens, new: int) -> Tokens:
        ids = torch.tensor(prompts)
        options = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new, "use_cache": True}
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[:, ids.shape[1] :].tolist()

    return Engine(prefill, generate, ("transformers", "torch"))


ENGINES = {"smollm3_jax": smollm3_jax, "transformers": transformers}


def answer(engine: Engine, command: dict[str, Any]) -> dict[str, Any]:
    """One measurement. Decode is what `new` + 1 tokens take beyond 1 token: `new` steps without their prefill."""
    prompts = command["prompts"]
    if command["do"] == "prefill":
        return {"seconds": _timed(engine.prefill, prompts)[0]}
    one, _ = _timed(engine.generate, prompts, 1)
    all_, tokens = _timed(engine.generate, prompts, command["new"] + 1)
    if any(len(row) != command["new"] + 1 for row in tokens):
        raise BenchError(f"asked for {command['new'] + 1} tokens a row, it made {[len(row) for row in tokens]}")
    return {"seconds": all_ - one, "first_seconds": one, "tokens": tokens}


def _timed(function: Callable[..., T], *arguments: Any) -> tuple[float, T]:
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def peak_bytes() -> int:
    """The most memory this process ever had resident, mapped files included."""
    found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "/proc/self/status has no VmHWM: the benchmark needs Linux"
    return int(found[1]) * 1024


def serve(settings: dict[str, Any]) -> None:
    """Loads, reports, and answers until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def reply(content: dict[str, Any]) -> None:
        replies.write(json.dumps(content | {"peak_bytes": peak_bytes()}) + "\n")

    load = ENGINES[settings.pop("engine")]
    seconds, engine = _timed(lambda: load(**settings))
    reply({"seconds": seconds, "versions": {name: version(name) for name in engine.packages}})
    for line in sys.stdin:
        reply(answer(engine, json.loads(line)))


if __name__ == "__main__":
    try:
        serve(json.loads(sys.argv[1]))
    except BenchError as error:
        sys.exit(str(error))
