"""Many prompts from a file: one JSON object a line goes in, one a line comes out, and what is done stays done.

An input line is {"prompt": "..."} or {"messages": [...]}, with an "id" of any kind if wanted, a "json_schema" that its
answer keeps to, and any field of SamplingParams for this line alone. Its answer is written when it is finished, so
answers come in any order; the "index", the number of the input line from 0, says which it is. A line that cannot be run
is answered with an "error", and the others go on. Blank lines have no answer.

Every answer carries a digest of its input line and of all settings that it depends on. So a run that was
stopped, in whatever way, goes on where it was, and cannot go on with another input, model or options.
"""

import codecs
import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from ..config import GenerationConfig, ModelConfig
from ..errors import DataError, OptionError, SaveError
from ..file_kind import what_it_is
from ..files import locked
from ..model import SmolLM3
from ..progress import busy, tally
from ..reading import lines, why
from ..tokenizer import Tokenizer
from .lines import MAX_LINE, SAMPLING_FIELDS, LineOptions, Shape, answers, shape_for
from .sampling import SamplingParams
from .stats import Stats

# How every answer begins, and so how the torn end of one does.
BEGINNING = b'{"index": '
MAX_ANSWER = 2**28  # bytes


class Batch:
    """A file of requests and the file of their answers, which is locked until `close`.

    done, failed: how many lines have an answer, and how many of these are errors; left: how many have none;
    stats: what `run` has done, and how fast.
    """

    def __init__(
        self,
        source: str | Path,
        target: str | Path,
        params: SamplingParams | None = None,
        *,
        encode_messages: Callable[..., list[int]] | None = None,
        chat: bool = False,
        thinking: bool = True,
        settings: Mapping[str, Any] | None = None,
        fit: bool = False,
    ):
        """Looks through both files, and cuts a torn last line off the target.

        Args:
          params, encode_messages, chat, thinking, fit: as of `LineOptions`.
          settings: what else the answers depend on (JSON): the model above all.

        Raises:
          OptionError: the source cannot be read.
          SaveError: the target cannot be written, another process is writing it, or it is not this batch's.
        """
        self.source, self.target = Path(source), Path(target)
        params = params or SamplingParams()
        self.options = LineOptions(params, encode_messages, chat, thinking, fit)
        self.done = self.failed = 0
        self.stats = Stats()
        # Fields at their defaults stay out, so that a later version with more of them can go on.
        own, default = vars(params), vars(SamplingParams())
        changed = {name: own[name] for name in SAMPLING_FIELDS if own[name] != default[name]}
        self._salt = json.dumps([changed, chat, thinking, settings], sort_keys=True).encode()
        try:
            found = self.source.stat()
        except (OSError, ValueError) as error:  # ValueError: a name with NUL, half a character
            raise self._unreadable(error) from None
        if not stat.S_ISREG(found.st_mode):  # it is read twice
            raise OptionError(f"{self.source} is not a regular file")
        if what := what_it_is(self.source):
            raise OptionError(f"{self.source} holds no lines of JSON: {what}")
        self._found = found
        self._left = {index: self._digest(line) for index, line in self._lines()}
        self._file = self._lock()
        try:
            if os.path.samestat(found, os.fstat(self._file)):
                raise OptionError(f"{self.target} is the input itself; the answers need another file")
            self._end = self._look_through()
            os.ftruncate(self._file, self._end)
        except OSError as error:
            os.close(self._file)
            raise error if isinstance(error, SaveError) else self._unwritable(error) from None
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "Batch":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Makes sure of what is written, and lets go of the target."""
        try:
            os.fsync(self._file)
        except OSError as error:
            raise self._unwritable(error) from None
        finally:
            os.close(self._file)

    @property
    def left(self) -> int:
        return len(self._left)

    def shape(
        self,
        config: ModelConfig,
        generation_config: GenerationConfig,
        tokenizer: Tokenizer,
        slots: int | None = None,
        context: int | None = None,
    ) -> Shape:
        """The engine's shape for the lines that are left; arguments and errors as for `run`."""
        pending = ((index, line) for index, line in self._lines() if index in self._left)
        with busy("counting tokens"):
            return shape_for(pending, self.options, config, generation_config, tokenizer, slots, context)

    def run(
        self,
        model: SmolLM3,
        tokenizer: Tokenizer,
        *,
        slots: int | None = None,
        context: int | None = None,
        cache_dtype: DTypeLike | None = None,
    ) -> None:
        """Answers the lines that are left; with slots and a context as a server with the same does, to the bit.

        Args:
          slots: how many sequences at a time, rounded up to a power of two; None is at most SLOTS.
          context: the most tokens that a sequence may have, its prompt included; None takes what the longest
            line needs, for which all lines are tokenized first.
          cache_dtype: as for `stream`.

        Raises:
          OptionError: an option is out of range.
          OutOfMemoryError: the slots do not fit into memory.
          DataError, SaveError, KeyboardInterrupt: as for `collect`.
        """
        shape = self.shape(model.config, model.generation_config, tokenizer, slots, context)
        given: dict[str, Any] = {"cache_dtype": cache_dtype, "stats": self.stats}
        self.collect(answers(model, tokenizer, self.pending(), self.options, shape, **given))

    def pending(self) -> Iterator[tuple[int, bytes]]:
        """The lines that have no answer, by their numbers."""
        for index, line in self._lines():
            if index in self._left:
                if self._digest(line) != self._left[index]:
                    raise self._changed()
                yield index, line

    def collect(self, found: Iterable[Sequence[tuple[int, dict[str, Any]]]]) -> None:
        """Writes answers as they come, some at a time, of (index, answer).

        Raises:
          DataError: the source has changed since this batch was made, so that lines may be missing; those that were
            read are answered.
          SaveError: an answer could not be written; those before it are.
          KeyboardInterrupt: with a message that says how to go on.
        """
        try:
            with tally("lines", self.done + self.left, self.done) as report:
                for some in found:
                    for index, answer in some:
                        self._write(index, answer)
                    report(self.done, self.stats.tokens)
            self._check_unchanged()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{self.done} of {self.done + self.left} lines are in {self.target}; "
                "the same command goes on from there"
            ) from None

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """The lines that are not blank, by their numbers."""
        try:
            with self.source.open("rb") as file:
                for index, line in enumerate(lines(file, MAX_LINE)):
                    if line := line.strip().removeprefix(codecs.BOM_UTF8):  # within, of files that were joined
                        yield index, line
        except OSError as error:
            raise self._unreadable(error) from None

    def _check_unchanged(self) -> None:
        """The end of a file is only taken for the end if the file is still the one that was found."""
        try:
            now = self.source.stat()
        except OSError:
            raise self._changed() from None
        if any(getattr(now, field) != getattr(self._found, field) for field in ("st_size", "st_mtime_ns", "st_ino")):
            raise self._changed()

    def _changed(self) -> DataError:
        return DataError(
            f"{self.source} has changed while it was read, so lines of it may be missing; the {self.done} answers in "
            f"{self.target} are kept, and the same command goes on from there"
        )

    def _digest(self, line: bytes) -> str:
        return hashlib.sha256(self._salt + b"\n" + line).hexdigest()[:16]

    def _lock(self) -> int:
        """The target, open; the lock dies with its process."""
        try:
            return locked(self.target)
        except BlockingIOError:
            raise SaveError(
                f"{self.target} is being written by another process; wait for it, or name another file"
            ) from None
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from None

    def _look_through(self) -> int:
        """Counts the answers that are there, and takes their lines off `left`; returns where they end."""
        end = 0
        with open(self._file, "rb", closefd=False) as file:
            for number, answer in enumerate(lines(file, MAX_ANSWER), 1):
                # A power cut may leave zeros after what was written.
                begun = answer.startswith(BEGINNING) or BEGINNING.startswith(answer.rstrip(b"\0"))
                if begun and not answer.endswith(b"\n") and len(answer) <= MAX_ANSWER:
                    break
                try:
                    content = json.loads(answer)
                    index, same = content["index"], self._left.get(content["index"]) == content["digest"]
                except (ValueError, TypeError, KeyError, RecursionError):
                    raise SaveError(
                        f"{self.target}: line {number} is no answer of a run like this; name another file, or remove it"
                    ) from None
                if not same:
                    raise SaveError(
                        f"{self.target}: line {number} is an answer to another input, model or option than now; go on "
                        "with those, name another file, or remove it"
                    )
                self._count(index, "error" in content)
                end += len(answer)
        return end

    def _count(self, index: int, failed: bool) -> None:
        del self._left[index]
        self.done += 1
        self.failed += failed

    def _write(self, index: int, answer: dict[str, Any]) -> None:
        content = {"index": index, **answer, "digest": self._left[index]}
        # What JSON calls \ud800 is half a character, which UTF-8 has not: it stays as it is spelled there.
        line = json.dumps(content, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        # One write, so that a process that is killed leaves at most the last line torn.
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise self._unwritable(error) from None
        self._end += len(line)
        self._count(index, "error" in answer)

    def _unreadable(self, error: Exception) -> OptionError:
        return OptionError(f"{self.source} cannot be read: {why(error)}")

    def _unwritable(self, error: Exception) -> SaveError:
        kept = f"; the {self.done} lines in it are kept, and the same command goes on from there" if self.done else ""
        return SaveError(f"{self.target} cannot be written: {why(error)}{kept}")
