"""A server's life: it listens, loads and compiles, says that it is ready, answers, and drains."""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from ..errors import OptionError
from ..streams import end_now
from .app import Service, make_app
from .connection import Connection
from .errors import ApiError

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# An idle connection stays open for longer than proxies keep theirs.
IDLE_SECONDS = 75
# For what is written already to reach its reader, and for a step to end.
LAST_SECONDS = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
      OptionError: the address cannot be had, and why.
    """
    if not 0 <= port <= 65535:
        raise OptionError(f"--port is {port}; it must be from 0 (a free one) to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        # localhost is both; programs that know one alone know IPv4.
        family, kind, protocol, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        own = socket.socket(family, kind, protocol)
        try:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            own.bind(address)
            own.listen(2048)
        except OSError:
            own.close()
            raise
    except socket.gaierror as error:
        raise OptionError(f"--host {host} is no name or address that this machine knows: {error.strerror}") from None
    except OSError as error:
        whys = {
            errno.EADDRINUSE: f"--port {port} is in use by another program; name another, or 0 for a free one",
            errno.EACCES: f"--port {port} is for the administrator (those below 1024 are); name a higher one",
            errno.EADDRNOTAVAIL: f"--host {host} is no address of this machine",
        }
        raise OptionError(whys.get(error.errno or 0, f"cannot listen at {host}, port {port}: {error}")) from None
    return own


def url_of(own: socket.socket) -> str:
    host, port = own.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # `run` has its own, which drain first: uvicorn's shutdown tells streams that their clients have left


async def run(
    service: Service,
    own: socket.socket,
    *,
    say: Callable[[str], None],
    drain_timeout: float,
    stop: asyncio.Event,
) -> None:
    """Serves until `stop` is set, or the engine fails; says the ready line when requests are taken."""
    worker, server = service.worker, _Server(config_of(make_app(service)))
    serving = asyncio.create_task(server.serve(sockets=[own]))
    worker.start()
    stopped, changed = asyncio.create_task(stop.wait()), asyncio.create_task(worker.changed.wait())
    try:
        await asyncio.wait([stopped, changed, serving], return_when=asyncio.FIRST_COMPLETED)
        if worker.ready and not stop.is_set():
            say(f"ready {url_of(own)}")
            failed = asyncio.create_task(worker.failed.wait())
            await asyncio.wait([stopped, failed, serving], return_when=asyncio.FIRST_COMPLETED)
            failed.cancel()
        await _drain(service, drain_timeout if worker.failure is None else LAST_SECONDS)
    finally:
        stopped.cancel()
        changed.cancel()
        server.should_exit = True
        await serving


async def _drain(service: Service, timeout: float) -> None:
    """Lets what is under way end, and takes nothing new."""
    service.draining = True
    try:
        async with asyncio.timeout(timeout):
            while service.answering:
                await asyncio.sleep(0.02)
    except TimeoutError:
        error = ApiError(503, "the server has ended", type="server_error", code="draining")
        for ticket in list(service.worker.tickets):
            service.worker.cancel(ticket, "drain", error)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST_SECONDS):
                while service.answering:
                    await asyncio.sleep(0.02)


def serve(
    make_service: Callable[[], Service], own: socket.socket, *, say: Callable[[str], None], drain_timeout: float
) -> None:
    """Serves until a signal comes; a second one ends the process at once.

    Raises:
      what the engine has failed with.
    """

    async def main() -> Service:
        service = make_service()
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            if stop.is_set():
                end_now(128 + number)
            if not service.worker.ready:  # a thread that compiles cannot be interrupted
                log.info("a signal ends it before it is ready")
                end_now(0 if service.worker.failure is None else 3)
            log.info(
                "draining: what is under way ends, for at most %.0f s; a second signal ends at once", drain_timeout
            )
            stop.set()

        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                loop.add_signal_handler(number, on_signal, number)
        await run(service, own, say=say, drain_timeout=drain_timeout, stop=stop)
        return service

    with asyncio.Runner(loop_factory=config_of(None).get_loop_factory()) as runner:
        service = runner.run(main())
    ended = service.worker.stop(LAST_SECONDS)
    failure = service.worker.failure
    if not ended:
        if failure is not None:
            print(f"smollm3: {failure}", file=sys.stderr)
        end_now(0 if failure is None else 3)
    if failure is not None:
        raise failure


def config_of(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=LAST_SECONDS,
    )
