"""/v1/chat/completions: messages to a request, and deltas to an answer or its chunks."""

import json
import secrets
import time
from typing import Any

from ..chat.parse import Text, Thinking, ToolCall
from ..generation.requests import Delta, Request
from .contract import DONE, Event, Job, Server
from .conversation import Wishes, check_messages, conversation_request, read_template_fields, set_effort
from .errors import bad
from .fields import Fields
from .formats import read_format
from .params import NAMES, shared_fields
from .samples import Token, listed, usage
from .spoken import Spoken
from .tools import read_tools

REFUSED = {
    "functions": "give tools",
    "function_call": "give tool_choice",
    "audio": "this model writes text alone",
    "prediction": "this server drafts on its own",
    "web_search_options": "this server searches nothing",
    "verbosity": "say in a message how long answers should be",
    "best_of": "give n, and choose",
    "suffix": "this model does not fill in",
    "echo": "/v1/completions has it",
}


def parse(body: dict[str, Any], server: Server) -> Job:
    """Raises ApiError, OptionError."""
    server, fields, stream, told, given = shared_fields(body, server, REFUSED)
    if fields.take("modalities", list, ["text"]) != ["text"]:
        raise fields.error("modalities", "['text'], which is all that this model writes")
    given |= _logprobs(fields)
    limit, limit_name = _limit(fields)
    wishes = read_template_fields(fields, read_tools(fields))
    set_effort(wishes, fields.any("reasoning_effort"), "reasoning_effort", server)
    if (budget := fields.take("max_thinking_tokens", int)) is not None:
        given["max_thinking_tokens"] = budget
    wishes.format = read_format(fields.object("response_format"))
    salt = fields.take("cache_salt", str, "")
    messages = check_messages(fields.any("messages"))
    fields.finish(NAMES)
    request = conversation_request(server, messages, wishes, given, limit, limit_name, "messages")
    return Job("chat", [request], stream, ChatReply(server, request, wishes, told), salt)


def _logprobs(fields: Fields) -> dict[str, Any]:
    wanted, top = fields.take("logprobs", bool, False), fields.take("top_logprobs", int)
    if top is not None and not wanted:
        raise bad("top_logprobs is there, but logprobs is not true: set it, or leave top_logprobs out", "top_logprobs")
    if top is not None and not 0 <= top <= 20:
        raise fields.error("top_logprobs", "a whole number from 0 to 20")
    return {"logprobs": top or 0} if wanted else {}


def _limit(fields: Fields) -> tuple[int | None, str]:
    """The most new tokens, and the field that says so."""
    new, old = fields.take("max_completion_tokens", int), fields.take("max_tokens", int)
    if None not in (new, old) and new != old:
        raise bad("max_completion_tokens and max_tokens differ: they mean the same, keep one", "max_tokens")
    return (old, "max_tokens") if new is None else (new, "max_completion_tokens")


class ChatReply:
    """See `contract.Reply`; told: where a stream tells the usage, as `stream_options` says it."""

    def __init__(self, server: Server, request: Request, wishes: Wishes, told: str):
        self._server, self._request, self._told = server, request, told
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": server.model}
        self._head["seed"] = request.params.seed
        self._choices = [_Choice(server, request, wishes) for _ in range(request.params.n)]

    def begin(self) -> list[Event]:
        return [self._chunk(i, {"role": "assistant", "content": ""}) for i in range(len(self._choices))]

    def add(self, index: int, delta: Delta) -> list[Event]:
        choice = self._choices[delta.sample]
        pieces, tokens = choice.add(delta)
        logprobs = choice.listed(tokens) if tokens else None
        if logprobs and not pieces:
            pieces = [{}]
        events = [self._chunk(delta.sample, piece, None if i else logprobs) for i, piece in enumerate(pieces)]
        if delta.finish_reason is not None:
            events.append(self._chunk(delta.sample, {}, finish_reason=choice.spoken.finish_reason))
        return events

    def end(self) -> list[Event]:
        last = self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self._usage()}
        return [(None, last), DONE] if self._told else [DONE]

    def body(self) -> dict[str, Any]:
        choices = [choice.body(i) for i, choice in enumerate(self._choices)]
        return self._head | {"object": "chat.completion", "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        return usage(len(self._request.prompt), [choice.spoken.sample for choice in self._choices])

    def _chunk(
        self, sample: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
    ) -> Event:
        choice = {"index": sample, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = self._head | {"object": "chat.completion.chunk", "choices": [choice]}
        counted = {"usage": self._usage() if self._told == "each" else None} if self._told else {}
        return None, chunk | counted


class _Choice:
    """One sample: what a message holds, as it comes."""

    def __init__(self, server: Server, request: Request, wishes: Wishes):
        self.spoken = Spoken(server, request, wishes)
        self._tokenizer, self._wanted = server.tokenizer, request.params.logprobs is not None
        self._thinking: list[str] = []
        self._text: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._tokens: list[Token] = []

    def add(self, delta: Delta) -> tuple[list[dict[str, Any]], list[Token]]:
        """The deltas of chunks, and the new tokens."""
        events, tokens = self.spoken.add(delta)
        self._tokens += tokens
        return [self._piece(event) for event in events], tokens

    def _piece(self, event: Thinking | Text | ToolCall) -> dict[str, Any]:
        if isinstance(event, Thinking):
            self._thinking.append(event.text)
            return _reasoning(event.text)
        if isinstance(event, Text):
            self._text.append(event.text)
            return {"content": event.text}
        function = {"name": event.name, "arguments": json.dumps(event.arguments, ensure_ascii=False)}
        call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
        self._calls.append(call)
        return {"tool_calls": [{"index": len(self._calls) - 1, **call}]}

    def listed(self, tokens: list[Token]) -> dict[str, Any]:
        return {"content": listed(self._tokenizer, tokens), "refusal": None}

    def body(self, index: int) -> dict[str, Any]:
        text = "".join(self._text)
        message = {"role": "assistant", "content": None if self._calls and not text else text, "refusal": None}
        message |= _reasoning("".join(self._thinking) or None)
        message |= {"tool_calls": self._calls} if self._calls else {}
        logprobs = self.listed(self._tokens) if self._wanted else None
        reason = self.spoken.finish_reason
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


def _reasoning(text: str | None) -> dict[str, Any]:
    """Under both of its names: clients know one or the other."""
    return {"reasoning_content": text, "reasoning": text}
