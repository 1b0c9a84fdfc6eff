"""What a sample says in a conversation, as thinking, text and calls of the tools that were offered."""

from collections.abc import Iterable

from ..chat.parse import Event, Parser, Text, Thinking, ToolCall
from ..generation.requests import Delta, Request, think_ids
from .contract import Server
from .conversation import Wishes
from .samples import Sample, Token
from .tools import parameters_of, with_names


class Spoken:
    """One sample of an answer; `sample` counts its tokens."""

    def __init__(self, server: Server, request: Request, wishes: Wishes):
        self.sample = Sample(server, request)
        self._offered = parameters_of(wishes.offered)
        formed = request.grammar is not None and not wishes.tools.forced
        self._parser = Parser(
            self.sample.begins_thinking,
            () if formed else wishes.calls,
            names=self._offered,
            thinks=-1 not in think_ids(server.tokenizer),
            one_text=formed,
        )
        self._several, self._forced = wishes.tools.parallel, wishes.tools.forced
        self.called = False

    @property
    def finish_reason(self) -> str | None:
        """As the API names it."""
        reason = self.sample.finish_reason
        return "tool_calls" if self.called and reason == "stop" else reason

    def add(self, delta: Delta) -> tuple[list[Event], list[Token]]:
        """What is said now, no two pieces of one kind in a row, and the tokens of it that have log-probabilities."""
        tokens = self.sample.add(delta)
        events = self._parser.feed(delta.text)
        if delta.finish_reason is not None:
            rest = self._parser.finish()
            # What a limit has cut of a call that had to be is no text of the model's.
            cut = self._forced and delta.finish_reason == "length"
            events += [event for event in rest if not (cut and isinstance(event, Text))]
        return _joined(event for found in events for event in self._passed(found)), tokens

    def _passed(self, event: Event) -> list[Event]:
        if not isinstance(event, ToolCall):
            return [event]
        if self.called and not self._several:
            return []
        self.called = True
        return [ToolCall(event.name, with_names(event, (self._offered or {}).get(event.name, [])))]


def _joined(events: Iterable[Event]) -> list[Event]:
    found: list[Event] = []
    for event in events:
        last = found[-1] if found else None
        if isinstance(event, Text) and isinstance(last, Text):
            found[-1] = Text(last.text + event.text)
        elif isinstance(event, Thinking) and isinstance(last, Thinking):
            found[-1] = Thinking(last.text + event.text)
        else:
            found.append(event)
    return found
