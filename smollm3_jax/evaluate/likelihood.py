"""Log-likelihoods of the ends of many texts, packed: several texts a row, none of which sees another.

Rows have few lengths, so that few programs serve all texts. A text that another one begins with, such as a question
before each of its answers of one token, is computed once. Logits are computed of the tokens that are asked for alone.

Shapes: B rows, T tokens of a row, N = B T, C tokens that are judged in one call, D model width, V vocabulary.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from ..compile_cache import enable
from ..model import SmolLM3, where_it_lies
from ..sizes import power_of_two_from
from ..train.data.windows import best_fit


class Sizes(NamedTuple):
    """row: the least length of rows; tokens: about how many of a call; judged: whose logits are there at a time; steps:
    how many lengths there are from one power of two to the next."""

    row: int
    tokens: int
    judged: int
    steps: int = 1


# On a CPU a program is compiled in seconds, and padding takes as long as text does.
CPU, ACCELERATOR = Sizes(512, 2048, 128, 4), Sizes(2048, 16384, 512)


class Span(NamedTuple):
    """The end of a text, ids[start:], whose log-likelihood given what is before it is asked for; start is 1 or more."""

    ids: Sequence[int]
    start: int


class Batch(NamedTuple):
    """Rows of one length: each a list of groups of spans that one text holds, the longest of a group first."""

    length: int
    rows: list[list[list[int]]]


def log_likelihoods(
    model: SmolLM3, spans: Sequence[Span], wanted: Collection[int] | None = None, sizes: Sizes | None = None
) -> Iterator[dict[int, tuple[float, bool]]]:
    """By the numbers of spans, a batch at a time: (the sum of the tokens' log-probabilities, whether each of them is
    the likeliest).

    Args:
      spans: none of them outside of the vocabulary, or longer than the context and a token.
      wanted: the spans that are asked for; None is all. Batches are the same whatever is wanted, so that who goes on
        after some of them finds the same numbers; those with nothing that is wanted are left out.
      sizes: None is those of the model's platform.
    """
    enable()
    model = where_it_lies(model)
    sizes = sizes or (CPU if model.platform == "cpu" else ACCELERATOR)
    parts = 1 if model.sharding is None else model.sharding.parts("batch")
    wanted = range(len(spans)) if wanted is None else wanted
    for batch in batches(spans, sizes):
        numbers = [number for row in batch.rows for group in row for number in group]
        if any(number in wanted for number in numbers):
            rows = min(max(1, sizes.tokens // batch.length), power_of_two_from(len(batch.rows)))
            yield _judged(model, spans, batch, -(-rows // parts) * parts, sizes.judged)


def batches(spans: Sequence[Span], sizes: Sizes) -> Iterator[Batch]:
    """All spans, in rows of few lengths, at most about `sizes.tokens` at a time; the longest rows first."""
    groups = _groups(spans)
    by_length: dict[int, list[list[int]]] = {}
    for group in groups:
        length = _row_for(len(spans[group[0]].ids) - 1, sizes)
        by_length.setdefault(length, []).append(group)
    for length in sorted(by_length, reverse=True):
        of_length = by_length[length]
        rows = best_fit([len(spans[group[0]].ids) - 1 for group in of_length], length)
        count = max(1, sizes.tokens // length)
        for first in range(0, len(rows), count):
            yield Batch(length, [[of_length[number] for number in row] for row in rows[first : first + count]])


def _row_for(tokens: int, sizes: Sizes) -> int:
    """The length of the rows that a text of this many tokens goes into."""
    if tokens <= sizes.row:
        return sizes.row
    step = max(1, power_of_two_from(tokens) // 2 // sizes.steps)
    return -(-tokens // step) * step


def _groups(spans: Sequence[Span]) -> list[list[int]]:
    """The numbers of spans, those together whose inputs the first of them begins with. A span's last token is no input.

    Big-endian bytes are in the order of the numbers, so an input comes, from the last to the first, right after those
    that begin with it.
    """
    inputs = [np.asarray(span.ids[:-1], ">u4").tobytes() for span in spans]
    groups: list[list[int]] = []
    for number in sorted(range(len(spans)), key=inputs.__getitem__, reverse=True):
        if groups and inputs[groups[-1][0]].startswith(inputs[number]):
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _judged(
    model: SmolLM3, spans: Sequence[Span], batch: Batch, rows: int, judged: int
) -> dict[int, tuple[float, bool]]:
    """What `log_likelihoods` gives of a batch, in that number of rows, of which some stay empty."""
    tokens_BT, positions_BT, segments_BT = np.zeros((3, rows, batch.length), np.int32)
    places, labels, owners, numbers = [], [], [], []
    for row, groups in enumerate(batch.rows):
        begin = 0
        for segment, group in enumerate(groups, 1):
            ids = np.asarray(spans[group[0]].ids[:-1], np.int32)
            at = slice(begin, begin + len(ids))
            tokens_BT[row, at], positions_BT[row, at], segments_BT[row, at] = ids, np.arange(len(ids)), segment
            for number in group:
                asked = np.asarray(spans[number].ids[spans[number].start :], np.int32)
                first = row * batch.length + begin + spans[number].start - 1
                places.append(np.arange(first, first + len(asked), dtype=np.int32))
                labels.append(asked)
                owners.append(np.full(len(asked), len(numbers)))
                numbers.append(number)
            begin += len(ids)
    x_ND = _states(model, tokens_BT, positions_BT, segments_BT)
    found = list(_in_calls(model, x_ND, np.concatenate(places), np.concatenate(labels), judged))
    logps, likeliest = (np.concatenate(parts) for parts in zip(*jax.device_get(found), strict=True))
    owner = np.concatenate(owners)
    sums = np.bincount(owner, weights=logps[: len(owner)], minlength=len(numbers))  # in float64
    others = np.bincount(owner, weights=~likeliest[: len(owner)], minlength=len(numbers))
    return {number: (float(sums[i]), bool(others[i] == 0)) for i, number in enumerate(numbers)}


def _in_calls(model: SmolLM3, x_ND: Array, places: np.ndarray, labels: np.ndarray, judged: int) -> Iterator[Any]:
    """`_judge` of all of them, `judged` at a time; what fills the last call up is of no use."""
    for first in range(0, len(places), judged):
        of_call = (x[first : first + judged] for x in (places, labels))
        yield _judge(model, x_ND, *(np.pad(x, (0, judged - len(x))) for x in of_call))


@jax.jit
def _states(model: SmolLM3, tokens_BT: Array, positions_BT: Array, segments_BT: Array) -> Array:
    x_BTD, _ = model.hidden(tokens_BT, positions_BT, segments_BT)
    return x_BTD.reshape(-1, x_BTD.shape[-1])


@jax.jit
def _judge(model: SmolLM3, x_ND: Array, places_C: Array, labels_C: Array) -> tuple[Array, Array]:
    """(log-probabilities, float32, of what comes after these places; whether it is the likeliest), each [C]."""
    logits_CV = model.unembed(jnp.take(x_ND, places_C, axis=0))
    said_C = jnp.take_along_axis(logits_CV, labels_C[:, None], axis=1)[:, 0]
    return said_C - jax.nn.logsumexp(logits_CV, axis=-1), jnp.argmax(logits_CV, axis=-1).astype(jnp.int32) == labels_C
