"""Rows of one corpus: documents one after the other, cut where a row ends.

How far a corpus is read is two numbers, the document and the token in it, so a checkpoint holds no text and the
same rows follow on any number of hosts.
"""

import logging
from typing import Protocol, TypeVar

import numpy as np

from ...errors import DataError
from .encode import Encode
from .records import BadRecord, Document

T_co = TypeVar("T_co", covariant=True)

log = logging.getLogger(__name__)


class Numbered(Protocol[T_co]):
    """What a list, `sources.Documents` and grain's data sets have in common."""

    def __getitem__(self, index: int, /) -> T_co: ...


class EndOfData(Exception):
    """All epochs of a corpus have been read."""


class Rows:
    """The rows of a corpus, from any document and token on.

    document, token: where the next row begins, in the endless order of epoch after epoch; skipped: how many bad
    records the first epoch had so far. Segment ids number a row's documents from 1; 0 is padding, which only the last
    row of the last epoch has.
    """

    def __init__(
        self,
        name: str,
        documents: Numbered[Document],
        encode: Encode,
        *,
        order: Numbered[int],
        epoch: int,
        epochs: int = 0,
        bad_records: int = 0,
    ):
        """
        Args:
          documents: documents[i] as `sources.Documents` gives them.
          encode: such a document -> its token ids, the end of text among them.
          order: order[k] is the number of the k-th document, for all epochs.
          epoch: how many documents an epoch has.
          epochs: how many there are; 0 is no end.
          bad_records: how many may be skipped.
        """
        self.name, self.document, self.token, self.skipped = name, 0, 0, 0
        self._documents, self._encode, self._order, self._epoch = documents, encode, order, epoch
        self._epochs, self._bad_records = epochs, bad_records
        self._held: tuple[int, np.ndarray] | None = None

    def state(self) -> dict[str, int]:
        return {"document": self.document, "token": self.token, "skipped": self.skipped}

    def restore(self, state: dict[str, int]) -> None:
        self.document, self.token, self.skipped = state["document"], state["token"], state["skipped"]

    def next(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, segment ids), int32 [length].

        Raises:
          EndOfData: there is nothing left.
          DataError: too many bad records.
        """
        tokens, segments = np.zeros(length, np.int32), np.zeros(length, np.int32)
        at = count = 0
        while at < length:
            try:
                ids = self._current()
            except EndOfData:
                if at == 0:
                    raise
                break
            part = ids[self.token : self.token + length - at]
            count += 1
            tokens[at : at + len(part)] = part
            segments[at : at + len(part)] = count
            at += len(part)
            self.token += len(part)
            if self.token == len(ids):
                self._advance()
        return tokens, segments

    def _current(self) -> np.ndarray:
        """The tokens of the document that is next; bad ones are skipped."""
        bad = 0
        while True:
            if self._epochs and self.document >= self._epochs * self._epoch:
                raise EndOfData(self.name)
            if self._held is not None and self._held[0] == self.document:
                return self._held[1]
            number = int(self._order[self.document])
            try:
                ids = self._encode(self._documents[number])
            except BadRecord as reason:
                bad += 1
                self._skip(reason, bad)
                continue
            self._held = (self.document, ids)
            return ids

    def _skip(self, reason: BadRecord, in_a_row: int) -> None:
        if self.document < self._epoch:
            self.skipped += 1
            # The first ten are warned of, then the 16th, the 32nd, ...
            often = self.skipped > 10 and self.skipped & (self.skipped - 1)
            say = log.debug if often else log.warning
            say("source %s: skipped a bad record (%d so far): %s", self.name, self.skipped, reason)
        if self.skipped > self._bad_records:
            raise DataError(
                f"source {self.name}: {self.skipped} bad records, more than data.bad_records={self._bad_records}; "
                f"the last: {reason}"
            )
        if in_a_row >= self._epoch:
            raise DataError(f"source {self.name}: none of its {self._epoch} documents can be read; the last: {reason}")
        self._advance()

    def _advance(self) -> None:
        self.document, self.token = self.document + 1, 0
        epoch, inside = divmod(self.document, self._epoch)
        if inside == 0 and self._epochs != 1 and epoch & (epoch - 1) == 0:  # the 1st, 2nd, 4th, ...
            log.info("source %s: epoch %d of its %d documents ends", self.name, epoch, self._epoch)
