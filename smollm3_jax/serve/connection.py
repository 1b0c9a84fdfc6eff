"""uvicorn's connection with bounds that it lacks: on a request's head, on how long one takes to arrive, and on readers
that take nothing."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 << 10  # bytes
ARRIVAL_SECONDS = 75.0  # of a whole request: longer than the routes wait for a body, which can say that it is late
SLOW_READER_SECONDS = 120.0
HEAD_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Connection(HttpToolsProtocol):
    arrival_seconds, slow_reader_seconds = ARRIVAL_SECONDS, SLOW_READER_SECONDS

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._arriving: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._head: int | None = 0  # bytes of it so far, as they arrive; None while a body comes
        self._fields = 0  # bytes of its address and fields, which may all be there at once
        self._requests = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arriving, self._writing):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        requests, in_head = self._requests, self._head is not None
        super().data_received(data)
        if in_head and self._head is not None and self._requests == requests:
            self._head += len(data)
            if self._head > MAX_HEAD and not self.transport.is_closing():
                self._refuse_head()

    def _refuse_head(self) -> None:
        self.transport.write(HEAD_TOO_LARGE)
        self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self._fields > MAX_HEAD:
            self._refuse_head()
        else:
            super().send_400_response(msg)

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + len(": \r\n"))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        """Raises ValueError, which ends the parser: the head is too large."""
        self._fields += size
        if self._fields > MAX_HEAD:
            raise ValueError(f"a head of more than {MAX_HEAD} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._fields = 0
        self.scope.setdefault("state", {})["cut"] = False
        self._expect_request()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._head = None

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._head, self._requests = 0, self._requests + 1
        if self._arriving is not None:
            self._arriving.cancel()

    def _expect_request(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
        self._arriving = self.loop.call_later(self.arrival_seconds, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()  # closes, once all is written
        self._await_reader(self.transport.get_write_buffer_size())

    def _await_reader(self, left: int) -> None:
        if self._writing is not None:
            self._writing.cancel()
        self._writing = self.loop.call_later(self.slow_reader_seconds, self._cut_unless_read, left)

    def _cut_unless_read(self, left: int) -> None:
        now = self.transport.get_write_buffer_size()
        if now < left:
            self._await_reader(now)
            return
        if self.cycle is not None:
            self.cycle.scope.setdefault("state", {})["cut"] = True
        self.transport.abort()
