"""The run that is launched, and how long it may take to stop."""

import pytest
from hypothesis import given, settings
from odd_words import SETTINGS

from smollm3_jax.errors import OptionError
from smollm3_jax.launch.job import RESTART, grace, job_name, train_job
from smollm3_jax.train.run.loop import STOPPED

REMOTE = "run.dir=gs://bucket/run"


def test_the_code_is_the_runs_own():
    assert RESTART == STOPPED


@settings(max_examples=50, deadline=None)
@given(SETTINGS)
def test_the_words_stand_in_the_command_as_they_are(word):
    job = train_job("quick", [REMOTE, word])
    assert job.command() == ["smollm3", "train", "--config", "quick", REMOTE, word, "--resume", "auto"]


def test_a_file_goes_along(tmp_path):
    file = tmp_path / "my run.toml"
    file.write_text('[run]\ndir = "gs://b/r"\nsteps = 3\n[model]\npath = "demo"\n[data]\npath = "gs://b/c"\n')
    job = train_job(str(file), [])
    assert job.file == file.read_text() and job.name == "smollm3-my-run"
    assert job.command("/etc/x.toml")[3] == "/etc/x.toml" and job.command()[3] == str(file)
    assert train_job("quick", [REMOTE]).command("/etc/x.toml")[3] == "quick"


def test_slices_lie_along_data():
    assert train_job("quick", [REMOTE], slices=2).words[-1] == "mesh.axes=data=2,fsdp=-1"
    assert train_job("quick", [REMOTE, "mesh.axes=data=4,fsdp=-1"], slices=2).words[-1] == "mesh.axes=data=4,fsdp=-1"
    assert train_job("quick", [REMOTE, "mesh.rules=dp"], slices=2).words[-1] == "mesh.axes=data=-1"


@pytest.mark.parametrize(
    ("config", "words", "said"),
    [
        ("quik", [], "did you mean quick"),
        ("quick", ["run.step=1"], "did you mean run.steps"),
        ("quick", ["run.steps"], "write section.key=value"),
        ("quick", ["run.dir=runs/x"], "run.dir is 'runs/x', and the machines have no volume that stays"),
        ("quick", ["run.dir=/mnt/x"], "run.dir is '/mnt/x', .*each restart would begin anew. Give run.dir=gs://BUCKET"),
        ("quick", ["run.dir=s3://bucket/x"], "run.dir is 's3://bucket/x', .*s3:// is not written to by training"),
    ],
)
def test_mistakes_are_named(config, words, said):
    with pytest.raises(OptionError, match=said):
        train_job(config, words)


def test_hosts_that_see_these_files_take_any_folder():
    assert train_job("quick", ["run.dir=runs/x"], shared=True).settings.run.dir == "runs/x"
    assert train_job("quick", ["run.dir=/mnt/x"], shared=True).settings.run.dir == "/mnt/x"


@pytest.mark.parametrize(
    ("what", "name"),
    [("quick", "smollm3-quick"), ("smollm3-sft", "smollm3-sft"), ("HuggingFaceTB/SmolLM3-3B", "smollm3-3b")],
)
def test_a_name_is_made(what, name):
    assert job_name(None, what) == name
    assert job_name(name, what) == name  # and may be given


@pytest.mark.parametrize("name", ["", "A", "a_b", "-a", "a-", "a" * 41, "a\n", "a b", "é"])
def test_names_that_no_cluster_takes(name):
    with pytest.raises(OptionError, match="--name is "):
        job_name(name, "quick")


def test_grace_is_two_steps_and_a_save():
    assert grace(0, 1, 1.0) == 60  # 2 + 30, in half minutes
    assert grace(0, 1, None) == 150
    assert grace(37 * 10**9, 1, 0.6) == 420 and grace(37 * 10**9, 4, 0.6) == 150
