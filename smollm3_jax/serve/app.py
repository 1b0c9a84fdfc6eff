"""The routes of the server: bodies become requests of the engine, and their answers go back, whole or streamed."""

import asyncio
import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..generation.requests import Delta
from ..support import version
from .errors import ApiError
from .guards import Guard, read_json
from .job import Job, Reply, Server
from .models import detokenize, model_body, models_body, tokenize
from .openapi import described
from .page import page
from .ticket import Ticket
from .worker import Worker
from .write import Write, as_json, framed, in_pieces

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_AFTER = {"Retry-After": "2"}
KEEP_ALIVE_SECONDS = 15.0
THREADS = 2  # that render templates and tokenize, and as many that make answers
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
EVENTS += [(b"x-accel-buffering", b"no")]  # or nginx holds them back
KINDS = {"/v1/chat/completions": "chat", "/v1/completions": "completions", "/v1/responses": "responses"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a server allows.

    slots, max_queue: samples side by side, and that wait; max_queue_tokens: of prompts that wait.
    keys, hosts, origins: see `Guard`; log_requests: a line for each.
    """

    slots: int
    max_queue: int
    max_queue_tokens: int
    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()
    log_requests: bool = False
    keep_alive: float = KEEP_ALIVE_SECONDS


class Service:
    """What the routes share; used in the event loop's thread alone."""

    def __init__(self, worker: Worker, server: Server, parse: Callable[..., Job], settings: Settings):
        self.worker, self.server, self.parse, self.settings = worker, server, parse, settings
        self.metrics, self.started, self.draining = worker.metrics, int(time.time()), False
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="texts")
        self.answers = ThreadPoolExecutor(THREADS, thread_name_prefix="answers")  # which do not wait for prompts
        self.answering = 0  # requests whose answer is not sent yet
        self._in_pool = 0  # calls that its threads have begun or have before them, with all that they hold
        waiting = lambda: len(worker.tickets) - self._running()  # noqa: E731
        prefixes = [lambda name=name: getattr(self._prefixes(), name, 0) for name in ("queries", "hits")]
        preemptions = lambda: getattr(worker.engine, "preemptions", 0)  # noqa: E731
        self.metrics.watch(self._running, waiting, self._usage, preemptions, *prefixes)

    @property
    def _places(self) -> int:
        return self.settings.slots + self.settings.max_queue

    def _running(self) -> int:
        return sum(ticket.state in ("prefilling", "decoding") for ticket in self.worker.tickets)

    def _prefixes(self) -> object:
        return None if self.worker.engine is None else self.worker.engine.prefixes

    def _usage(self) -> float:
        engine = self.worker.engine
        if engine is None:
            return 0.0
        if (pages := engine.usage) is not None:
            return pages
        return sum(ticket.held.total() for ticket in self.worker.tickets) / (engine.slots * engine.capacity)

    @property
    def status(self) -> str:
        if self.worker.failure is not None:
            return "failed"
        return "draining" if self.draining else "ready" if self.worker.ready else "loading"

    def admit(self, samples: int = 1, tokens: int = 0) -> None:
        """Refuses what there is no place for.

        Raises:
          ApiError: 429 or 503.
        """
        if self.status != "ready":
            message = f"the server takes no requests: it is {self.status}"
            raise ApiError(503, message, code=self.status, headers=RETRY_AFTER)
        if self.worker.samples + samples > self._places:
            raise _full(f"{self.worker.samples} answers are under way or wait", "queue_full")
        waiting = self.worker.waiting_tokens
        if waiting and waiting + tokens > self.settings.max_queue_tokens:
            raise _full(f"prompts of {waiting:,} tokens wait", "queue_tokens")

    def place(self, ticket: Ticket, job: Job, key: str) -> None:
        """Gives a ticket what its body asks for, if there is a place for all of it; key: whose prefixes it shares.

        Raises:
          ApiError: 400, 429 or 503.
        """
        if ticket.over:
            return
        samples, tokens = sum(x.params.n for x in job.requests), sum(len(x.prompt) for x in job.requests)
        if samples > self._places:
            own = f"{self.settings.slots} slots and {self.settings.max_queue} places to wait"
            message = (
                f"{samples} answers are asked for, and this server takes at most {self._places} at a time: it has {own}"
            )
            several = "prompt" if len(job.requests) > 1 else "n"
            raise ApiError(400, f"{message}; ask for fewer, or start it with a larger --max-queue", param=several)
        ticket.samples = 0  # its own place is not in its way
        try:
            self.admit(samples, tokens)
        finally:
            ticket.samples = samples
        salt = hashlib.sha256(json.dumps([key, job.cache_salt]).encode()).hexdigest()
        ticket.requests = [dataclasses.replace(request, cache_salt=salt) for request in job.requests]
        ticket.tokens = tokens

    async def texts(self, function: Callable[[Any, Server], object], body: object) -> bytes:
        """The JSON of what tokenizes without the model; raises as `off_the_loop` and the function do."""
        return await self.off_the_loop(lambda: in_pieces(function(body, self.server)))

    async def off_the_loop(self, function: Callable[..., T], *args: Any) -> T:
        """Calls it in one of the few threads that render and tokenize. At most as many calls wait for one as requests
        may be under way, those of clients that have left included.

        Raises:
          ApiError: 429, or what the function raises.
        """
        if self._in_pool >= self._places:
            raise _full(f"{self._in_pool} texts wait to be tokenized", "queue_full")
        self._in_pool += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, functools.partial(function, *args))
        finally:
            self._in_pool -= 1

    async def answer(self, job: Job, function: Callable[..., bytes], *args: Any) -> bytes:
        """Calls what makes a part of a job's answer, with what writes JSON: in a thread where log-probabilities are
        listed, as it may take seconds; else it takes less than going there does, as a part has few tokens."""
        if all(x.params.logprobs is None and not x.params.prompt_logprobs for x in job.requests):
            return function(as_json, *args)
        return await self.in_thread(function, in_pieces, *args)

    async def in_thread(self, function: Callable[..., bytes], *args: Any) -> bytes:
        """Calls what makes an answer, or a part that is large, in one of the threads that do that alone."""
        return await asyncio.get_running_loop().run_in_executor(self.answers, function, *args)


def _unless_over(ticket: Ticket, function: Callable[..., Any], *args: Any) -> Any:
    """Calls it, or gives None where nobody waits for it any more: its client has left before a thread was free."""
    return None if ticket.over else function(*args)


def _full(what: str, code: str) -> ApiError:
    return ApiError(429, f"the queue is full: {what}; try again later", code=code, headers=RETRY_AFTER)


class Generate:
    """A route that runs the model. It is an ASGI application of its own, not a function that starlette calls, because
    it goes on listening to the client: one that leaves cancels its request, streamed or not."""

    def __init__(self, service: Service, kind: str):
        self.service, self.kind = service, kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, worker = self.service, self.service.worker
        service.admit()
        body = await read_json(Request(scope, receive), service.off_the_loop)
        service.admit()
        ticket = worker.receive()
        service.answering += 1
        watch = asyncio.create_task(self._until_left(scope, receive, ticket))
        try:
            job = await service.off_the_loop(_unless_over, ticket, service.parse, self.kind, body, service.server)
            if job is None:
                return
            service.place(ticket, job, scope["state"].get("key", ""))
            worker.submit(ticket)
            await (self._stream if job.stream else self._whole)(ticket, job, send)
        except ApiError as error:
            worker.fail(ticket, error)
            raise
        finally:
            watch.cancel()
            worker.cancel(ticket, "error")  # nothing where it is over
            service.answering -= 1
            if service.settings.log_requests:
                _log(scope, ticket)

    async def _until_left(self, scope: Scope, receive: Receive, ticket: Ticket) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.service.worker.cancel(ticket, "slow_reader" if scope["state"].get("cut") else "disconnect")

    async def _whole(self, ticket: Ticket, job: Job, send: Send) -> None:
        while news := await ticket.take():
            await self.service.answer(job, _taken, job.reply, news)
        if ticket.error is not None:
            raise ticket.error
        if ticket.state == "finished":
            await respond(await self.service.in_thread(lambda: in_pieces(job.reply.body())), send)

    async def _stream(self, ticket: Ticket, job: Job, send: Send) -> None:
        started, said, keep_alive = False, time.monotonic(), self.service.settings.keep_alive
        while True:
            # Nothing is said before there is something to say: until then, an error has a status of its own.
            news = await ticket.take(keep_alive)
            if ticket.error is not None and not started:
                raise ticket.error
            if ticket.state == "cancelled" and ticket.error is None:  # nobody is there
                return
            last = not news and ticket.over
            try:
                content = b"" if started else framed(job.reply.begin())
                content += await self.service.answer(job, _added, job.reply, news)
                if last:
                    content += framed(job.reply.end() if ticket.error is None else [(None, ticket.error.body())])
            except Exception:
                if not started:
                    raise
                log.exception("a stream has failed")
                self.service.worker.fail(ticket, own_mistake())
                content, last = framed([(None, own_mistake().body())]), True
            # What came may be held back, as it may be the beginning of a call.
            if not content and not last and news and time.monotonic() - said < keep_alive:
                continue
            if not started:
                await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
                started = True
            content, said = content or b": keep-alive\n\n", time.monotonic()
            await send({"type": "http.response.body", "body": content, "more_body": not last})
            if last:
                return


def _taken(write: Write, reply: Reply, news: Iterable[tuple[int, Delta]]) -> bytes:
    """What came goes into an answer that is sent whole."""
    for index, delta in news:
        reply.add(index, delta)
    return b""


def _added(write: Write, reply: Reply, news: Iterable[tuple[int, Delta]]) -> bytes:
    return b"".join(framed(reply.add(index, delta), write) for index, delta in news)


async def respond(body: bytes, send: Send) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _log(scope: Scope, ticket: Ticket) -> None:
    seconds, asked = time.monotonic() - ticket.arrived, ticket.samples
    refused = ticket.error is not None and ticket.error.status < 500
    state = "refused" if refused else ticket.state
    log.info("%s: %s, prompts %d tokens, samples %d, %.2f s", scope["path"], state, ticket.tokens, asked, seconds)


# --- the other routes -------------------------------------------------------------------------------------


def _json(content: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = content if isinstance(content, bytes) else as_json(content)
    return Response(body, status, headers, "application/json")


def _routes(service: Service) -> Iterable[Route]:
    for path, kind in KINDS.items():
        yield Route(path, Generate(service, kind), methods=["POST"])

    async def health(request: Request) -> Response:
        healthy = service.worker.is_healthy
        return _json({"status": "ok" if healthy else "failed"}, 200 if healthy else 503)

    async def ready(request: Request) -> Response:
        return _json({"status": service.status}, 200 if service.status == "ready" else 503)

    async def metrics(request: Request) -> Response:
        return Response(service.metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def models(request: Request) -> Response:
        return _json(models_body(service.server, service.started))

    async def model(request: Request) -> Response:
        if not (name := request.path_params["name"]):
            return await models(request)
        return _json(model_body(service.server, service.started, name))

    async def tokens(request: Request) -> Response:
        return _json(await service.texts(tokenize, await read_json(request, service.off_the_loop)))

    async def text(request: Request) -> Response:
        return _json(await service.texts(detokenize, await read_json(request, service.off_the_loop)))

    async def openapi(request: Request) -> Response:
        return _json(described(version("smollm3-jax") or "0", service.server))

    async def chat_page(request: Request) -> Response:
        body, headers = page()
        return Response(body, 200, headers)

    yield from (Route("/health", health), Route("/ready", ready), Route("/metrics", metrics), Route("/", chat_page))
    yield Route("/openapi.json", openapi)
    yield Route("/tokenize", tokens, methods=["POST"])
    yield Route("/detokenize", text, methods=["POST"])
    yield from (Route("/v1/models", models), Route("/v1/models/{name:path}", model))


def make_app(service: Service) -> ASGIApp:
    async def refuse(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            error = ApiError(
                error.status_code, f"{request.method} {request.url.path[:100]}: {error.detail}", headers=error.headers
            )
        elif not isinstance(error, ApiError):
            error = own_mistake()
        service.metrics.rejected.labels(reason(error)).inc()
        return _json(error.body(), error.status, error.headers)

    async def nobody(request: Request, error: Exception) -> None:
        """The client has left before all of its body was there."""

    settings = service.settings
    middleware = [Middleware(Guard, refuse, settings.keys, settings.hosts, settings.origins)]
    if settings.origins:
        own: dict[str, Any] = {"allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        middleware.insert(0, Middleware(CORSMiddleware, allow_origins=settings.origins, **own))
    handlers: dict[Any, Any] = {ApiError: refuse, HTTPException: refuse, ClientDisconnect: nobody, Exception: refuse}
    app = Starlette(routes=list(_routes(service)), middleware=middleware, exception_handlers=handlers)
    # A redirection would name http where a proxy has taken https, and prompt and key would go there.
    app.router.redirect_slashes = False
    return app


def own_mistake() -> ApiError:
    return ApiError(500, "the server has failed to answer; its log says why", type="server_error")


def reason(error: ApiError) -> str:
    """The label that a refusal is counted under."""
    if error.code in ("queue_full", "queue_tokens", "loading", "draining"):
        return error.code
    known = {401: "unauthorized", 403: "forbidden", 404: "not_found", 408: "timeout", 413: "too_large"}
    return known.get(error.status, "failed" if error.status >= 500 else "invalid")
