"""Rows of whole conversations: best fit, in windows.

A window is the next WINDOW records of an epoch, the last one of an epoch what is left of it. Its items are laid into as
few rows as best-fit-decreasing finds, and what room is left in them stays empty. How far a corpus is read is two
numbers, the window and the row in it: what a window holds follows from the records alone, so a checkpoint keeps no text
and the same rows follow on any number of hosts.
"""

import bisect
import collections
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...config import ModelConfig
from ...errors import DataError
from ...tokenizer import Tokenizer
from ..settings import Settings
from .conversations import Conversation, conversation_encoder, tokenizer_for
from .packing import EndOfData, Numbered
from .records import BadRecord

log = logging.getLogger(__name__)

WINDOW = 1000  # records, as TRL packs them
# Columns [n] of what stays together in a row: tokens int32, documents int32 from 1 on (which become segment ids), and
# any others, which are 0 where a row is empty.
Item = tuple[np.ndarray, ...]
# What is counted of the records of the first epoch.
NOTHING, LONG = "no trained token", "too long"


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing: rows of the numbers of items, none longer than `capacity` in all. The longest item goes
    first, of equals the first of them, each into the fullest row with room for it, of equals the oldest."""
    rows: list[list[int]] = []
    room: dict[int, collections.deque[int]] = {}  # how much is left -> rows
    left: list[int] = []  # the keys of room, in order
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        at = bisect.bisect_left(left, length)
        if at < len(left):
            space = left[at]
            row = room[space].popleft()
            if not room[space]:
                del room[space], left[at]
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(number)
        if space > length:
            if space - length not in room:
                room[space - length] = collections.deque()
                bisect.insort(left, space - length)
            room[space - length].append(row)
    return rows


def items_of(conversation: Conversation, length: int, overflow: str, tally: Counter[str]) -> list[Item]:
    """(tokens, documents, weights) of what of a conversation goes into rows of `length` tokens; nothing if no token of
    it is trained. weights: float32, 1 where the next token is trained.

    Args:
      overflow: what becomes of a longer one: "drop" leaves it out, "truncate" keeps its beginning, "split" makes
        several items of it, which do not see each other.
      tally: what is counted: "records", "tokens" and "trained" of all, those of NOTHING and LONG left out, "cut"
        tokens.
    """
    ids, trained, _ = conversation
    tally.update({"records": 1, "tokens": len(ids), "trained": int(trained[1:].sum())})
    if len(ids) > length and overflow == "drop" and trained[1:].any():
        tally.update({LONG: 1, "cut": len(ids)})
        return []
    items: list[Item] = []
    for start in range(0, len(ids) if overflow == "split" else min(1, len(ids)), length):
        part, weights = ids[start : start + length], np.zeros(len(ids[start : start + length]), np.float32)
        weights[:-1] = trained[start + 1 : start + len(part)]
        if weights.any():
            items.append((part, np.ones(len(part), np.int32), weights))
    if not items:
        tally[NOTHING] += 1
    tally["cut"] += len(ids) - sum(len(item[0]) for item in items)
    return items


def sft_items(
    tokenizer: Tokenizer, config: ModelConfig, settings: Settings
) -> Callable[[Mapping[str, Any], int, Counter[str]], list[Item]]:
    """What `Windows` encodes records of conversations with, as the settings have it."""
    data = settings.data
    tokenizer = tokenizer_for(tokenizer, data.template)
    encode = conversation_encoder(tokenizer, config, date=data.date, train_on=settings.objective.train_on)

    def items(record: Mapping[str, Any], length: int, tally: Counter[str]) -> list[Item]:
        return items_of(encode(record), length, data.overflow, tally)

    return items


def lay(items: Sequence[Item], length: int) -> Item:
    """A row [length] of items one after the other; the second column counts their documents on, from 1."""
    row = tuple(np.zeros(length, column.dtype) for column in items[0])
    at = documents = 0
    for item in items:
        end = at + len(item[0])
        for i, (out, column) in enumerate(zip(row, item, strict=True)):
            out[at:end] = column + documents if i == 1 else column
        at, documents = end, documents + int(item[1].max())
    return row


class Windows:
    """The rows of a corpus, from any window and row on; used as `packing.Rows`."""

    def __init__(
        self,
        name: str,
        documents: Numbered[Any],
        encode: Callable[[Any, int, Counter[str]], list[Item]],
        *,
        order: Numbered[int],
        epoch: int,
        epochs: int = 0,
        bad_records: int = 0,
        seed: int | None = None,
        size: int = WINDOW,
    ):
        """
        Args:
          documents: documents[i] is a record.
          encode: (a record, the rows' length, what to count in) -> its items, see `items_of`; or raises BadRecord.
          order: order[k] is the number of the k-th record, for all epochs; epoch: how many an epoch has.
          epochs: how many there are; 0 is no end.
          bad_records: how many may be skipped in an epoch.
          seed: of the order of a window's rows; None leaves them as they are packed, the fullest first.
          size: records of a window.
        """
        self.name, self.window, self.row, self.length = name, 0, 0, 0
        self.tally: Counter[str] = Counter()  # of the windows before this one, of the first epoch
        self._documents, self._encode, self._order, self._epoch = documents, encode, order, epoch
        self._epochs, self._bad_records, self._seed, self._size = epochs, bad_records, seed, size
        self._held: tuple[int, int, list[list[Item]], Counter[str]] | None = None

    def state(self) -> dict[str, Any]:
        return {"window": self.window, "row": self.row, "length": self.length, "tally": dict(self.tally)}

    def restore(self, state: dict[str, Any]) -> None:
        self.window, self.row, self.length = state["window"], state["row"], state["length"]
        self.tally = Counter(state["tally"])

    def next(self, length: int) -> Item:
        """The columns of a row, [length] each: tokens and segment ids, int32, and further ones.

        Raises:
          EndOfData: there is nothing left.
          DataError: too many bad records, or an epoch has no row.
        """
        if self.length != length:  # another stage: the rows of this window were packed for the one before
            if self.row:
                self._advance(Counter())
            self.length = length
        empty = 0
        while True:
            if self._epochs and self.window >= self._epochs * self._windows:
                raise EndOfData(self.name)
            if self._held is None or self._held[:2] != (self.window, length):
                self._held = (self.window, length, *self._packed(length))
            _, _, rows, tally = self._held
            if self.row < len(rows):
                self.row += 1
                return lay(rows[self.row - 1], length)
            self._advance(tally)
            empty += not rows
            if empty == self._windows:
                raise DataError(
                    f"source {self.name}: nothing of its {self._epoch:,} records is to be trained: {said(self.tally)}"
                )

    @property
    def _windows(self) -> int:
        """Of an epoch."""
        return -(-self._epoch // self._size)

    def _advance(self, tally: Counter[str]) -> None:
        if self.window < self._windows:
            self.tally = self.tally + tally
        self.window, self.row = self.window + 1, 0
        if self.window == self._windows and self._epochs != 1:
            log.info("source %s: its first epoch ends: %s", self.name, said(self.tally))

    def _packed(self, length: int) -> tuple[list[list[Item]], Counter[str]]:
        """(the items of each row of this window, what was counted)."""
        epoch, inside = divmod(self.window, self._windows)
        begin = epoch * self._epoch
        # In the order of the file, so that the rows of a window do not depend on the order that was drawn for it.
        numbers = sorted(
            int(self._order[begin + k]) for k in range(inside * self._size, min((inside + 1) * self._size, self._epoch))
        )
        items: list[Item] = []
        tally: Counter[str] = Counter()
        for number in numbers:
            try:
                items += self._encode(self._documents[number], length, tally)
            except BadRecord as reason:
                tally["bad"] += 1
                if tally["bad"] <= 10 and epoch == 0:
                    log.warning("source %s: skipped a bad record: %s", self.name, reason)
                bad = tally["bad"] + (self.tally["bad"] if epoch == 0 else 0)
                if bad > self._bad_records:
                    raise DataError(
                        f"source {self.name}: {bad} bad records, more than data.bad_records={self._bad_records}; "
                        f"the last: {reason}"
                    ) from None
        if epoch == 0 and (inside == 0 or tally[LONG] + tally[NOTHING] > len(numbers) // 2):
            log.info("source %s: of its records %d to %d: %s", self.name, begin, begin + len(numbers), said(tally))
        rows = [[items[i] for i in row] for row in best_fit([len(item[0]) for item in items], length)]
        if self._seed is not None:
            rows = [rows[i] for i in np.random.default_rng([self._seed, self.window]).permutation(len(rows))]
        return rows, tally


def said(tally: Counter[str]) -> str:
    """What was counted, in words."""
    share = 100 * tally["cut"] / max(1, tally["tokens"])
    return (
        f"{tally['records']:,} records of {tally['tokens']:,} tokens, {tally['trained']:,} of them trained; left out: "
        f"{tally[NOTHING]:,} without a trained token, {tally[LONG]:,} longer than a row, {tally['bad']:,} unreadable; "
        f"{share:.3g} % of the tokens"
    )
