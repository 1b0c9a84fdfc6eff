"""Perplexity on held-out text, computed as text is generated: one token a step, from the cache.

So what quantization costs is measured with the kernels that decode: those for few rows, with the
activations rounded as they are there, and with the cache's own dtype.

Shapes: B documents side by side, T tokens of each, V vocabulary.
"""

import codecs
import functools
import itertools
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from .. import text_files
from ..compile_cache import enable
from ..errors import OptionError
from ..file_kind import what_it_is
from ..kv_cache import KVCache, empty_cache
from ..model import SmolLM3, where_it_lies
from ..progress import tally
from ..quantize import kernel
from ..sizes import power_of_two_from
from ..tokenizer import Tokenizer

log = logging.getLogger(__name__)

ROWS = 24
# Of one call: the program is compiled once.
STEPS = 32


def read_documents(path: Path, tokenizer: Tokenizer, max_tokens: int, length: int) -> dict[str, list[list[int]]]:
    """The beginnings of a file's documents, as token ids, by language: `encode_texts` of `read_texts`."""
    return encode_texts(path, read_texts(path)[0], tokenizer, max_tokens, length)


def read_texts(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The texts of a file by language, and why others were skipped: half a surrogate pair is no text.

    Args:
      path: JSON lines, each with a "text", and a "language" if there are several; compressed or not.

    Raises:
      OptionError: the file is missing, or no such file.
      DataError: it is damaged, or not in UTF-8.
    """
    texts: dict[str, list[str]] = {}
    skipped = []
    try:
        lines = text_files.read(path).splitlines()
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        line = line.strip().removeprefix(codecs.BOM_UTF8)  # within, of files that were joined
        if not line:
            continue
        fields: Any = None
        try:
            fields = json.loads(line)
            text, language = fields["text"], fields.get("language") or ""
            if not isinstance(text, str) or not isinstance(language, str):
                raise TypeError("text and language must be strings")
            f"{language}{text}".encode()
        except UnicodeEncodeError:
            skipped.append(f"{path}: line {number} is skipped: half a surrogate pair, which is no text")
            log.warning("%s", skipped[-1])
            continue
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            there = f"; it has {', '.join(list(fields)[:10])}"[:300] if isinstance(error, KeyError) else ""
            reason = (number == 1 and what_it_is(path)) or f"{error!r}{there}"
            raise OptionError(f'{path}: line {number} is no JSON object with a "text": {reason}') from None
        texts.setdefault(language, []).append(text)
    return texts, skipped


def encode_texts(
    path: Path, texts: Mapping[str, Sequence[str]], tokenizer: Tokenizer, max_tokens: int, length: int
) -> dict[str, list[list[int]]]:
    """Token ids of the texts' beginnings, by language.

    Args:
      path: what to name where there is nothing in them.
      max_tokens: how many tokens to take in all; as many of each language, as far as there are.
      length: how many to take of a document at most.

    Raises:
      OptionError: a number is too small, or there is no text of two tokens or more.
    """
    if length < 2 or max_tokens < 2:
        raise OptionError(f"length {length} and max_tokens {max_tokens} must be at least 2")
    documents: dict[str, list[list[int]]] = {language: [] for language in texts}
    left = max_tokens
    rounds = itertools.zip_longest(*([(language, text) for text in of] for language, of in texts.items()))
    for language, text in (pair for pairs in rounds for pair in pairs if pair is not None):
        ids = tokenizer.encode(text)[: min(length, left)]
        if len(ids) < 2:
            continue
        documents[language].append(ids)
        left -= len(ids)
        if left < 2:
            break
    if not any(documents.values()):
        raise OptionError(f"{path} holds no text of two tokens or more")
    return documents


def perplexity(
    model: SmolLM3,
    documents: Mapping[str, Sequence[Sequence[int]]],
    cache_dtype: DTypeLike | None = None,
) -> dict[str, Any]:
    """The perplexity of a document's tokens, each given those before it in the document.

    Args:
      documents: token ids by language, at least two of each document, none outside the vocabulary.
      cache_dtype: None is the model's own; "int8" quantizes it.

    Returns:
      perplexity, nats_per_token and tokens, of all and of each language; and what computed them. Ready for
      json.dumps: None in place of numbers that are not finite.
    """
    enable()
    model = where_it_lies(model)
    rows = [(language, document) for language, of in documents.items() for document in of]
    batch = min(ROWS, len(rows))
    if model.sharding is not None:  # as many rows as the mesh divides, though some of them stay empty
        batch = -(-batch // model.sharding.parts("batch")) * model.sharding.parts("batch")
    dtype = jnp.dtype(cache_dtype or model.cache_dtype)
    nats = dict.fromkeys(documents, 0.0)
    counts = dict.fromkeys(documents, 0)
    with tally("documents", len(rows)) as report:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            sums = _nats(model, [document for _, document in part], batch, dtype)
            for (language, document), value in zip(part, sums, strict=True):
                nats[language] += value
                counts[language] += len(document) - 1
            report(start + len(part), sum(counts.values()))
    scheme = model.config.quantization and model.config.quantization.weights
    by = kernel(scheme, batch, model.platform)
    return {
        **_measures(sum(nats.values()), sum(counts.values())),
        "languages": {language: _measures(nats[language], counts[language]) for language in documents},
        "documents": len(rows),
        "longest": max(len(document) for _, document in rows),
        "weights": scheme or model.dtype.name,
        "activations": "int8 with an int8 remainder" if by == "integer" else model.dtype.name,
        "cache": dtype.name,
        "dtype": model.dtype.name,
        "kernel": by,
        "rows": batch,
        "platform": model.platform,
    }


def _measures(nats: float, tokens: int) -> dict[str, Any]:
    mean = nats / max(tokens, 1)
    finite = math.isfinite(mean) and mean < 700
    return {
        "perplexity": math.exp(mean) if finite else None,
        "nats_per_token": mean if finite else None,
        "tokens": tokens,
    }


def _nats(model: SmolLM3, documents: Sequence[Sequence[int]], batch: int, dtype: np.dtype) -> list[float]:
    """-log p of each document's tokens but the first, summed."""
    steps = -(-(max(map(len, documents)) - 1) // STEPS) * STEPS
    tokens_BT = np.full((batch, steps + 1), -1, np.int32)
    for row, document in enumerate(documents):
        tokens_BT[row, : len(document)] = document
    cache = empty_cache(model.config, batch, max(128, power_of_two_from(steps)), dtype, model.sharding)
    sums_B = np.zeros(batch)
    for start in range(0, steps, STEPS):
        piece = jnp.asarray(tokens_BT[:, start : start + STEPS + 1])
        cache, nats_TB = _score(model, cache, piece)
        sums_B += np.asarray(nats_TB, np.float64).sum(axis=0)
    return sums_B[: len(documents)].tolist()


@functools.partial(jax.jit, donate_argnames="cache")
def _score(model: SmolLM3, cache: KVCache, tokens_BT: Array) -> tuple[KVCache, Array]:
    """-log p, float32 [T - 1, B], of each token but the first; 0 where there is none (-1)."""

    def step(cache: KVCache, pair: tuple[Array, Array]) -> tuple[KVCache, Array]:
        token_B, next_B = pair
        x_B1D, new = model.hidden(
            jnp.maximum(token_B, 0)[:, None],
            segment_ids=(token_B >= 0).astype(jnp.int32)[:, None],
            cache=cache,
        )
        logits_BV = model.unembed(x_B1D[:, 0])
        chosen_B = jnp.take_along_axis(logits_BV, jnp.maximum(next_B, 0)[:, None], axis=1)[:, 0]
        return new, jnp.where(next_B >= 0, jax.nn.logsumexp(logits_BV, axis=-1) - chosen_B, 0)

    return jax.lax.scan(step, cache, (tokens_BT[:, :-1].T, tokens_BT[:, 1:].T))
