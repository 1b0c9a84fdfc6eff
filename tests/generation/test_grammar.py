"""Grammars: whatever a model says under their masks is what they are grammars of."""

import dataclasses
import functools
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import letters, talking_checkpoint

from smollm3_jax.chat.parse import ToolCall, parse
from smollm3_jax.errors import OptionError
from smollm3_jax.generation import grammar as module
from smollm3_jax.generation.grammar import Matcher, check_grammar, json_object, json_schema, prepare, tool_calls
from smollm3_jax.tokenizer import Tokenizer, load_tokenizer

FIXTURES = Path(__file__).parents[3] / "shared" / "fixtures" / "smollm3-3b"
LETTERS = letters()
TAGS = ("<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
END, OPEN, CLOSE, CALL, CALL_END = (LETTERS.backend.token_to_id(tag) for tag in TAGS)
VOCAB = 160  # more rows than tokens


def matcher(grammar: str, turn: str = "", tokenizer: Tokenizer = LETTERS) -> Matcher:
    end, opens, closes = (tokenizer.backend.token_to_id(tag) for tag in TAGS[:3])
    vocab = max(VOCAB, tokenizer.backend.get_vocab_size())
    return Matcher(grammar, tokenizer, vocab, (end,), (opens or -1, closes or -1), tokenizer.encode(turn))


def allowed(one: Matcher) -> np.ndarray:
    """The ids that may come next."""
    row = one.forbidden()
    assert row.dtype == np.int32
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little") == 0)


def keeps(grammar: str, text: str, turn: str = "", tokenizer: Tokenizer = LETTERS) -> bool:
    """Whether a model may write this and then end."""
    one = matcher(grammar, turn, tokenizer)
    for token in [*tokenizer.encode(text), tokenizer.backend.token_to_id("<|im_end|>")]:
        if token not in allowed(one):
            return False
        one.take(token)
    return True


def written(grammar: str, seed: int, tokenizer: Tokenizer = LETTERS, turn: str = "", thinks: bool = False) -> str:
    """What a random model writes: it goes anywhere, and after a while rather to an end."""
    one, random, ids = matcher(grammar, turn, tokenizer), np.random.RandomState(seed), []
    vocabulary = module.vocabulary_of(tokenizer).tokens
    end, opens, closes = (tokenizer.backend.token_to_id(tag) for tag in TAGS[:3])
    texts = [vocabulary.decode_bytes([token]) for token in range(tokenizer.backend.get_vocab_size())]
    brief = [token for token, text in enumerate(texts) if token in (end, closes) or set(text) <= set(b'"}],1e')]
    for i in range(4000):
        may = allowed(one)
        if opens in may and not thinks:
            may = may[may != opens]
        said = int(may[random.randint(len(may))])
        if i > 10 and random.rand() < 0.8:
            wanted = np.intersect1d(may, brief)
            said = int(wanted[random.randint(len(wanted))]) if len(wanted) else said
        if said == end:
            return tokenizer.decode(ids, skip_special_tokens=True)
        one.take(said)
        ids.append(said)
    raise AssertionError(f"it never ends: {tokenizer.decode(ids)!r:.300}")


def kind_of(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def satisfies(schema: Any, value: Any, root: Any = None) -> bool:
    """JSON Schema, of the keywords that `SCHEMAS` have."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return satisfies(root["$defs"][schema["$ref"].split("/")[-1]], value, root)
    if "anyOf" in schema:
        return any(satisfies(one, value, root) for one in schema["anyOf"])
    if "enum" in schema:
        return any(kind_of(value) == kind_of(one) and value == one for one in schema["enum"])
    kind, kinds = kind_of(value), schema.get("type", kind_of(value))
    if kind not in kinds and not (kind == "integer" and "number" in kinds):
        return False
    infinite = float("inf")
    if kind == "string":
        return schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", infinite)
    if kind in ("integer", "number"):
        return schema.get("minimum", -infinite) <= value <= schema.get("maximum", infinite)
    if kind == "array":
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        each = all(satisfies((first[i : i + 1] or [rest])[0], one, root) for i, one in enumerate(value))
        return each and schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", infinite)
    if kind == "object":
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        each = all(satisfies(known.get(name, more), one, root) for name, one in value.items())
        return each and all(name in value for name in schema.get("required", []))
    return True


VALUES = st.none() | st.booleans() | st.integers(-99, 99) | st.text(st.characters(min_codepoint=32, max_codepoint=126))
NAMES = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=5)


@st.composite
def bounds(draw, low: str, high: str, least: int, most: int) -> dict[str, int]:
    """Either, both or none of two bounds."""
    first, second = sorted(draw(st.tuples(st.integers(least, most), st.integers(least, most))))
    given = draw(st.sets(st.sampled_from([low, high])))
    return {name: value for name, value in ((low, first), (high, second)) if name in given}


@st.composite
def of_type(draw, kind: str, inner: st.SearchStrategy) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": draw(st.sampled_from([kind, [kind, "null"]])), "description": draw(NAMES)}
    if kind == "string":
        return schema | draw(bounds("minLength", "maxLength", 0, 9))
    if kind in ("integer", "number"):
        return schema | draw(bounds("minimum", "maximum", -300, 300))
    if kind == "array":
        first = draw(st.lists(inner, max_size=2))
        schema |= {"prefixItems": first} if first else {}
        return schema | {"items": draw(inner)} | draw(bounds("minItems", "maxItems", 2, 4))
    known = draw(st.dictionaries(NAMES, inner, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(known)), unique=True)) if known else []
    more = draw(
        st.just({}) | st.just({"additionalProperties": False}) | st.builds(lambda x: {"additionalProperties": x}, inner)
    )
    return schema | {"properties": known, "required": required} | more


def nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    alternatives = st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some})
    return of_type("array", inner) | of_type("object", inner) | alternatives


LEAVES = st.one_of(
    st.lists(VALUES, min_size=1, max_size=4).map(lambda some: {"enum": some}),
    *(of_type(kind, st.nothing()) for kind in ("string", "integer", "number")),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"$ref": "#/$defs/named"}]),
)
SCHEMAS = st.recursive(LEAVES, nested, max_leaves=6)


@settings(max_examples=60)
@given(SCHEMAS, LEAVES.filter(lambda schema: "$ref" not in schema), st.integers(0, 2**32 - 1))
def test_whatever_is_written_satisfies_the_schema(schema, named, seed):
    schema = schema | {"$defs": {"named": named}}
    text = written(json_schema(schema), seed)
    assert satisfies(schema, json.loads(text)), text


def test_the_check_of_schemas_can_fail():
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]}
    assert satisfies(schema, {"a": 3, "b": None})
    assert not any(satisfies(schema, value) for value in ({}, [], {"a": 2}, {"a": "3"}, {"a": True}))
    assert not satisfies({"type": "array", "items": {"type": ["string", "null"]}, "maxItems": 2}, [None, "a", "b"])
    assert not satisfies({"prefixItems": [{"enum": [1]}], "items": False}, [1, 1])
    assert not satisfies({"anyOf": [{"enum": [True]}, {"type": "string", "maxLength": 2}]}, "abc")


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1))
def test_a_json_object(seed):
    assert isinstance(json.loads(written(json_object(), seed)), dict)


@pytest.mark.parametrize("text", ["{}", '{"a":1}', '{"a": [1, 2 ], "b" : {}}', '{\n  "a": "<b>\\n"\n}'])
def test_texts_that_a_grammar_has(text):
    assert keeps(json_object(), text)


@pytest.mark.parametrize("text", ["", "[]", " {}", "{}\n", '{"a":  1}', '{"a": 1', '{"a": "<think>"}', "{}{}"])
def test_texts_that_a_grammar_does_not_have(text):
    """No end before the grammar's, nothing after it, and no run of spaces that never ends."""
    assert not keeps(json_object(), text)


def test_where_it_may_end_or_go_on_there_are_no_other_tokens():
    one = matcher(json_schema({"type": "integer"}))
    one.take(LETTERS.encode("1")[0])
    assert allowed(one).tolist() == sorted([*LETTERS.encode("0123456789"), END])


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"not": {}}, "not cannot be kept"),
        (
            {"type": "object", "properties": {"a": {"uniqueItems": True, "contains": {}, "type": "array"}}},
            "uniqueItems",
        ),
        ({"type": "object", "dependentRequired": {}, "x-guidance": {"lenient": True}}, "dependentRequired"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf cannot be kept .* write anyOf"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
        ({"type": "string", "format": "phone"}, "Unknown format: phone"),
        ({"type": "text"}, "Invalid type: text"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable"),
        ({"$ref": "https://example.com/a"}, "example.com"),
        (functools.reduce(lambda inner, _: {"items": inner}, range(500), {}), "recursion limit"),
        ({"const": "\ud800"}, "hex escape"),
        ({"description": "a" * (1 << 16)}, "65[0-9]{3} characters of JSON; it may have 65536"),
        (False, "no answer satisfies"),
        ([1], "must be an object"),
        ({"const": float("nan")}, "cannot be written as JSON"),
    ],
)
def test_what_cannot_be_kept_is_named(schema, named):
    with pytest.raises(OptionError, match=named):
        json_schema(schema)
    if isinstance(schema, dict):
        tool = {"name": "look", "parameters": {"type": "object", "properties": {"a": schema}, "required": ["a"]}}
        with pytest.raises(OptionError, match=f"the tool 'look'.*{named.replace('example.com', '')}"):
            tool_calls([tool], names=None, parallel=False, style="xml")


WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
TOOLS = [
    {"type": "function", "function": WEATHER | {"description": "The forecast."}},
    {"name": 'a "b" <c>', "parameters": {"type": "object", "properties": {"x": {"enum": [1, "</tool_call"]}}}},
    {"name": "now"},
]


@settings(max_examples=40)
@given(
    st.sampled_from([None, ["now"], ["get_weather", "now"]]), st.booleans(), st.integers(0, 2**32 - 1), st.booleans()
)
def test_calls_are_calls_of_these_tools(names, parallel, seed, thinks):
    text = written(tool_calls(TOOLS, names=names, parallel=parallel, style="xml"), seed, thinks=thinks)
    found = parse(text)
    assert found.text == "" and not found.problems and (parallel or len(found.tool_calls) == 1) and found.tool_calls
    schemas = {WEATHER["name"]: WEATHER["parameters"], TOOLS[1]["name"]: TOOLS[1]["parameters"], "now": {}}
    for call in found.tool_calls:
        assert call.name in (names or schemas) and satisfies(schemas[call.name], call.arguments)
        assert call.arguments.keys() <= schemas[call.name].get("properties", {}).keys()


CALL_TEXT = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def test_calls_as_the_template_writes_them():
    one, many = (tool_calls(TOOLS, names=None, parallel=parallel, style="xml") for parallel in (False, True))
    two = f"{CALL_TEXT}\n{CALL_TEXT}"
    assert keeps(one, CALL_TEXT) and keeps(many, CALL_TEXT) and keeps(many, two) and not keeps(one, two)
    assert keeps(one, CALL_TEXT.replace("\n", "")) and not keeps(one, f"Well: {CALL_TEXT}") and not keeps(one, "")
    assert not keeps(one, CALL_TEXT.replace("city", "town")) and not keeps(one, CALL_TEXT.replace("get_weather", "get"))
    named = tool_calls(TOOLS, names=["now"], parallel=False, style="xml")
    assert keeps(named, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>') and not keeps(named, CALL_TEXT)


def without_tags(tmp_path: Path) -> Tokenizer:
    """Of a model that has no tokens for calls and thinking."""
    content = json.loads(LETTERS.backend.to_str())
    content["added_tokens"] = content["added_tokens"][:1]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(tmp_path)


def test_tags_that_are_no_tokens_are_written_in_letters(tmp_path):
    tokenizer = without_tags(tmp_path)
    grammar = tool_calls(TOOLS, names=None, parallel=True, style="xml")
    assert keeps(grammar, f"{CALL_TEXT}\n{CALL_TEXT}", tokenizer=tokenizer)
    for seed in range(5):
        found = parse(written(grammar, seed, tokenizer))
        assert found.tool_calls and not found.problems and not found.text


@pytest.mark.parametrize("tags", [True, False])
def test_no_string_ends_its_call(tags, tmp_path):
    """`parse` takes the first </tool_call> for the end, wherever it stands."""
    tokenizer = LETTERS if tags else without_tags(tmp_path)
    one = matcher(tool_calls(TOOLS, names=None, parallel=False, style="xml"), tokenizer=tokenizer)
    begun = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "</tool</tool_call'
    for token in tokenizer.encode(begun):
        assert token in allowed(one)
        one.take(token)
    ids = {tokenizer.decode([token]): token for token in tokenizer.encode('>"s/')}
    may = allowed(one)
    assert ids[">"] not in may and {ids['"'], ids["s"], ids["/"]} <= set(may.tolist())
    one.take(ids["s"])
    assert ids[">"] in allowed(one)


@pytest.mark.parametrize(
    ("tools", "options", "said"),
    [
        (TOOLS, {"names": ["later"]}, "there is no tool 'later'; the tools are get_weather, a"),
        ([], {}, "give tools"),
        ([{"function": {}}], {}, r"tools\[0\] has no name"),
        ([{"name": "\ud800"}], {}, "the tools cannot be kept"),
        (TOOLS, {"style": "python"}, "'python'; only calls in 'xml'"),
        ([{"name": "a", "parameters": {"type": "array"}}], {}, "the type 'array'; arguments are an object"),
        ([{"name": "a", "parameters": "none"}], {}, "'none' for a schema"),
    ],
)
def test_tools_that_there_are_not(tools, options, said):
    with pytest.raises(OptionError, match=said):
        tool_calls(tools, **{"names": None, "parallel": True, "style": "xml"} | options)


ANY = [token for token in range(VOCAB) if token != END]


def test_thinking_is_free_and_the_answer_is_not():
    """C6."""
    grammar = json_schema({"enum": ["ab"]})
    quote = LETTERS.encode('"')
    line_break = LETTERS.encode("\n")
    # The answer begins at once where thinking is over, and may open it where none was in this turn.
    assert allowed(matcher(grammar, "<think>\n\n</think>\n")).tolist() == quote
    assert allowed(matcher(grammar, "Hi")).tolist() == sorted([*quote, OPEN])
    assert allowed(matcher(grammar, "<think>hm</think>")).tolist() == sorted([*quote, *line_break])
    for turn, first in (("<think>\nhm", []), ("Hi", [OPEN])):
        one = matcher(grammar, turn)
        for token in [*first, *LETTERS.encode('{"\n'), OPEN, CALL]:
            if token not in first:
                assert allowed(one).tolist() == ANY  # but no end
            one.take(token)
        one.take(CLOSE)
        assert allowed(one).tolist() == sorted([*quote, *line_break])
        one.take(line_break[0])
        for token in LETTERS.encode('"ab"'):
            assert allowed(one).tolist() == [token]
            one.take(token)
        assert allowed(one).tolist() == [END]


def test_an_answer_that_cannot_go_on_ends(caplog):
    one = matcher(json_object())
    one.take(LETTERS.encode("x")[0])  # what the mask does not have
    assert one.failed and allowed(one).tolist() == [END] and "ends before its grammar does" in caplog.text


def test_a_grammar_needs_a_tokenizer_of_bytes(tmp_path):
    check_grammar(json_object(), LETTERS)
    prepare(None)
    prepare(load_tokenizer(talking_checkpoint(tmp_path / "words")))  # which is no mistake until somebody asks
    with pytest.raises(OptionError, match="give one"):
        check_grammar(json_object(), None)
    with pytest.raises(OptionError, match="no grammar can be kept with this model's tokenizer"):
        check_grammar(json_object(), load_tokenizer(talking_checkpoint(tmp_path / "m")))
    with pytest.raises(OptionError, match="the grammar cannot be kept"):
        check_grammar("start: nothing", LETTERS)


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"$ref": "#"}, "the grammar has no answer: NoExtensionBias"),
        ({"type": "object", "properties": {f"field_{i}": {} for i in range(600)}}, "too large .* Current row has"),
    ],
)
def test_what_no_answer_keeps_to_is_refused(schema, said):
    """S10."""
    with pytest.raises(OptionError, match=said):
        check_grammar(json_schema(schema), LETTERS)


def test_a_long_grammar_is_refused():
    """S10."""
    with pytest.raises(OptionError, match="it may have 65536"):
        check_grammar("start: " + "a" * (1 << 16), LETTERS)


def test_a_thousand_grammars_leave_few_behind():
    """S10."""
    for i in range(1000):
        check_grammar(json_schema({"const": i}), LETTERS)
    kept = module.vocabulary_of(LETTERS).compiled.cache_info()  # pyright: ignore[reportFunctionMemberAccess]
    assert kept.currsize <= module.MAX_KEPT < 1000 <= kept.misses


def test_what_was_checked_is_not_compiled_again(monkeypatch):
    grammar = json_schema({"const": "compiled once"})
    check_grammar(grammar, LETTERS)
    monkeypatch.setattr(module._library(), "LLMatcher", None)
    one, other = matcher(grammar), matcher(grammar)
    for token in LETTERS.encode('"co'):
        one.take(token)  # which is nothing to the other one
    assert allowed(one).tolist() == LETTERS.encode("m") and LETTERS.encode('"')[0] in allowed(other)


def test_a_tokenizer_is_read_once_and_let_go(monkeypatch):
    monkeypatch.setattr(module, "_vocabulary", lambda tokenizer: object())
    tokenizer = dataclasses.replace(LETTERS)
    gone, key = weakref.ref(tokenizer), id(tokenizer)
    assert module.vocabulary_of(tokenizer) is module.vocabulary_of(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None and key not in module._vocabularies


@pytest.mark.slow
@pytest.mark.skipif(not FIXTURES.exists(), reason="../shared has the tokenizer of SmolLM3")
def test_with_the_tokenizer_of_smollm3():
    tokenizer = load_tokenizer(FIXTURES)
    grammar = tool_calls([*TOOLS, {"name": "née"}], names=None, parallel=True, style="xml")
    assert keeps(grammar, '<tool_call>\n{"name": "née", "arguments": {}}\n</tool_call>', tokenizer=tokenizer)
    assert keeps(grammar, f"<think>\nRome, then.\n</think>\n{CALL_TEXT}\n{CALL_TEXT}", tokenizer=tokenizer)
    begun = CALL_TEXT[: CALL_TEXT.index("Rome")]
    assert not keeps(grammar, f"{begun}</tool_call>", tokenizer=tokenizer)
    some, many = (
        json_schema({"type": "object", "properties": {f"field_{i}": {"type": "string"} for i in range(count)}})
        for count in (400, 600)
    )
    check_grammar(some, tokenizer)
    with pytest.raises(OptionError, match="too large"):  # though "{}", a token, would be an answer
        check_grammar(many, tokenizer)
    one = matcher(grammar, "<think>\n\n</think>\n", tokenizer)
    assert allowed(one).tolist() == [128015]
    schema = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 20}}, "required": ["a"]}
    for seed in range(2):
        found = parse(written(grammar, seed, tokenizer))
        assert found.tool_calls and not found.problems and not found.text
        assert satisfies(schema, json.loads(written(json_schema(schema), seed, tokenizer)))
    assert ToolCall("now", {}) in parse('<tool_call>{"name": "now", "arguments": {}}</tool_call>').tool_calls
