"""A client's request on its way, as the event loop sees it."""

import asyncio
import collections
import dataclasses
import time

from ..generation.requests import Delta, Request
from .errors import ApiError

OVER = ("finished", "cancelled", "failed")


@dataclasses.dataclass(eq=False)
class Ticket:
    """A client's request on its way: what it asks of the engine, how far it is, and what nobody has taken of it yet.

    samples: how many sequences it makes, counted before its body was read as one; tokens: of its prompts;
    going_in: which of `requests` have begun, of one after another; left: samples that have not ended; held: tokens in
    slots, of samples that decode.
    """

    samples: int = 1
    tokens: int = 0
    requests: list[Request] = dataclasses.field(default_factory=list)
    going_in: set[int] = dataclasses.field(default_factory=set)
    state: str = "received"
    error: ApiError | None = None
    left: int = 0
    held: collections.Counter[tuple[int, int]] = dataclasses.field(default_factory=collections.Counter)
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    began: float | None = None  # its prompt's way into a slot
    first: float | None = None  # token
    latest: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)
    deltas: list[tuple[int, Delta]] = dataclasses.field(default_factory=list)
    news: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    @property
    def over(self) -> bool:
        return self.state in OVER

    @property
    def waiting_tokens(self) -> int:
        """Of prompts that have not begun to go into a slot."""
        return sum(len(request.prompt) for i, request in enumerate(self.requests) if i not in self.going_in)

    @property
    def unanswered_tokens(self) -> int:
        """Of prompts that no token has come of."""
        answered = {index for index, _ in self.latest}
        return sum(len(request.prompt) for i, request in enumerate(self.requests) if i not in answered)

    async def take(self, timeout: float | None = None) -> list[tuple[int, Delta]]:
        """What came since the last time, waiting for something; nothing after `timeout` seconds, or at the end."""
        if not self.deltas and not self.over:
            self.news.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self.news.wait()
            except TimeoutError:
                return []
        taken, self.deltas = self.deltas, []
        return taken
