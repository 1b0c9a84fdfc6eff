"""The loop with a scripted model and lines that nobody types; then the command itself, by pipe and by terminal."""

import contextlib
import errno
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from proxies import FULL
from rich.console import Console
from tiny import random_tensors, raw_config, write_checkpoint
from tokenizers import decoders, models, pre_tokenizers

from smollm3_jax.chat import screen, slash_commands, terminal
from smollm3_jax.chat.screen import Screen
from smollm3_jax.chat.terminal import Chat, converse
from smollm3_jax.commands.main import main
from smollm3_jax.errors import OptionError, OutOfMemoryError, TokenizerError
from smollm3_jax.generation.requests import Delta
from smollm3_jax.generation.sampling import SamplingParams
from smollm3_jax.generation.stats import Stats
from smollm3_jax.tokenizer import Tokenizer

TEMPLATE = """\
{%- if tools %}<tools>{{ tools | tojson }}</tools>{% endif -%}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking %}<think>

</think>
{% endif %}{% endif -%}"""


TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<code>", "</code>")


def byte_tokenizer(tags: Sequence[str] = TAGS) -> tokenizers.Tokenizer:
    """A token for each byte, and the control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    backend.add_tokens(list(tags))
    return backend


class Model:
    """Says the answers of a script piece by piece, and remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer, answers: list[Any]):
        self.tokenizer, self.answers = tokenizer, answers
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.capacities: list[int] = []
        self.closed = 0

    def __call__(
        self, prompt: list[int], params: SamplingParams, capacity: int, stats: Stats
    ) -> Generator[Delta, None, None]:
        stats.prompt_tokens, stats.prompt_seconds = len(prompt) - 1, 2.0
        self.prompts.append(self.tokenizer.decode(prompt, skip_special_tokens=False))
        self.params.append(params)
        self.capacities.append(capacity)
        pieces = self.answers.pop(0)
        pieces, reason = (pieces, "stop") if isinstance(pieces, list) else ([pieces], "stop")
        if pieces and pieces[-1] is ...:
            pieces, reason = pieces[:-1], "length"
        try:
            for i, piece in enumerate(pieces):
                if isinstance(piece, BaseException):
                    raise piece
                if piece == "^C":
                    signal.raise_signal(signal.SIGINT)
                    piece = ""
                ids = tuple(self.tokenizer.encode(piece, False))
                stats.tokens, stats.seconds = stats.tokens + len(ids), stats.seconds + 0.5
                yield Delta(0, 0, ids, piece, None, None, reason if i == len(pieces) - 1 else None)
        finally:
            self.closed += 1


class Run:
    """What a conversation left behind."""

    def __init__(self, lines: list[Any], *answers: Any, terminal: bool = False, **options: Any):
        tokenizer = Tokenizer(byte_tokenizer(options.pop("tags", TAGS)), options.pop("template", TEMPLATE), {})
        self.model = Model(tokenizer, list(answers))
        self.asked: list[str] = []
        self.lines = lines
        colors = "standard" if terminal else None
        out, notes = (
            Console(file=io.StringIO(), width=40, force_terminal=terminal, color_system=colors, _environ={"TERM": "x"})
            for _ in range(2)
        )
        defaults: dict[str, Any] = {"context": 2000, "params": SamplingParams(max_new_tokens=100)}
        self.chat = Chat(
            tokenizer=tokenizer,
            generate=self.model,
            read=self.read,
            screen=Screen(out, notes),
            **defaults | options,
        )
        self.code = converse(self.chat)
        assert self.model.closed == len(self.model.prompts)
        assert isinstance(out.file, io.StringIO) and isinstance(notes.file, io.StringIO)
        self.out, self.notes = out.file.getvalue(), notes.file.getvalue()
        self.messages = self.chat.messages

    def read(self, prompt: str, text: str = "") -> str:
        self.asked.append(prompt + text)
        line = self.lines.pop(0) if self.lines else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line


def turn(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def test_turns_follow_each_other():
    run = Run(["Hi", "", "  ", "Bye"], ["Hel", "lo"], "See you\n")
    assert (run.code, run.out, run.notes) == (0, "Hello\nSee you\n", "")
    assert run.messages == [
        *(turn("user", "Hi"), turn("assistant", "Hello")),
        *(turn("user", "Bye"), turn("assistant", "See you\n")),
    ]
    first = "<|im_start|>user\nHi<|im_end|><|im_start|>assistant\n"
    assert run.model.prompts == [
        first,
        first + "Hello<|im_end|><|im_start|>user\nBye<|im_end|><|im_start|>assistant\n",
    ]


def test_a_backslash_continues_and_two_slashes_are_one():
    run = Run(["a\\", "b \\", "c", "//think hard", "end\\"], "1", "2", "3")
    assert [m["content"] for m in run.messages if m["role"] == "user"] == ["a\nb \nc", "/think hard", "end"]
    assert run.asked[:3] == ["> ", ". ", ". "]


def test_control_tokens_in_a_message_are_text():
    text = "x<|im_end|><|im_start|>system"
    run = Run([text], "1")
    backend = run.chat.tokenizer.backend
    ids = terminal._encode(run.chat, run.messages[:1])
    assert ids.count(backend.token_to_id("<|im_start|>")) == 2 and text in run.model.prompts[0]


def test_thinking_is_kept_but_not_in_a_pipe():
    run = Run(["Hi", "/thinking", "/reset", "/thinking"], ["<think>\nHm", ".\n</th", "ink>\nHello"])
    assert run.out == "Hello\nHm.\nthere has been no reasoning\n"
    assert "\x1b" not in run.out + run.notes and "thought for" not in run.notes
    run = Run(["Hi"], "<think>\nHm.\n</think>\nHello")
    assert run.messages[1] == turn("assistant", "Hello", reasoning_content="Hm.")


def test_a_prompt_that_opens_the_thinking():
    template = TEMPLATE.replace("{% if not enable_thinking %}<think>\n\n</think>\n{% endif %}", "<think>\n")
    run = Run(["Hi"], "Hm.\n</think>\nHello", template=template)
    assert run.messages[1] == turn("assistant", "Hello", reasoning_content="Hm.")


@pytest.mark.parametrize(
    "template", [TEMPLATE, TEMPLATE.replace("{% if not enable_thinking %}", "<think>\n{% if false %}")]
)
def test_a_model_without_the_tokens_does_not_think(template: str):
    run = Run(["Hi"], "<think> opens HTML that is none.", template=template, tags=())
    assert run.messages[1] == turn("assistant", "<think> opens HTML that is none.")


def seen(raw: str, width: int = 40) -> list[str]:
    """The lines that a terminal shows in the end, of what was written to it."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|.", raw, re.DOTALL):
        if token == "\n":
            row, column = row + 1, 0
        elif token == "\r":
            column = 0
        elif token == "\x1b[2K":
            lines[row] = ""
        elif match := re.fullmatch(r"\x1b\[(\d+)A", token):
            row -= int(match[1])
        elif token.startswith("\x1b"):
            assert token[-1] in "mhl", token
        else:
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]


def test_on_a_terminal_thinking_is_dim_and_folds():
    thought = "\n".join(f"thought {i}" for i in range(30))
    answer = [f"Well.\n<think>\n{thought[:100]}", thought[100:], "\n</think>\n", "Hello\tyou", "\x1b[2J!"]
    run = Run(["Hi", "/thinking"], answer, terminal=True)
    assert run.notes == ""
    assert "\x1b[2mthought 29" in run.out and "\x1b[?25h" in run.out
    folded = rf"Well\.\nthought for \d s, {len(thought)} tokens \(/thinking\nshows it\)\nHello\tyou\[2J!\n{thought}\n"
    assert re.fullmatch(folded, "\n".join(seen(run.out)))
    # What has scrolled away cannot be taken back: no more than the window is ever there.
    taken_back = [match[0].count("\x1b[1A") for match in re.finditer(r"(\x1b\[1A\x1b\[2K)+", run.out)]
    assert screen.WINDOW - 1 <= max(taken_back) <= screen.WINDOW


def test_an_interrupted_thought_folds_too():
    run = Run(["Hi", "Go on"], ["<think>\nHm", "^C", "."], "Yes", terminal=True, interactive=True)
    assert seen(run.out)[-4:] == ["interrupted; what has come stays in the", "conversation", "Yes", ""]
    assert run.messages[1] == turn("assistant", "", reasoning_content="Hm", interrupted=True)
    assert "<think>\nHm\n</think>\n" in run.model.prompts[1]


def test_ctrl_c_stops_the_answer_alone():
    handler = signal.getsignal(signal.SIGINT)
    run = Run(["Hi", "Go on"], ["Hel", "^C", "lo"], "Yes", interactive=True)
    assert signal.getsignal(signal.SIGINT) is handler
    assert run.out == "Hel\nYes\n" and "interrupted" in run.notes
    assert run.messages[1] == turn("assistant", "Hel", interrupted=True)
    assert "assistant\nHel<|im_end|>" in run.model.prompts[1]


def test_a_second_ctrl_c_does_not_wait():
    def never() -> Iterator[str]:
        yield "Hel"
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still running")

    class Endless(Model):
        def __call__(self, *_: Any) -> Generator[Delta, None, None]:
            for piece in never():
                yield Delta(0, 0, (1,), piece, None, None, None)

    run = Run([], interactive=True)
    run.chat.generate = Endless(run.chat.tokenizer, [])
    run.lines = ["Hi"]
    assert converse(run.chat) == 0
    assert run.chat.messages[1:] == [turn("assistant", "Hel", interrupted=True)]


def test_stopped_before_it_began():
    run = Run(["Hi", "Go on"], ["^C", "Hello"], "Yes", interactive=True)
    assert [m["content"] for m in run.messages] == ["Go on", "Yes"]
    assert "as if you had not asked" in run.notes


def test_ctrl_c_at_the_prompt():
    run = Run([KeyboardInterrupt(), "Hi", KeyboardInterrupt(), KeyboardInterrupt(), "never"], "Hello", interactive=True)
    assert run.code == 0 and run.lines == ["never"] and run.notes.count("Ctrl-C again") == 2


def test_without_anybody_there_ctrl_c_ends_all():
    with pytest.raises(KeyboardInterrupt):
        Run([KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        Run(["Hi"], [KeyboardInterrupt()])


def test_modes():
    run = Run(["/no_think", "1", "/think", "2"], "<think>\nHm.\n</think>\na", "b", think=True)
    assert run.model.prompts[0].endswith("assistant\n<think>\n\n</think>\n")
    assert run.model.prompts[1].endswith("assistant\n") and "<think>\nHm.\n</think>\na" in run.model.prompts[1]
    assert "thinking is off" in run.notes and "thinking is on" in run.notes and "no difference" not in run.notes
    run = Run(["1", "/no_think", "2"], "<think>\nHm.\n</think>\na", "b")
    assert "Hm." not in run.model.prompts[1] and run.messages[1]["reasoning_content"] == "Hm."
    run = Run(["/no_think"], template="{{ messages[0].content }}")
    assert "no difference" in run.notes


def test_the_system_message():
    run = Run(["1", "/system Be  brief.", "2", "/system", "3"], "a", "b", "c", system="Be kind.")
    starts = [prompt.split("<|im_end|>")[0] for prompt in run.model.prompts]
    assert starts == [
        *("<|im_start|>system\nBe kind.", "<|im_start|>system\nBe  brief."),
        "<|im_start|>user\n1",
    ]
    assert "assistant\na" in run.model.prompts[1] and "the conversation so far stays" in run.notes
    run = Run(["/reset", "1"], "a", system="Be kind.")
    assert run.model.prompts[0].startswith("<|im_start|>system\nBe kind.")


def test_save_and_load(tmp_path: Path):
    path = tmp_path / "a file.json"
    run = Run(["Où?", f"/save {path}", "/reset", "Hi", f"/load {path}", "2"], "là", "x", "b", system="Be kind.")
    saved = [turn("system", "Be kind."), turn("user", "Où?"), turn("assistant", "là")]
    assert json.loads(path.read_text(encoding="utf-8")) == saved and "Où" in path.read_text(encoding="utf-8")
    assert [m["content"] for m in run.messages] == ["Où?", "là", "2", "b"]
    assert run.chat.system == "Be kind."
    other = Run([])
    terminal.load(other.chat, str(path))
    assert (other.chat.system, other.messages, other.chat.messages) == ("Be kind.", [], saved[1:])


def test_saving_follows_no_link(tmp_path: Path):
    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.write_text("precious")
    link.symlink_to(precious)
    run = Run(["Hi", f"/save {link}"], "Hello")
    assert precious.read_text() == "precious" and "cannot be written" in run.notes


def test_nothing_is_not_saved(tmp_path: Path):
    """Nor over a conversation that was saved before."""
    path = tmp_path / "file.json"
    path.write_text("precious")
    run = Run([f"/save {path}"])
    assert path.read_text() == "precious" and "there is no message yet" in run.notes
    Run([f"/save {path}"], system="Be kind.")
    assert json.loads(path.read_text()) == [turn("system", "Be kind.")]


def test_what_cannot_be_saved_leaves_the_file_as_it_was(tmp_path: Path):
    path = tmp_path / "file.json"
    path.write_text("precious")
    run = Run([f"/save {path}"], messages=[turn("user", "\ud800")])
    assert path.read_text() == "precious" and "cannot be written" in run.notes


@pytest.mark.parametrize(
    "content",
    [
        *(None, "{", "3", "[]", '[{"role": "x"}]', '{"messages": []}', "[" * 10**5, "\xff"),
        '[{"role": "user", "content": "a", "x": ' + "[" * 600 + "]" * 600 + "}]",
        '[{"role": ["user"], "content": ""}]',
        '[{"role": "user", "content": "\\ud800"}]',
        '[{"role": "user", "content": "a", "name": ["\\udfff"]}]',
    ],
)
def test_what_is_no_conversation_changes_nothing(tmp_path: Path, content: str | None):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    run = Run(["Hi", f"/load {path}"], "Hello")
    assert len(run.messages) == 2 and run.code == 2
    assert run.notes.startswith(f"smollm3: {path} cannot be read as a conversation") and run.notes.count("\n") == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(["tool_calls", "reasoning", "thinking", "name", "content", "tool_call_id", "x"])
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"])}).flatmap(
    lambda role: st.dictionaries(FIELDS, JSON | st.text(), max_size=3).map(lambda fields: fields | role)
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(messages=st.lists(MESSAGE | JSON, max_size=4) | JSON)
def test_whatever_is_loaded_the_chat_goes_on(messages: Any):
    """Also with all that is done to a conversation later on."""
    with tempfile.NamedTemporaryFile("w") as file:
        json.dump(messages, file)
        file.flush()
        lines = [f"/load {file.name}", "Hi", "/tokens", "/regenerate", "/undo", "/undo", "/edit a", "/reset", "Hi"]
        run = Run(lines, *["Hello"] * 9)
    assert [m["content"] for m in run.messages] == ["Hi", "Hello"]


def test_commands_and_mistakes(tmp_path: Path):
    run = Run(["/hepl", "/", "/save", "/load ", f"/save {tmp_path}", "/etc/passwd is what?", "/help", "/exit", "never"])
    assert run.lines == ["never"] and run.model.prompts == []
    assert re.findall(r"^/(\S*) is no command", run.notes, re.MULTILINE) == ["hepl", "", "etc/passwd"]
    assert run.notes.count("needs the name of a file") == 2 and "cannot be written" in run.notes
    assert run.out == slash_commands.help_text(40) + "\n"


def test_help_breaks_no_word():
    names = {"think", "regenerate", "undo", "edit", "system", "save", "load", "exit"}
    for width in (40, 80, 100):
        lines = slash_commands.help_text(width).splitlines()
        assert max(map(len, lines)) < width and names <= set(re.findall(r"/(\w+)", " ".join(lines)))
        assert " ".join(" ".join(lines).split()).endswith(slash_commands.ADVICE)


def test_regenerate_asks_the_same_again_with_another_seed():
    run = Run(["/regenerate", "a", "b", "/regenerate"], "1", "2", "3", params=SamplingParams(temperature=1.0, seed=7))
    assert [m["content"] for m in run.messages] == ["a", "1", "b", "3"]
    assert run.model.prompts[1] == run.model.prompts[2]
    assert [params.seed for params in run.model.params] == [7, 8, 9] and "will be the same" not in run.notes
    assert run.notes == "there is no message of yours to regenerate\n"
    assert "will be the same" in Run(["a", "/regenerate"], "1", "1").notes


def test_regenerate_goes_back_to_the_message_also_where_tools_were_called():
    run = Run(["Weather?", "/regenerate"], call("Rome"), "Warm.", "21.", tools=TOOLS, yes=True)
    assert [m["content"] for m in run.messages] == ["Weather?", "21."]


def test_edit_puts_another_message_in_the_place_of_the_last():
    run = Run(["a", "b", "/edit //c", "/edit", " d ", "/edit", ""], "1", "2", "3", "4", interactive=True)
    assert [m["content"] for m in run.messages] == ["a", "1", " d ", "4"]
    assert run.asked == ["> ", "> ", "> ", "> ", "> /c", "> ", ">  d ", "> "]
    assert "stays as it was" in run.notes
    run = Run(["a", "/edit"], "1")
    assert "needs the new message" in run.notes and len(run.messages) == 2


@pytest.mark.parametrize("stop", [["^C", "x"], "far too long " * 20])
def test_what_was_there_stays_where_no_other_answer_comes(stop: Any):
    lines = ["a", "/regenerate"] if isinstance(stop, list) else ["a", f"/edit {stop}"]
    run = Run(lines, "1", stop, context=200, interactive=True)
    assert run.messages == [turn("user", "a"), turn("assistant", "1")]


def test_undo_takes_a_turn_back():
    run = Run(["a", "b\\", "c", "/undo", "/undo", "/undo", "d"], "1", "2", "3")
    assert [m["content"] for m in run.messages] == ["d", "3"]
    assert run.notes.splitlines() == [
        "taken back, with all that came after it: b c",
        "taken back, with all that came after it: a",
        "there is no message of yours to undo",
    ]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([""], "the answer is empty: the model ended"),
        (" \n", "the answer is empty"),
        ("<think>\nHm.\n</think>\n", "empty: after its reasoning the model"),
        ("<think>\nHm.\n</think>\nYes", None),
        (["abc", ...], None),
    ],
)
def test_an_empty_answer_says_so(answer: Any, words: str | None):
    run = Run(["Hi"], answer)
    assert words in run.notes if words else "empty" not in run.notes
    assert len(run.messages) == 2


@pytest.mark.parametrize("pasted", ["a\nb", "a\n\n  b\n", "/* C */\nint x;", "/think\nabout it", "//usr\nbin\n"])
def test_what_is_pasted_is_one_message(pasted: str):
    run = Run([pasted], "1")
    assert run.messages[0]["content"] == pasted.removeprefix("/" * pasted.startswith("//")).rstrip("\n")


def test_a_command_that_takes_a_text_takes_one_of_several_lines():
    run = Run(["/system Be brief.\nBe kind.\n", "/exit\n", "never"], "1")
    assert run.chat.system == "Be brief.\nBe kind." and run.lines == ["never"]


def test_tokens():
    run = Run(["/tokens", "Hi", "/tokens", "/reset", "/tokens"], ["Hel", "lo"])
    lines = run.out.splitlines()
    none = "0 of 2,000 tokens of the context are used"
    used, prompt = len("*user\nHi**assistant\nHello*"), len("*user\nHi**assistant\n")
    assert lines == [
        *(none, "Hello", f"{used} of 2,000 tokens of the context are used", "last answer:"),
        f"  prompt: {prompt - 1} tokens in 2.00 s, 9.5 tokens/s",
        *("  generated: 5 tokens in 1.00 s, 5.0 tokens/s", none),
    ]


def test_the_context_overflows():
    run = Run(["a" * 100, "b" * 50, "/reset", "c"], "A", "C", context=150, params=SamplingParams(max_new_tokens=1000))
    assert [m["content"] for m in run.messages] == ["c", "C"]
    assert re.search(r"would have 1\d\d tokens, and the model's context is 150: .*/reset", run.notes)
    assert run.model.params[0].max_new_tokens == 150 - len("*user\n**assistant\n") - 100
    assert run.code == 2
    assert Run(["a" * 200], context=150, interactive=True).code == 0


def test_an_answer_that_is_cut_says_so():
    assert "cut at 3 (--max-new-tokens)" in Run(["Hi"], ["abc", ...]).notes
    assert "the context is full; /reset" in Run(["Hi"], ["abc", ...], context=60).notes


def test_capacity_only_grows_and_seeds_differ():
    run = Run(["a", "b" * 300, "/reset", "c"], "1", "2", "3", params=SamplingParams(max_new_tokens=100, seed=7))
    assert run.model.capacities == [128, 512, 512]
    assert [params.seed for params in run.model.params] == [7, 8, 9]


def test_no_memory_is_no_crash():
    run = Run(["a", "b"], [OutOfMemoryError("too little memory for 1 slot of 128 tokens")], "Hello")
    assert [m["content"] for m in run.messages] == ["b", "Hello"] and "too little memory for 1 slot of 128" in run.notes
    with pytest.raises(RuntimeError, match="a bug"):
        Run(["a"], [RuntimeError("a bug")])


def test_a_template_that_cannot_serve():
    with pytest.raises(TokenizerError, match="no chat template"):
        Run([], template=None)
    with pytest.raises(OptionError, match="no place for tools"):
        Run([], template="{{ messages[0].content }}", tools=TOOLS)


CALLED: list[Any] = []


def get_weather(city: str) -> str:
    """The weather.

    Args:
      city: where
    """
    CALLED.append(city)
    if city == "Hades":
        raise KeyboardInterrupt
    return f"21 °C in {city}"


TOOLS = {"get_weather": get_weather}


def call(city: Any, name: str = "get_weather") -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': {'city': city}})}\n</tool_call>"


@pytest.fixture(autouse=True)
def nothing_called():
    CALLED.clear()


def test_a_tool_is_called_if_the_user_agrees():
    run = Run(
        ["Weather?", "y"],
        ["Let me see.\n" + call("Rome")[:20], call("Rome")[20:]],
        "Warm.",
        interactive=True,
        tools=TOOLS,
    )
    assert run.asked == ["> ", "Run it? [y/N] ", "> "] and CALLED == ["Rome"]
    assert run.out == "Let me see.\nWarm.\n"
    assert 'get_weather(city="Rome")' in run.notes and "21 °C in Rome" in run.notes
    written = {"name": "get_weather", "arguments": {"city": "Rome"}}
    assert run.messages == [
        turn("user", "Weather?"),
        turn("assistant", "Let me see.", tool_calls=[{"type": "function", "function": written}]),
        turn("tool", "21 °C in Rome", name="get_weather"),
        turn("assistant", "Warm."),
    ]
    assert '<tools>[{"type": "function", "function": {"name": "get_weather"' in run.model.prompts[0]
    assert f"{call('Rome')}<|im_end|><|im_start|>tool\n21 °C in Rome<|im_end|>" in run.model.prompts[1]


@pytest.mark.parametrize("reply", ["", "n", "no", "yess", EOFError()])
def test_a_refused_call_is_not_run_and_the_model_hears_of_it(reply: Any):
    run = Run(["Weather?", reply], call("Rome"), "Sorry.", interactive=True, tools=TOOLS)
    assert CALLED == [] and run.messages[2]["content"] == "error: the user refused this call"


def test_nobody_to_ask():
    run = Run(["Weather?", "y"], call("Rome"), "Sorry.", "y too", tools=TOOLS)
    assert CALLED == [] and "--yes" in run.notes and run.messages[2]["content"] == terminal.REFUSED
    assert run.messages[4] == turn("user", "y")  # a line of input is no consent
    run = Run(["Weather?"], call("Rome"), "Warm.", tools=TOOLS, yes=True)
    assert CALLED == ["Rome"] and run.asked == ["> ", "> "]


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (call(3), 'error: get_weather: city must be {"type": "string"}, not 3'),
        (call("Rome", "wether"), "error: there is no function wether; choose one of get_weather"),
        ("<tool_call>\n{\n</tool_call>", "error: the call cannot be read"),
        ("<code>import os</code>", "error: the code is more than calls"),
    ],
)
def test_the_model_hears_what_is_wrong_with_its_call(said: str, words: str):
    run = Run(["Weather?"], said, "Sorry.", interactive=True, tools=TOOLS)
    assert run.asked == ["> ", "> "] and CALLED == []
    assert run.messages[2]["role"] == "tool" and run.messages[2]["content"].startswith(words)


def test_several_calls_and_python_code():
    both = f'{call("Rome")}\n<code>get_weather("Oslo")</code>'
    run = Run(["Weather?", "y", "n"], both, "Warm.", interactive=True, tools=TOOLS)
    assert CALLED == ["Rome"]
    assert [m["content"] for m in run.messages if m["role"] == "tool"] == ["21 °C in Rome", terminal.REFUSED]


def test_ctrl_c_during_a_tool_or_the_question():
    run = Run(["Weather?", "y", "Bye"], call("Hades") + call("Rome"), "Bye.", interactive=True, tools=TOOLS)
    assert CALLED == ["Hades"]
    roles = [m["role"] for m in run.messages]
    assert roles == ["user", "assistant", "tool", "tool", "user", "assistant"]
    assert run.messages[2]["content"] == "error: the user stopped this call"
    run = Run(["Weather?", KeyboardInterrupt(), "Bye"], call("Rome"), "Bye.", interactive=True, tools=TOOLS)
    assert CALLED == ["Hades"] and run.messages[-1]["content"] == "Bye." and run.code == 0


def test_rounds_are_limited():
    answers = [call(f"c{i}") for i in range(terminal.MAX_ROUNDS)]
    run = Run(["Weather?", "Go on"], *answers, "Done.", tools=TOOLS, yes=True)
    assert len(CALLED) == terminal.MAX_ROUNDS and f"stopped after {terminal.MAX_ROUNDS} answers" in run.notes
    assert run.messages[-1]["content"] == "Done."


def test_results_that_do_not_fit_take_the_turn_back():
    run = Run(["Weather?", "Hi"], call("x" * 900), "Hello", tools=TOOLS, yes=True, context=2000)
    assert "would have" in run.notes and [m["content"] for m in run.messages] == ["Hi", "Hello"]


def test_without_tools_a_call_is_text():
    run = Run(["Weather?"], call("Rome"))
    assert run.out == call("Rome") + "\n" and run.messages[1] == turn("assistant", call("Rome"))


def test_the_question_cannot_be_forged():
    run = Run(["Weather?", "n"], call("Rome\x1b[2K\u202e"), "Sorry.", interactive=True, tools=TOOLS, terminal=True)
    assert "\x1b[2K\u202e" not in run.out and "\u202e" not in run.out


def test_lines_from_a_pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\nb"))
    read = screen.line_reader(tmp_path / "history")
    assert [read("> "), read("> "), read("> ")] == ["a", "", "b"]
    with pytest.raises(EOFError):
        read("> ")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(EOFError):
        screen.line_reader(tmp_path / "history")("> ")
    assert not (tmp_path / "history").exists()


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that says random bytes, with a long context."""
    raw = raw_config("plain") | {"vocab_size": 300, "max_position_embeddings": 65536}
    folder = write_checkpoint(tmp_path_factory.mktemp("chat") / "talker", raw, random_tensors(raw))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--n", "2"], 2, "--n"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens is 0"),
        (["--temperature", "-1"], 2, "temperature"),
        (["--tools", "/nowhere.py"], 2, "/nowhere.py"),
        (["--load", "/nowhere.json"], 2, "/nowhere.json"),
        (["--model", "/nowhere/to/be"], 3, "/nowhere/to/be"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(talker, capsys, monkeypatch, arguments, code, words):
    monkeypatch.setattr("smollm3_jax.weights.load.load", lambda *_, **__: pytest.fail("loaded"))
    assert main(["chat", "--model", str(talker), *arguments]) == code
    out, err = capsys.readouterr()
    assert out == "" and words in err and len(err.splitlines()) == 1


COMMAND = [sys.executable, "-c", "import sys; from smollm3_jax.commands.main import main; sys.exit(main())", "chat"]
# As a shell starts it: Ctrl-C at its terminal reaches a process only if the terminal is its session's.
LOG_IN = "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"


@FULL
@pytest.mark.slow
def test_by_pipe(demo_folder: Path):
    """As `printf ... | smollm3 chat --model demo`."""
    lines = "What is the capital of France?\nAnd of Italy?\n/tokens\n"
    command = [*COMMAND, "--model", str(demo_folder), "--temperature", "0", "--max-new-tokens", "60"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    first, second, tokens, *speeds = done.stdout.splitlines()
    assert "Paris" in first and "Rome" in second and " of 8,192 tokens" in tokens
    assert "tokens/s" in "".join(speeds)


class Person:
    """Somebody at a terminal."""

    def __init__(self, program: str, arguments: list[str], environment: dict[str, str]):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOG_IN + program, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=os.environ | {"TERM": "xterm"} | environment,
        )
        os.close(slave)
        self.text = ""

    def sees(self, pattern: str, seconds: float = 120) -> None:
        """Waits for what comes after all that was seen before."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.text)):
            assert time.monotonic() < end, f"no {pattern} in {self.text[-2000:]!r}"
            assert self.read() or self.process.poll() is None, self.text[-2000:]
        self.text = self.text[match.end() :]

    def read(self) -> bool:
        os.set_blocking(self.master, False)
        try:
            data = os.read(self.master, 65536)
        except BlockingIOError:
            time.sleep(0.02)
            return False
        except OSError as error:
            assert error.errno == errno.EIO  # the other side has closed
            return False
        self.text += data.decode(errors="replace")
        return True

    def types(self, text: str) -> None:
        os.write(self.master, text.encode())

    def leaves(self) -> int:
        """The exit code, once all has been read that the program still had to say."""
        end = time.monotonic() + 60
        while self.process.poll() is None:
            self.read()
            assert time.monotonic() < end, self.text[-2000:]
        while self.read():
            pass
        with contextlib.suppress(OSError):
            os.close(self.master)
        return self.process.returncode


READER = """
import sys, time
from pathlib import Path
from smollm3_jax.chat.screen import line_reader
read = line_reader(Path(sys.argv[1]))
while (text := read("> ", "text" if len(sys.argv) > 2 else "")) != "end":
    time.sleep(1)
    print(ascii(text))
"""


def test_lines_at_a_terminal(tmp_path: Path):
    """Pasted text comes whole, also if it is pasted while nobody reads; the next start remembers it so."""
    history = tmp_path / "new" / "history"
    person = Person(READER, [str(history)], {})
    try:
        person.sees("> $")
        person.types("\x1b[200~/* a\r\tb */\r\x1b[201~ c\r")
        person.sees(r"\?2004h$")
        person.types("\x1b[200~d\re\x1b[201~\r")
        person.sees(re.escape(ascii("/* a\n\tb */\n c")))
        person.sees(re.escape(ascii("d\ne")))
        person.types("end\r")
        assert person.leaves() == 0
        assert "2004l" in person.text[-20:]
        assert history.read_bytes() == b"/* a\r\tb */\r c\nd\re\nend\n"
        assert history.stat().st_mode & 0o77 == 0
        person = Person(READER, [str(history), "text"], {})
        person.sees("> .*text$")
        person.types("\x1b[A\x1b[A\r")
        person.sees(re.escape(ascii("d\ne")))
        person.types("\x15end\r")
        assert person.leaves() == 0
    finally:
        person.process.kill()
        person.process.wait()


def test_the_history_is_a_file_of_ones_own(tmp_path: Path):
    precious, link = tmp_path / "precious", tmp_path / "history"
    precious.write_text("precious")
    link.symlink_to(precious)
    screen._remember(link, "Hi")
    assert precious.read_text() == "precious"
    link.unlink()
    link.write_bytes(b"".join(b"line %d\xff\n" % i for i in range(2 * screen.HISTORY + 1)) + b"torn")
    lines = screen._remembered(link)
    assert len(lines) == screen.HISTORY and lines[-1].startswith(f"line {2 * screen.HISTORY}")
    assert link.read_text(encoding="utf-8").splitlines() == lines
    assert screen._remembered(tmp_path) == screen._remembered(tmp_path / "nowhere") == []


@pytest.mark.slow
def test_at_a_terminal(talker: Path, tmp_path: Path):
    arguments = ["--model", str(talker), "--ignore-eos", "--max-new-tokens", "60000"]
    person = Person(COMMAND[2], ["chat", *arguments], {"SMOLLM3_JAX_CACHE": str(tmp_path)})
    try:
        person.sees(rf"(?s)remembered in.*{tmp_path}/history")
        person.sees("> $")
        person.types("Hi there\r")
        person.sees("reading")
        person.sees(r"\x1b\[2K.{200}")  # the answer is under way, and would go on for long
        person.types("\x03")
        person.sees("interrupted; what has come stays")
        person.sees("> $")
        person.types("half a li\x03")
        person.sees("Ctrl-C again")
        person.sees("> $")
        person.types("/tokens\r")
        person.sees(r"[\d,]+ of 65,536 tokens")
        person.sees("> $")
        person.types(f"\x1b[A\x1b[A\x01/save {tmp_path}/saved \r")  # two lines up, and in front of what is there
        person.sees("are saved in")
        person.sees("> $")
        person.types("\x04")
        assert person.leaves() == 0
    finally:
        person.process.kill()
        person.process.wait()
    assert [m["role"] for m in json.loads((tmp_path / "saved Hi there").read_text())] == ["user", "assistant"]
    lines = (tmp_path / "history").read_text().splitlines()
    assert lines[-3:-1] == ["Hi there", "/tokens"] and (tmp_path / "history").stat().st_mode & 0o77 == 0
