"""Text generation in calls: `generate` for texts, `complete` for requests, `stream` for what comes as it comes."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from ..errors import OptionError, unknown_name
from ..model import SmolLM3
from ..tokenizer import Tokenizer, tokenizer_of
from .device_loop import MAX_STEPS
from .engine import Engine
from .requests import Completion, Delta, Request, check_request, fitted, with_ids
from .sampling import ELSEWHERE, SamplingParams, with_defaults
from .stats import Stats

log = logging.getLogger(__name__)


def generate(
    model: SmolLM3,
    prompts: str | Iterable[str] | Iterable[Iterable[int]],
    params: SamplingParams | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    **fields: Any,
) -> Any:
    """What the model says after each prompt: text after text, token ids after token ids.

    Prompts may differ in length: a row's result does not depend on the other rows.

    Args:
      prompts: a text, a list of texts, or a list of lists of token ids.
      params: None is what the model's generation_config.json says (see `with_defaults`), which may be to sample.
      tokenizer: for texts; None is the one that came with the model, see `from_pretrained`.
      **fields: of SamplingParams, over those of `params`: generate(model, "Hi", max_new_tokens=8).

    Returns:
      For a text its continuation, or a list of them if params.n > 1. For a list one result for each prompt (for each
      sample of each prompt): texts, or new ids, which end with the end-of-sequence token that was met.

    Raises:
      OptionError: a prompt is empty, no text or list of ids, holds an id outside the vocabulary, is a text where there
        is no tokenizer, or leaves no room in the context; or a field is none.
    """
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in fields:
        if name not in known:
            raise unknown_name("generate", name, [*known, "params", "tokenizer"], ELSEWHERE)
    rows = [prompts] if isinstance(prompts, str) else _rows(prompts)
    texts = isinstance(prompts, str) or (len(rows) > 0 and isinstance(rows[0], str))
    if any(isinstance(row, str) != texts for row in rows):
        raise OptionError("prompts are texts or lists of token ids, not both at once")
    tokenizer = tokenizer or tokenizer_of(model)
    requests = [with_ids(Request(row), model.config, tokenizer, f"prompt {i}") for i, row in enumerate(rows)]
    free = params is None and "max_new_tokens" not in fields  # nobody asked for this number: it need not fit
    own = model.generation_config, model.config.vocab_size
    params = dataclasses.replace(params, **fields) if params else with_defaults(*own, **fields)
    for i, request in enumerate(requests):
        own = fitted(params, len(request.prompt), model.config.max_position_embeddings) if free else params
        # Row i draws with seed + i; the samples of a prompt follow each other.
        own = dataclasses.replace(own, seed=(params.seed + i * params.n) % 2**32)
        requests[i] = dataclasses.replace(request, params=own)
    done = complete(model, requests, tokenizer=tokenizer)
    if not texts:
        return [completion.token_ids for completion in done]
    found = [completion.text for completion in done]
    return found[0] if isinstance(prompts, str) and params.n == 1 else found


def _rows(prompts: Iterable[Any]) -> list[Any]:
    """The prompts of a list, an array of ids [B, T], ...

    Raises:
      OptionError: it is one prompt as a flat list of ids, a chat's messages, or no list.
    """
    try:
        rows = list(prompts)
    except TypeError:
        raise OptionError(
            f"prompts is a {type(prompts).__name__}; give a text, a list of texts, or a list of lists of token ids"
        ) from None
    if any(isinstance(row, Mapping) for row in rows):
        raise OptionError(
            "prompts are texts or lists of token ids, not messages; smollm3_jax.chat.template.encode_chat makes ids of "
            "messages, smollm3_jax.generation.requests.chat_ends what ends an answer"
        )
    if any(np.ndim(row) == 0 and not isinstance(row, str) for row in rows):
        raise OptionError(
            f"prompts is a flat list of {len(rows)} ids; give a list of prompts, each a list of ids: [[1, 2, 3]]"
        )
    return rows


def complete(model: SmolLM3, requests: Sequence[Request], **options: Any) -> list[Completion]:
    """All requests to their end, in order, samples of one request side by side; options as for `stream`."""
    done = [[Completion.empty() for _ in range(request.params.n)] for request in requests]
    for delta in stream(model, requests, **options):
        done[delta.request][delta.sample].add(delta)
    return [completion for samples in done for completion in samples]


def stream(
    model: SmolLM3,
    requests: Iterable[Request | str] | str,
    *,
    tokenizer: Tokenizer | None = None,
    max_slots: int = 64,
    capacity: int | None = None,
    piece_sizes: tuple[int, ...] | None = None,
    cache_dtype: DTypeLike | None = None,
    steps: int = MAX_STEPS,
    lookup: int = 0,
    stats: Stats | None = None,
) -> Iterator[Delta]:
    """Runs requests side by side in slots of the cache, and yields what they say as it comes.

    A slot that has finished takes the next request at once. Closing the iterator stops everything.

    Args:
      requests: read as slots become free if `capacity` is given, at once if it is not. A text is a request with the
        model's own settings, as for `generate`.
      max_slots: the most sequences that run at a time.
      capacity: the most tokens that a sequence may have, its prompt included.
      tokenizer, piece_sizes, cache_dtype, steps, lookup, stats: as for `Engine`. The share of drafted tokens that was
        accepted is logged at the end.

    Raises:
      OptionError: a request that cannot be run, when its turn comes.
      OutOfMemoryError: the slots do not fit into memory.
    """
    tokenizer = tokenizer or tokenizer_of(model)
    queue: Iterable[Request] = _requests(model, [requests] if isinstance(requests, str) else requests, tokenizer)
    if capacity is None:
        queue = list(queue)
        for index, request in enumerate(queue):
            check_request(model.config, model.generation_config, request, tokenizer, None, lookup, f"prompt {index}")
        capacity = max((len(r.prompt) + r.params.max_new_tokens for r in queue), default=0)
        max_slots = min(max_slots, sum(r.params.n for r in queue))
    if not max_slots:
        return
    shape: dict[str, Any] = {"slots": max_slots, "context": capacity, "piece_sizes": piece_sizes, "steps": steps}
    given: dict[str, Any] = {"tokenizer": tokenizer, "cache_dtype": cache_dtype, "lookup": lookup, "stats": stats}
    engine = Engine(model, prefill_tokens=None, **shape, **given)
    waiting = enumerate(queue)
    with contextlib.closing(engine):
        while True:
            while engine.has_room:
                index, request = next(waiting, (0, None))
                if request is None:
                    break
                engine.submit(request, f"prompt {index}")
            if engine.is_idle:
                break
            yield from engine.step()
    if engine.drafted:
        share = 100 * engine.accepted / engine.drafted
        log.info("prompt lookup: %d of %d drafted tokens accepted (%.0f %%)", engine.accepted, engine.drafted, share)


def _requests(model: SmolLM3, requests: Iterable[Request | str], tokenizer: Tokenizer | None) -> Iterator[Request]:
    for i, request in enumerate(requests):
        name = f"prompt {i}"
        if not isinstance(request, Request | str):
            raise OptionError(f"{name} is a {type(request).__name__}; it must be a Request or a text")
        one = with_ids(Request(request) if isinstance(request, str) else request, model.config, tokenizer, name)
        if isinstance(request, str):
            params = with_defaults(model.generation_config, model.config.vocab_size)
            one = dataclasses.replace(one, params=fitted(params, len(one.prompt), model.config.max_position_embeddings))
        yield one
