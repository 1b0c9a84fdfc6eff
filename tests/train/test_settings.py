import json
import math
import re

import pytest

from smollm3_jax.commands.main import main
from smollm3_jax.errors import OptionError
from smollm3_jax.train.data.conversations import read_template
from smollm3_jax.train.settings import Settings, as_table, listed, stage_at
from smollm3_jax.train.settings_file import parse, read_settings, recipes

MINIMAL = """
[run]
dir = "out"
steps = 10
[model]
path = "demo"
[data]
path = "texts.jsonl"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return str(path)


def test_words_go_over_the_file(file):
    words = ["run.steps=20", "optimizer.learning_rate=1e-3", "data.path=other", 'model.dtype="float32"']
    settings = read_settings(file, words)
    assert (settings.run.steps, settings.optimizer.learning_rate, settings.data.path) == (20, 1e-3, "other")
    assert settings.model.dtype == "float32" and settings.run.dir == "out"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run.stepz=3"], "unknown key run.stepz; did you mean run.steps?"),
        (["runs.steps=3"], "unknown section runs; did you mean run"),
        (["run.steps=many"], "run.steps = 'many' must be of type int"),
        (["run.steps=1.5"], "must be of type int"),
        (["data.shuffle=1"], "must be of type bool"),
        (["run.steps"], "'run.steps' is no setting; write section.key=value"),
        (["steps=3"], "the setting steps=3: unknown section steps; did you mean run.steps?"),
        (["train.steps=3"], "the setting train.steps=3: unknown section train; did you mean run.steps?"),
        (["model.rows=3"], "unknown key model.rows; did you mean data.rows?"),
        (["optimizer.lr=3"], "unknown key optimizer.lr; choose one of "),
        (["run.x=" + "[" * 5000], "unknown key run.x"),
        (["run.dir.x=3"], "dir is no section"),
        (["run.steps=0"], "run.steps is 0; give the number of updates, run.steps=N"),
        (["model.dtype=float8"], "model.dtype is 'float8'; choose one of float32, "),
        (["checkpoint.keep=1"], "checkpoint.keep is 1; it must be at least 2, as the newest"),
        (["data.sources.a.path=x"], "either data.path or"),
        (["data.sources=3"], "data.sources = 3 must be"),
        (["step.remat=some"], "step.remat is 'some'; choose one of none, dots"),
        (["data.eval_every_nth=1"], "data.eval_every_nth is 1; it must be 0, or at least 2"),
        (["data.eval_every_nth=5", "data.eval_path=x"], "either data.eval_path or data.eval_every_nth"),
        (["data.rows=6", "step.micro_batches=4"], "6 rows do not split into 4 equal parts"),
        (["data.path=", "data.sources.a={path = 'x', weight = 0}"], "none has a weight at step 0"),
        (["data.format=csv"], "data.format is 'csv'; choose one of jsonl, "),
        (
            ["data.path=", "data.sources.a={path = 'x', format = 'zip'}"],
            "data.sources.a.format is 'zip'; choose one of",
        ),
        (["log.every=0"], "log.every is 0; it must be at least 1"),
        (["log.profile=some"], "log.profile is 'some'; give steps, as in 10-12"),
        (["guard.window=1"], "at least 2"),
        (["stages=[{start = 5}, {start = 5}]"], "stages start at [5, 5]; their starts must increase"),
        (["stages=[{start = 10}]"], "must lie between 0 and run.steps=10"),
        (
            ["stages=[{start = 5, weights = {a = 1}}]"],
            "stages.weights names 'a', and data.sources has no source of that name",
        ),
    ],
)
def test_mistakes_are_named(file, words, said):
    with pytest.raises(OptionError, match=re.escape(said)):
        read_settings(file, words)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        (f"run.steps={'9' * 5000}", "must be of type int"),
        (f"data.length={2**70}", "data.length is 1180591620717411303424; it must be a whole number from 0 to"),
        ("run.seed=-1", "run.seed is -1; it must be a whole number from 0 to 4,294,967,295"),
        ("data.epochs=-1", "data.epochs is -1"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate is nan; it must be a finite number"),
        ("optimizer.clip_norm=-0.5", "optimizer.clip_norm is -0.5"),
        ("guard.spike=inf", "guard.spike is inf"),
        ("model.rope_theta=-1", "model.rope_theta is -1.0"),
        ('run.dir="a\\u0000b"', r"run.dir is 'a\\x00b'; a NUL"),
        ("run.name=\ud800", "run.name is .* half a surrogate pair"),
    ],
)
def test_values_that_no_setting_has(file, word, said):
    with pytest.raises(OptionError, match=said):
        read_settings(str(file), [word])
    assert read_settings(str(file), [f"run.seed={2**32 - 1}"])


def test_files_that_are_none(tmp_path):
    with pytest.raises(OptionError, match="neither a file nor a recipe"):
        read_settings(str(tmp_path / "gone.toml"))
    (tmp_path / "bad.toml").write_text("run = [")
    with pytest.raises(OptionError, match="not TOML"):
        read_settings(str(tmp_path / "bad.toml"))
    with pytest.raises(OptionError, match="did you mean quick"):
        read_settings("quik")
    with pytest.raises(OptionError, match="cannot be read: Is a directory"):
        read_settings(str(tmp_path))
    with pytest.raises(OptionError, match="cannot be read: it is larger than"):
        read_settings("/dev/zero")


def test_the_file_is_blamed_for_what_is_in_it(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL.replace("[run]", "[run]\nstepz = 3"))
    with pytest.raises(OptionError, match=r"run\.toml: unknown key run\.stepz"):
        read_settings(str(path), ["run.steps=3"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_with_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "run.toml").write_bytes(MINIMAL.encode(encoding))
    assert read_settings(str(tmp_path / "run.toml")).run.steps == 10


def test_settings_survive_json(file):
    settings = read_settings(file, ["stages=[{start = 5, length = 64}]"])
    assert parse(json.loads(json.dumps(as_table(settings)))) == settings


def test_stages_add_up():
    stages = [
        {"start": 5, "length": 64, "rope_theta": 1e6},
        {"start": 8, "weights": {"b": 3.0}, "reset_optimizer": True},
    ]
    sources = {"a": {"path": "a", "weight": 1.0}, "b": {"path": "b", "weight": 3.0}}
    settings = parse({"data": {"sources": sources, "length": 32, "rows": 2}, "stages": stages})
    first, second, third = (stage_at(settings, step) for step in (4, 5, 100))
    assert first[0] == 0 and first[1].weights == {"a": 0.25, "b": 0.75} and first[1].length == 32
    assert second[0] == 1 and (second[1].length, second[1].rope_theta, second[1].rows) == (64, 1e6, 2)
    assert third[0] == 2 and third[1].weights == {"b": 1.0} and third[1].length == 64 and third[1].reset_optimizer
    assert not second[1].reset_optimizer


@pytest.mark.parametrize("name", recipes())
def test_recipes_are_sound(name, tmp_path):
    text = recipes()[name].read_text()
    words = [f"run.dir={tmp_path}"]
    words += [] if "[data.sources]" in text else ["data.path=texts"]
    words += [] if "\npath = " in text or "\nconfig = " in text else ["model.path=exported"]
    settings = read_settings(name, words)
    assert settings.run.name == name
    if name.startswith(("smollm3-stage", "smollm3-long")):
        assert settings.data.rows * settings.data.length == 2_359_296
        assert sum(source.weight for source in settings.data.sources.values()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("name", "splits", "length"), [("smollm3-sft", 25, 65_536), ("smollm3-mid", 2, 32_768)])
def test_recipes_of_conversations_are_those_that_were_released(name, splits, length, tmp_path):
    words = [] if name == "smollm3-mid" else ["model.path=mid"]
    s = read_settings(name, [f"run.dir={tmp_path}", *words])
    assert (s.objective.kind, s.data.concatenate, s.data.epochs, s.data.rows, s.data.length) == (
        "sft",
        True,
        5,
        128,
        length,
    )
    assert s.objective.train_on == ("assistant" if name == "smollm3-sft" else "all")
    assert len(s.data.sources) == splits and "endgeneration" in read_template(s.data.template)
    o = s.optimizer
    assert (o.learning_rate, o.schedule, o.end, o.b1, o.b2, o.weight_decay, o.clip_norm) == (
        2e-5,
        "cosine",
        0.1,
        0.9,
        0.999,
        0,
        0.2,
    )
    assert o.warmup_steps == math.ceil(0.03 * s.run.steps)


def test_every_setting_says_what_it_means():
    """Each name of the table is one that the file takes, with the default that it states."""
    table = listed()
    names = [setting["name"] for setting in table]
    assert len(names) == len(set(names)) and {"run.steps", "data.sources.NAME.path", "stages[].start"} <= {*names}
    for setting in table:
        assert setting["meaning"] and not setting["meaning"].endswith("."), setting
        section, key = setting["name"].rsplit(".", 1)
        if setting["type"] == "table":
            continue
        given: dict = {key: setting["default"]}
        for part in reversed(section.split(".")):
            given = {part.removesuffix("[]"): [given] if part.endswith("[]") else given}
        parse(given)
    sections = {name: section for name, section in as_table(Settings()).items() if name != "stages"}
    assert {f"{name}.{key}" for name, section in sections.items() for key in section} <= {*names}


def test_the_command_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--list"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(setting["name"] in out for setting in listed())
