"""What stands before every route: whom the server talks to, and how much of a request it reads.

Pure ASGI: a middleware that wraps a response hides from it that the client has left.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import ApiError

# What may be asked without the key.
OPEN = ("/", "/health", "/ready")
Refuse = Callable[[Request, Exception], Awaitable[Response]]
MAX_BODY = 4 << 20  # bytes
LARGE = 64 << 10
BODY_SECONDS = 60.0


class Guard:
    """Refuses names that are not the server's, pages of other sites, and requests without one of the keys.

    Args:
      refuse: makes the response of an error.
      keys: none is no check.
      hosts: names that the server has beside localhost and all addresses; "*" is every name. A name that is not the
        server's may be a page's that has made it point here (DNS rebinding), which an address cannot be.
      origins: sites, such as https://example.com, whose pages may ask; "*" is every one.
    """

    def __init__(self, app: ASGIApp, refuse: Refuse, keys: Sequence[str], hosts: Sequence[str], origins: Sequence[str]):
        self.app, self.refuse, self.keys = app, refuse, [_digest(key) for key in keys]
        self.hosts, self.origins = {"localhost", *(host.lower() for host in hosts)}, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope, Headers(scope=scope))
            except ApiError as error:
                await (await self.refuse(Request(scope), error))(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        self._check_host(headers.get("host", ""))
        self._check_origin(headers)
        if self.keys and scope["path"] not in OPEN:
            scope["state"]["key"] = self._check_key(headers.get("authorization", ""))

    def _check_host(self, host: str) -> None:
        name = _name(host)
        if "*" not in self.hosts and name not in self.hosts and not _is_address(name):
            raise ApiError(
                403,
                f"this server does not go by the name {name[:100]!r}: use localhost or its address, or start it with "
                "--allow-host NAME",
                code="host_not_allowed",
            )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or "*" in self.origins or origin in self.origins:
            return
        try:
            site = urlsplit(origin).netloc.lower()
        except ValueError:
            site = ""
        if not site or site != headers.get("host", "").lower():
            raise ApiError(
                403,
                f"pages of {origin[:100]!r} may not ask this server: start it with --allow-origin {origin[:100]}",
                code="origin_not_allowed",
            )

    def _check_key(self, authorization: str) -> str:
        scheme, _, given = authorization.partition(" ")
        # All are compared, and digests of them in constant time: how long it takes tells nothing.
        same = [hmac.compare_digest(_digest(given.strip()), key) for key in self.keys]
        if scheme.lower() != "bearer" or not any(same):
            raise ApiError(
                401,
                "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return given.strip()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _name(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.split("%")[0])
    except ValueError:
        return False
    return True


async def read_json(
    request: Request,
    off_the_loop: Callable[..., Awaitable[Any]],
    limit: int = MAX_BODY,
    seconds: float = BODY_SECONDS,
) -> Any:
    """What JSON a request's body is; `off_the_loop` calls in a thread what takes a large one.

    Raises:
      ApiError: 400, 408 or 413, or what `off_the_loop` raises; starlette's ClientDisconnect: the client has left.
    """
    # A browser sends other kinds to other sites without asking them first.
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(400, f"the content type is {kind[:100]!r}; it must be application/json")
    body = await _read(request, limit, seconds)
    return _parse(body) if len(body) <= LARGE else await off_the_loop(_parse, body)


async def _read(request: Request, limit: int, seconds: float) -> bytes:
    said = request.headers.get("content-length", "")
    too_large = ApiError(413, f"the body has more than {limit:,} bytes", code="body_too_large")
    if said.isdecimal() and int(said) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        close = {"Connection": "close"}
        raise ApiError(408, f"the body was not there after {seconds:.0f} s", code="timeout", headers=close) from None
    return bytes(body)


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is no JSON that is understood: {why}", code="invalid_json") from None
