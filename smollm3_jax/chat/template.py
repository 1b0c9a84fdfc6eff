"""Renders a checkpoint's chat template, the Jinja program that turns a conversation into the model's text.

The template is a stranger's program, so it runs in Jinja's immutable sandbox, and in a process of its own, with limits
of time, memory and output (see template_process.py). It is also forgiving: the released one drops what it does not know
without a word. `normalize` therefore rewrites a conversation first into what every template prints, roles and text, or
refuses it.
"""

import atexit
import bisect
import contextlib
import functools
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OptionError, SupportError, TokenizerError
from ..nesting import check_depth
from ..tokenizer import Tokenizer
from .parse import read_call

SECONDS = 10  # that a rendering may take: it takes milliseconds
ROLES = ("system", "developer", "user", "assistant", "tool")
# Servers and libraries disagree on the name; all mean the text between <think> and </think>.
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")


def render(template: str | None, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """The text of a conversation, equal to transformers' `apply_chat_template(..., tokenize=False)`; its options and
    what it raises are those of `render_spans`."""
    return render_spans(template, messages, **options)[0]


def render_spans(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    special_tokens: Mapping[str, str] | None = None,
    now: Callable[[], datetime] = datetime.now,
    **variables: Any,
) -> tuple[str, list[tuple[int, int]]]:
    """(the text, the (start, end) in it of what each `{% generation %}` block wrote).

    In SmolLM3's template a block is an assistant's turn, from <|im_start|> to the line break after <|im_end|>; a
    template without such blocks has no spans. What a macro or a call writes has an empty one.

    Args:
      template: `Tokenizer.chat_template`, the source of chat_template.jinja; None is an error.
      messages: OpenAI's form; they are normalized here, see `normalize`.
      add_generation_prompt: end with the opening of the assistant's next turn.
      tools: JSON schemas of the functions that the model may call.
      special_tokens: `Tokenizer.special_tokens`.
      now: the clock of the template's `strftime_now`.
      **variables: what else the template reads; SmolLM3's knows enable_thinking, custom_instructions,
        xml_tools and python_tools.

    Raises:
      OptionError: the messages or tools are malformed, or hold what the template would drop.
      TokenizerError: the template itself failed, with its own words and, where known, the line; or it took too long, or
        too much memory.
    """
    if template is None:
        raise TokenizerError(
            "the model has no chat template: neither chat_template.jinja nor an entry of tokenizer_config.json"
        )
    if tools is not None and (isinstance(tools, str) or not all(isinstance(tool, Mapping) for tool in tools)):
        raise OptionError("tools must be a list of JSON schemas, one object a function")
    context = {**(special_tokens or {}), **variables, "messages": normalize(messages), "tools": tools}
    try:
        request = pickle.dumps((template, context | {"add_generation_prompt": add_generation_prompt}, now()))
    except Exception as error:  # of whatever class a variable is
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise OptionError(
            f"a chat template gets plain values (texts, numbers, lists, dicts), not these: {reason}"
        ) from None
    with _lock:
        return _process(request)


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, context: int | None = None, **options: Any
) -> list[int]:
    """Token ids of a conversation in which nobody's words become control tokens.

    Control tokens are what the template writes. The text of one that stands in a message of role user or tool
    is encoded as any other text; in all else (what the model said, the system message, tools), only that of
    special tokens is, such as <|im_end|>, since <think> or <tool_call> mean themselves there. Conversations
    without such text give the ids of their rendering, encoded whole.

    Args:
      context: refuse a conversation that cannot fit into this many tokens, before any work is done on it.
      **options: those of `render`, but for the tokenizer's own.

    Raises:
      OptionError, TokenizerError: as `render`.
    """
    return _encode(tokenizer, messages, context, options)[0]


def encode_chat_mask(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, context: int | None = None, **options: Any
) -> tuple[list[int], np.ndarray]:
    """(`encode_chat`, which of its tokens a `{% generation %}` block wrote: bool [n]); equal to transformers'
    `return_assistant_tokens_mask`. A token that a block wrote in part counts."""
    ids, places, spans = _encode(tokenizer, messages, context, options)
    starts, ends = np.asarray(places, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(ids), bool)
    for start, end in spans:
        mask |= (starts < end) & (ends > start)
    return ids, mask


_Places = list[tuple[int, int]]


def _encode(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], context: int | None, options: Mapping[str, Any]
) -> tuple[list[int], _Places, _Places]:
    """(ids, where each begins and ends in a text, where the generation blocks do in that text)."""
    template = tokenizer.template(options.get("tools"))
    messages = normalize(messages)
    for message in messages:
        tokenizer.check_length(message["content"], context)
    text, spans = render_spans(template, messages, special_tokens=tokenizer.special_tokens, **options)
    encoding = tokenizer.encoding(text, add_special_tokens=False, context=context)
    added = tokenizer.backend.get_added_tokens_decoder()
    # A token that is whitespace is text to everyone, templates included.
    tokens = [token for token in added.values() if not token.content.isspace()]
    # Digits that occur nowhere else part the first character of a token from its rest. They go through the
    # template wherever the text goes, whatever it does to it.
    gap = next(digits for digits in _digits(text) if digits not in text)
    part_all = _parting([token.content for token in tokens], gap)
    part_special = _parting([token.content for token in tokens if token.special], gap)
    parted = [(part_all if message["role"] in ("user", "tool") else part_special)(message) for message in messages]
    parted_options = part_special(options)
    if (parted, parted_options) == (messages, options):
        return encoding.ids, encoding.offsets, spans
    text, spans = render_spans(template, parted, special_tokens=tokenizer.special_tokens, **parted_options)
    encoding = tokenizer.encoding(text, add_special_tokens=False)
    plain = _without_added_tokens(tokenizer)
    ids, places, done = [], [], 0
    for token, (start, end) in zip([*encoding.ids, None], [*encoding.offsets, (len(text), len(text))], strict=True):
        if token is None or token in added:
            # Whole stretches between the template's control tokens, as the tokenizer itself would cut the text.
            stretch = plain.encoding(text[done:start].replace(gap, ""), add_special_tokens=False)
            ids += stretch.ids
            places += _with_gaps(stretch.offsets, text[done:start], gap, done)
            ids += [] if token is None else [token]
            places += [] if token is None else [(start, end)]
            done = end
    return ids, places, spans


def _with_gaps(places: _Places, text: str, gap: str, begin: int) -> _Places:
    """Places in a text without its gaps -> those in the text with them, which begins at `begin`."""
    shifts, length = [], 0  # where a part begins without gaps, and how much later it does so with them
    for i, part in enumerate(text.split(gap)):
        shifts.append((length, begin + i * len(gap)))
        length += len(part)

    def moved(at: int) -> int:
        return at + shifts[bisect.bisect_right(shifts, at, key=lambda shift: shift[0]) - 1][1]

    return [(moved(start), moved(end - 1) + 1) for start, end in places]


def encode_for_answer(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, context: int | None = None, thinking: bool = True
) -> list[int]:
    """`encode_chat` up to the opening of the assistant's next turn; thinking: whether it is to reason first."""
    return encode_chat(tokenizer, messages, context=context, add_generation_prompt=True, enable_thinking=thinking)


def _digits(text: str) -> Iterator[str]:
    """Numbers that no author of the text can have foreseen, the same every time."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass"))
    while True:
        yield str(10**15 + int.from_bytes(digest.digest()) % 10**15)
        digest.update(b"again")


@functools.lru_cache(maxsize=8)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    """The first character of one of these; a look-ahead finds tokens that overlap, too."""
    return re.compile(f"(?={'|'.join(map(re.escape, tokens)) or '(?!)'}).", re.DOTALL)


def _parting(tokens: Sequence[str], gap: str) -> Callable[[Any], Any]:
    """A function that puts `gap` into these tokens in all strings of a value."""
    pattern = _any_of(tuple(tokens))

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
    check_depth(message, where)
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
    form = f'{where} must be {{"type": "function", "function": {{"name": ..., "arguments": ...}}}}'
    if not isinstance(call, Mapping) or call.get("type", "function") != "function":
        raise OptionError(form)
    try:
        # What APIs put around the function (ids, places in a stream) is not the model's.
        function = call.get("function")
        name, arguments = read_call({"function": function} if isinstance(function, Mapping) else call)
    except ValueError as error:
        raise OptionError(f"{form}: {error}") from None
    arguments = {} if arguments in (None, "") else arguments  # how APIs send a call without arguments
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(arguments, Mapping):
            raise ValueError(f"a {type(arguments).__name__}, not an object")
        written = json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{where}: the arguments of {name} are not a JSON object: {error}") from None
    return f"<tool_call>\n{written}\n</tool_call>"


_lock = threading.Lock()
_running: list[tuple[int, subprocess.Popen[bytes]]] = []  # at most one, and the process that started it


def _process(request: bytes) -> tuple[str, list[tuple[int, int]]]:
    """The answer of the process that renders, which is started where none is; see template_process.py."""
    try:
        worker = _worker()
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(bytes([SECONDS]) + len(request).to_bytes(8, "little") + request)
        worker.stdin.flush()
        header = worker.stdout.read(9)
        answer = worker.stdout.read(int.from_bytes(header[1:], "little"))
    except OSError as error:
        _end()
        raise SupportError(f"the process that renders chat templates cannot be run: {error}") from None
    except BaseException:  # Ctrl-C: what would come is the answer to this request, not to the next
        _end()
        raise
    if len(header) < 9:
        code = _end()
        why = f"it was not done after {SECONDS} s" if code == -signal.SIGALRM else f"it ended its process ({code})"
        raise TokenizerError(f"the chat template failed: {why}")
    if header[:1] == b"+":
        spans, _, text = answer.decode(errors="surrogatepass").partition("\n")
        return text, [(start, end) for start, end in json.loads(spans)]
    raise TokenizerError(answer.decode(errors="replace"))


def _worker() -> subprocess.Popen[bytes]:
    if _running and _running[0][0] == os.getpid() and _running[0][1].poll() is None:
        return _running[0][1]
    _end()
    # Isolated: beside a user's script may stand a types.py. Jinja it finds where this process does.
    found = [find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = [os.path.abspath(Path(one.origin).parents[1]) for one in found if one is not None and one.origin]
    worker = subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__).with_name("template_process.py")), *folders],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C in a terminal is not for it
    )
    _running.append((os.getpid(), worker))
    return worker


def _end() -> int | None:
    """Ends the process; the code that it ended with. One that a parent of this process started is left to that."""
    if not _running:
        return None
    owner, worker = _running.pop()
    if owner != os.getpid():
        return None
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return worker.wait(1)
    worker.kill()
    return worker.wait()


atexit.register(_end)
