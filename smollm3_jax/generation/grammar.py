"""Grammars that answers keep to: JSON by a schema, calls of tools; and where an answer is in its grammar.

A grammar is a text of llguidance's, which comes with the extra `serve`. It says after each token which may come next.
Every process that runs an engine finds the same from the same tokens.

Shapes: W = ceil(V / 32) words of 32 bits, the lowest bit first, for a vocabulary of V tokens.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from ..errors import OptionError
from ..support import how_to_install
from ..tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# Between the parts of a JSON text: nothing, a space, or a line break and an indentation. A model that may write any
# number of spaces sometimes writes nothing else.
_JSON = {"lenient": False, "whitespace_pattern": r"\x20|\n[\x20\t]{0,40}"}
# A call's tags: tokens where the tokenizer has them. Else they are text, with line breaks that tell them from a string.
_TAGS = 'open: <tool_call> "\\n"?\nclose: "\\n"? </tool_call>\n'
_TAGS_AS_TEXT = 'open: "<tool_call>\\n"\nclose: "\\n</tool_call>"\n'
_CLOSE = b"</tool_call>"
# What says more of an object's properties than "properties" does.
_MORE = {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}

# Characters of a grammar: compiling as many takes at most about a second, wherever it is done.
MAX_GRAMMAR = 64 << 10
MAX_KEPT = 64  # compiled grammars of a tokenizer that are kept, for more samples and requests
_TRIES = 16  # first tokens after which a grammar is tried: it must be able to go on after each

log = logging.getLogger(__name__)


def json_schema(schema: Mapping[str, Any] | bool) -> str:
    """The grammar of the JSON texts that a schema allows, properties in the schema's order.

    Raises:
      OptionError: nothing satisfies the schema, or it has what no grammar can hold an answer to; by name.
    """
    return _schema(schema, "the JSON schema")[1]


def json_object() -> str:
    """The grammar of JSON objects."""
    return json_schema({"type": "object"})


def tool_calls(tools: Sequence[Mapping[str, Any]], *, names: Sequence[str] | None, parallel: bool, style: str) -> str:
    """The grammar of one call of a tool, in the words of SmolLM3's template, with arguments by the tool's own schema.

    Args:
      tools: OpenAI's descriptions, with or without the "function" around them. Where a schema lists the arguments
        there are no others, unless it says something of others.
      names: the tools that may be called; None is all.
      parallel: allow any number of calls, at least one.
      style: "xml".

    Raises:
      OptionError: there is no such tool, or one whose arguments no grammar can hold an answer to; by name.
    """
    if style != "xml":
        raise OptionError(f"the style of tool calls is {style!r}; only calls in 'xml' can be held to a grammar")
    found = {}
    for i, tool in enumerate(tools):
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise OptionError(f"tools[{i}] has no name; give OpenAI's description of a function")
        found[function["name"]] = function.get("parameters")
    for name in names or ():
        if name not in found:
            raise OptionError(f"there is no tool {name!r}; the tools are {', '.join(found) or 'none'}")
    wanted = [name for name in found if names is None or name in names]
    if not wanted:
        raise OptionError("there is no tool to call; give tools")
    bodies = []
    for i, name in enumerate(wanted):
        what = f"the arguments of the tool {name!r}"
        schema, _ = _schema(_arguments(found[name], what), what)
        head = json.dumps(f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": ')
        bodies.append(f'body_{i}: {head} arguments_{i} "}}"\narguments_{i}: %json {schema}\n')
    calls = 'call ("\\n" call)*' if parallel else "call"
    body = " | ".join(f"body_{i}" for i in range(len(wanted)))
    return _checked(f"start: {calls}\ncall: open ({body}) close\n{_TAGS}{''.join(bodies)}", "the tools")


def _arguments(schema: object, what: str) -> dict[str, Any]:
    """A tool's schema, of an object alone: without one, of an empty object."""
    schema = {"type": "object", "properties": {}} if schema is None else schema
    if not isinstance(schema, Mapping):
        raise OptionError(f"{what} have {schema!r:.60} for a schema; it must be an object")
    schema = {"type": "object"} | dict(schema)
    if schema["type"] != "object":
        raise OptionError(f"{what} have the type {schema['type']!r:.60}; arguments are an object")
    return schema | ({"additionalProperties": False} if "properties" in schema and not _MORE & schema.keys() else {})


def _schema(schema: object, what: str) -> tuple[str, str]:
    """A schema as JSON with our options in it, and its grammar."""
    schema = {} if schema is True else schema
    if not isinstance(schema, Mapping):
        raise OptionError(f"{what} is {schema!r:.60}, which no answer satisfies; it must be an object")
    try:
        written = json.dumps({**schema, "x-guidance": _JSON}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise OptionError(f"{what} cannot be written as JSON: {error}") from None
    return written, _checked(f'{{"grammars": [{{"json_schema": {written}}}]}}', what)


def _checked(grammar: str, what: str) -> str:
    _check_length(grammar, what)
    error = _library().LLMatcher.validate_grammar(grammar, limits=_limits())
    if error and not error.startswith("WARNING"):
        _refuse(error, what)
    return grammar


def _check_length(grammar: str, what: str) -> None:
    if len(grammar) > MAX_GRAMMAR:
        raise OptionError(
            f"{what}: a grammar of {len(grammar)} characters of JSON; it may have {MAX_GRAMMAR}. Shorten it, for "
            "example by leaving out descriptions"
        )


def _refuse(error: str, what: str) -> NoReturn:
    if found := re.search(r"Unimplemented keys: (\[.*\])", error):
        keys = ", ".join(json.loads(found[1]))
        raise OptionError(f"{what}: {keys} cannot be kept by a grammar; leave it out, and check the answer yourself")
    if "coerce_one_of" in error:
        raise OptionError(f"{what}: oneOf cannot be kept by a grammar where alternatives overlap; write anyOf")
    raise OptionError(f"{what} cannot be kept by a grammar: {' '.join(error.split()):.500}")


def check_grammar(grammar: str, tokenizer: Tokenizer | None) -> None:
    """Refuses a grammar that no answer of a model with this tokenizer can keep to.

    Raises:
      OptionError: saying why.
    """
    if tokenizer is None:
        raise OptionError("a grammar needs a tokenizer; give one")
    vocabulary_of(tokenizer).begin(grammar)


def _compiled(tokens: "LLTokenizer", end: int, grammar: str) -> "LLMatcher":
    """A matcher at the beginning of a grammar that fits these tokens, for `deep_copy`.

    Raises:
      OptionError: there is no such grammar, or no answer keeps to it.
    """
    _check_length(grammar, "the grammar")
    matcher = _library().LLMatcher(tokens, grammar, log_level=0, limits=_limits())
    if matcher.is_error():
        _refuse(matcher.get_error(), "the grammar")
    first = _next(matcher, tokens, end)
    if why := _dead(matcher, first):
        raise OptionError(f"the grammar has no answer: {why}")
    for token in _ids(first)[:_TRIES]:
        tried = matcher.deep_copy()
        tried.consume_token(token)
        if why := _dead(tried, _next(tried, tokens, end)):
            raise OptionError(f"the grammar is too large to be kept to: {why}")
    return matcher


def _next(matcher: "LLMatcher", tokens: "LLTokenizer", end: int) -> np.ndarray:
    """What may come next, as bits int32 [W of the tokenizer]."""
    said = _library().numpy.allocate_token_bitmask(1, tokens.vocab_size)
    if not matcher.is_stopped():
        _library().numpy.fill_next_token_bitmask(matcher, said)
        _set(said[0], end, False)
    return said[0] if not (matcher.is_stopped() or matcher.is_error()) else np.zeros_like(said[0])


def _ids(row: np.ndarray) -> list[int]:
    """The tokens whose bits are 1."""
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def _dead(matcher: "LLMatcher", following: np.ndarray) -> str:
    """Why an answer can neither go on nor end here; "" if it can."""
    if not matcher.is_error() and (following.any() or matcher.is_accepting()):
        return ""
    return " ".join((matcher.get_error() or "no token continues it").split())[:500]


def _limits() -> "LLParserLimits":
    """Of what llguidance does for one grammar; verbose errors would have what users wrote in the log.

    Its own limit of items for one token, a quarter of this, is too low for an object of 200 optional properties.
    """
    return _library().LLParserLimits(verbose_errors=False, initial_lexer_fuel=300_000, step_max_items=200_000)


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as grammars see it.

    tokens: llguidance's LLTokenizer; end: what it takes for the end of all answers, a token that there is not;
    has_tags: whether a call's tags are tokens; line_breaks: the tokens that are one or two of them; completing: for
    each number of bytes of </tool_call> that may have been said, the tokens that begin with all the others, as bits
    int32 [W]; compiled: fitted grammar -> a matcher at its beginning, the last MAX_KEPT kept, see `_compiled`.
    """

    tokens: "LLTokenizer"
    end: int
    has_tags: bool
    line_breaks: tuple[int, ...]
    completing: Mapping[int, np.ndarray]
    compiled: Callable[[str], "LLMatcher"]

    def begin(self, grammar: str) -> "LLMatcher":
        """A matcher of an answer's own, cheap where the grammar was here before.

        Raises:
          OptionError: no answer in these tokens keeps to the grammar.
        """
        return self.compiled(self.fitted(grammar)).deep_copy()

    def fitted(self, grammar: str) -> str:
        """A grammar in these tokens."""
        return grammar if self.has_tags else grammar.replace(_TAGS, _TAGS_AS_TEXT)


_vocabularies: dict[int, Vocabulary] = {}  # by the id of the tokenizer, which fields of dicts keep from being a key


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """A tokenizer's vocabulary; the first call takes a second or two for 128,000 tokens.

    Raises:
      OptionError: the tokenizer is of a kind that grammars cannot use.
    """
    if id(tokenizer) not in _vocabularies:
        _vocabularies[id(tokenizer)] = _vocabulary(tokenizer)
        weakref.finalize(tokenizer, _vocabularies.pop, id(tokenizer), None)
    return _vocabularies[id(tokenizer)]


def prepare(tokenizer: Tokenizer | None) -> None:
    """Reads a tokenizer before the first grammar comes; where none can, whoever asks for one is told."""
    if tokenizer is not None:
        with contextlib.suppress(OptionError):
            vocabulary_of(tokenizer)


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    # Tags such as <think> are no special tokens for `tokenizers`, which would leave them out of texts. In a grammar
    # they are: they mean themselves, and no string has them in it.
    text = tokenizer.backend.to_str()
    start = text.index(key := '"added_tokens":') + len(key)  # of megabytes, of which this is a part
    added, rest = json.JSONDecoder().raw_decode(text, start)
    for token in added:
        token["special"] |= bool(re.fullmatch("<[^<>]+>", token["content"]))
    special = {token["content"] for token in added if token["special"]}
    end = 1 + max(tokenizer.backend.get_vocab(with_added_tokens=True).values())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added.append({"id": end, "content": "<no token>", "special": True, **flags})
    try:
        tokens = _library().LLTokenizer(text[:start] + json.dumps(added) + text[rest:], eos_token=end)
    except Exception as error:  # a bare ValueError, or a panic
        raise OptionError(f"no grammar can be kept with this model's tokenizer: {error}") from None
    ids = [tokenizer.encode(breaks, add_special_tokens=False) for breaks in ("\n", "\n\n")]
    return Vocabulary(
        tokens=tokens,
        end=end,
        has_tags={"<tool_call>", "</tool_call>"} <= special,
        line_breaks=tuple(one[0] for one in ids if len(one) == 1),
        completing=_completing(tokens),
        compiled=functools.lru_cache(MAX_KEPT)(functools.partial(_compiled, tokens, end)),
    )


def _completing(tokens: "LLTokenizer") -> dict[int, np.ndarray]:
    found = {said: np.zeros(-(-tokens.vocab_size // 32), np.int32) for said in range(1, len(_CLOSE))}
    firsts = set(_CLOSE[1:])
    for token in range(tokens.vocab_size):
        if not tokens.is_special_token(token) and (text := tokens.decode_bytes([token])) and text[0] in firsts:
            for said, row in found.items():
                if text.startswith(_CLOSE[said:]):
                    _set(row, token, True)
    return found


class Matcher:
    """Where one answer is in its grammar.

    The grammar begins with the answer, or where thinking ends: the thinking that the prompt ends in, or that the answer
    opens with. Line breaks after it are no part of the grammar.

    Args:
      ends: the tokens that end an answer once its grammar is complete.
      think_ids: the tokens that open and close thinking; -1 where there are none.
      turn: the prompt's ids, of the turn that the answer is in.
    """

    def __init__(
        self,
        grammar: str,
        tokenizer: Tokenizer,
        vocab_size: int,
        ends: Sequence[int],
        think_ids: tuple[int, int],
        turn: Sequence[int],
    ):
        self._vocabulary = vocabulary_of(tokenizer)
        self._matcher = self._vocabulary.begin(grammar)
        self._words, self._ends = -(-vocab_size // 32), ends
        self._opens, self._closes = think_ids
        self._has_calls = _TAGS in grammar
        self.failed = False  # nothing can follow, or it takes too long to find out what: the answer ends here
        self._tail = b""  # the last bytes of the answer's text, as many as a call's end and one
        marks = [token for token in turn if token in think_ids and token >= 0]
        self._thinking = bool(marks) and marks[-1] == self._opens
        self._may_think = not marks and self._opens >= 0
        self._may_break = bool(marks) and turn[-1] == self._closes

    def forbidden(self) -> np.ndarray:
        """Bits int32 [W], one a token: 1 where it may not come next."""
        allowed = np.full(self._words, -1, np.int32)
        if not self._thinking:
            self._restrict(allowed)
        for token in self._ends:
            _set(allowed, token, not self._thinking and (self.failed or self._matcher.is_accepting()))
        if self._may_think:
            _set(allowed, self._opens, True)
        for token in self._vocabulary.line_breaks if self._may_break else ():
            _set(allowed, token, True)
        return ~allowed

    def _restrict(self, allowed: np.ndarray) -> None:
        """To what the grammar has next."""
        allowed[:] = 0
        if self.failed:
            return
        said = _next(self._matcher, self._vocabulary.tokens, self._vocabulary.end)
        words = min(len(allowed), len(said))
        allowed[:words] = said[:words]
        at = self._tail.rfind(b"<")
        if at >= 0 and _CLOSE.startswith(self._tail[at:]) and self._tail[at - 1 : at] != b"\n":
            completing = self._vocabulary.completing.get(len(self._tail) - at)
            if completing is not None:  # a string may not have it: whoever reads the call ends it there
                allowed[:words] &= ~completing[:words]
        if why := _dead(self._matcher, allowed):
            self._fail(why)

    def take(self, token: int) -> None:
        """The next token, which is no end of the answer."""
        may_think, may_break, self._may_think, self._may_break = self._may_think, self._may_break, False, False
        if self._thinking or (may_think and token == self._opens):
            self._thinking = token != self._closes
            self._may_break = not self._thinking
        elif not (self.failed or (may_break and token in self._vocabulary.line_breaks)):
            if not self._matcher.consume_token(token):
                self._fail(self._matcher.get_error())
            if self._has_calls:
                self._tail = (self._tail + self._vocabulary.tokens.decode_bytes([token]))[-len(_CLOSE) - 1 :]

    def _fail(self, why: str) -> None:
        log.warning("an answer ends before its grammar does: %s", " ".join(why.split())[:500])
        self.failed = True


def _set(row: np.ndarray, token: int, value: bool) -> None:
    """One token's bit of int32 [W]."""
    word, bit = row.view(np.uint32)[token // 32 :][:1], np.uint32(1 << token % 32)
    word[:] = word | bit if value else word & ~bit


def _library() -> ModuleType:
    """llguidance.

    Raises:
      OptionError: it is not installed.
    """
    try:
        import llguidance
        import llguidance.numpy
    except ImportError:
        raise OptionError(f"grammars need llguidance: {how_to_install('serve')}") from None
    return llguidance
