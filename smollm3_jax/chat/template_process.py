"""The process in which chat templates run, so that one that never ends, or fills the memory, can be ended.

`template.render` starts this file as a script, with the folders that Jinja is in as arguments; nothing of the package
is imported, so that it is there in a tenth of a second. On standard input comes, again and again, a byte (the seconds
that it may take), a length of 8 bytes and the pickle of (template, variables, time); on standard output goes b"+" or
b"-", such a length, and in UTF-8 what is wrong, or the spans (JSON, a line) and the text after them. Where the time is
up, the alarm ends the process without an answer.
"""

import functools
import json
import pickle
import resource
import signal
import sys
import traceback
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2
    import jinja2.nodes

MEMORY = 1 << 30  # bytes of address space
MARK = "generation mark"  # the variable that holds what notes spans: no template can write its name
MAX_TEXT = 1 << 25  # characters, more than any model's context holds


def serve() -> None:
    """Answers until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which may have been ignored or blocked where this was started
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while header := requests.read(9):
        request = requests.read(int.from_bytes(header[1:], "little"))
        signal.alarm(header[0])
        try:
            found, spans = render(*pickle.loads(request))
            sign, text = b"+", f"{json.dumps(spans)}\n{found}"
        except BaseException as error:  # a program can fail in every way there is
            sign, text = b"-", explain(error)
        signal.alarm(0)
        content = text.encode(errors="surrogatepass")
        answers.write(sign + len(content).to_bytes(8, "little") + content)
        answers.flush()


def render(template: str, variables: dict[str, Any], now: datetime) -> tuple[str, list[list[int]]]:
    """(the text, [start, end] of what its `generation` blocks wrote); raises whatever the template does."""
    spans: list[list[int]] = []
    size = 0

    def mark(end: bool) -> str:
        # What a block or macro that collects its own text has written so far is not counted: there a span is empty.
        if end:
            spans[-1].append(size)
        else:
            spans.append([size])
        return ""

    variables = {"documents": None, "strftime_now": lambda pattern: now.strftime(pattern)} | variables | {MARK: mark}
    pieces = []
    for piece in compiled(template).generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size > MAX_TEXT:
            raise ValueError(f"it writes more than {MAX_TEXT:,} characters")
    if any(len(span) != 2 for span in spans):
        raise ValueError("`continue` or `break` leaves a `generation` block")
    return "".join(pieces), spans


def explain(error: BaseException) -> str:
    """What a failed template says, and the line of its source that said it."""
    if isinstance(error, MemoryError):
        return f"the chat template failed: it takes more than {MEMORY >> 20} MiB of memory (MemoryError)"
    if isinstance(error, SyntaxError):  # of the Python that Jinja compiled it to, whose lines mean nothing here
        return f"the chat template failed: {error.msg}"
    # Jinja rewrites tracebacks so that the frames of a template, whose file is "<template>", carry its own lines.
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    message = str(getattr(error, "message", None) or error or type(error).__name__)
    return f"the chat template failed{f' in line {line}' if line else ''}: {message[:1000]}"


def marking(end: bool, line: int) -> "jinja2.nodes.ExprStmt":
    """A statement that calls MARK of the template's variables."""
    from jinja2 import nodes

    function = nodes.Getitem(nodes.ContextReference(), nodes.Const(MARK), "load")
    return nodes.ExprStmt(nodes.Call(function, [nodes.Const(end)], [], None, None), lineno=line)


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> "jinja2.Template":
    """The template in transformers' dialect: its whitespace rules, functions and `generation` blocks."""
    from jinja2 import Environment, TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what the model is trained on; rendering prints its body, in a scope of its own,
        and notes where that begins and ends."""

        def __init__(self, environment: Environment) -> None:
            super().__init__(environment)
            self.tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope([marking(False, line), *body, marking(True, line)], lineno=line)

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


if __name__ == "__main__":
    sys.path += sys.argv[1:]  # after Python's own modules, whatever else is in those folders
    serve()
