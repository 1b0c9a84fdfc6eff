"""Preferences as what goes into rows: a pair, the chosen completion and the rejected one, is one item of a window.

Each completion has a key, which its tokens alone determine, by which the reference's sum of it is found again:
whatever the order of the data, and wherever a completion occurs twice.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...config import ModelConfig
from ...tokenizer import Tokenizer
from ..settings import Settings
from .conversations import Completion, preference_encoder, tokenizer_for
from .windows import LONG, NOTHING, Item


def pair_items(
    tokenizer: Tokenizer, config: ModelConfig, settings: Settings
) -> Callable[[Mapping[str, Any], int, Counter[str]], list[Item]]:
    """What `Windows` encodes records of preferences with, as the settings have it."""
    data = settings.data
    tokenizer = tokenizer_for(tokenizer, data.template)
    encode = preference_encoder(tokenizer, config, date=data.date)

    def items(record: Mapping[str, Any], length: int, tally: Counter[str]) -> list[Item]:
        return items_of_pair(*encode(record), length, data.overflow, tally)

    return items


def items_of_pair(
    chosen: Completion, rejected: Completion, length: int, overflow: str, tally: Counter[str]
) -> list[Item]:
    """(tokens, documents, weights, keys) of a pair that goes into rows of `length` tokens: the chosen completion with
    its prompt is document 1, the rejected one 2; nothing if of one of them no token is learned.

    weights: float32, 1 where the next token is learned. keys: int64, each completion's at each of its tokens.

    Args:
      overflow: what becomes of a pair that is longer in all: "drop" leaves it out; "truncate" keeps of each completion
        the first length // 2 tokens, prompt among them.
      tally: what is counted, as `items_of` does.
    """
    sides = [chosen, rejected]
    whole = sum(len(side.ids) for side in sides)
    tally.update({"records": 1, "tokens": whole, "trained": sum(_learned(side) for side in sides)})
    if whole > length and overflow == "truncate":
        sides = [Completion(side.ids[: length // 2], side.first) for side in sides]
    if not all(_learned(side) for side in sides):
        tally.update({NOTHING: 1, "cut": whole})
        return []
    if sum(len(side.ids) for side in sides) > length:
        tally.update({LONG: 1, "cut": whole})
        return []
    tally["cut"] += whole - sum(len(side.ids) for side in sides)
    counts = [len(side.ids) for side in sides]
    return [
        (
            np.concatenate([side.ids for side in sides]),
            np.repeat(np.array([1, 2], np.int32), counts),
            np.concatenate([_weights(side) for side in sides]),
            np.repeat(np.array([key_of(side) for side in sides], np.int64), counts),
        )
    ]


def key_of(completion: Completion) -> int:
    """A number of 63 bits that a completion's tokens, and where it begins, determine; never 0."""
    content = np.int64(completion.first).tobytes() + completion.ids.astype("<i4").tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little") >> 1 or 1


def _learned(completion: Completion) -> int:
    """How many tokens are: the first one of a text follows nothing."""
    return max(0, len(completion.ids) - max(1, completion.first))


def _weights(completion: Completion) -> np.ndarray:
    weights = np.zeros(len(completion.ids), np.float32)
    weights[max(1, completion.first) - 1 : -1] = 1
    return weights
