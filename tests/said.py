"""Deltas as an engine would give them for tokens that nobody computed."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from smollm3_jax.config import GenerationConfig, ModelConfig
from smollm3_jax.generation import sequence
from smollm3_jax.generation.requests import Delta, Request
from smollm3_jax.generation.sampling import MAX_LOGPROBS
from smollm3_jax.serve.job import Job, Server
from smollm3_jax.tokenizer import Tokenizer, load_tokenizer


def server_of(folder: Path, context: int = 4096, name: str = "SmolLM3-3B") -> Server:
    config = ModelConfig.from_hf(folder)
    tokenizer = load_tokenizer(folder, config)
    return Server(name, tokenizer, config, GenerationConfig.from_hf(folder, config), context)


def deltas(
    server: Server, request: Request, ids: Sequence[int], cuts: Sequence[int] = (), sample: int = 0
) -> list[Delta]:
    """What a request's sample says that generates these ids, handed out in pieces; `cuts` are places between them.

    The log-probability of the token at place i is -i / 8, and the likeliest tokens are those with the ids 0, 1, ...
    """
    own = {"generation_config": server.generation_config, "adapters": tuple(server.adapters)}
    model: Any = SimpleNamespace(config=server.config, **own)
    of = sequence.Sequence(model, 0, sample, request, server.tokenizer)
    found, ids = [], ids[: request.params.max_new_tokens]
    for start, end in pairwise(sorted({0, len(ids), *(cut for cut in cuts if cut < len(ids))})):
        piece, places = np.array([ids[start:end]]), np.arange(start, end)
        tops = np.broadcast_to(np.arange(MAX_LOGPROBS), (1, end - start, MAX_LOGPROBS))
        chosen: Any = SimpleNamespace(tokens=piece, logprobs=-places[None] / 8, top_ids=tops, top_logprobs=-tops / 8.0)
        found.append(of.take(0, chosen))
        if found[-1].finish_reason is not None:
            break
    return found


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Of an answer, whose tags and ends are tokens."""
    return tokenizer.encode(text, add_special_tokens=False)


def prompt_text(server: Server, job: Job) -> str:
    """What the model reads for the first request, control tokens included."""
    ids: Any = job.requests[0].prompt
    return server.tokenizer.decode(ids, skip_special_tokens=False)


def answer(
    server: Server, job: Job, *texts: str | Sequence[int], cuts: Sequence[int] = ()
) -> tuple[list[Any], dict[str, Any]]:
    """The events and the body of a job whose samples (of all requests, in turn) say these texts or ids."""
    n = job.requests[0].params.n
    events = job.reply.begin()
    for i, text in enumerate(texts):
        request = job.requests[i // n]
        ids = ids_of(server.tokenizer, text) if isinstance(text, str) else text
        for delta in deltas(server, request, ids, cuts, i % n):
            events += job.reply.add(i // n, delta)
    return events + job.reply.end(), job.reply.body()
