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
import dataclasses
import difflib
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from ..config import ModelConfig
from ..errors import DataError, OptionError, SaveError, SmolLM3Error
from ..file_kind import what_it_is
from ..files import locked
from ..model import SmolLM3
from ..nesting import check_depth
from ..progress import busy, tally
from ..reading import lines, why
from ..tokenizer import Tokenizer
from .api import stream
from .grammar import json_schema
from .prompts import SERVING_PIECES
from .requests import Completion, Request, chat_ends, check_request, fitted
from .sampling import SamplingParams
from .stats import Stats

SLOTS = 16
SAMPLING_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))
# How every answer begins, and so how the torn end of one does.
BEGINNING = b'{"index": '
MAX_ERROR = 1000  # characters
MAX_LINE, MAX_ANSWER = 2**26, 2**28  # bytes; of a line, more than any context holds


@dataclasses.dataclass
class _Line:
    """An input line that is being answered."""

    index: int
    id: dict[str, Any]
    request: Request
    samples: list[Completion]


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
          params: for lines that say nothing else; a line without a seed draws with seed + index * n.
          encode_messages: chat.template.encode_for_answer; None refuses lines with "messages".
          chat: a "prompt" is a user's message, and the chat template is applied to it.
          thinking: what the chat template is told about thinking.
          fit: params.max_new_tokens is no wish of anybody's: a prompt that leaves less room gets less.
          settings: what else the answers depend on (JSON): the model above all.

        Raises:
          OptionError: the source cannot be read.
          SaveError: the target cannot be written, another process is writing it, or it is not this batch's.
        """
        self.source, self.target = Path(source), Path(target)
        self.encode_messages = encode_messages
        self.params, self.chat, self.thinking, self.fit = params or SamplingParams(), chat, thinking, fit
        self.done = self.failed = 0
        self.stats = Stats()
        # Fields at their defaults stay out, so that a later version with more of them can go on.
        own, default = vars(self.params), vars(SamplingParams())
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
          DataError: the source has changed since this batch was made, so that lines may be missing; those that were
            read are answered.
          SaveError: an answer could not be written; those before it are.
          KeyboardInterrupt: with a message that says how to go on.
        """
        as_served = slots is not None and context is not None
        slots = SLOTS if slots is None else slots
        if slots < 1:
            raise OptionError(f"slots is {slots}; it must be at least 1")
        if context is not None and context < 2:
            raise OptionError(f"context is {context}; it must be at least 2")
        if self.chat:
            tokenizer.template()  # says once, not in every line, that there is none
        try:
            sequences = self.left * self.params.n
            if context is None:
                with busy("counting tokens"):
                    context, sequences = self._needs(model, tokenizer)
            slots = slots if as_served else max(1, min(slots, sequences))
            context = min(context, model.config.max_position_embeddings)
            running: dict[int, _Line] = {}
            requests = self._requests(model, tokenizer, context, running)
            with tally("lines", self.done + self.left, self.done) as report:
                for delta in stream(
                    model,
                    requests,
                    tokenizer=tokenizer,
                    max_slots=slots,
                    capacity=context,
                    piece_sizes=SERVING_PIECES if as_served else None,
                    cache_dtype=cache_dtype,
                    stats=self.stats,
                ):
                    line = running[delta.request]
                    line.samples[delta.sample].add(delta)
                    if all(sample.finish_reason for sample in line.samples):
                        self._write(line.index, line.id | _answer(running.pop(delta.request), tokenizer))
                    report(self.done, self.stats.tokens)
            self._check_unchanged()
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"{self.done} of {self.done + self.left} lines are in {self.target}; "
                "the same command goes on from there"
            ) from None

    def _needs(self, model: SmolLM3, tokenizer: Tokenizer) -> tuple[int, int]:
        """Over the lines that can be run: the most tokens of a sequence, and how many sequences."""
        longest, sequences = 0, 0
        for index, line in self._lines():
            if index in self._left:
                with contextlib.suppress(Exception):  # it is that line's answer, later
                    request = self._request(index, _parse(line), model, tokenizer)
                    check_request(model.config, model.generation_config, request, tokenizer)
                    longest = max(longest, len(request.prompt) + request.params.max_new_tokens)
                    sequences += request.params.n
        return longest, sequences

    def _requests(
        self, model: SmolLM3, tokenizer: Tokenizer, context: int, running: dict[int, _Line]
    ) -> Iterator[Request]:
        """The lines that are left, each at its turn: to `running` and out, or answered with what is wrong."""
        count = 0
        for index, line in self._lines():
            if index not in self._left:
                continue
            if self._digest(line) != self._left[index]:
                raise self._changed()
            name: dict[str, Any] = {}
            try:
                fields = _parse(line)
                name = {"id": fields["id"]} if "id" in fields else {}
                request = self._request(index, fields, model, tokenizer, context)
                check_request(model.config, model.generation_config, request, tokenizer, context)
            except Exception as error:  # whatever it is: the other lines can do nothing about it
                text = str(error) if isinstance(error, SmolLM3Error) else f"{type(error).__name__}: {error}"
                text = text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]}..."
                self._write(index, name | {"error": text})
                continue
            running[count] = _Line(index, name, request, [Completion.empty() for _ in range(request.params.n)])
            count += 1
            yield request

    def _request(
        self,
        index: int,
        fields: Mapping[str, Any],
        model: SmolLM3,
        tokenizer: Tokenizer,
        context: int | None = None,
    ) -> Request:
        own = ("id", "prompt", "messages", "json_schema")
        given = {name: value for name, value in fields.items() if name not in own}
        if unknown := [name for name in given if name not in SAMPLING_FIELDS]:
            close = difflib.get_close_matches(unknown[0], SAMPLING_FIELDS, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise OptionError(
                f"the field {unknown[0]!r} is unknown{meant}; a line has prompt or messages, and may have id, "
                + ", ".join(("json_schema", *SAMPLING_FIELDS))
            )
        if ("prompt" in fields) == ("messages" in fields):
            raise OptionError('a line needs one of "prompt" and "messages"')
        biases = given.get("logit_bias")
        if isinstance(biases, Mapping):  # JSON has no other keys than texts
            given["logit_bias"] = {
                int(token) if token.isdecimal() and len(token) < 20 else token: biases[token] for token in biases
            }
        seed = (self.params.seed + index * self.params.n) % 2**32
        params = dataclasses.replace(self.params, **{"seed": seed} | given)
        prompt, messages = fields.get("prompt"), fields.get("messages")
        if "prompt" in fields and not isinstance(prompt, str):
            raise OptionError(f"prompt is a {type(prompt).__name__}; it must be a text")
        if self.chat and "prompt" in fields:
            messages = [{"role": "user", "content": prompt}]
        ids, ends = self._encode(model.config, tokenizer, prompt, messages)
        fit = self.fit and "max_new_tokens" not in given
        grammar = json_schema(fields["json_schema"]) if "json_schema" in fields else None
        request = fitted_request(model.config, ids, params, ends, fit=fit, context=context)
        return dataclasses.replace(request, grammar=grammar)

    def _encode(
        self, config: ModelConfig, tokenizer: Tokenizer, prompt: str | None, messages: object
    ) -> tuple[list[int], tuple[int, ...]]:
        """Token ids of a line's messages or else of its prompt, and what ends the answer."""
        limit = config.max_position_embeddings
        if isinstance(prompt, str) and messages is None:
            return tokenizer.encode(prompt, context=limit), ()
        if self.encode_messages is None:
            raise OptionError('"messages" need a chat template; a line of this batch has a "prompt"')
        ids = self.encode_messages(tokenizer, messages, context=limit, thinking=self.thinking)
        return ids, chat_ends(tokenizer, config)

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


def fitted_request(
    config: ModelConfig,
    prompt: Sequence[int],
    params: SamplingParams,
    ends: Sequence[int] = (),
    *,
    fit: bool = False,
    context: int | None = None,
) -> Request:
    """A request to go on from a prompt's token ids; `fit` as for `Batch`, `context` as for `run`."""
    limit = min(context or config.max_position_embeddings, config.max_position_embeddings)
    return Request(prompt, fitted(params, len(prompt), limit) if fit else params, ends)


def spell_logprobs(completion: Completion, tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON field "logprobs", if it was asked for."""
    if completion.logprobs is None:
        return {}
    entries = [
        _entry(tokenizer, one.token_id, one.logprob)
        | {"top": [_entry(tokenizer, token, logprob) for token, logprob in one.top]}
        for one in completion.logprobs
    ]
    return {"logprobs": entries}


def spell_prompt_logprobs(completion: Completion, prompt: Sequence[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """The JSON field "prompt_logprobs", if it was asked for; the first token, which nothing precedes, has null."""
    if completion.prompt_logprobs is None:
        return {}
    values = (None, *completion.prompt_logprobs)
    return {"prompt_logprobs": [_entry(tokenizer, *pair) for pair in zip(prompt, values, strict=True)]}


def _entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    if logprob is not None and not math.isfinite(logprob):  # JSON has no such numbers
        logprob = None
    return {"id": token, "token": tokenizer.decode([token], skip_special_tokens=False), "logprob": logprob}


def _parse(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise OptionError(f"the line is longer than {MAX_LINE:,} bytes")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise ValueError(f"{number} is beyond every float")
        return value

    try:
        fields = json.loads(line, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"the line is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise OptionError(f"the line is a JSON {type(fields).__name__}; it must be an object")
    check_depth(fields, "the line")
    return fields


def _answer(line: _Line, tokenizer: Tokenizer) -> dict[str, Any]:
    prompt = line.request.prompt
    assert not isinstance(prompt, str)  # lines are encoded as they are read
    samples = [
        {
            "text": sample.text,
            "completion_tokens": len(sample.token_ids),
            "finish_reason": sample.finish_reason,
            **spell_logprobs(sample, tokenizer),
        }
        for sample in line.samples
    ]
    shared = {"prompt_tokens": len(prompt), **spell_prompt_logprobs(line.samples[0], prompt, tokenizer)}
    if len(samples) == 1:
        return samples[0] | shared
    return {"samples": samples, "completion_tokens": sum(len(sample.token_ids) for sample in line.samples)} | shared
