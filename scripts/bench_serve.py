"""What a server does under load: latencies, throughput and goodput of any that speaks OpenAI's API.

    python scripts/bench_serve.py --url http://127.0.0.1:8000 --rate 0.5 1 2 4 [--requests 64] [--out bench.json]
    python scripts/bench_serve.py --url http://127.0.0.1:8000 --concurrency 1 16

An open loop (--rate) sends requests at times that --seed draws, exponentially distributed around the rate, whether or
not earlier ones are answered: what users do, and the only load under which a queue shows. A closed loop (--concurrency)
keeps N requests under way: what throughput is measured by. One level follows the other, each after one request that
is not counted. Two runs with one --seed send the same requests: a server that keeps prefixes knows the second's.

- first token: from sending a request to the first chunk with a token.
- per token: from there to the last chunk, by one token less than the server counts in `usage`.
- gap: between two chunks, which may hold several tokens each.
- tokens/s: tokens that came, by the time from the first request sent to the last chunk.
- good: requests per second that met both --first-limit and --token-limit; what failed or was refused is not good.

With --health the server's /health is asked for all the while, fifty times a second; with --long N one prompt of N words
goes in beside --concurrency streams that decode, and the longest gap between their chunks stands beside the engine's
steps (of `smollm3 serve`, by its /metrics): those with a piece of a prompt and a call of decoding, and calls alone.
Give --new enough for the streams to last.

Prompts are made of common words, each about one token; the servers' own counts are in the result. Requests ask for
--new tokens and, with "ignore_eos" (of vLLM, llama.cpp and smollm3), get them: `--body '{}'` for a server that does
not know it. The client takes a share of the processor: on a small machine, compare servers under the same client.
The chart needs matplotlib, which is in the extra `bench`.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np
from bench_report import machine
from bench_serve_figures import Level, draw, summarize, table, told
from bench_watch import Ask, Health, beside_a_long_prompt, spread
from rich.console import Console

from smollm3_jax.files import write
from smollm3_jax.support import how_to_install

TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name"
)
WORDS = TEXT.split()


class BenchError(Exception):
    """What a user can mend; its text is all that is shown."""


class Planned(NamedTuple):
    """A request: seconds after the level's begin at a rate of 1/s, the prompt (a text or ids), the tokens asked for."""

    at: float
    prompt: str | list[int]
    new: int


def plan(seed: int, number: int, args: argparse.Namespace) -> list[Planned]:
    """The requests of a level, and before them one to warm up with.

    Every level has prompts of its own, whose first --shared words alone are those of all levels: else a server that
    keeps prefixes would know them.
    """
    common = np.random.default_rng(seed).choice(WORDS, size=args.shared)
    rng = np.random.default_rng([seed, number])
    requests = []
    for at in np.cumsum(rng.exponential(size=args.requests + 1)):
        length, tokens = (int(rng.integers(*span, endpoint=True)) for span in (args.prompt, args.new))
        own = rng.choice(WORDS, size=max(0, length - args.shared))
        requests.append(Planned(float(at), " ".join([*common, *own]), tokens))
    return requests


class Server(NamedTuple):
    client: httpx2.AsyncClient
    model: str
    chat: bool
    body: dict[str, Any]

    def request(self, planned: Planned) -> tuple[str, dict[str, Any]]:
        body = {"model": self.model, "max_tokens": planned.new, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "temperature": 0, **self.body}
        if self.chat:
            return "chat/completions", body | {"messages": [{"role": "user", "content": planned.prompt}]}
        return "completions", body | {"prompt": planned.prompt}


def has_token(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta", {})
    said = ("content", "reasoning_content", "reasoning", "tool_calls")
    return bool(choice.get("text") or any(delta.get(name) for name in said))


async def ask(
    server: Server, planned: Planned, clock: Callable[[], float], on_token: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Sends one request and reads its answer; calls `on_token` at each chunk with a token.

    Returns:
      Times in seconds of `clock`: "sent", "chunks" (of all chunks with tokens); "prompt_tokens", "tokens" as the server
      counts them; "error" if it failed, as text without what differs between requests.
    """
    path, body = server.request(planned)
    result: dict[str, Any] = {"sent": clock(), "chunks": [], "prompt_tokens": None, "tokens": 0}
    done = False
    try:
        async with server.client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return result | {"error": f"{response.status_code} {_message(text)}"}
            async for line in response.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line[5:].strip()
                if done := data == "[DONE]":
                    break
                event = json.loads(data)
                if "error" in event:
                    return result | {"error": _message(data)}
                if any(map(has_token, event.get("choices", ()))):
                    result["chunks"].append(clock())
                    on_token()
                if usage := event.get("usage"):
                    result |= {"prompt_tokens": usage["prompt_tokens"], "tokens": usage["completion_tokens"]}
    except (httpx2.HTTPError, ValueError) as error:
        return result | {"error": type(error).__name__}
    if not done:
        return result | {"error": "the stream ended without [DONE]"}
    if not result["chunks"] or not result["tokens"]:
        return result | {"error": "no token came, or `usage` counts none"}
    return result


def _message(text: str) -> str:
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:200]
    except (ValueError, KeyError, TypeError):
        return text[:200]


async def load(server: Server, requests: Sequence[Planned], level: Level) -> list[dict[str, Any]]:
    """Sends all requests as the level says, and waits for the last; in order, with "late": how late each was sent."""
    begin = time.perf_counter()

    def clock() -> float:
        return time.perf_counter() - begin

    if level.rate:

        async def at_its_time(planned: Planned) -> dict[str, Any]:
            due = planned.at / (level.rate or 1)
            await asyncio.sleep(due - clock())
            answer = await ask(server, planned, clock)
            return answer | {"late": answer["sent"] - due}

        return list(await asyncio.gather(*map(at_its_time, requests)))

    results: dict[int, dict[str, Any]] = {}
    waiting = iter(enumerate(requests))

    async def one_after_the_other() -> None:
        for number, planned in waiting:
            results[number] = await ask(server, planned, clock) | {"late": 0.0}

    await asyncio.gather(*(one_after_the_other() for _ in range(level.concurrency or 1)))
    return [results[number] for number in range(len(requests))]


async def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    """All levels against one server; see `save` for the result."""
    headers = {"Authorization": f"Bearer {args.key}"} if args.key else {}
    base = args.url.rstrip("/").removesuffix("/v1") + "/v1/"
    options: dict[str, Any] = {"limits": httpx2.Limits(max_connections=None), "timeout": httpx2.Timeout(args.timeout)}
    async with httpx2.AsyncClient(base_url=base, headers=headers, trust_env=False, **options) as client:
        server = Server(client, args.model or await first_model(client), args.chat, args.body)
        levels = []
        for number, level in enumerate(args.levels):
            first, *requests = plan(args.seed, number, args)
            (warm,) = await load(server, [first], Level(concurrency=1))
            if "error" in warm:
                raise BenchError(f"{base}: {warm['error']}")
            say(f"{level}: {args.requests} requests")
            long: dict[str, Any] = {}
            with Health(base.removesuffix("/v1/")) if args.health else contextlib.nullcontext() as health:
                if args.long:
                    results, long = await load_with_long(server, requests, level, args)
                else:
                    results = await load(server, requests, level)
            summary = summarize(results, args.first_limit, args.token_limit) | ({"long": long} if long else {})
            levels.append((level, summary | ({"health": spread(health.seconds)} if health else {}), results))
    return {"model": server.model, "levels": levels}


async def load_with_long(
    server: Server, requests: Sequence[Planned], level: Level, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """As `beside_a_long_prompt`: as many streams as the level says, and a prompt of --long words."""
    begin = time.perf_counter()

    def asking(planned: Planned) -> Ask:
        return lambda on_token: ask(server, planned, lambda: time.perf_counter() - begin, on_token)

    async def metrics() -> str:
        response = await server.client.get(str(server.client.base_url).removesuffix("/v1/") + "/metrics")
        return response.text if response.status_code == 200 else ""

    words = np.random.default_rng([args.seed, level.concurrency or 1]).choice(WORDS, size=args.long)
    streams = [asking(planned) for planned in requests[: level.concurrency]]
    results, found = await beside_a_long_prompt(streams, asking(Planned(0.0, " ".join(words), 4)), metrics)
    return [result | {"late": 0.0} for result in results], found


async def first_model(client: httpx2.AsyncClient) -> str:
    try:
        response = await client.get("models")
        if response.status_code != 200:
            raise BenchError(f"{client.base_url}models: {response.status_code} {_message(response.text)}")
        return response.json()["data"][0]["id"]
    except (httpx2.HTTPError, ValueError, LookupError) as error:
        raise BenchError(f"{client.base_url}models names no model ({type(error).__name__}); is it a server?") from error


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; `levels` are those of --rate or --concurrency."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])

    def span(text: str) -> tuple[int, int]:
        low, _, high = text.partition("-")
        found = (int(low), int(high or low))
        if not 0 < found[0] <= found[1]:
            raise ValueError
        return found

    span.__name__ = "length, such as 128 or 64-512,"
    parser.add_argument("--url", required=True, help="of the server, with or without /v1")
    parser.add_argument("--key", default=os.environ.get("OPENAI_API_KEY"), help="(default: OPENAI_API_KEY's)")
    parser.add_argument("--model", help="(default: the first that the server names)")
    load = parser.add_mutually_exclusive_group(required=True)
    load.add_argument("--rate", type=float, nargs="+", metavar="R", help="requests a second, an open loop")
    load.add_argument("--concurrency", type=int, nargs="+", metavar="N", help="requests at a time, a closed loop")
    parser.add_argument("--requests", type=int, default=64, metavar="N", help="of each level (default: 64)")
    parser.add_argument("--prompt", type=span, default=(256, 256), metavar="N[-M]", help="words (default: 256)")
    parser.add_argument("--shared", type=int, default=0, metavar="N", help="words with which all prompts begin")
    parser.add_argument("--new", type=span, default=(64, 64), metavar="N[-M]", help="tokens asked for (default: 64)")
    long_help = "words of one prompt more, sent when all of --concurrency have tokens: how long do they wait for it?"
    parser.add_argument("--long", type=int, metavar="N", help=long_help)
    parser.add_argument("--health", action="store_true", help="ask for /health meanwhile: how soon is it answered?")
    parser.add_argument("--chat", action="store_true", help="chat completions; completions else")
    parser.add_argument("--body", default='{"ignore_eos": true}', metavar="JSON", help="fields of every request")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and prompts")
    parser.add_argument("--first-limit", type=float, default=1.0, metavar="S", help="a good first token (default: 1)")
    parser.add_argument(
        "--token-limit", type=float, default=0.1, metavar="S", help="a good time per token (default: 0.1)"
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="without a byte (default: 600)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="every request, and a chart in FILE.png")
    args = parser.parse_args(argv)
    args.levels = [Level(rate=x) for x in args.rate or ()] + [Level(concurrency=x) for x in args.concurrency or ()]
    if args.requests < 1 or any((level.rate or level.concurrency or 0) <= 0 for level in args.levels):
        parser.error("--requests, --rate and --concurrency are above 0")
    if args.long is not None and (args.rate or args.long < 1 or args.requests < max(args.concurrency)):
        parser.error("--long is above 0 and goes with --concurrency, and --requests is no less than that")
    if args.out and (args.out.suffix != ".json" or not args.out.absolute().parent.is_dir()):
        parser.error(f"--out is {args.out}; it must end in .json, in a folder that exists")
    try:
        args.body = json.loads(args.body)
    except ValueError:
        args.body = None
    if not isinstance(args.body, dict):
        parser.error("--body is no JSON object")
    return args


def save(result: dict[str, Any], args: argparse.Namespace) -> None:
    """The JSON file, times of every chunk included, and, where there is matplotlib, the chart beside it."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("key", "levels")}
    levels = [{**level._asdict(), "summary": s, "results": results} for level, s, results in result["levels"]]
    content = {"model": result["model"], "settings": settings, "client": machine(1), "levels": levels}
    write(args.out, json.dumps(content) + "\n")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(
            [(level, s) for level, s, _ in result["levels"]],
            f"{result['model']}, {args.url}",
            args.out.with_suffix(".png"),
        )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if args.out and importlib.util.find_spec("matplotlib") is None:
        say(f"no chart: matplotlib is missing; {how_to_install('bench')}")
    try:
        result = asyncio.run(measure(args, say))
    except BenchError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    Console().print(table([(level, summary) for level, summary, _ in result["levels"]]))
    for level, summary, _ in result["levels"]:
        for message, count in summary["errors"].items():
            say(f"{level}: {count} failed: {message}")
        for line in told(summary):
            say(f"{level}: {line}")
        if summary["late"] > 0.05:
            say(f"{level}: a request was sent {summary['late']:.2f} s late: this client cannot keep up")
    if args.out:
        save(result, args)


if __name__ == "__main__":
    main()
