"""What answers are split into, that no cutting changes it, that nothing gets lost, and that time is linear."""

import gc
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smollm3_jax.chat import parse as module
from smollm3_jax.chat.parse import Event, Message, Parser, Text, Thinking, ToolCall, parse, signature
from smollm3_jax.chat.template import normalize

WEATHER = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Copenhagen"}}\n</tool_call>'
CODE = '<code>get_weather(city="Copenhagen")</code>'
NO_CALL = "the code is more than calls of functions"
CALL = ToolCall("get_weather", {"city": "Copenhagen"})


def message(
    text: str = "", thinking: str = "", calls: Sequence[ToolCall] = (), problems: Sequence[str] = ()
) -> Message:
    return Message(thinking, text, tuple(calls), tuple(problems))


def events(pieces: Iterable[str], thinking: bool = False) -> list[Event]:
    """What comes out, the pieces of what belongs together joined."""
    parser = Parser(thinking)
    joined: list[Event] = []
    for event in [event for piece in pieces for event in parser.feed(piece)] + parser.finish():
        match joined[-1] if joined else None, event:
            case (Thinking(before), Thinking(text)) if text:
                joined[-1] = Thinking(before + text)
            case (Text(before, None), Text(text, None)) if text:
                joined[-1] = Text(before + text)
            case _:
                assert isinstance(event, ToolCall) or event.text  # nothing is not worth an event
                joined.append(event)
    return joined


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", message()),
        ("Hi", message("Hi")),
        ("\n Hi \n\n", message("\n Hi \n\n")),
        ("a < b <thin <tool_call <code", message("a < b <thin <tool_call <code")),
        ("<tool_calls></tool_call></code></think>", message("<tool_calls></tool_call></code></think>")),
        ("<think>\nHm.\n</think>\nHi", message("Hi", "Hm.")),
        ("<think>Hm.</think>Hi", message("Hi", "Hm.")),
        ("<think>\n\n Hm. \n\n</think>\n\n\n Hi", message(" Hi", "\n Hm. \n")),
        ("\n<think>\nHm.\n</think>\n", message("", "Hm.")),
        ("<think>\n\n</think>\nHi", message("Hi")),
        ("<think>\n</think>\n \n", message()),
        ("<think></think>", message()),
        ("<think>\nHm.\n", message("", "Hm.\n")),
        ("<think>", message()),
        ("<think>a</think>b\n<think>c</think>\nd", message("b\nd", "ac")),
        ("<think>a<think>b</think>c</think>d", message("c</think>d", "a<think>b")),
        (f"<think>\n{WEATHER}{CODE}\n</think>\nHi", message("Hi", WEATHER + CODE)),
        (f"<think>\nHm.\n</think>\n{WEATHER}", message("", "Hm.", [CALL])),
        (WEATHER, message(calls=[CALL])),
        (CODE, message(calls=[CALL])),
        (f" \n{WEATHER}\n\n {CODE}\t{WEATHER}\n", message(calls=[CALL] * 3)),
        (f"Let me look.\n{WEATHER}\n", message("Let me look.", calls=[CALL])),
        (f"Let me look. \n\n{CODE}\nSo.", message("Let me look. \n\nSo.", calls=[CALL])),
        (f"a{WEATHER}b{CODE}c", message("abc", calls=[CALL] * 2)),
        (f"{WEATHER}\n<code>1</code>\n\n{CODE}", message("\n<code>1</code>\n", "", [CALL] * 2, [NO_CALL])),
    ],
)
def test_splits(text: str, expected: Message):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\nHm.\n</think>\nHi", message("Hi", "Hm.")),
        ("Hm.", message("", "Hm.")),
        ("\n</think>\n\nHi", message("Hi")),
        (f"{WEATHER}</think>{WEATHER}", message("", WEATHER, [CALL])),
    ],
)
def test_an_answer_can_begin_with_thinking(text: str, expected: Message):
    assert parse(text, thinking=True) == expected


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('<tool_call>{"name": "f"}</tool_call>', [ToolCall("f", {})]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', [ToolCall("f", {})]),
        ('<tool_call>{"name": "f", "arguments": ""}</tool_call>', [ToolCall("f", {})]),
        ('<tool_call>{"name": "f", "parameters": {"x": 1}}</tool_call>', [ToolCall("f", {"x": 1})]),
        ('<tool_call>{"args": {"x": 1}, "name": "f"}</tool_call>', [ToolCall("f", {"x": 1})]),
        (r'<tool_call>{"name": "f", "input": "{\"x\": 1}"}</tool_call>', [ToolCall("f", {"x": 1})]),
        ('<tool_call>{"id": "a", "type": "function", "name": "f", "args": {}}</tool_call>', [ToolCall("f", {})]),
        (
            '<tool_call>{"type": "function", "function": {"name": "f", "parameters": {"x": 1}}}</tool_call>',
            [ToolCall("f", {"x": 1})],
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"x": 1}, "parameters": {"x": 1}}</tool_call>',
            [ToolCall("f", {"x": 1})],
        ),
        (r'<tool_call>{"arguments": "{\"x\": [1]}", "name": "f"}</tool_call>', [ToolCall("f", {"x": [1]})]),
        ('<tool_call>{"name": "f", "arguments": {"x": "a\n\tb"}}</tool_call>', [ToolCall("f", {"x": "a\n\tb"})]),
        (
            '<tool_call>{"name": "f", "arguments": {"x": "<tool_call></code><think>"}}</tool_call>',
            [ToolCall("f", {"x": "<tool_call></code><think>"})],
        ),
        (r'<tool_call>{"name": "f", "arguments": {"x": "\ud83d\ude42é"}}</tool_call>', [ToolCall("f", {"x": "🙂é"})]),
        ("<code>\nf()\n</code>", [ToolCall("f", {})]),
        (
            "<code>  f(1)  # why\ng(x=-1.5); h('a', y=None)\n</code>",
            [ToolCall("f", {"0": 1}), ToolCall("g", {"x": -1.5}), ToolCall("h", {"0": "a", "y": None})],
        ),
        (
            "<code>f(x=(1, [True]), y={'a': {'b': 2}, 1: 'c'})</code>",
            [ToolCall("f", {"x": [1, [True]], "y": {"a": {"b": 2}, "1": "c"}})],
        ),
        (
            r"<code>f('\d', r'\w', 'a' 'b', '''c" + "\n" + r"d''')</code>",
            [ToolCall("f", {"0": r"\d", "1": r"\w", "2": "ab", "3": "c\nd"})],
        ),
    ],
)
def test_reads_calls(text: str, calls: list[ToolCall]):
    assert parse(text) == message(calls=calls)


def test_the_markup_of_a_block_is_kept_once():
    found = parse(f"Hi\n{WEATHER}\n<code>f(); g()</code>").tool_calls
    assert [call.markup for call in found] == [WEATHER, "<code>f(); g()</code>", ""]


DEEP = 100_000
DEEPER = "nested deeper than 100 levels"
MALFORMED = [
    ("", "cannot be read: Expecting value"),
    ("{", "cannot be read"),
    ("{'name': 'f'}", "cannot be read"),
    ('{"name": "f"} {}', "cannot be read: Extra data"),
    ('{"name": "f", "arguments": {}', "cannot be read"),
    ("<tool_call>", "cannot be read"),
    (WEATHER[:-12], "cannot be read"),
    ('"f"', "not a JSON object"),
    ('[{"name": "f"}]', "not a JSON object"),
    ("null", "not a JSON object"),
    ("{}", "no name"),
    ('{"name": ""}', "no name"),
    ('{"name": ["f"]}', "no name"),
    ('{"function": "f", "arguments": {}}', "no name"),
    ('{"name": "f", "arguments": []}', "arguments are not"),
    ('{"name": "f", "city": "Oslo"}', "'city', which is neither"),
    ('{"name": "f", "arguments": {}, "city": "Oslo"}', "'city', which is neither"),
    ('{"name": "f", "description": "d", "parameters": {"type": "object"}}', "'description', which is neither"),
    ('{"name": "f", "arguments": {"x": 1}, "args": {"x": 2}}', "arguments and args, which differ"),
    ('{"name": "f", "arguments": {}, "parameters": {"x": 2}}', "arguments and parameters, which differ"),
    ('{"function": {"name": "f", "city": "Oslo"}}', "'city', which is neither"),
    ('{"function": {"name": "f"}, "city": "Oslo"}', "'city', which is neither"),
    ('{"name": "f", "parameters": [1]}', "arguments are not"),
    ('{"name": "f", "arguments": 0}', "arguments are not"),
    ('{"name": "f", "arguments": "x=1"}', "cannot be read"),
    (r'{"name": "f", "arguments": "\"{}\""}', "arguments are not"),
    ('{"name": "f", "arguments": {"x": NaN}}', "Out of range float"),
    ('{"name": "f", "arguments": {"x": -Infinity}}', "Out of range float"),
    ('{"name": "f", "arguments": {"x": 1e999}}', "Out of range float"),
    (r'{"name": "f", "arguments": "{\"x\": NaN}"}', "Out of range float"),
    ('{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}", "digits"),
    ('{"name": "f", "name": "g"}', "'name' is there twice"),
    (r'{"name": "f", "arguments": {"\ud800": 1, "\ud800": 2}}', r"'\\ud800' is there twice"),
    (r'{"name": "f", "arguments": {"x": "\ud800"}}', "surrogates not allowed"),
    ('{"name": "f", "arguments": {"x": "\ud800"}}', "surrogates not allowed"),
    ("\0", "cannot be read"),
    ("[" * DEEP, DEEPER),
    ("[" * DEEP + "]" * DEEP, DEEPER),
    ('{"a":' * DEEP, DEEPER),
    ('{"name": "f", "arguments": {"x": ' + "[" * 99 + "]" * 99 + "}}", DEEPER),
]
MALFORMED_CODE = [
    ("", "no call"),
    ("# f()", "no call"),
    ("f", "more than calls"),
    ("'f()'", "more than calls"),
    ("f()\nx = g()", "more than calls"),
    ("f(), g()", "more than calls"),
    ("import os", "more than calls"),
    ("os.system('ls')", "more than calls"),
    ("f()()", "more than calls"),
    ("f(**{'x': 1})", "more than calls"),
    ("f(*[1])", "not a literal"),
    ("f(x)", "not a literal"),
    ("f(g())", "not a literal"),
    ("f(f'{x}')", "not a literal"),
    ("f(1 + 1)", "not a literal"),
    ("f({**{}})", "not a literal"),
    ("f({1})", "not a literal"),
    ("f(x for x in y)", "not a literal"),
    ("f(b'a')", "bytes is not JSON"),
    ("f(...)", "ellipsis is not JSON"),
    ("f(2j)", "complex is not JSON"),
    ("f(1e999)", "Out of range float"),
    ("f(0x" + "f" * 5000 + ")", "digits"),
    ("f(" + "9" * 5000 + ")", "digits"),
    (r"f('\ud800')", "surrogates not allowed"),
    ("f('\ud800')", "surrogates not allowed"),
    ("f({[]: 1})", "unhashable"),
    ("f(x=1, x=2)", "twice|repeated"),
    ("f({'x': 1, 'x': 2})", "'x' is there twice"),
    ("f({'1': 1, 1: 2})", "'1' is there twice"),
    ("f(", "cannot be read"),
    ("f(x=1", "cannot be read"),
    ("f(\0)", "null byte"),
    ("if 1:", "cannot be read"),
    ("f(" + "[" * DEEP, "cannot be read"),
    ("f(" + "[" * 150 + "]" * 150 + ")", DEEPER),
    ("f(" + "-" * DEEP + "1)", DEEPER),
    ("f" + ".a" * DEEP + "()", DEEPER),
]


@pytest.mark.parametrize(
    ("tag", "payload", "reason"),
    [("tool_call", *case) for case in MALFORMED] + [("code", *case) for case in MALFORMED_CODE],
    ids=lambda value: value[:30].encode("unicode_escape").decode(),
)
def test_a_malformed_call_is_text_with_a_reason(tag: str, payload: str, reason: str):
    markup = f"<{tag}>{payload}</{tag}>"
    before, text, *after = events([f"Hi\n{markup}\n{WEATHER}"])
    assert (before, after) == (Text("Hi\n"), [CALL])
    assert isinstance(text, Text) and text.text == markup
    assert text.reason and re.search(reason, text.reason)
    assert len(text.reason) < 300
    text.reason.encode()


@pytest.mark.parametrize(
    "markup", ["<tool_call>", "<code>f()", f"{WEATHER[:-1]}", f"<code>{WEATHER}", "<code>f()</cod"]
)
def test_an_unclosed_call_is_text_with_a_reason(markup: str):
    closing = "</code>" if "code" in markup else "</tool_call>"
    assert events([f"{WEATHER}\n{markup}"]) == [CALL, Text("\n"), Text(markup, f"the call has no {closing}")]


def test_nesting_up_to_the_limit_is_a_call():
    inner = "[" * 98 + "]" * 98
    (call,) = parse(f'<tool_call>{{"name": "f", "arguments": {{"x": {inner}}}}}</tool_call>').tool_calls
    assert call.arguments == {"x": json.loads(inner)}


@pytest.mark.parametrize("size", range(1, 40))
def test_a_call_is_as_long_as_the_limit_at_most(monkeypatch: pytest.MonkeyPatch, size: int):
    monkeypatch.setattr(module, "MAX_CALL", 20)
    reason = "the call is longer than 20 characters"
    payload = "f('" + "x" * (20 - 5) + "')"
    longer = "f('" + "x" * 16 + "')"
    text = f"<code>{payload}</code><code>{longer}</code>\n<code>{payload}</code><tool_call>" + "<" * 50
    assert events(text[i : i + size] for i in range(0, len(text), size)) == [
        ToolCall("f", {"0": "x" * 15}),
        Text(f"<code>{longer[:20]}", reason),
        Text(")</code>"),
        ToolCall("f", {"0": "x" * 15}),
        Text("<tool_call>" + "<" * 20, reason),
        Text("<" * 30),
    ]


def test_comes_out_as_soon_as_it_can():
    parser = Parser()
    text = "<think>\nHm<m.\n</think>\n \nA <b\n\n<tool_call>{}"
    came = [(char, event) for char in text for event in parser.feed(char)]
    assert came == [
        ("H", Thinking("H")),
        ("m", Thinking("m")),
        ("m", Thinking("<m")),
        (".", Thinking(".")),
        ("A", Text(" \nA")),
        (" ", Text(" ")),
        ("b", Text("<b")),
        ("\n", Text("\n")),
    ]
    assert parser.finish() == [Text("\n"), Text("<tool_call>{}", "the call has no </tool_call>")]


def test_a_finished_parser_starts_anew():
    parser = Parser(thinking=True)
    assert parser.feed("Hm.\n</thi") + parser.finish() == [Thinking("Hm."), Thinking("\n</thi")]
    assert parser.finish() == []
    assert parser.feed(f"Hi{CODE}") + parser.finish() == [Text("Hi"), CALL]


# Calls whose markup tells them apart, malformed ones, tags and parts of tags, and whitespace.
CALLS = (WEATHER, CODE, "<code>f(1); g()</code>", '<tool_call>{"name": "h"}</tool_call>')
PIECES = (
    *CALLS, "<think>", "</think>", "<think>\n", "\n</think>\n", "<tool_call>", "</tool_call>", "<code>", "</code>",
    "<", "<t", "hink>", "</", "tool_call>", "<code", ">", "\n", "\n\n", " ", "\t", "Hi", "é🙂", "{", '"',
    '{"name": "f"}', "f()", "<tool_call>{}</tool_call>", "<code>1</code>",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text("<>/thinktoolcallcode_ \n", max_size=8), max_size=12).map("".join)


@st.composite
def cut_texts(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(TEXTS)
    borders = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[i:j] for i, j in zip([0, *borders], [*borders, len(text)], strict=True)]


@given(cut_texts(), st.booleans(), st.sampled_from([5, 20, module.MAX_CALL]))
@settings(max_examples=200, deadline=None)
def test_cutting_changes_nothing(cut: tuple[str, list[str]], thinking: bool, limit: int):
    text, pieces = cut
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_CALL", limit)
        whole = events([text], thinking)
        assert events(pieces, thinking) == whole
        assert events(text, thinking) == whole


@given(TEXTS, st.booleans())
@example(f"<think>\n a \n</think>\n\n b \n{WEATHER}\n{CODE}\n\n c\n", False)
@settings(max_examples=200, deadline=None)
def test_nothing_is_lost(text: str, thinking: bool):
    parser = Parser(thinking)
    found = parser.feed(text) + parser.finish()
    between = r"(\s|</?think>)*"
    parts = [event.markup if isinstance(event, ToolCall) else event.text for event in found]
    assert re.fullmatch("".join(between + re.escape(part) for part in parts) + between, text)
    if not re.search("<think>|<tool_call>|<code>", text) and not thinking and text.strip():
        assert parse(text) == message(text)


@given(TEXTS)
@settings(max_examples=100, deadline=None)
def test_a_message_is_its_events(text: str):
    found = events([text])
    assert parse(text) == message(
        "".join(event.text for event in found if isinstance(event, Text)),
        "".join(event.text for event in found if isinstance(event, Thinking)),
        [event for event in found if isinstance(event, ToolCall)],
        [event.reason for event in found if isinstance(event, Text) and event.reason],
    )


# No tags: the first one that closes a block does so wherever it is.
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), max_size=20).filter(
    lambda text: not re.search("<think>|<tool_call>|<code>", text)
) | st.sampled_from(["\n a \n", "<", "\n\n", "🙂"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


@given(
    reasoning=WORDS,
    content=WORDS.filter(lambda text: not text or (text.strip() and not text.startswith("\n"))),
    calls=st.lists(st.builds(ToolCall, WORDS.filter(bool), st.dictionaries(WORDS, VALUES, max_size=3)), max_size=3),
)
@settings(deadline=None)
def test_undoes_what_normalize_writes(reasoning: str, content: str, calls: list[ToolCall]):
    sent = {
        "role": "assistant",
        "content": content,
        "reasoning": reasoning,
        "tool_calls": [{"name": call.name, "arguments": call.arguments} for call in calls],
    }
    (normal,) = normalize([sent])
    assert parse(normal["content"]) == message(content, reasoning, calls)


def seconds(text: str, size: int) -> float:
    """Of this process alone, and without the garbage collector, which also looks at what other tests left."""
    parser = Parser()
    gc.disable()
    try:
        before = time.process_time()
        for i in range(0, len(text), size):
            parser.feed(text[i : i + size])
        parser.finish()
        return time.process_time() - before
    finally:
        gc.enable()


def is_linear(text: Callable[[int], str], size: int, length: int) -> bool:
    """Ten times the text takes ten times as long, not a hundred times; a busy machine gets a second chance."""
    short, long = text(length), text(10 * length)
    return any(seconds(long, size) < 20 * seconds(short, size) + 0.01 for _ in range(5))


WORST: dict[str, Callable[[int], str]] = {
    "beginnings of tags": lambda n: "<" * n,
    "open calls": lambda n: "<tool_call>" * (n // 11),
    "an unclosed call": lambda n: "<tool_call>" + "x" * n,
    "open objects": lambda n: f"<tool_call>{'{' * n}</tool_call>",
    "open lists": lambda n: f"<tool_call>{'[' * n}</tool_call>",
    "open think tags": lambda n: "<think>" * (n // 7),
    "think blocks": lambda n: "<think></think>" * (n // 15),
    "closing tags of another block": lambda n: "<code>" + "</tool_call>" * (n // 12),
    "newlines": lambda n: "\n" * n,
    "spaces after a call": lambda n: CODE + " " * n,
    "many calls": lambda n: ("<tool_call>" + " " * 100 + "</tool_call>") * (n // 123),
    "a long string": lambda n: '<tool_call>{"name": "' + '\\"' * (n // 2) + '"}</tool_call>',
}


@pytest.mark.parametrize(("size", "length"), [(1, 3_000), (100, 100_000), (sys.maxsize, 100_000)])
@pytest.mark.parametrize("case", WORST)
def test_time_is_proportional_to_length(case: str, size: int, length: int):
    """S9."""
    assert is_linear(WORST[case], size, length)


@pytest.mark.parametrize("tag", ["<tool_call>", "<code>"])
def test_time_is_proportional_to_length_beyond_the_limit(monkeypatch: pytest.MonkeyPatch, tag: str):
    """Each of many calls that are too long looks for its end no further than the limit."""
    monkeypatch.setattr(module, "MAX_CALL", 100)
    assert is_linear(lambda n: tag * n, sys.maxsize, 20_000)


@pytest.mark.parametrize("text", ["<code>f()</code>", "a\n<tool_call>\n{}\n</tool_call> ", "\n<tool_call>"])
def test_tags_that_open_no_call_are_text(text):
    for cut in range(len(text) + 1):
        parser = Parser(calls=())
        events = parser.feed(text[:cut]) + parser.feed(text[cut:]) + parser.finish()
        assert "".join(event.text for event in events if isinstance(event, Text) and not event.reason) == text
    [event] = Parser(calls=["<code>"]).feed("<code>f()</code>")
    assert event == ToolCall("f", {})


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("def f(a, *, b=1) -> str:\n  'Doc.'", ("f", ["a", "b"])),
        ("def f(x: int) -> int", ("f", ["x"])),
        ("def f(x: int):", ("f", ["x"])),
        ("  def f(): ...", ("f", [])),
        ("f(x)", None),
        ("def f(", None),
        ("\0", None),
        ("(" * 5000, None),
        ("def f(x='\\d'): ...", ("f", ["x"])),
    ],
)
def test_signatures_of_python_functions(code, found):
    assert signature(code) == found


def pieced(text: str, size: int, **options) -> Message:
    """A whole answer, in pieces of `size` characters."""
    parser = Parser(**options)
    found = [event for i in range(0, len(text), size) for event in parser.feed(text[i : i + size])] + parser.finish()
    said = {kind: "".join(event.text for event in found if isinstance(event, kind)) for kind in (Text, Thinking)}
    return message(said[Text], said[Thinking], [event for event in found if isinstance(event, ToolCall)])


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_what_tags_mean_depends_on_who_answers(size):
    answer = f'"a <think> b{WEATHER}{CODE}</think>"'
    assert pieced(answer, size, one_text=True) == message(answer)
    assert pieced(f"\n<think>\nHm.\n</think>\n{answer}", size, one_text=True) == message(answer, "Hm.")
    assert pieced(f"Hm.\n</think>\n{answer}", size, one_text=True, thinking=True) == message(answer, "Hm.")
    assert pieced("a <think> b</think>", size, thinks=False) == message("a <think> b</think>")
    assert pieced(f"<think>{WEATHER}", size, thinks=False) == message("<think>", calls=[CALL])


@pytest.mark.parametrize("code", ["f(1)\ng(2)", "g(1)\nf(2)", "g()"])
def test_a_block_with_an_unknown_function_is_text(code):
    block = f"Look:\n<code>{code}</code>"
    parser = Parser(names=["f", "get_weather"])
    found = parser.feed(f"{block}\n{WEATHER}") + parser.finish()
    assert found[-1] == CALL and found[-2] == Text(f"<code>{code}</code>", "there is no function 'g'")
    assert "".join(event.text for event in found[:-1] if isinstance(event, Text)) == block
    assert parser.feed("<code>f(1)\nf(2)</code>") == [ToolCall("f", {"0": 1}), ToolCall("f", {"0": 2})]
