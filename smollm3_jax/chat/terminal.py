"""The chat in a terminal: reads messages, streams answers, obeys commands, runs tools."""

import contextlib
import dataclasses
import json
import re
import signal
from collections.abc import Callable, Generator, Iterator
from types import FrameType
from typing import Any

from .. import files
from ..errors import OptionError, SmolLM3Error
from ..generation.requests import Delta, think_ids
from ..generation.sampling import SamplingParams
from ..generation.stats import Stats
from ..paths import user_path
from ..reading import read_file, why
from ..sizes import power_of_two_from
from ..tokenizer import Tokenizer
from .parse import Event, Parser, Text, Thinking, ToolCall
from .screen import PROMPT, Answer, Screen
from .slash_commands import from_user, help_text, is_command
from .template import REASONING_FIELDS, encode_chat, normalize
from .tools import Tools, prepare, schema

CONTINUATION = ". "
MOST_BYTES = 2**28  # of a conversation's file
MAX_ROUNDS = 8  # answers to one message of the user's, all but the last with calls of tools
MIN_ANSWER = 16  # tokens; with less room the context counts as full
REFUSED = "error: the user refused this call"
HELLO = [{"role": "user", "content": "Hello"}]  # for questions about the template


@dataclasses.dataclass
class Chat:
    """A conversation, and all that it is held with.

      context: how many tokens the model can attend to.
      generate: streams the answer to a prompt, with this capacity of the cache; the Stats get how fast.
      read: a line of input, given a prompt and, if wanted, a text to change; EOFError at the end. Only what was pasted
      holds line breaks.
    remembered: where what is typed is kept, to be told.
      interactive: somebody is there to answer questions and to press Ctrl-C.
      yes: run tools without a question.

      Raises:
        TokenizerError: the model has no chat template, or a broken one.
        OptionError: the template would not show the tools to the model.
    """

    tokenizer: Tokenizer
    context: int
    params: SamplingParams
    generate: Callable[[list[int], SamplingParams, int, Stats], Generator[Delta, None, None]]
    read: Callable[..., str]
    screen: Screen
    remembered: str = ""
    interactive: bool = False
    tools: Tools = dataclasses.field(default_factory=dict)
    yes: bool = False
    think: bool = True
    system: str | None = None
    messages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    thought: str = ""  # the last
    last: str = ""  # about the last answer, for /tokens
    answers: int = 0
    capacity: int = 0  # only grows, so that what has been compiled serves again

    def __post_init__(self):
        if _encode(self, HELLO) == _encode(self, HELLO, tools=None) and self.tools:
            raise OptionError("this model's chat template has no place for tools, so the model would never see them")


def converse(chat: Chat) -> int:
    """Answers until the input ends. The exit code: 0, or where nobody watches that of the last error."""
    code, pressed = 0, False
    if chat.interactive:
        where = f"; what you type is remembered in {chat.remembered}" if chat.remembered else ""
        chat.screen.note(f"/help lists the commands, Ctrl-D leaves{where}")
    while True:
        try:
            text = _message(chat)
        except EOFError:
            return code
        except KeyboardInterrupt:
            if not chat.interactive:
                raise
            if pressed:
                return code
            pressed = True
            chat.screen.note("Ctrl-C again or Ctrl-D leaves")
            continue
        pressed = False
        try:
            if is_command(text):
                if _command(chat, text):
                    return code
            elif text.strip():
                _turn(chat, from_user(text))
        except KeyboardInterrupt:
            if not chat.interactive:
                raise
            chat.screen.note("interrupted")
        except SmolLM3Error as error:
            chat.screen.note(f"smollm3: {error}", "bold")
            code = 0 if chat.interactive else error.exit_code


def load(chat: Chat, path: str) -> None:
    """Replaces the conversation, its system message included, with one from a file.

    Raises:
      OptionError: the file cannot be read, or holds no conversation.
    """
    try:
        messages = json.loads(read_file(user_path(path), MOST_BYTES))
        first = normalize(messages)[0]
        if re.search("[\ud800-\udfff]", json.dumps(messages, ensure_ascii=False)):
            raise ValueError("half a surrogate pair is in it, which is no text")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: of depth, and of ~somebody who is not known
        raise OptionError(f"{path} cannot be read as a conversation, a JSON list of messages: {why(error)}") from None
    has_system = first["role"] == "system"
    chat.system = first["content"] if has_system else None
    chat.messages, chat.thought, chat.last = messages[has_system:], "", ""


def _save(chat: Chat, path: str) -> None:
    messages = _with_system(chat, chat.messages)
    if not messages:
        raise OptionError(f"{path} cannot be written: there is no message yet")
    text = json.dumps(messages, ensure_ascii=False, indent=2) + "\n"
    try:
        files.write(user_path(path), text)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: of ~somebody who is not known
        raise OptionError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _message(chat: Chat, text: str = "") -> str:
    lines = [chat.read(PROMPT, text)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        with contextlib.suppress(EOFError):
            lines.append(chat.read(CONTINUATION))
    return "\n".join(lines).rstrip("\n")  # what is copied as whole lines ends with a break


def _command(chat: Chat, line: str) -> bool:
    """Carries out a command; True means leave."""
    name, rest = (*line[1:].split(maxsplit=1), "", "")[:2]
    note = chat.screen.note
    match name, rest.strip():
        case "exit" | "quit", _:
            return True
        case "help", _:
            chat.screen.say(help_text(min(chat.screen.out.width, 100)))
        case "think" | "no_think", _:
            chat.think = name == "think"
            note(f"thinking is {'on' if chat.think else 'off'} from here on")
            if _encode(chat, HELLO) == _encode(chat, HELLO, enable_thinking=not chat.think):
                note("which makes no difference: the model's template or the system message decides")
        case "thinking", _:
            chat.screen.say(chat.thought or "there has been no reasoning")
        case "system", text:
            chat.system = text or None
            note(f"the system message is {'set' if text else 'removed'}; the conversation so far stays")
        case "save" | "load", "":
            note(f"/{name} needs the name of a file")
        case "save", path:
            _save(chat, path)
            note(f"{len(chat.messages)} messages are saved in {path}")
        case "load", path:
            load(chat, path)
            note(f"{len(chat.messages)} messages; the system message is {'its own' if chat.system else 'removed'}")
        case "reset", _:
            chat.messages, chat.thought, chat.last = [], "", ""
            note("the conversation is forgotten; the system message and the mode stay")
        case "regenerate" | "edit" | "undo", _ if _last_turn(chat) is None:
            note(f"there is no message of yours to {name}")
        case "regenerate", _:
            if chat.params.temperature == 0:
                note("the temperature is 0, so the answer will be the same: --temperature, or /edit the message")
            _turn_again(chat)
        case "edit", "" if not chat.interactive:
            note("/edit needs the new message: standard input is no terminal, where it could be changed")
        case "edit", text:
            text = text or _message(chat, _last_words(chat))
            if text.strip():
                _turn_again(chat, from_user(text))
            else:
                note("the message stays as it was: /undo takes it back")
        case "undo", _:
            words = " ".join(_last_words(chat).split())
            del chat.messages[_last_turn(chat) :]
            note(f"taken back, with all that came after it: {words if len(words) <= 60 else words[:57] + '...'}")
        case "tokens", _:
            used = len(_encode(chat, chat.messages, add_generation_prompt=False)) if chat.messages else 0
            chat.screen.say(f"{used:,} of {chat.context:,} tokens of the context are used{chat.last}")
        case _:
            note(f"/{name} is no command: /help lists them, and a message that begins with a slash is written with two")
    return False


def _last_turn(chat: Chat) -> int | None:
    """Where the last message of the user's is."""
    return next((i for i in reversed(range(len(chat.messages))) if chat.messages[i]["role"] == "user"), None)


def _last_words(chat: Chat) -> str:
    return normalize(chat.messages[_last_turn(chat) :])[0]["content"]


def _turn_again(chat: Chat, message: dict[str, Any] | None = None) -> None:
    """Answers the user's last message again, or this one in its place; if no answer comes, all stays as it was."""
    before = _last_turn(chat)
    assert before is not None
    kept = chat.messages[before:]
    del chat.messages[before:]
    try:
        _turn(chat, message or kept[0])
    finally:
        if len(chat.messages) == before:
            chat.messages += kept


def _turn(chat: Chat, message: dict[str, Any]) -> None:
    """A message of the user's, and what the model says to it: several answers, if it calls tools."""
    before = len(chat.messages)
    chat.messages.append(message)
    try:
        for _ in range(MAX_ROUNDS):
            answer, problems = _answer(chat)
            if answer is None:
                if len(chat.messages) == before + 1:
                    del chat.messages[before:]
                    chat.screen.note("stopped before the answer began: it is as if you had not asked")
                return
            chat.messages.append(answer)
            calls = [call["function"] for call in answer.get("tool_calls", [])]
            if "interrupted" in answer or not (calls or problems):
                return
            chat.messages += [{"role": "tool", "content": f"error: {problem}"} for problem in problems]
            if not _use_tools(chat, calls):
                return
        chat.screen.note(f"stopped after {MAX_ROUNDS} answers with calls; say something to go on")
    except BaseException:
        del chat.messages[before:]  # half a turn would stand in the way of the next
        raise


def _answer(chat: Chat) -> tuple[dict[str, Any] | None, list[str]]:
    """The model's next message, shown as it comes, and what is wrong with the calls that it attempted."""
    prompt = _encode(chat, chat.messages)
    room = chat.context - len(prompt)
    if room < MIN_ANSWER:
        raise OptionError(
            f"the conversation would have {len(prompt):,} tokens, and the model's context is {chat.context:,}: no room "
            "is left for an answer, so your message is not kept; /reset starts again (/save FILE keeps a copy)"
        )
    # With the same seed for all, a question that is asked again would have the same answer.
    seed = (chat.params.seed + chat.answers) % 2**32
    params = dataclasses.replace(chat.params, max_new_tokens=min(room, chat.params.max_new_tokens), seed=seed)
    capacity = max(chat.capacity, power_of_two_from(len(prompt) + params.max_new_tokens))
    end = chat.tokenizer.decode(prompt[-8:], skip_special_tokens=False)
    thinks = -1 not in think_ids(chat.tokenizer)  # to a model without these tokens the tags are text
    parser = Parser(thinks and end.rstrip().endswith("<think>"), thinks=thinks)
    events: list[Event] = []
    stats, count = Stats(), 0
    reason = None
    with (
        Answer(chat.screen, lambda text: len(chat.tokenizer.encode(text, False))) as shown,
        _stoppable(chat, shown) as stop,
    ):

        def show(new: list[Event]) -> None:
            for event in new:
                # Without tools a call is no more than text.
                event = event if chat.tools or not isinstance(event, ToolCall) else Text(event.markup)
                shown.show(event)
                events.append(event)

        try:
            with contextlib.closing(chat.generate(prompt, params, capacity, stats)) as deltas:
                for delta in deltas:
                    count += len(delta.token_ids)
                    show(parser.feed(delta.text))
                    reason = delta.finish_reason
                    if stop():
                        break
        except KeyboardInterrupt:
            if not chat.interactive:
                raise
        show(parser.finish())
        interrupted = stop() or reason is None
    chat.capacity, chat.answers = capacity, chat.answers + 1
    chat.last = "\nlast answer:\n  " + stats.line().replace("; ", "\n  ")
    if interrupted and events:
        chat.screen.note("interrupted; what has come stays in the conversation")
    elif reason == "length":
        full = params.max_new_tokens == room
        chat.screen.note("the context is full; /reset starts again" if full else f"cut at {count} (--max-new-tokens)")
    elif not any(isinstance(event, ToolCall) or (isinstance(event, Text) and event.text.strip()) for event in events):
        thought = "after its reasoning " if any(isinstance(event, Thinking) for event in events) else ""
        chat.screen.note(f"the answer is empty: {thought}the model ended at once; /regenerate or /edit asks again")
    problems = [event.reason for event in events if chat.tools and isinstance(event, Text) and event.reason]
    return _as_message(chat, events, interrupted), problems


def _as_message(chat: Chat, events: list[Event], interrupted: bool) -> dict[str, Any] | None:
    if interrupted and not events:
        return None
    content = "".join(event.text for event in events if isinstance(event, Text))
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if thought := "".join(event.text for event in events if isinstance(event, Thinking)):
        chat.thought = message["reasoning_content"] = thought
    if calls := [{"name": call.name, "arguments": call.arguments} for call in events if isinstance(call, ToolCall)]:
        message["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return message | ({"interrupted": True} if interrupted else {})


def _use_tools(chat: Chat, calls: list[dict[str, Any]]) -> bool:
    """Adds the results to the conversation; False if the user does not want the model to go on."""
    wanted = True
    for call in calls:
        try:
            result = _use_tool(chat, **call) if wanted else REFUSED
        except KeyboardInterrupt:
            if not chat.interactive:
                raise
            result, wanted = "error: the user stopped this call", False
        chat.screen.note(result if len(result) <= 1000 else f"{result[:1000]} ...")
        chat.messages.append({"role": "tool", "name": call["name"], "content": result})
    return wanted


def _use_tool(chat: Chat, name: str, arguments: dict[str, Any]) -> str:
    written = ", ".join(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in arguments.items())
    chat.screen.note(f"{name}({written})", "bold")
    try:
        run = prepare(chat.tools, name, arguments)
    except ValueError as error:
        return f"error: {error}"
    if not chat.yes and not chat.interactive:
        chat.screen.note("not run: standard input is no terminal, so nobody can be asked; --yes runs every call")
        return REFUSED
    with contextlib.suppress(EOFError):
        if chat.yes or chat.read("Run it? [y/N] ").strip().lower() in ("y", "yes"):
            return run()
    return REFUSED


def _encode(chat: Chat, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    if not chat.think:
        # The template opens each answer with empty reasoning then; no other comes after it in what models learn from.
        messages = [{key: v for key, v in message.items() if key not in REASONING_FIELDS} for message in messages]
    tools = [schema(name, function) for name, function in chat.tools.items()] or None
    options = {"add_generation_prompt": True, "enable_thinking": chat.think, "tools": tools} | options
    return encode_chat(chat.tokenizer, _with_system(chat, messages), context=chat.context, **options)


def _with_system(chat: Chat, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return messages if chat.system is None else [{"role": "system", "content": chat.system}, *messages]


@contextlib.contextmanager
def _stoppable(chat: Chat, shown: Answer) -> Iterator[Callable[[], bool]]:
    """Ctrl-C is remembered, and heeded between two pieces of an answer, not within JAX; the second one at once."""
    if not chat.interactive:
        yield lambda: False
        return
    presses: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        presses.append(number)
        shown.status.update("stopping after this step")
        if len(presses) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, before)
