"""The persistent compilation cache with every fault a folder can have, and a count of compilations that stands still.

Programs here are tiny, and new functions each time: what a process has compiled once, it does not ask the cache for.
"""

import logging
import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from tiny import letters, tiny_checkpoint

import smollm3_jax as s3
from smollm3_jax import compile_cache
from smollm3_jax.compile_cache import Compilations, compilations, enable
from smollm3_jax.generation.api import complete
from smollm3_jax.generation.engine import Engine
from smollm3_jax.generation.grammar import json_schema
from smollm3_jax.generation.requests import Request

ROOT = Path(__file__).parents[1]
OPTIONS = {
    "jax_enable_compilation_cache": True,
    "jax_compilation_cache_dir": None,
    "jax_compilation_cache_max_size": -1,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the cache will be, in a process in which nobody has configured or used one."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    for name, value in OPTIONS.items():
        jax.config.update(name, value)
    for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SMOLLM3_JAX_CACHE", str(tmp_path / "cache"))
    for name, value in {"_decided": False, "_folder": None, "_said": False}.items():
        monkeypatch.setattr(compile_cache, name, value)
    monkeypatch.setattr(compile_cache, "_simulates_devices", lambda: False)  # the tests have eight
    reset_cache()
    yield tmp_path / "cache" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


def run() -> Compilations:
    """Runs a program that this process has not compiled; what came of it, and that it is right."""

    def program(x):
        return (x @ x).sum(axis=0) + 1

    x = np.arange(16, dtype=np.float32).reshape(4, 4)
    before = compilations()
    result = jax.jit(program)(x)
    np.testing.assert_array_equal(result, (x @ x).sum(axis=0) + 1)
    return Compilations(*(now - then for now, then in zip(compilations(), before, strict=True)))


COMPILED, LOADED = Compilations(1, 0), Compilations(0, 1)


def entries(folder: Path) -> list[Path]:
    return sorted(folder.glob("jit_program-*-cache"))


def warned(caplog) -> str:
    """The one warning of the log."""
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    text = record.getMessage()
    assert record.name == "smollm3_jax.compile_cache" and "\n" not in text
    assert "JAX_ENABLE_COMPILATION_CACHE=false" in text
    return text


def test_the_second_time_is_loaded(folder, caplog):
    enable()
    assert run() == COMPILED and len(entries(folder)) == 1
    assert run() == LOADED and run() == LOADED
    assert not caplog.records or max(record.levelno for record in caplog.records) < logging.WARNING


def test_programs_compiled_before_do_not_matter(folder):
    jax.config.update("jax_enable_compilation_cache", False)
    run()
    jax.config.update("jax_enable_compilation_cache", True)
    run()
    enable()
    assert run() == COMPILED and run() == LOADED


def test_once_is_enough(folder, monkeypatch):
    enable()
    listeners = compilations()
    monkeypatch.setattr(compile_cache, "_open", lambda: pytest.fail("opened twice"))
    filters, show = list(warnings.filters), warnings.showwarning
    for _ in range(3):
        enable()
    assert warnings.filters == filters and warnings.showwarning is show
    assert compilations() == listeners and run() == COMPILED


def test_small_programs_get_no_file(folder):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    enable()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == compile_cache.MIN_COMPILE_SECONDS
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 60.0)
    run()
    assert entries(folder) == []


# Who configures JAX's own cache


@pytest.mark.parametrize("how", ["option", "variable", "off", "processes", "devices"])
def test_the_callers_choice_stays(how, folder, tmp_path, monkeypatch):
    own = tmp_path / "own"
    if how == "option":
        jax.config.update("jax_compilation_cache_dir", str(own))
    elif how == "variable":  # set after jax was imported, which therefore does not know it
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(own))
    elif how == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    elif how == "processes":
        monkeypatch.setattr(jax, "process_count", lambda: 2)
    else:
        monkeypatch.setattr(compile_cache, "_simulates_devices", lambda: True)
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    filters, show = list(warnings.filters), warnings.showwarning
    enable()
    assert {name: getattr(jax.config, name) for name in OPTIONS} == before
    assert warnings.filters == filters and warnings.showwarning is show
    assert run() == COMPILED and run() == (LOADED if how == "option" else COMPILED)
    assert not folder.exists() and len(entries(own)) == (how == "option")


# Folders that cannot be used


def occupied(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("a file")


def below_a_file(folder: Path) -> None:
    folder.parent.write_text("a file")


def everybodys(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def dangling(folder: Path) -> None:
    folder.parent.mkdir()
    folder.symlink_to("/proc/there/is/none")


def its_groups(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o770)


def below_everybodys(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.parent.chmod(0o777)


def linked_to_everybodys(folder: Path) -> None:
    everybodys(folder.parent / "other")
    folder.symlink_to("other")


def anothers(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives folders away")
    folder.mkdir(parents=True, mode=0o700)
    os.chown(folder, 1234, -1)


@pytest.mark.parametrize(
    "fault",
    [*(occupied, below_a_file, everybodys, dangling), *(its_groups, below_everybodys, linked_to_everybodys, anothers)],
)
def test_folder_that_cannot_be_used(fault, folder, caplog):
    fault(folder)
    enable()
    assert str(folder.parent) in warned(caplog) and "SMOLLM3_JAX_CACHE" in warned(caplog)
    assert run() == COMPILED and run() == COMPILED
    enable()
    assert warned(caplog), "said once"
    assert jax.config.jax_compilation_cache_dir is None


def test_user_without_a_home(folder, caplog, monkeypatch):
    monkeypatch.setenv("SMOLLM3_JAX_CACHE", "~nobody-of-that-name")
    enable()
    assert "this user has no home" in warned(caplog)
    assert run() == COMPILED


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which even root cannot write")
def test_read_only_folder(folder, caplog):
    folder.parent.mkdir()
    folder.symlink_to("/proc/self")
    enable()
    assert run() == COMPILED and run() == COMPILED
    text = warned(caplog)
    assert str(folder) in text and "writing jit_program failed" in text


def test_read_only_folder_with_entries(folder, caplog, monkeypatch):
    """It is read; nothing has to be said."""
    enable()
    run()
    folder.chmod(0o500)
    try:
        assert run() == LOADED
    finally:
        folder.chmod(0o700)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_folder_that_vanishes(folder, caplog):
    enable()
    run()
    entries(folder)[0].unlink()
    folder.rmdir()
    assert run() == COMPILED and run() == COMPILED
    assert str(folder) in warned(caplog)


# Entries that cannot be used


def truncated(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:-20])


def empty(entry: Path) -> None:
    entry.write_bytes(b"")


def noise(entry: Path) -> None:
    entry.write_bytes(b"\x00\xff" * 500)


def not_a_program(entry: Path) -> None:
    entry.write_bytes(zlib.compress(b"\x00\x00\x00\x01" + b"not a program" * 50))


def flipped(entry: Path) -> None:
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)


def of_another_program(entry: Path) -> None:
    """As sound as can be, and under the name of this one."""

    def another(x):
        return x * 3

    jax.jit(another)(np.arange(5, dtype=np.float32))
    (other,) = entry.parent.glob("jit_another-*-cache")
    other.rename(entry)


@pytest.mark.parametrize("fault", [truncated, empty, noise, not_a_program, flipped, of_another_program])
def test_broken_entry(fault, folder, caplog):
    """E3: it is compiled anew, replaced, and fine the next time."""
    enable()
    run()
    (entry,) = entries(folder)
    fault(entry)
    other = folder / "jit_other-0123-cache"
    other.write_bytes(b"somebody else's")
    assert run() == COMPILED
    text = warned(caplog)
    assert str(folder) in text and "reading jit_program failed" in text
    assert run() == LOADED
    assert entries(folder) == [entry] and other.exists()


def test_entry_that_cannot_be_replaced(folder, caplog):
    enable()
    run()
    (entry,) = entries(folder)
    entry.unlink()
    entry.mkdir()
    assert run() == COMPILED and run() == COMPILED
    assert "reading jit_program failed" in warned(caplog), "said once"


def test_entries_of_others_are_left_alone(folder, caplog):
    """Of another jax, topology or processor: their names differ."""
    folder.mkdir(parents=True)
    other = folder / f"jit_program-{'0' * 64}-cache"
    other.write_bytes(b"of another jax")
    enable()
    assert run() == COMPILED and run() == LOADED
    assert other.read_bytes() == b"of another jax" and not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_warnings_that_are_errors_by_a_later_filter(folder, caplog):
    enable()
    run()
    truncated(entries(folder)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable()
        assert run() == COMPILED
    assert warned(caplog)


def test_other_warnings_are_shown(folder):
    enable()
    with pytest.raises(UserWarning, match="something else"):
        warnings.warn("something else", stacklevel=1)
    shown = []
    warnings.showwarning = lambda *args, **options: shown.append(str(args[0]))
    enable()
    warnings.filterwarnings("always", "something")
    warnings.warn("something else", stacklevel=1)
    jax.config.update("jax_compilation_cache_dir", "/somewhere/else")
    text = "Error reading persistent compilation cache entry for 'jit_f': gone"
    warnings.warn(text, stacklevel=1)
    assert shown == ["something else", text]


# Size


def test_what_was_used_last_stays(folder, monkeypatch):
    folder.mkdir(parents=True)
    for age, name in enumerate(["new", "old", "older", "oldest"]):
        entry = folder / f"{name}-cache"
        entry.write_bytes(bytes(100))
        os.utime(entry, (1e9 - age, 1e9 - age))
    os.utime(folder / "oldest-cache", (2e9, 1e9 - 9))  # read since
    monkeypatch.setattr(compile_cache, "MAX_BYTES", 250)
    enable()
    assert {entry.name for entry in folder.iterdir()} == {"new-cache", "oldest-cache"}


def test_bound_of_jax_with_entries_that_have_no_time(folder, caplog):
    """Entries written without a bound, or by a process that was killed, have no file for the time of their last use."""
    folder.mkdir(parents=True)
    orphan = folder / "jit_orphan-00-cache"
    orphan.write_bytes(bytes(1000))
    jax.config.update("jax_compilation_cache_max_size", 100_000)
    enable()
    assert run() == COMPILED and run() == LOADED
    (entry,) = entries(folder)
    assert orphan.exists() and entry.with_name(entry.name.replace("-cache", "-atime")).exists()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_bound_of_jax_that_is_too_small(folder, caplog):
    jax.config.update("jax_compilation_cache_max_size", 10)
    enable()
    assert run() == COMPILED and run() == COMPILED
    assert "writing jit_program failed" in warned(caplog) and entries(folder) == []


# Processes


SCRIPT = """
import jax
from smollm3_jax.compile_cache import compilations, enable
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
enable()
print(jax.device_count(), jax.jit(lambda x: (x * 2).sum())(jax.numpy.array([1.0, 2.0])).item(), *compilations())
"""


@pytest.mark.slow
def test_the_second_start(tmp_path):
    """With warnings as errors, and not a word of XLA's about processors; several devices on one CPU keep nothing."""

    def start(devices: int) -> list[float]:
        variables = {
            "SMOLLM3_JAX_CACHE": str(tmp_path / "cache"),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-W", "error", "-c", SCRIPT]
        inherited = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        done = subprocess.run(command, env=inherited | variables, capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        return [float(word) for word in done.stdout.split()]

    devices, result, compiled, loaded = start(1)
    assert (devices, result, loaded) == (1, 6, 0) and compiled > 0
    assert start(1) == [1, 6, 0, compiled]
    assert start(2) == start(2) == [2, 6, compiled, 0]


# Once warm, nothing is compiled


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> s3.SmolLM3:
    return s3.from_pretrained(tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "m", "one_layer"))


PARAMS = [
    {},
    {"temperature": 0.8, "seed": 5},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 2**32 - 1},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.1},
    {"logit_bias": {3: 5.0, 4: -100.0}, "logprobs": 3},
    {"logprobs": 0, "stop_token_ids": [7, 8, 9]},
    {"ignore_eos": True, "prompt_logprobs": True},
    {"n": 3, "temperature": 1.0, "logprobs": 20},
]


@pytest.mark.slow
def test_generate_compiles_nothing_after_the_first_time(model):
    """Prompts of other lengths, parameters of every kind: one short generation compiles what all of them need."""
    enable()
    first = s3.SamplingParams(max_new_tokens=1)
    s3.generate(model, [[5, 9, 11]], first)
    complete(model, [Request([5, 9, 11], first)], lookup=4)
    warm = compilations()
    for length in (1, 2, 3, 10, 17):
        s3.generate(model, [list(range(3, 3 + length))], s3.SamplingParams(max_new_tokens=40))
        complete(model, [Request([3] * length, s3.SamplingParams(max_new_tokens=40))], lookup=4)
    for params in PARAMS[:6]:
        s3.generate(model, [[5, 9, 11, 13]], s3.SamplingParams(max_new_tokens=20, **params))
    assert compilations() == warm


@pytest.mark.slow
@pytest.mark.parametrize("cache_tokens", [None, 128])
def test_slots_compile_nothing_after_the_first_time(cache_tokens, model):
    """Sequences of every kind side by side, as they come and go, and begin alike; and as they begin again."""
    tokenizer = letters()
    grammar = {"grammar": json_schema({"enum": ["abc", 12]}), "ends": (tokenizer.backend.token_to_id("<|im_end|>"),)}
    shape: dict[str, Any] = {"slots": 4, "context": 128, "piece_sizes": (16, 64), "prefix_tokens": 256}
    shape |= {"cache_tokens": cache_tokens}
    engine = Engine(model, tokenizer=tokenizer, **shape)
    before = compilations()
    engine.warm_up()
    warm = compilations()
    assert sum(warm) - sum(before) <= 12
    for shift in (0, 0, 1):
        requests = [
            Request([3] * shift + list(range(3, 4 + 12 * i)), s3.SamplingParams(max_new_tokens=20, **params))
            for i, params in enumerate(PARAMS)
        ]
        for request in [*requests, Request([5, 9], s3.SamplingParams(max_new_tokens=9), **grammar)]:
            engine.submit(request)
        list(engine.drain())
    engine.steps = 4  # so that both begin before one has to grow
    for seed in range(2):
        engine.submit(Request([5] * 40, s3.SamplingParams(max_new_tokens=60, seed=seed, ignore_eos=True)))
    list(engine.drain())
    for _ in range(2):  # alone: in so small a pool others take the pages of what is kept
        engine.submit(Request(list(range(3, 73)), s3.SamplingParams(max_new_tokens=9)))
        list(engine.drain())
    assert engine.prefixes and engine.prefixes.hits and compilations() == warm
    assert (engine.preemptions > 0) == (cache_tokens is not None)
