"""What checkpoints are checked by; what is done to them from outside is in test_faults.py."""

import json
import shutil
import sys
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st

from smollm3_jax.errors import OptionError, TrainingError
from smollm3_jax.train.run import checkpoint
from smollm3_jax.train.run.checkpoint import (
    Checkpoints,
    Damaged,
    broken_off,
    digest,
    left_overs,
    read_about,
    restore,
    steps,
)


def digest_of(array):
    words, finite = digest({"x": jnp.asarray(array)})
    return words["x"], finite["x"]


@given(st.integers(0, 2**32 - 1), st.integers(0, 59), st.integers(0, 31))
@settings(max_examples=60, deadline=None)
def test_each_bit_counts(seed, place, bit):
    """C1."""
    x = np.random.RandomState(seed).randint(0, 2**31, (3, 4, 5)).astype(np.uint32)
    y = x.copy()
    y.reshape(-1)[place] ^= np.uint32(1 << bit)
    assert digest_of(x)[0] != digest_of(y)[0]


@given(st.integers(0, 2**32 - 1), st.integers(0, 58))
@settings(max_examples=30, deadline=None)
def test_so_does_the_order(seed, place):
    """C1."""
    x = np.random.RandomState(seed).permutation(60).astype(np.float32)
    y = x.copy()
    y[place : place + 2] = y[place : place + 2][::-1]
    assert digest_of(x)[0] != digest_of(y)[0]


def test_what_is_not_finite_is_seen():
    assert digest_of(np.ones(3, np.float32))[1]
    assert not digest_of(np.array([1, np.nan], np.float32))[1] and not digest_of(np.array([np.inf], np.float32))[1]


def saved(folder, step=3, **arrays):
    """The folder of checkpoints in which this is one."""
    checkpoints = Checkpoints(epath.Path(folder))
    checkpoints.save(step, {name: jnp.asarray(array) for name, array in arrays.items()}, {"data": {}})
    checkpoints.close()
    return epath.Path(folder)


def test_errors_that_nobody_can_catch_are_told_of_but_for_one_kind(tmp_path, monkeypatch):
    """Only while a run is under way: what is set up, and may fail before that, changes nothing of Python's."""
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    before = sys.unraisablehook
    Checkpoints(epath.Path(tmp_path))
    assert sys.unraisablehook is before
    kinds: list[Any] = [SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "another")]
    with pytest.raises(KeyError), checkpoint.without_late_writes():
        for kind in kinds:
            sys.unraisablehook(kind)
        raise KeyError
    assert told == kinds[1:] and sys.unraisablehook is before


def test_another_dtype_or_shape_is_refused(tmp_path):
    """C9: never a silent cast."""
    folder = saved(tmp_path / "c", w=np.arange(6, dtype=np.float32))
    for like in (jnp.zeros(6, jnp.bfloat16), jnp.zeros((2, 3), jnp.float32), jnp.zeros(6, jnp.int32)):
        with pytest.raises(TrainingError, match=rf"w: \('float32', \(6,\)\) saved, .*{like.dtype.name}"):
            restore(folder, 3, {"w": like})
    with pytest.raises(TrainingError, match="v: nothing saved"):
        restore(folder, 3, {"w": jnp.zeros(6), "v": jnp.zeros(6)})
    np.testing.assert_array_equal(restore(folder, 3, {"w": jnp.zeros(6)})["w"], np.arange(6))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_neither_saved_nor_restored(tmp_path, monkeypatch, value):
    """T7."""
    array = np.array([1, value], np.float32)
    with pytest.raises(TrainingError, match="step 3 is not saved: not all is finite in w"):
        saved(tmp_path / "a", w=array)
    with monkeypatch.context() as lenient:
        lenient.setattr(checkpoint, "digest", lambda arrays: (digest(arrays)[0], dict.fromkeys(arrays, True)))
        folder = saved(tmp_path / "b", w=array)
    with pytest.raises(TrainingError, match="checkpoint 3: not all is finite in w"):
        restore(folder, 3, {"w": jnp.zeros(2)})


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"3", b"null", b"{}", b"[" * 100_000, b'{"seal": []}', b"\xff", b'{"a":' * 100_000]
)
def test_damage_to_what_a_checkpoint_says_of_itself(tmp_path, content):
    """C2: whatever stands there, it is Damaged, so that the one before is taken."""
    folder = saved(tmp_path / "c", w=np.zeros(3, np.float32))
    (folder / "00000003" / "about" / "metadata").write_bytes(content)
    with pytest.raises(Damaged, match="about/metadata"):
        read_about(folder, 3)


def test_a_sealed_list_or_another_step_is_damage(tmp_path):
    """C2, C3: names are not taken for truth."""
    folder = saved(tmp_path / "c", w=np.zeros(3, np.float32))
    shutil.copytree(folder / "00000003", folder / "00000007")
    for name in ("9", "\u00b2", "000000003", "-0000003"):
        shutil.copytree(folder / "00000003", folder / name)
    assert steps(folder) == [3, 7]
    with pytest.raises(Damaged, match="is of step 3, not of the one that its folder's name says"):
        read_about(folder, 7)
    about = json.loads((folder / "00000003" / "about" / "metadata").read_text())
    assert read_about(folder, 3)["step"] == about["step"] == 3


def test_what_is_left_over_is_not_sought_through_a_link(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "diary.txt").write_text("mine")
    (tmp_path / "checkpoints").symlink_to("victim")
    with pytest.raises(OptionError, match="is a link, to victim, where nothing is removed"):
        left_overs(epath.Path(tmp_path / "checkpoints"))
    assert [path.name for path in left_overs(epath.Path(tmp_path / "victim"))] == ["diary.txt"]
    assert left_overs(epath.Path(tmp_path / "none")) == []
    assert broken_off(epath.Path(tmp_path / "checkpoints")) == broken_off(epath.Path(tmp_path / "none")) == []


def test_what_a_kill_left_is_told_from_what_is_whole_or_newer(tmp_path):
    """C3: A save or a removal that was ended in its midst; what is newer may be of somebody who copies it here."""
    folder = saved(tmp_path, step=6, x=np.ones(2, np.float32))
    for name in ("00000004/about", "00000008/about", "00000009.orbax-checkpoint-tmp/state", "00000003", "diary"):
        (tmp_path / name).mkdir(parents=True)
    assert [path.name for path in broken_off(folder)] == ["00000003", "00000004", "00000009.orbax-checkpoint-tmp"]
