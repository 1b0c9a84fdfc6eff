"""The judge of calls, with answers of all kinds to questions like BFCL's."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm3_jax.evaluate.tasks.calls import problem

FUNCTION = {
    "name": "trip.book",
    "parameters": {
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "budget": {"type": "float"},
            "window": {"type": "boolean"},
            "stops": {"type": "array", "items": {"type": "string"}},
            "place": {"type": "tuple", "items": {"type": "float"}},
            "guest": {"type": "dict"},
            "rooms": {"type": "array", "items": {"type": "dict"}},
            "note": {"type": "any"},
        },
        "required": ["city", "days"],
    },
}
OTHER = {"name": "trip.cancel", "parameters": {"properties": {"city": {"type": "string"}}, "required": []}}
WANTED = {
    "city": ["New York, NY", "NYC"],
    "days": [3],
    "budget": [100.0, ""],
    "window": [True, ""],
    "stops": [["Rome", "Bern"], ""],
    "place": [[1.5, 2.0], ""],
    "guest": [{"name": ["Ann"], "age": [30, ""]}, ""],
    "rooms": [[{"beds": [2]}, {"beds": [1, 3]}], ""],
    "note": ["late", ""],
}
LEAST = {"city": "NYC", "days": 3}


def of(**arguments: Any) -> str | None:
    return problem([OTHER, FUNCTION], [("trip.book", LEAST | arguments)], [{"trip.book": WANTED}])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"city": "new york NY"},
        {"budget": 100},  # Python makes a float of it
        {"budget": 100.0, "window": True},
        {"stops": ["rome", "BERN"]},
        {"place": [1.5, 2.0]},
        {"guest": {"name": "ann"}},
        {"guest": {"name": "Ann", "age": 30}},
        {"rooms": [{"beds": 2}, {"beds": 3}]},
        {"note": "Late"},
    ],
)
def test_what_is_right(arguments):
    assert of(**arguments) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"city": "Boston"}, "city is 'Boston', none of"),
        ({"city": 5}, "city is 5"),
        ({"days": 4}, "days is 4"),
        ({"days": 3.0}, "days is 3.0"),
        ({"days": "3"}, "days is '3'"),
        ({"days": True}, "days is True"),
        ({"window": 1}, "window is 1"),
        ({"stops": ["Bern", "Rome"]}, "stops is"),
        ({"stops": ["Rome"]}, "stops is"),
        ({"stops": "Rome"}, "stops is"),
        ({"place": [1, 2]}, "place is"),  # inside lists nothing is made a float
        ({"guest": {"age": 30}}, "guest is"),
        ({"guest": {"name": "Ann", "age": 31}}, "guest is"),
        ({"guest": {"name": "Ann", "size": 1}}, "guest is"),
        ({"rooms": [{"beds": 2}]}, "rooms is"),
        ({"rooms": [{"beds": 1}, {"beds": 2}]}, "rooms is"),
        ({"note": 7}, "note is 7"),
        ({"colour": "red"}, "colour is no parameter"),
    ],
)
def test_what_is_wrong(arguments, words):
    assert words in str(of(**arguments))


def test_parameters_that_are_missing_or_new():
    functions, wanted = [FUNCTION], [{"trip.book": {"city": ["NYC"], "days": [3], "budget": [1.0]}}]
    assert problem(functions, [("trip.book", {"city": "NYC"})], wanted) == "days is required"
    assert problem(functions, [("trip.book", LEAST)], wanted) == "budget is asked for"
    assert problem(functions, [("trip.book", LEAST | {"budget": 1.0, "window": True})], wanted) == (
        "window is no parameter that is asked for"
    )
    assert problem(functions, [("trip_book", LEAST)], wanted) == "a call of trip_book, not of trip.book"


def test_a_variable_stands_for_a_value():
    """An answer that is a text where the function has a number: as it is written, and the number is none of it."""
    wanted = [{"trip.book": {"city": ["NYC"], "days": ["stay_length"]}}]
    assert problem([FUNCTION], [("trip.book", {"city": "NYC", "days": "stay_length"})], wanted) is None
    assert problem([FUNCTION], [("trip.book", {"city": "NYC", "days": "Stay_Length"})], wanted)
    assert problem([FUNCTION], [("trip.book", {"city": "NYC", "days": 3})], wanted)


def test_no_calls_where_none_is_wanted():
    assert problem([FUNCTION], [], []) is None
    assert problem([FUNCTION], [("trip.book", LEAST)], []) == "1 calls, not 0"


VALUES = {
    "string": st.text("abcdefg xyz", min_size=1, max_size=8).filter(str.strip),
    "integer": st.integers(-99, 99),
    "float": st.floats(-9, 9, allow_nan=False),
    "boolean": st.booleans(),
}
# One that is of the same type, and not equal.
CHANGED = {
    "string": lambda value: value + "Q",
    "integer": lambda value: value + 1,
    "float": lambda value: value + 1.0,
    "boolean": lambda value: not value,
}


@st.composite
def asked(draw: st.DrawFn) -> tuple[list[dict], list[tuple[str, dict]], list[dict], list[tuple[str, str, str]]]:
    """(functions, right calls, what is wanted, [(function, parameter, type)]) of one to four functions."""
    functions, calls, wanted, places = [], [], [], []
    for number in range(draw(st.integers(1, 4))):
        types = draw(st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=4))
        properties = {f"p{i}": {"type": kind} for i, kind in enumerate(types)}
        values = {f"p{i}": draw(VALUES[kind]) for i, kind in enumerate(types)}
        optional = draw(st.sets(st.sampled_from(sorted(values))))
        name = f"f{number}"
        functions.append(
            {"name": name, "parameters": {"properties": properties, "required": sorted(values.keys() - optional)}}
        )
        wanted.append({name: {p: [value, *([""] if p in optional else [])] for p, value in values.items()}})
        given = {p: value for p, value in values.items() if p not in optional or draw(st.booleans())}
        calls.append((name, given))
        places += [(name, p, properties[p]["type"]) for p in given]
    return functions, calls, wanted, places


@settings(max_examples=50, deadline=None, derandomize=True)
@given(asked(), st.randoms(use_true_random=False))
def test_right_calls_in_any_order_are_right_and_changed_ones_wrong(case, chance: random.Random):
    functions, calls, wanted, places = case
    chance.shuffle(calls)
    assert problem(functions, calls, wanted) is None
    assert problem(functions, calls[1:], wanted) and problem(functions, [*calls, calls[0]], wanted)
    name, parameter, kind = chance.choice(places) if places else ("", "", "")
    for i, (own, arguments) in enumerate(calls):
        if own == name:
            changed = arguments | {parameter: CHANGED[kind](arguments[parameter])}
            assert problem(functions, [*calls[:i], (own, changed), *calls[i + 1 :]], wanted)
            assert problem(functions, [*calls[:i], (own, arguments | {"new": 1}), *calls[i + 1 :]], wanted)
            assert problem(functions, [*calls[:i], (f"{own}_", arguments), *calls[i + 1 :]], wanted)
