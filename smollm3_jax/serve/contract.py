"""What the two halves of the server say to each other: jobs in, deltas in, events and bodies out."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from ..config import GenerationConfig, ModelConfig
from ..generation.requests import Delta, Request
from ..tokenizer import Tokenizer

# A server-sent event: its name (the responses API alone names them) and its data; "[DONE]" is a text.
Event = tuple[str | None, dict[str, Any] | str]
DONE: Event = (None, "[DONE]")


@dataclasses.dataclass(frozen=True)
class Server:
    """The models that answer: one, and adapters of it.

    name: what clients call the one; context: the most tokens of a request and its answer; adapters: what clients call
    each -> the folder that it was read from; adapter: which of them a request is for, None is the one without.
    """

    name: str
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    config: ModelConfig = dataclasses.field(repr=False)
    generation_config: GenerationConfig = dataclasses.field(repr=False)
    context: int
    adapters: Mapping[str, str] = dataclasses.field(default_factory=dict)
    adapter: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of all models."""
        return self.name, *self.adapters

    @property
    def model(self) -> str:
        """The name of the model that a request is for."""
        return self.name if self.adapter is None else self.adapter

    def answering_as(self, name: str) -> "Server":
        """The same for a request for another of its models."""
        return dataclasses.replace(self, adapter=None if name == self.name else name)


class Reply(Protocol):
    """Makes an answer of deltas. A stream sends the events of `begin`, each `add` and `end`; else `body` is the answer,
    after the same calls of `add`. Both say the same."""

    def begin(self) -> list[Event]:
        """What a stream says first."""
        ...

    def add(self, index: int, delta: Delta) -> list[Event]:
        """What came of a sample; index: of its request, in Job.requests."""
        ...

    def end(self) -> list[Event]:
        """What a stream says after the last delta of every sample."""
        ...

    def body(self) -> dict[str, Any]:
        """The whole answer, after the last delta of every sample."""
        ...


@dataclasses.dataclass
class Job:
    """A request of a client: what to generate, and what makes an answer of it.

    kind: "chat", "completions" or "responses"; cache_salt: only requests of one salt share prefixes.
    """

    kind: str
    requests: list[Request]
    stream: bool
    reply: Reply
    cache_salt: str = ""
