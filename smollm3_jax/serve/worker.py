"""The thread that owns the engine, and what the event loop knows of each request.

The engine's thread takes requests and cancellations from an inbox. What a step decodes it hands to the event loop, all
of it in one call.
Every state of a request changes in the event loop's thread alone:

    received -> queued -> prefilling -> decoding -> finished | cancelled | failed

`Worker._end` is the one place where a request leaves, whatever its state.
"""

import asyncio
import contextvars
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..errors import SmolLM3Error
from ..generation.device_loop import MAX_STEPS
from ..generation.engine import Engine
from ..generation.requests import Delta
from .errors import ApiError
from .metrics import Metrics
from .ticket import Ticket

log = logging.getLogger(__name__)

T = TypeVar("T")

# Tokens a call while a slot is free: a new request waits for no more than one call.
FEW_STEPS = 4
# Without a token for so long, and for each token of prompts that are going in so much longer, the engine has stalled.
STALL_SECONDS = 300.0
STALL_SECONDS_A_TOKEN = 0.1
LOOK_EVERY = 1.0
UNFINISHED = (
    "the engine could not go on with the answer; if it has to keep to a format or to call tools, simplify those"
)


@dataclasses.dataclass(frozen=True)
class _Step:
    """What the engine's thread says of a step: deltas with whose they are; begun: whose prompt goes in, and which."""

    deltas: list[tuple[Ticket, int, Delta]]
    begun: tuple[Ticket, int] | None
    began: float
    ended: float


class Worker:
    """Runs requests on an engine in a thread of its own; all methods are the event loop's.

    Args:
      make: makes the engine, compiled for all that requests can need; called in the thread.
      stall: seconds without a token after which the engine has stalled.
    """

    def __init__(self, make: Callable[[], Engine], metrics: Metrics, stall: float = STALL_SECONDS):
        self.metrics, self._make, self._stall = metrics, make, stall
        self.tickets: set[Ticket] = set()  # that are not over
        self.engine: Engine | None = None
        self.ready = False
        self.failure: BaseException | None = None
        self.changed, self.failed = asyncio.Event(), asyncio.Event()  # changed: ready, or failed
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        # Seconds since something was delivered, as the watchdog counts them: while the process is stopped it does not.
        self._quiet = 0.0
        # What says that this process leads others is in its context.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._run,), name="engine", daemon=True)

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watch = self._loop.create_task(self._watchdog())

    def stop(self, timeout: float) -> bool:
        """Ends the thread after its step at hand; whether it did in `timeout` seconds."""
        self._watch.cancel()
        self._inbox.put(("stop", None))
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # --- requests -----------------------------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Samples that are not over, of requests that are being read too."""
        return sum(ticket.samples for ticket in self.tickets)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of prompts that are not in a slot yet, nor on their way into one."""
        return sum(ticket.waiting_tokens for ticket in self.tickets)

    def receive(self) -> Ticket:
        """A ticket for a request that has arrived, which holds a place from now on."""
        ticket = Ticket()
        self.tickets.add(ticket)
        return ticket

    def submit(self, ticket: Ticket) -> None:
        """Hands its requests, whose prompts are ids, to the engine."""
        if not ticket.over:
            if not self._owed():
                self._touch()
            ticket.state, ticket.left = "queued", ticket.samples
            self._inbox.put(("submit", ticket))

    def cancel(self, ticket: Ticket, cause: str, error: ApiError | None = None) -> None:
        """Ends a request that nobody waits for any more; nothing where it is over.

        Args:
          cause: one of `metrics.CAUSES`; error: what its client is told, if that is still there.
        """
        if not ticket.over:
            self.metrics.cancelled.labels(cause).inc()
            self._withdraw(ticket, "cancelled", error)

    def fail(self, ticket: Ticket, error: ApiError) -> None:
        """Ends a request with what its client is told; nothing where it is over."""
        if not ticket.over:
            self._withdraw(ticket, "failed", error)

    def _withdraw(self, ticket: Ticket, state: str, error: ApiError | None) -> None:
        ticket.error = error
        if ticket.state != "received":
            self._inbox.put(("cancel", ticket))
        self._end(ticket, state)

    @property
    def is_healthy(self) -> bool:
        """Whether tokens come, where any are owed."""
        return self.failure is None and not self._is_stalled()

    def _end(self, ticket: Ticket, state: str) -> None:
        ticket.state = state
        self.tickets.discard(ticket)
        ticket.held.clear()
        self.metrics.ended(ticket)
        ticket.news.set()

    # --- what the thread says -----------------------------------------------------------------------------

    def _deliver(self, step: _Step) -> None:
        fresh = any((index, delta.sample) not in ticket.latest for ticket, index, delta in step.deltas)
        self.metrics.step(step.ended - step.began, fresh or step.begun is not None, bool(step.deltas))
        if step.begun is not None and not step.begun[0].over:
            ticket, index = step.begun
            ticket.going_in.add(index)
            if ticket.state == "queued":
                self._touch()
                ticket.state, ticket.began = "prefilling", step.began
        for ticket, index, delta in step.deltas:
            if ticket.over:
                continue
            self._touch()
            if not delta.token_ids and delta.finish_reason is None:
                continue  # it says again what it had said when others needed its part of the cache
            if delta.finish_reason == "error":
                self.fail(ticket, ApiError(500, UNFINISHED, type="server_error", code="answer_failed"))
                continue
            ticket.state, ticket.began = "decoding", ticket.began or step.began
            ticket.going_in.add(index)
            self._count(ticket, index, delta, step.ended)
            ticket.deltas.append((index, delta))
            ticket.news.set()
            if not ticket.left:
                self._end(ticket, "finished")

    def _count(self, ticket: Ticket, index: int, delta: Delta, now: float) -> None:
        which, prompt = (index, delta.sample), len(ticket.requests[index].prompt)
        self.metrics.delta(delta, prompt, ticket.arrived, ticket.first, ticket.latest.get(which), now)
        ticket.held[which] += len(delta.token_ids) + (0 if which in ticket.latest else prompt)
        ticket.latest[which] = now
        ticket.first = ticket.first or now
        if delta.finish_reason is not None:
            del ticket.held[which]
            ticket.left -= 1

    def _made(self, engine: Engine) -> None:
        self.engine, self.ready = engine, True
        self._touch()
        self.changed.set()

    def _failed(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure, self.ready = error, False
            for ticket in list(self.tickets):
                self.fail(ticket, ApiError(500, "the engine has failed; the server ends", type="server_error"))
            self.changed.set()
            self.failed.set()

    # --- the watchdog -------------------------------------------------------------------------------------

    def _touch(self) -> None:
        self._quiet = 0.0

    def _owed(self) -> list[Ticket]:
        return [ticket for ticket in self.tickets if ticket.state != "received"]

    def _is_stalled(self) -> bool:
        """Whether nothing has come for too long of what the engine was given: a thread that lives, or even steps, says
        nothing of tokens that arrive."""
        owed = self._owed()
        if not owed or not self.ready:
            return False
        going_in = sum(ticket.unanswered_tokens for ticket in owed)
        return self._quiet > self._stall + STALL_SECONDS_A_TOKEN * going_in

    async def _watchdog(self) -> None:
        every = min(LOOK_EVERY, self._stall / 4)
        while self.failure is None:
            await asyncio.sleep(every)
            self._quiet += every
            if self._is_stalled():
                self._failed(SmolLM3Error(f"the engine has delivered no token for {self._stall:.0f} s"))

    # --- the engine's thread ------------------------------------------------------------------------------

    def _say(self, call: Callable[[T], None], what: T) -> None:
        try:
            self._loop.call_soon_threadsafe(call, what)
        except RuntimeError:  # the event loop has ended: nobody listens
            log.debug("nobody hears %r", what)

    def _run(self) -> None:
        try:
            engine = self._make()
            self._say(self._made, engine)
            try:
                self._serve(engine)
            finally:
                engine.close()
        except BaseException as error:
            self._say(self._failed, error)

    def _serve(self, engine: Engine) -> None:
        tickets: dict[int, tuple[Ticket, int, set[int]]] = {}  # by the engine's number; samples that go on
        numbers: dict[Ticket, list[int]] = {}
        while True:
            for kind, ticket in self._asked(engine.is_idle):
                if kind == "stop":
                    return
                if kind == "submit":
                    self._submit(engine, ticket, tickets, numbers)
                else:
                    for number in numbers.pop(ticket, ()):
                        if tickets.pop(number, None) is not None:
                            engine.cancel(number)
            if engine.is_idle:
                continue
            engine.steps = _steps(engine)
            began = time.monotonic()
            deltas = engine.step()
            going_in = None if engine.prefilling is None else tickets[engine.prefilling][:2]
            told = [(*tickets[delta.request][:2], delta) for delta in deltas]
            for delta in deltas:
                ticket, _, left = tickets[delta.request]
                left.discard(delta.sample if delta.finish_reason else -1)
                if not left:
                    del tickets[delta.request]
                    numbers[ticket].remove(delta.request)
                    if not numbers[ticket]:
                        del numbers[ticket]
            self._say(self._deliver, _Step(told, going_in, began, time.monotonic()))

    def _asked(self, wait: bool) -> Iterator[tuple[str, Ticket]]:
        """All that is in the inbox, waiting for something if the engine has nothing to do."""
        if wait:
            yield self._inbox.get()
        while True:
            try:
                yield self._inbox.get_nowait()
            except queue.Empty:
                return

    def _submit(
        self, engine: Engine, ticket: Ticket, tickets: dict[int, Any], numbers: dict[Ticket, list[int]]
    ) -> None:
        own = numbers[ticket] = []
        try:
            for index, request in enumerate(ticket.requests):
                own.append(engine.submit(request))
                tickets[own[-1]] = ticket, index, set(range(request.params.n))
        except Exception as error:
            for number in numbers.pop(ticket):
                tickets.pop(number, None)
                engine.cancel(number)
            told = ApiError(400, str(error)) if isinstance(error, SmolLM3Error) else ApiError(500, "the engine failed")
            if told.status == 500:
                log.exception("a request could not be given to the engine")
            self._say(lambda told: self.fail(ticket, told), told)


def _steps(engine: Engine) -> int:
    """How many tokens the next call brings: few while a slot is free, and one while samples wait for their prompts'
    turn: until then their slots are empty."""
    return 1 if engine.is_filling else FEW_STEPS if engine.has_room else MAX_STEPS
