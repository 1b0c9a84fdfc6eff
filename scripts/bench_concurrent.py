"""Throughput of many requests at a time: `smollm3 serve`, its engine without a server, and llama.cpp, in one run.

    python scripts/bench_concurrent.py [--model demo] [--dtype float32] [--slots 16] [--requests 32] [--peer llama.cpp]

All get the same prompts, as token ids, and generate --new tokens for each, greedily, whatever ends come. In every round
each of them has all --requests, in turn, so that a busy machine is busy for all; what counts is the median. Round 0
warms up. Tokens per second are generated tokens by the time from the first request to the last token, prefill included.
CPU is what the processes used meanwhile, the client of the server included: what can be compared where other work has
the cores as well.

- serve: a process of `smollm3 serve`. This one keeps --slots requests under way, streamed over HTTP, on the same cores.
- engine: an `Engine` of the same shape in a process of its own, as `smollm3 generate --slots --context` has it: all
  requests are submitted at once, and prompts go in as soon as a slot is free.
- llama.cpp: node-llama-cpp's library, without a server: as many sequences in one context as there are slots, all of
  which begin together and are one batch in every step. (bench_inference.py says how to install it.)
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from bench_inference import GGUF_KINDS, LLAMA, Worker, busy_seconds, node_folder
from bench_models import gguf_of
from bench_peers import BenchError
from bench_report import machine
from bench_serve import WORDS, Planned, Server, load
from bench_serve_figures import Level, summarize
from rich.console import Console
from rich.table import Table

from smollm3_jax.config import ModelConfig
from smollm3_jax.files import write
from smollm3_jax.tokenizer import load_tokenizer
from smollm3_jax.weights.demo import model_folder

SERVE, ENGINE = "serve", "engine"


def engine_process(settings: dict[str, Any]) -> None:
    """Answers lines of {"prompts": [[1, 2, 3]], "new": 64} on standard input with {"seconds": ..., "count": ...}."""
    import smollm3_jax as s3
    from smollm3_jax.generation.engine import Engine
    from smollm3_jax.generation.prompts import SERVING_PIECES

    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    model = s3.from_pretrained(settings["folder"], settings["dtype"])
    shape = {"slots": settings["slots"], "context": settings["context"]}
    engine = Engine(model, **shape, piece_sizes=SERVING_PIECES, prefill_tokens=None)
    engine.warm_up()
    print("{}", file=replies)
    for line in sys.stdin:
        command, count, began = json.loads(line), 0, time.perf_counter()
        params = s3.SamplingParams(max_new_tokens=command["new"], ignore_eos=True)
        for prompt in command["prompts"]:
            engine.submit(s3.Request(prompt, params))
        count = sum(len(delta.token_ids) for delta in engine.drain())
        print(json.dumps({"seconds": time.perf_counter() - began, "count": count}), file=replies)


@contextlib.contextmanager
def serving(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """The address of a server that is ready, and its process."""
    command = [sys.executable, "-m", "smollm3_jax", "serve", args.model, "--port", "0", "--dtype", args.dtype]
    command += ["--slots", str(args.slots), "--context", str(args.context), "--no-prefix-cache"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline().split()
            if said[:1] != ["ready"]:
                raise BenchError("the server did not start")
            yield said[1], process.pid
        finally:
            process.terminate()
            process.wait()


def serve(url: str, prompts: Sequence[list[int]], args: argparse.Namespace) -> float:
    """Tokens per second of a server."""

    async def run() -> dict[str, Any]:
        options: dict[str, Any] = {"limits": httpx2.Limits(max_connections=None), "timeout": httpx2.Timeout(600)}
        async with httpx2.AsyncClient(base_url=f"{url}/v1/", trust_env=False, **options) as client:
            server = Server(client, (await client.get("models")).json()["data"][0]["id"], False, {"ignore_eos": True})
            planned = [Planned(0.0, ids, args.new) for ids in prompts]
            return summarize(await load(server, planned, Level(concurrency=args.slots)), 1.0, 1.0)

    summary = asyncio.run(run())
    if summary["tokens"] != len(prompts) * args.new:
        raise BenchError(f"the server made {summary['tokens']} tokens: {summary['errors']}")
    return summary["tokens_per_second"]


def engine(worker: Worker, prompts: Sequence[list[int]], args: argparse.Namespace) -> float:
    """Tokens per second of the engine alone."""
    answer = worker.ask({"prompts": prompts, "new": args.new})
    assert answer["count"] == len(prompts) * args.new
    return answer["count"] / answer["seconds"]


def llama(worker: Worker, prompts: Sequence[list[int]], args: argparse.Namespace) -> float:
    """Tokens per second of llama.cpp: a prompt's prefill gives the first of its tokens."""
    waves = [prompts[i : i + args.slots] for i in range(0, len(prompts), args.slots)]
    answers = [worker.ask({"do": "generate", "prompts": wave, "new": args.new - 1}) for wave in waves]
    assert all(len(row) == args.new for answer in answers for row in answer["tokens"])
    return len(prompts) * args.new / sum(answer["seconds"] for answer in answers)


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """What each has done in each round: tokens per second, and CPU seconds a thousand tokens."""
    folder = model_folder(args.model)
    tokenizer = load_tokenizer(folder, ModelConfig.from_hf(folder))
    shape = {"folder": str(folder), "dtype": args.dtype, "slots": args.slots, "context": args.context}
    with contextlib.ExitStack() as stack:
        url, server = stack.enter_context(serving(args))
        own = stack.enter_context(Worker(ENGINE, [sys.executable, __file__, "--engine", json.dumps(shape)]))
        runs: dict[str, tuple[Callable[..., float], list[int]]] = {
            SERVE: (lambda prompts: serve(url, prompts, args), [server, os.getpid()]),
            ENGINE: (lambda prompts: engine(own, prompts, args), [own.pid]),
        }
        if LLAMA in args.peer:
            script, file = Path(__file__).with_name("bench_llama.mjs"), gguf_of(folder, GGUF_KINDS[args.dtype])
            threads = str(len(os.sched_getaffinity(0)))
            peer = stack.enter_context(Worker(LLAMA, ["node", str(script), str(node_folder()), str(file), threads]))
            runs[LLAMA] = (lambda prompts: llama(peer, prompts, args), [peer.pid])
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for number in range(args.rounds + 1):
            rng = np.random.default_rng(number)
            texts = [" ".join(rng.choice(WORDS, size=args.prompt)) for _ in range(args.requests)]
            prompts = [tokenizer.encode(text)[: args.prompt] for text in texts]
            for name, (run, processes) in runs.items():
                before = [busy_seconds(process) for process in processes]
                rate = run(prompts)
                used = [busy_seconds(process) - first for process, first in zip(processes, before, strict=True)]
                cpu = [1000 * seconds / (args.requests * args.new) for seconds in used]
                found, of_client = {"rate": rate, "cpu": sum(cpu)}, f"{cpu[1]:.2f} s the client's" if cpu[1:] else ""
                print(f"round {number}: {name}: {rate:.0f} tokens/s, CPU {sum(cpu):.2f} s {of_client}", file=sys.stderr)
                rounds[name] += [found] if number else []
    return rounds


def ratios(rounds: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """How many times better the server is than each other: by the medians, in tokens per second and in CPU, and the
    lowest and highest of a round in tokens per second."""

    def values(name: str, what: str) -> list[float]:
        return [one[what] for one in rounds[name]]

    found = {}
    for name in (x for x in rounds if x != SERVE):
        single = [a / b for a, b in zip(values(SERVE, "rate"), values(name, "rate"), strict=True)]
        rate = statistics.median(values(SERVE, "rate")) / statistics.median(values(name, "rate"))
        cpu = statistics.median(values(name, "cpu")) / statistics.median(values(SERVE, "cpu"))
        found[name] = {"rate": rate, "cpu": cpu, "low": min(single), "high": max(single)}
    return found


def table(rounds: dict[str, list[dict[str, float]]]) -> Table:
    result = Table("", "tokens/s", "serve / this", "single rounds", "CPU s, 1,000 tokens", "this / serve")
    found = ratios(rounds)
    for name, ones in rounds.items():
        rate, cpu = (statistics.median(one[what] for one in ones) for what in ("rate", "cpu"))
        own = found.get(name)
        speed = ("", "") if own is None else (f"{own['rate']:.2f}", f"{own['low']:.2f} to {own['high']:.2f}")
        result.add_row(name, f"{rate:.0f}", *speed, f"{cpu:.2f}", "" if own is None else f"{own['cpu']:.2f}")
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo", help="(default: demo)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--peer", action="append", default=[], choices=[LLAMA])
    parser.add_argument("--slots", type=int, default=16, metavar="N", help="requests at a time (default: 16)")
    parser.add_argument("--requests", type=int, default=32, metavar="N", help="of each round (default: 32)")
    parser.add_argument("--prompt", type=int, default=64, metavar="N", help="tokens (default: 64)")
    parser.add_argument("--new", type=int, default=96, metavar="N", help="tokens (default: 96)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--engine", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if min(args.slots, args.requests, args.prompt, args.rounds) < 1 or args.new < 2:
        parser.error("all numbers are above 0, and --new above 1")
    args.context = args.prompt + args.new
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.engine:
        engine_process(args.engine)
        return
    try:
        rounds = measure(args)
    except BenchError as error:
        sys.exit(str(error))
    Console().print(table(rounds))
    if args.out:
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
        write(args.out, json.dumps({"settings": settings, "machine": machine(1), "rounds": rounds}, indent=2) + "\n")


if __name__ == "__main__":
    main()
