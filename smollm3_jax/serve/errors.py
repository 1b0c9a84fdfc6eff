"""What a client is told when a request cannot be answered, in OpenAI's form."""

import re
from collections.abc import Mapping
from typing import Any

from ..errors import MAX_CHARACTERS, OptionError
from ..screen_text import plain

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error"}
TYPES |= {403: "permission_error", 405: "invalid_request_error", 413: "invalid_request_error"}
TYPES |= {408: "timeout_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable_error"}

# Where a message of OptionError begins with what it is about: "top_p is 2; ...", "messages[0].role is ...".
_PATH = re.compile(r"([a-z_]+(?:\[\d+\]|\.[a-z_]+)*)(?=: | is | must | names | needs | has | holds )")


class ApiError(Exception):
    """An answer that is an error.

    status: HTTP's; param: the field of the body that it is about, as "messages[0].content"; code: a word for programs;
    headers: that go along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        # It quotes the client, which may have sent anything: halves of surrogate pairs, a megabyte, control codes.
        self.message = plain(message if len(message) <= MAX_CHARACTERS else f"{message[:MAX_CHARACTERS]} ...")
        super().__init__(self.message)
        self.status, self.code = status, code
        self.type = type or TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.param = None if param is None else plain(param)[:200]
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """{"error": ...}, the answer's body, and the last event of a stream that fails."""
        found = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": found}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A body that cannot be answered: 400."""
    return ApiError(400, message, param=param, code=code)


def from_option(error: OptionError, param: str | None = None) -> ApiError:
    """What the rest of the package refuses, as 400.

    Args:
      param: what it is about; None is what its message begins with, if that looks like a field.
    """
    found = _PATH.match(str(error))
    return bad(str(error), param or (found and found[1]))


def too_long(what: str, context: int, param: str | None) -> ApiError:
    """A request that does not fit into the context, in words that clients look for."""
    return bad(f"This model's maximum context length is {context} tokens. {what}", param, "context_length_exceeded")
