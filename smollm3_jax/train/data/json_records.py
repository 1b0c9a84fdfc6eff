"""Where the records of a JSON file lie: a line each, or the values of one array or of a row of values."""

import codecs
import json
import re
from collections.abc import Iterator
from typing import IO

import numpy as np
from etils import epath

_BLOCK = 2**24
_SPACE = re.compile(r"[ \t\r\n]*")
# Where a value ends, whatever numbers are in it: those of thousands of digits are none of Python's.
_SCANNER = json.JSONDecoder(parse_int=len, parse_float=len)
# An array or a value of several lines is looked through in memory.
MAX_BYTES = 2**32


class Spans:
    """len(spans) of them; spans[i] is where the i-th record begins and ends in the file."""

    def __init__(self, starts: np.ndarray, ends: np.ndarray):
        self._starts, self._ends = starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return int(self._starts[index]), int(self._ends[index])


def spans(file: epath.Path, several_lines: bool) -> Spans:
    """The records of a file in UTF-8.

    Args:
      several_lines: it may be an array of records, or records of several lines. What follows damage in one is one
        record that cannot be read.

    Raises:
      ValueError: it would have to be looked through in memory, and is too long.
    """
    with file.open("rb") as stream:
        begin = 3 if stream.read(3) == codecs.BOM_UTF8 else 0
    starts, length = _lines(file, begin)
    if several_lines and len(starts):
        first = _lines_at(file, starts[:3])
        if first[0].startswith(b"[") or (first[0].startswith(b"{") and not any(map(_is_object, first))):
            if length > MAX_BYTES:
                raise ValueError(f"one array or value of {length} bytes; write a record a line: jq -c '.[]'")
            # Bytes as characters, so that places in the text are places in the file.
            text = file.read_bytes().decode("latin-1")
            found = np.array(list(_values(text, int(starts[0]))), np.int64).reshape(-1, 2)
            return Spans(found[:, 0], found[:, 1])
    return Spans(starts, np.append(starts[1:], length))


def _lines_at(file: epath.Path, starts: np.ndarray) -> list[bytes]:
    with file.open("rb") as stream:
        lines = []
        for start in starts.tolist():
            stream.seek(start)
            lines.append(stream.readline(MAX_BYTES).strip())
        return lines


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _values(text: str, at: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each value of an array that begins there, or of the values from there on."""

    def skipped(at: int) -> int:
        found = _SPACE.match(text, at)
        return found.end() if found else at

    at = skipped(at)
    array = text[at] == "["
    at = skipped(at + array)
    while at < len(text) and not (array and text[at] == "]"):
        start = at
        try:
            _, at = _SCANNER.raw_decode(text, at)
        except (ValueError, RecursionError):
            yield start, len(text)
            return
        yield start, at
        at = skipped(at)
        if array and at < len(text) and text[at] == ",":
            at = skipped(at + 1)
        elif array and text[at : at + 1] != "]":
            yield at, len(text)  # what follows is damaged, or missing
            return
    if array and skipped(at + 1) < len(text):
        yield at + 1, len(text)


def _lines(file: epath.Path, begin: int) -> tuple[np.ndarray, int]:
    """(where each line that is not blank begins, from `begin` on; the file's length)."""
    found, doubtful, position, fresh = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], begin, True
    with file.open("rb") as stream:
        stream.seek(begin)
        while block := stream.read(_BLOCK):
            data = np.frombuffer(block, np.uint8)
            after = np.flatnonzero(data == ord("\n")) + 1
            at = np.concatenate([[0], after]) if fresh else after
            fresh = bool(after.size) and after[-1] == len(data)
            at = at[at < len(data)]
            first = data[at]
            found.append(at[first != ord("\n")] + position)
            doubtful.append(at[(first == ord("\r")) | (first == ord(" ")) | (first == ord("\t"))] + position)
            position += len(block)
        blank = [start for start in np.concatenate(doubtful).tolist() if _is_blank(stream, start)]
    return np.setdiff1d(np.concatenate(found), np.array(blank, np.int64), assume_unique=True), position


def _is_blank(stream: IO[bytes], start: int) -> bool:
    stream.seek(start)
    while part := stream.readline(_BLOCK):
        if part.strip():
            return False
        if part.endswith(b"\n"):
            break
    return True
