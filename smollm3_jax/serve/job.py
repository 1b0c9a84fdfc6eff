"""Bodies of OpenAI's API to what is generated for them, and what is generated to their answers."""

from typing import Any

from ..errors import OptionError
from . import chat, completions, responses
from .contract import DONE, Event, Job, Reply, Server
from .errors import from_option
from .fields import check_json

__all__ = ["DONE", "Event", "Job", "Reply", "Server", "parse"]

PARSERS = {"chat": chat.parse, "completions": completions.parse, "responses": responses.parse}


def parse(kind: str, body: Any, server: Server) -> Job:
    """What a client asks for; templates are rendered and texts tokenized here.

    Args:
      kind: "chat", "completions" or "responses".
      body: what JSON decoded to, of any type.

    Raises:
      ApiError: 400 for what is malformed or cannot be kept, by its field; 404 for another model.
    """
    try:
        return PARSERS[kind](check_json(body), server)
    except OptionError as error:
        raise from_option(error) from None
