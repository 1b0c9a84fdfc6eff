import json
from typing import Any

import numpy as np
import pytest
from etils import epath

from smollm3_jax.errors import TrainingError
from smollm3_jax.train.reference import Sums, keys_of
from smollm3_jax.train.state import Batch

ABOUT = {"tokenizer": "t", "template": "c", "length": 16, "dtype": "float32"}
MODEL = {"model.embed": "00", "model.norm": "11"}


def begun(folder, **about):
    sums = Sums(epath.Path(folder), ABOUT | about)
    sums.belong_to(MODEL)
    return sums


def drawn(count, seed=0):
    draw = np.random.RandomState(seed)
    return draw.randint(1, 2**60, count).astype(np.int64), draw.normal(size=count).astype(np.float32) * 1e4


def filled(folder):
    sums = begun(folder)
    for seed in range(3):
        sums.add(*drawn(5, seed))
    return sums


def test_what_was_computed_is_found_again_bit_for_bit(tmp_path):
    """trl #3985: saved."""
    sums = filled(tmp_path / "reference")
    again = Sums(epath.Path(tmp_path / "reference"), ABOUT)
    again.belong_to(MODEL)
    assert len(again.known) == 15 and again.digest() == sums.digest()
    for seed in range(3):
        for key, value in zip(*drawn(5, seed), strict=True):
            assert again.known[int(key)] == value
    again.add(*drawn(5, 3))
    assert [path.name for path in sorted((tmp_path / "reference").glob("*.sums"))] == [
        f"{i:08d}.sums" for i in range(4)
    ]


@pytest.mark.parametrize(
    "differs", [{"tokenizer": "u"}, {"template": "d"}, {"length": 32}, {"dtype": "bfloat16"}, {"model": None}]
)
def test_sums_of_another_reference_are_refused(tmp_path, differs):
    """Of another model, tokenizer, template, length or dtype: what differs is named."""
    filled(tmp_path)
    with pytest.raises(TrainingError, match=next(iter(differs))):
        if "model" in differs:
            begun(tmp_path)  # is that of before
            Sums(epath.Path(tmp_path), ABOUT).belong_to(MODEL | {"model.norm": "12"})
        begun(tmp_path, **differs)


@pytest.mark.parametrize("how", ["flip", "cut", "swap"])
def test_a_damaged_piece_is_computed_again(tmp_path, how, caplog):
    filled(tmp_path).done("data")
    pieces = sorted(tmp_path.glob("*.sums"))
    content = bytearray(pieces[1].read_bytes())
    content[-3] ^= 4
    damaged = {"flip": bytes(content), "cut": pieces[1].read_bytes()[:-12], "swap": b"0" * 32 + b"1" * 60}[how]
    pieces[1].write_bytes(damaged)
    again = begun(tmp_path)
    assert "is damaged" in caplog.text and not pieces[1].exists()
    assert set(again.known) == {int(key) for seed in (0, 2) for key in drawn(5, seed)[0]}
    assert not again.is_done("data")  # what is missing is to be found
    again.add(*drawn(5, 1))
    assert again.is_done("data") and len(list(tmp_path.glob("*.sums"))) == 3


def test_a_pass_is_done_for_its_data_alone(tmp_path):
    sums = filled(tmp_path)
    assert not sums.is_done({"rows": 3})
    sums.done({"rows": 3, "files": (("a", "b"),)})
    assert begun(tmp_path).is_done({"rows": 3, "files": [["a", "b"]]})
    assert not begun(tmp_path).is_done({"rows": 4, "files": [["a", "b"]]})


def test_half_written_json_is_an_error_that_says_so(tmp_path):
    filled(tmp_path)
    (tmp_path / "about.json").write_text(json.dumps(ABOUT)[:20])
    with pytest.raises(TrainingError, match=r"about\.json cannot be read"):
        begun(tmp_path)


def test_sums_come_to_their_completions_whatever_the_order(tmp_path):
    """trl #2423, #7083: by what a completion is, not by where it stands."""
    sums = begun(tmp_path)
    sums.add(np.array([7, 8, 9]), np.array([-1.5, -2.5, -3.5], np.float32))
    segments: Any = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 2, 2]], np.int32)
    keys: Any = np.array([[9, 9, 7, 7, 7, 0], [8, 8, 8, 9, 9, 9]])
    batch = Batch(segments + 10, segments, segments.astype(np.float32), keys)
    got = sums.filled(batch)
    assert got.tokens is batch.tokens and got.reference.dtype == np.float32
    assert got.reference.tolist() == [[-3.5, -3.5, -1.5, -1.5, -1.5, 0], [-2.5] * 3 + [-3.5] * 3]
    found, at = keys_of(batch)
    assert found.tolist() == [9, 7, 8, 9] and at.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    with pytest.raises(TrainingError, match="lack a completion"):
        sums.filled(Batch(batch.tokens, segments, batch.weights, keys + 1))
