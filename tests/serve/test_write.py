"""What is written for clients."""

import json

import pytest

from smollm3_jax.serve.write import as_json, framed, in_pieces


def test_json_in_pieces_is_json():
    small = {"a": [1, None, True, {}], "b": "\u00e9", "half": "\ud83d", "empty": [], "f": -1.5, "in": {"c": {"d": []}}}
    for content in (small, [small], {"all": [small] * 600, "ids": list(range(512))}, [[]] * 257, "text", 3, None):
        assert json.loads(in_pieces(content)) == content == json.loads(as_json(content))
    assert in_pieces(["\u00e9", {"a": 1, "b": [2, 3]}]) == as_json(["\u00e9", {"a": 1, "b": [2, 3]}])
    with pytest.raises(ValueError):
        in_pieces({"a": [float("nan")]})


def test_events():
    assert framed([("made", {"a": [1]}), (None, {"b": "\u00e9"}), (None, "[DONE]")]) == (
        'event: made\ndata: {"a":[1]}\n\ndata: {"b":"\u00e9"}\n\ndata: [DONE]\n\n'.encode()
    )
