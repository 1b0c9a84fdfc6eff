"""/v1/responses, without a memory: items to a request, and deltas to an answer or its events."""

import json
import secrets
import time
from typing import Any

from ..chat.parse import Text, Thinking, ToolCall
from ..generation.requests import Delta, Request
from .contract import Event, Job, Server
from .conversation import Wishes, conversation_request, read_template_fields, set_effort
from .formats import read_format
from .items import messages_of
from .params import NAMES, shared_fields
from .samples import usage
from .spoken import Spoken
from .tools import Tools, read_tools

_MEMORY = "this server remembers no answers: send the conversation as input"
REFUSED = {
    "previous_response_id": _MEMORY,
    "conversation": _MEMORY,
    "background": "this server answers while the client waits",
    "prompt": "this server has no prompts of its own: give instructions and input",
    "include": "this server has nothing to include; /v1/chat/completions has logprobs",
    "top_logprobs": "/v1/chat/completions has logprobs",
    "max_tool_calls": "it is about tools of the server, which has none",
    "context_management": "send what the model is to read",
    "moderation": "this server has none",
    "n": "an answer has one sample here; /v1/chat/completions has n",
    "messages": "this API calls it input",
}
_NAMES = NAMES | dict.fromkeys(("max_tokens", "max_completion_tokens", "max_new_tokens"), "max_output_tokens")
_NAMES |= {"response_format": "text.format", "reasoning_effort": "reasoning.effort"}


def parse(body: dict[str, Any], server: Server) -> Job:
    """Raises ApiError, OptionError."""
    server, fields, stream, _, given = shared_fields(body, server, REFUSED)
    fields.ignore("prompt_cache_retention", "prompt_cache_options")
    if fields.take("truncation", str, "disabled") != "disabled":
        raise fields.error("truncation", "'disabled': this server leaves nothing out")
    limit = fields.take("max_output_tokens", int)
    wishes = read_template_fields(fields, read_tools(fields, flat=True))
    effort = None
    if (reasoning := fields.object("reasoning")) is not None:
        effort = reasoning.any("effort")
        reasoning.refuse(dict.fromkeys(("summary", "generate_summary"), "reasoning comes whole"))
        reasoning.finish()
    set_effort(wishes, effort, "reasoning.effort", server)
    if (budget := fields.take("max_thinking_tokens", int)) is not None:
        given["max_thinking_tokens"] = budget
    form: dict[str, Any] = {"type": "text"}
    if (text := fields.object("text")) is not None:
        text.refuse({"verbosity": "say in the instructions how long answers should be"})
        form = text.any("format") or form
        wishes.format = read_format(text.object("format"), flat=True)
        text.finish()
    salt = fields.take("cache_salt", str, "")
    instructions = fields.take("instructions", str)
    messages = messages_of(fields.any("input"), instructions)
    fields.finish(_NAMES)
    request = conversation_request(server, messages, wishes, given, limit, "max_output_tokens", "input")
    said = {
        "instructions": instructions,
        "max_output_tokens": limit,
        "metadata": body.get("metadata") if isinstance(body.get("metadata"), dict) else {},
        "reasoning": {"effort": effort, "summary": None},
        "text": {"format": form},
    }
    return Job("responses", [request], stream, ResponsesReply(server, request, wishes, said), salt)


def _tools_said(tools: Tools) -> dict[str, Any]:
    """Tools as this API has them."""
    functions = [{"parameters": None, "strict": None, **tool["function"]} for tool in tools.functions]
    choice = tools.choice if tools.name is None else {"type": "function", "name": tools.name}
    return {
        "tools": [{"type": "function", **function} for function in functions],
        "tool_choice": choice,
        "parallel_tool_calls": tools.parallel,
    }


class ResponsesReply:
    """See `contract.Reply`.

    An answer is a list of items: reasoning, messages and calls, in the order in which they are said. One is open at a
    time, and its text grows.
    """

    def __init__(self, server: Server, request: Request, wishes: Wishes, said: dict[str, Any]):
        self._request, self._spoken = request, Spoken(server, request, wishes)
        params = request.params
        self._head = {"id": f"resp_{secrets.token_hex(12)}", "object": "response", "created_at": int(time.time())}
        self._head |= {"model": server.model, "seed": params.seed, "temperature": params.temperature}
        self._head |= {"top_p": params.top_p, **_tools_said(wishes.tools), **said}
        self._head |= {"error": None, "previous_response_id": None, "background": False, "truncation": "disabled"}
        self._head |= {"store": False, "completed_at": None, "incomplete_details": None}
        self._output: list[dict[str, Any]] = []
        self._open: list[str] | None = None  # pieces of the last item's text, while it grows
        self._number = 0  # of the next event

    def begin(self) -> list[Event]:
        events = ("response.created", "response.in_progress")
        return [self._event(name, response=self.body()) for name in events]

    def add(self, index: int, delta: Delta) -> list[Event]:
        found, _ = self._spoken.add(delta)
        events = [event for piece in found for event in self._say(piece)]
        if delta.finish_reason is not None:
            done = delta.finish_reason == "stop"
            events += self._close("completed" if done else "incomplete")
            self._head |= {"completed_at": int(time.time())} if done else {}
            self._head |= {} if done else {"incomplete_details": {"reason": "max_output_tokens"}}
        return events

    def end(self) -> list[Event]:
        body = self.body()
        return [self._event(f"response.{body['status']}", response=body)]

    def body(self) -> dict[str, Any]:
        ends = {"completed": "completed_at", "incomplete": "incomplete_details"}
        status = next((status for status, field in ends.items() if self._head[field] is not None), "in_progress")
        counted = None if status == "in_progress" else self._usage()
        return self._head | {"status": status, "output": list(self._output), "usage": counted}

    def _usage(self) -> dict[str, Any]:
        found = usage(len(self._request.prompt), [self._spoken.sample])
        return {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": found["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": found["completion_tokens_details"],
            "total_tokens": found["total_tokens"],
        }

    def _event(self, name: str, /, **fields: object) -> Event:
        number, self._number = self._number, self._number + 1
        return name, {"type": name, "sequence_number": number, **fields}

    def _of_item(self, name: str, /, **fields: object) -> Event:
        """An event about the last item."""
        return self._event(name, output_index=len(self._output) - 1, **fields)

    def _of_part(self, name: str, /, **fields: object) -> Event:
        """An event about the text of the last item."""
        return self._of_item(name, item_id=self._output[-1]["id"], content_index=0, **fields)

    def _say(self, piece: Thinking | Text | ToolCall) -> list[Event]:
        if isinstance(piece, ToolCall):
            return [*self._close("completed"), *self._call(piece)]
        kind = "reasoning" if isinstance(piece, Thinking) else "message"
        events = []
        if self._open is None or self._output[-1]["type"] != kind:
            events = self._close("completed")
            self._output.append(_empty(kind))
            self._open = []
            events.append(self._of_item("response.output_item.added", item=self._output[-1]))
            events.append(self._of_part("response.content_part.added", part=_part(kind, "")))
        assert self._open is not None
        self._open.append(piece.text)
        return [*events, self._of_part(f"{_TEXT[kind]}.delta", delta=piece.text, **_without_logprobs(kind))]

    def _call(self, call: ToolCall) -> list[Event]:
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        names = {"id": f"fc_{secrets.token_hex(12)}", "call_id": f"call_{secrets.token_hex(12)}", "name": call.name}
        item = {"type": "function_call", **names, "arguments": "", "status": "in_progress"}
        self._output.append(item)
        events = [self._of_item("response.output_item.added", item=item)]
        self._output[-1] = item = item | {"arguments": arguments, "status": "completed"}
        of = {"item_id": item["id"]}
        events.append(self._of_item("response.function_call_arguments.delta", **of, delta=arguments))
        done = {"name": call.name, "arguments": arguments}
        events.append(self._of_item("response.function_call_arguments.done", **of, **done))
        return [*events, self._of_item("response.output_item.done", item=item)]

    def _close(self, status: str) -> list[Event]:
        """The open item is whole."""
        if self._open is None:
            return []
        text, self._open = "".join(self._open), None
        kind = self._output[-1]["type"]
        self._output[-1] = self._output[-1] | {"content": [_part(kind, text)], "status": status}
        return [
            self._of_part(f"{_TEXT[kind]}.done", text=text, **_without_logprobs(kind)),
            self._of_part("response.content_part.done", part=_part(kind, text)),
            self._of_item("response.output_item.done", item=self._output[-1]),
        ]


_TEXT = {"reasoning": "response.reasoning_text", "message": "response.output_text"}


def _empty(kind: str) -> dict[str, Any]:
    """An item that has just begun."""
    item = {"type": kind, "status": "in_progress", "content": []}
    if kind == "reasoning":
        return item | {"id": f"rs_{secrets.token_hex(12)}", "summary": []}
    return item | {"id": f"msg_{secrets.token_hex(12)}", "role": "assistant"}


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _without_logprobs(kind: str) -> dict[str, Any]:
    """A field that clients expect of events about text."""
    return {"logprobs": []} if kind == "message" else {}
