"""The input of /v1/responses, a text or a list of items, as the messages of a chat."""

from collections.abc import Iterable
from typing import Any

from .errors import bad
from .fields import Fields, shown

_TEXTS = ("input_text", "output_text", "text")


def messages_of(value: Any, instructions: str | None) -> list[dict[str, Any]]:
    """The messages that an input stands for. Reasoning, text and calls in a row are one message of the assistant's.

    Raises:
      ApiError: an item is malformed, or of a kind that this model cannot read, by its path.
    """
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise bad("input must be a text or a list of at least one item", "input")
    messages: list[dict[str, Any]] = [] if not instructions else [{"role": "system", "content": instructions}]
    for i, item in enumerate(value):
        fields = Fields(item, f"input[{i}]")
        fields.ignore("id", "status")  # of the answer that an item comes from
        kind = fields.any("type") or ("message" if fields.has("role") else None)
        if not isinstance(kind, str) or kind not in _READERS:
            raise fields.error("type", f"one of {', '.join(_READERS)}")
        message = _READERS[kind](fields)
        fields.finish()
        if message != {"role": "assistant", "reasoning_content": ""}:  # another's reasoning comes without its words
            _append(messages, message)
    return messages


def _append(messages: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Adds a message, or puts it into the last one, if that is the same turn."""
    last = messages[-1] if messages else {}
    if message["role"] == last.get("role") == "system":
        last["content"] = f"{last['content']}\n\n{message['content']}"
    elif message["role"] == last.get("role") == "assistant" and _follows(message, last):
        last |= message | {"tool_calls": [*last.get("tool_calls", ()), *message.get("tool_calls", ())]}
    else:
        messages.append(message)


def _follows(message: dict[str, Any], last: dict[str, Any]) -> bool:
    """Whether a part of the assistant's turn comes after those that are there: reasoning, text, calls."""
    if "tool_calls" in message:
        return True
    return not last.get("tool_calls") and "content" not in last and "content" in message


def _message(fields: Fields) -> dict[str, Any]:
    role = fields.choice("role", ("user", "assistant", "system", "developer"), "")
    content = fields.any("content")
    if content is None:
        raise bad(f"{fields.path('content')} is missing", fields.path("content"))
    fields.refuse({"phase": "this model has none"})
    return {"role": "system" if role == "developer" else role, "content": _text(content, fields.path("content"))}


def _function_call(fields: Fields) -> dict[str, Any]:
    call = {name: fields.take(name, str) for name in ("name", "arguments", "call_id")}
    for name in ("name", "arguments"):
        if call[name] is None:
            raise bad(f"{fields.path(name)} is missing", fields.path(name))
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"role": "assistant", "tool_calls": [{"id": call["call_id"], "type": "function", "function": function}]}


def _function_call_output(fields: Fields) -> dict[str, Any]:
    output = fields.any("output")
    if output is None:
        raise bad(f"{fields.path('output')} is missing", fields.path("output"))
    call_id = fields.take("call_id", str)
    return {"role": "tool", "tool_call_id": call_id, "content": _text(output, fields.path("output"))}


def _reasoning(fields: Fields) -> dict[str, Any]:
    """What was thought, or where that is not there its summary."""
    content, summary = fields.take("content", list, []), fields.take("summary", list, [])
    fields.refuse({"encrypted_content": "this server encrypts nothing"})
    name, parts, kinds = (
        ("content", content, ("reasoning_text",)) if content else ("summary", summary, ("summary_text",))
    )
    return {"role": "assistant", "reasoning_content": _text(parts, fields.path(name), kinds)}


_READERS = {
    "message": _message,
    "function_call": _function_call,
    "function_call_output": _function_call_output,
    "reasoning": _reasoning,
}


def _text(content: Any, where: str, kinds: Iterable[str] = _TEXTS) -> str:
    """A text, or the texts of parts, joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad(f"{where} is {shown(content)}; it must be a string or a list of text parts", where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in list(kinds) or not isinstance(part.get("text"), str):
            what = shown(part if kind is None else kind)
            form = f'{{"type": "{next(iter(kinds))}", "text": "..."}}'
            raise bad(f"{where}[{i}] is a part of type {what}; this model reads text alone: {form}", f"{where}[{i}]")
        texts.append(part["text"])
    return "".join(texts)
