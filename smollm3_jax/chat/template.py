"""Renders a checkpoint's chat template, the Jinja program that turns a conversation into the model's text.

The template is a stranger's program, so it runs in Jinja's immutable sandbox. It is also forgiving: the
released one drops what it does not know without a word. `normalize` therefore rewrites a conversation
first into what every template prints, roles and text, or refuses it.
"""

import functools
import itertools
import json
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, TokenizerError
from ..tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2

ROLES = ("system", "developer", "user", "assistant", "tool")
# Servers and libraries disagree on the name; all mean the text between <think> and </think>.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


def render(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    special_tokens: Mapping[str, str] | None = None,
    now: Callable[[], datetime] = datetime.now,
    **variables: Any,
) -> str:
    """The text of a conversation, equal to transformers' `apply_chat_template(..., tokenize=False)`.

    Args:
      template: `Tokenizer.chat_template`, the source of chat_template.jinja; None is an error.
      messages: OpenAI's form; they are normalized here, see `normalize`.
      add_generation_prompt: end with the opening of the assistant's next turn.
      tools: JSON schemas of the functions that the model may call.
      special_tokens: `Tokenizer.special_tokens`.
      now: the clock behind the template's `strftime_now`.
      **variables: what else the template reads; SmolLM3's knows enable_thinking, custom_instructions,
        xml_tools and python_tools.

    Raises:
      OptionError: the messages or tools are malformed, or hold what the template would drop.
      TokenizerError: the template itself failed; with its own words and, where known, the line.
    """
    if template is None:
        raise TokenizerError(
            "the model has no chat template: neither chat_template.jinja nor an entry of tokenizer_config.json"
        )
    if tools is not None and (isinstance(tools, str) or not all(isinstance(tool, Mapping) for tool in tools)):
        raise OptionError("tools must be a list of JSON schemas, one object a function")
    context: dict[str, Any] = {"documents": None, "strftime_now": lambda pattern: now().strftime(pattern)}
    context |= special_tokens or {}
    context |= variables
    context |= {"messages": normalize(messages), "tools": tools, "add_generation_prompt": add_generation_prompt}
    try:
        return _compile(template).render(context)
    except Exception as error:  # a program can fail in every way there is
        raise TokenizerError(_explain(error)) from None


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
    """Token ids of a conversation in which nobody's words become control tokens.

    Control tokens are what the template writes. The text of one that stands in a message of role user or tool
    is encoded as any other text; in all else (what the model said, the system message, tools), only that of
    special tokens is, such as <|im_end|>, since <think> or <tool_call> mean themselves there. Conversations
    without such text give the ids of their rendering, encoded whole.

    Args:
      **options: those of `render`, but for the tokenizer's own.

    Raises:
      OptionError, TokenizerError: as `render`.
    """
    template = tokenizer.chat_template
    messages = normalize(messages)
    text = render(template, messages, special_tokens=tokenizer.special_tokens, **options)
    ids = tokenizer.encode(text, add_special_tokens=False)
    added = tokenizer.backend.get_added_tokens_decoder()
    # A token that is whitespace is text to everyone, templates included.
    tokens = [token for token in added.values() if not token.content.isspace()]
    # Digits that occur nowhere else part the first character of a token from its rest. They go through the
    # template wherever the text goes, whatever it does to it.
    gap = next(digits for digits in map(str, itertools.count(10**9)) if digits not in text)
    part_all = _parting([token.content for token in tokens], gap)
    part_special = _parting([token.content for token in tokens if token.special], gap)
    parted = [(part_all if message["role"] in ("user", "tool") else part_special)(message) for message in messages]
    parted_options = part_special(options)
    if (parted, parted_options) == (messages, options):
        return ids
    text = render(template, parted, special_tokens=tokenizer.special_tokens, **parted_options)
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    plain = _without_added_tokens(tokenizer)
    ids, done = [], 0
    for token, (start, end) in zip([*encoding.ids, None], [*encoding.offsets, (len(text), len(text))], strict=True):
        if token is None or token in added:
            # Whole stretches between the template's control tokens, as the tokenizer itself would cut the text.
            ids += plain.encode(text[done:start].replace(gap, ""), add_special_tokens=False)
            ids += [] if token is None else [token]
            done = end
    return ids


def _parting(tokens: Sequence[str], gap: str) -> Callable[[Any], Any]:
    """A function that puts `gap` into these tokens in all strings of a value."""
    # A look-ahead finds tokens that overlap, too.
    pattern = re.compile(f"(?={'|'.join(map(re.escape, tokens)) or '(?!)'}).", re.DOTALL)

    def part(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(rf"\g<0>{gap}", value)
        if isinstance(value, Mapping):
            return {part(key): part(inner) for key, inner in value.items()}
        return [part(inner) for inner in value] if isinstance(value, list | tuple) else value

    return part


def _without_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer, to which all text is text; it shares the vocabulary, so it costs nothing."""
    from tokenizers import Tokenizer as Backend

    backend = Backend(tokenizer.backend.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(tokenizer.backend, part) is not None:
            setattr(backend, part, getattr(tokenizer.backend, part))
    return Tokenizer(backend, None, {})


def normalize(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation in role and text alone; a second application changes nothing.

    Text parts are joined, `developer` becomes `system`, and an assistant's reasoning and tool calls are
    written into its content in the form that the model itself writes them:

        <think>
        reasoning
        </think>
        content
        <tool_call>
        {"name": "f", "arguments": {"x": 1}}
        </tool_call>

    Raises:
      OptionError: naming the message, for what is malformed or would be lost.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise OptionError('messages must be a list of at least one message like {"role": "user", "content": "Hi"}')
    normal = [_normalize(message, f"messages[{i}]") for i, message in enumerate(messages)]
    for i, message in enumerate(normal):
        if i and message["role"] == "system":
            raise OptionError(
                f"messages[{i}] is a system message, but only messages[0] can be one: merge its text into the first"
            )
    return normal


def _normalize(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise OptionError(f"{where} is a {type(message).__name__}; it must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise OptionError(f"{where}.role is {role!r}; it must be one of {', '.join(ROLES)}")
    # APIs send null for what is not there; a template's `is defined` must not see it.
    normal = {field: value for field, value in message.items() if value is not None}
    extra = [field for field in (*REASONING_FIELDS, "tool_calls") if normal.get(field)]
    if extra and role != "assistant":
        raise OptionError(f"{where}.{extra[0]} is set, but the role is {role}; only an assistant message can have it")
    if "content" not in message and not extra:
        raise OptionError(f"{where}.content is missing")
    reasoning = _reasoning({field: normal.pop(field) for field in REASONING_FIELDS if field in normal}, where)
    calls = normal.pop("tool_calls", [])
    if not isinstance(calls, list):
        raise OptionError(f"{where}.tool_calls must be a list, not a {type(calls).__name__}")
    written = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    content = "\n".join(filter(None, [_text(normal.get("content", ""), f"{where}.content"), *written]))
    return normal | {"role": "system" if role == "developer" else role, "content": reasoning + content}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise OptionError(f"{where} is a {type(content).__name__}; it must be a string or a list of text parts")
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise OptionError(
                f"{where}[{i}] is a part of type {kind!r}; this model reads text alone: "
                '{"type": "text", "text": "..."}'
            )
    return "".join(part["text"] for part in content)


def _reasoning(fields: Mapping[str, Any], where: str) -> str:
    """The thinking block that opens an assistant's turn, or nothing; `fields` are all names it came under."""
    for field, value in fields.items():
        if not isinstance(value, str):
            raise OptionError(f"{where}.{field} must be a string, not a {type(value).__name__}")
    texts = {value for value in fields.values() if value}
    if len(texts) > 1:
        raise OptionError(f"{where} has {' and '.join(fields)}, which differ; keep one")
    return f"<think>\n{texts.pop()}\n</think>\n" if texts else ""


def _tool_call(call: Any, where: str) -> str:
    """A call in OpenAI's form ({"type": "function", "function": {...}}) or bare, as the model writes it."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or call.get("type", "function") != "function":
        raise OptionError(f'{where} must be {{"type": "function", "function": {{"name": ..., "arguments": ...}}}}')
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else arguments  # how APIs send a call without arguments
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, Mapping):
            raise ValueError(f"a {type(arguments).__name__}, not an object")
        written = json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{where}: the arguments of {name} are not a JSON object: {error}") from None
    return f"<tool_call>\n{written}\n</tool_call>"


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> "jinja2.Template":
    """The template in transformers' dialect: its whitespace rules, functions and `generation` blocks."""
    from jinja2 import Environment, TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what the model is trained on; rendering prints its body, in a scope of its own."""

        def __init__(self, environment: Environment) -> None:
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class SafeNamespace(Namespace):
        """Without underscore names: filters call a value's `__html__`, and they do it outside the sandbox."""

        def __init__(*args: Any, **attributes: Any) -> None:  # no named `self`: it is a legal attribute
            Namespace.__init__(args[0])
            for name, value in dict(*args[1:], **attributes).items():
                args[0][name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace cannot have the attribute {name!r}")
            super().__setitem__(name, value)

    def new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        # The class itself would hand out dict.update, which changes even what the sandbox keeps immutable.
        return dict(*args, **kwargs)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own escapes <, > and & for HTML, which the model never saw.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "dict": new_dict, "namespace": SafeNamespace}
    return environment.from_string(template)


def _explain(error: Exception) -> str:
    """What a failed template says, and the line of its source that said it."""
    if isinstance(error, SyntaxError):  # of the Python that Jinja compiled it to, whose lines mean nothing here
        return f"the chat template failed: {error.msg}"
    # Jinja rewrites tracebacks so that the frames of a template, whose file is "<template>", carry its own lines.
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    message = getattr(error, "message", None) or str(error) or type(error).__name__
    return f"the chat template failed{f' in line {line}' if line else ''}: {message}"
