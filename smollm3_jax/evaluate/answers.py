"""What a model has answered so far, in a file that a run that was killed goes on from.

The first line is {"answers": FORMAT, "date": "2026-11-28"}, the date that chat templates of this folder's runs print;
each other one is {"key": ..., "answer": ...}. A key is a digest of a request and of all that its answer depends on, so
answers of other models or options may stand beside each other, and are of no use to one another.
"""

import contextlib
import datetime
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import SaveError
from ..files import locked
from ..reading import why

FORMAT = 1
NAME = "answers.jsonl"


class Answers:
    """By key. Of a folder, which has a file of them that is locked until `close`, or of this process alone (None).

    settings: what all answers depend on, ready for JSON: the model above all.
    date: what chat templates print as the day; that of the first run in the folder.

    Raises:
      SaveError: the file cannot be written, another process writes it, or it is no such file.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]):
        self._salt = json.dumps(settings, sort_keys=True, default=str)
        self._known: dict[str, Any] = {}
        self._file: int | None = None
        self.date = datetime.date.today()
        if folder is None:
            return
        self.path = folder / NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = locked(self.path)
        except BlockingIOError:
            raise SaveError(f"{self.path} is being written by another process; wait, or name another folder") from None
        except (OSError, ValueError) as error:
            raise SaveError(f"{self.path} cannot be written: {why(error)}") from None
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Answers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def key(self, *request: Any) -> str:
        """Of a request, ready for JSON."""
        return hashlib.sha256(f"{self._salt}\n{json.dumps(request, sort_keys=True)}".encode()).hexdigest()[:32]

    def get(self, key: str) -> Any:
        """None where there is no answer."""
        return self._known.get(key)

    def add(self, found: Iterable[tuple[str, Any]]) -> None:
        """Answers, ready for JSON, that are on the disk after this."""
        new = [{"key": key, "answer": answer} for key, answer in found]
        self._known.update((entry["key"], entry["answer"]) for entry in new)
        self._write(new)

    def _write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        if self._file is None:
            return
        rest = memoryview("".join(json.dumps(entry) + "\n" for entry in entries).encode())
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise SaveError(
                f"{self.path} cannot be written: {why(error)}; the same command goes on from there"
            ) from None
        self._end = os.fstat(self._file).st_size

    def _read(self) -> None:
        """What is there, without a torn last line."""
        assert self._file is not None
        with open(self._file, "rb", closefd=False) as file:
            content = file.read()
        whole, newline, _ = content.rpartition(b"\n")
        self._end = len(whole) + len(newline)
        first, *others = whole.split(b"\n") if whole else [b""]
        try:
            if first:
                header = json.loads(first)
                self.date = datetime.date.fromisoformat(header["date"])
                if header["answers"] != FORMAT:
                    raise ValueError(f"its format is {header['answers']}")
            elif content and not content.startswith(b'{"answers"'[: len(content)]):
                raise ValueError("it has no first line of such a file")
            entries = map(json.loads, others)
            self._known = {entry["key"]: entry["answer"] for entry in entries}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise SaveError(f"{self.path} is no file of answers ({error!r:.200}); name another folder") from None
        os.ftruncate(self._file, self._end)
        if not first:
            self._write([{"answers": FORMAT, "date": self.date.isoformat()}])
