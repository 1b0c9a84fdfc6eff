"""What the two halves of the server say to each other: jobs in, deltas in, events and bodies out."""

import dataclasses
from typing import Any, Protocol

from ..config import GenerationConfig, ModelConfig
from ..generation.requests import Delta, Request
from ..tokenizer import Tokenizer

# A server-sent event: its name (the responses API alone names them) and its data; "[DONE]" is a text.
Event = tuple[str | None, dict[str, Any] | str]
DONE: Event = (None, "[DONE]")


@dataclasses.dataclass(frozen=True)
class Server:
    """The model that answers. name: what clients call it; context: the most tokens of a request and its answer."""

    name: str
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    config: ModelConfig = dataclasses.field(repr=False)
    generation_config: GenerationConfig = dataclasses.field(repr=False)
    context: int


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
