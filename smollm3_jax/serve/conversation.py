"""A conversation with what it asks of the model, as the prompt that the model's template makes of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

from ..chat.parse import CALLS
from ..chat.template import REASONING_FIELDS, encode_chat, normalize, render
from ..errors import OptionError, TextTooLong, TokenizerError
from ..generation.requests import Request, chat_ends, think_ids
from .contract import Server
from .errors import bad, from_option, too_long
from .fields import Fields, shown
from .params import make_request
from .tools import Tools

# reasoning_effort -> at most how many tokens of thinking.
BUDGETS = {"low": 512, "medium": 2048, "high": 8192}
EFFORTS = ("none", *BUDGETS)
# Fields of messages by role, and those that clients send back as they came, which may hold nothing. `parsed` is what
# OpenAI's clients have read of the content, and put beside it.
_FIELDS = {"assistant": ("tool_calls", "parsed", *REASONING_FIELDS), "tool": ("tool_call_id",)}
_EMPTY = {"assistant": ("refusal", "audio", "function_call", "annotations")}


@dataclasses.dataclass
class Wishes:
    """What a body asks of a conversation's answer.

    variables: of the template; thinking: None is the template's own way; budget: the most tokens of thinking;
    format: makes the grammar of an answer's text, None is any text.
    """

    tools: Tools
    variables: dict[str, Any] = dataclasses.field(default_factory=dict)
    thinking: bool | None = None
    budget: int | None = None
    format: Callable[[], str] | None = None

    @property
    def calls(self) -> tuple[str, ...]:
        """The tags of the calls that may come."""
        if self.tools.choice == "none":
            return ()
        found = (self.tools.shown or self.variables.get("xml_tools"), self.variables.get("python_tools"))
        return tuple(tag for tag, tools in zip(CALLS, found, strict=True) if tools)

    @property
    def offered(self) -> list[Any]:
        """All tools that the model may call, in whatever form."""
        found = [self.variables.get(name, []) for name in ("xml_tools", "python_tools")]
        return [*self.tools.shown, *(tool for tools in found for tool in tools)]


def read_template_fields(fields: Fields, tools: Tools) -> Wishes:
    """The field chat_template_kwargs."""
    wishes = Wishes(tools)
    inner = fields.object("chat_template_kwargs")
    if inner is None:
        return wishes
    wishes.thinking = inner.take("enable_thinking", bool)
    for name, kind in (("custom_instructions", str), ("xml_tools", list), ("python_tools", list)):
        if value := inner.take(name, kind):
            if kind is list and not all(isinstance(tool, str | dict) for tool in value):
                raise inner.error(name, "a list of functions, as texts or as JSON schemas")
            wishes.variables[name] = value
    inner.finish()
    if wishes.tools.choice == "none":
        wishes.variables = {name: value for name, value in wishes.variables.items() if not name.endswith("_tools")}
    return wishes


def set_effort(wishes: Wishes, effort: Any, where: str, server: Server) -> None:
    """How much to reason: a budget of tokens, or not at all."""
    if effort is None:
        return
    if effort not in EFFORTS:
        raise bad(f"{where} is {shown(effort)}; it must be one of {', '.join(EFFORTS)}", where)
    if effort == "none":
        if wishes.thinking:
            raise bad(f"{where} is 'none', but enable_thinking is true: leave one of them out", where)
        wishes.thinking = False
    elif -1 not in think_ids(server.tokenizer):  # what cannot think keeps to every budget
        wishes.budget = BUDGETS[effort]


def conversation_request(
    server: Server,
    messages: list[dict[str, Any]],
    wishes: Wishes,
    given: dict[str, Any],
    limit: int | None,
    limit_name: str,
    where: str,
) -> Request:
    """What the engine is asked for the next turn of a conversation.

    Args:
      messages: as chat completions have them; where: the field that they came in.
      given: arguments of SamplingParams but for max_new_tokens.
    """
    if wishes.budget is not None and given.get("max_thinking_tokens") is None:
        given = given | {"max_thinking_tokens": wishes.budget}
    options: dict[str, Any] = {"ends": chat_ends(server.tokenizer, server.config)}
    grammar = wishes.tools.grammar if wishes.tools.forced else wishes.format
    if grammar is not None:
        if wishes.tools.shown and not wishes.tools.forced:
            raise bad(
                "a format of the answer would rule out calls: leave out tools, or set tool_choice to none", "tools"
            )
        form = "response_format" if where == "messages" else "text.format"
        options |= {"grammar": grammar(), "grammar_name": "tools" if wishes.tools.forced else form}
    prompt = encode_messages(server, messages, wishes, where)
    return make_request(server, prompt, given, limit, limit_name, where, **options)


def encode_messages(
    server: Server, messages: list[dict[str, Any]], wishes: Wishes, where: str, opens: bool = True
) -> list[int]:
    """The token ids of a conversation.

    Args:
      where: the field that the messages came in.
      opens: end with the opening of the assistant's turn.
    """
    variables = dict(wishes.variables)
    if wishes.tools.shown:
        variables["tools"] = wishes.tools.shown
    try:
        normal = normalize(messages)
        for message in normal:
            server.tokenizer.check_length(message["content"], server.context)
        for name in [name for name in variables if not _shows(server, normal, variables, name)]:
            if name != "tools" or not wishes.tools.forced:
                raise bad(_UNSEEN.format(name), name if name == "tools" else f"chat_template_kwargs.{name}")
            normal, variables = _with_system(normal, wishes.tools.as_text()), variables | {"tools": None}
        if wishes.thinking is not None:
            variables["enable_thinking"] = wishes.thinking
        return encode_chat(server.tokenizer, normal, context=server.context, add_generation_prompt=opens, **variables)
    except TokenizerError as error:  # of the template: it may refuse what it is given
        raise bad(str(error), where) from None
    except TextTooLong as error:
        raise too_long(str(error), server.context, where) from None
    except OptionError as error:  # which names the message, where there is one
        raise from_option(error, None if where == "messages" else where) from None


_UNSEEN = (
    "{0} would not reach the model: its chat template has no place for it here (a system message may override it). "
    "Leave it out; of tools, tool_choice 'required' or a named function works with any template"
)


def _shows(server: Server, messages: list[dict[str, Any]], variables: dict[str, Any], name: str) -> bool:
    """Whether the template writes a variable where it stands, beside the others."""
    first = messages[:1] if messages[0]["role"] == "system" else []
    short = [*first, {"role": "user", "content": "Hello"}]

    def text(variables: dict[str, Any]) -> str:
        tools = variables.get("tools")
        template, special = server.tokenizer.template(tools), server.tokenizer.special_tokens
        return render(template, short, special_tokens=special, **variables)

    return text(variables) != text({key: value for key, value in variables.items() if key != name})


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The same with a text at the end of the system message."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    return [messages[0] | {"content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """The field messages, of which `normalize` reads the rest.

    Raises:
      ApiError: it is no list of messages, or one has a field that would be lost.
    """
    if not isinstance(messages, list) or not messages:
        raise bad('messages must be a list of at least one message like {"role": "user", "content": "Hi"}', "messages")
    for i, message in enumerate(messages):
        fields = Fields(message, f"messages[{i}]")
        role = fields.any("role")
        role = role if isinstance(role, str) else ""  # `normalize` refuses it
        fields.ignore("content", *_FIELDS.get(role, ()))
        fields.take("name", str)
        fields.refuse(dict.fromkeys(_EMPTY.get(role, ()), "it would be lost"))
        fields.finish({"reasoning_text": "reasoning_content"})
        if role != "assistant" and not fields.has("content"):
            raise bad(f"messages[{i}].content is missing", f"messages[{i}].content")
    return messages
