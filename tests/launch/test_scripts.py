"""Scripts that bash reads, and what they do before clusters that a test stands in for."""

import dataclasses
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from odd_words import SETTINGS

from smollm3_jax.errors import OptionError
from smollm3_jax.launch.job import train_job
from smollm3_jax.launch.machines import machine
from smollm3_jax.launch.scripts import skypilot, slurm, tpu_vm
from smollm3_jax.launch.text import manifest

DATA = Path(__file__).parents[1] / "data" / "skypilot"
HARD = "run.name='\"$(id)`id` $HOME \\\n#SBATCH --nodes=9\n{{ x }}"
# What a script would call, in its place: it notes how many words it got, and the words; what it does is in $DO_NAME.
FAKE = """#!/bin/bash
printf '%s\\0' "$(($# + 1))" {name} "$@" >> calls
eval "${{DO_{name}-}}"
"""


@pytest.fixture
def stage(tmp_path):
    """Runs a script before programs that are not there; returns its exit code and what was called."""
    for name in ("srun", "scontrol", "gcloud", "smollm3", "curl", "pip"):
        (tmp_path / name).write_text(FAKE.format(name=name))
        (tmp_path / name).chmod(0o755)

    def run(script, **does):
        (tmp_path / "calls").write_text("")
        env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **does}
        done = subprocess.run(["bash"], input=script, cwd=tmp_path, env=env, text=True, capture_output=True)
        words, calls = (tmp_path / "calls").read_text().split("\0")[:-1], []
        while words:
            count = int(words[0])
            calls.append(words[1 : count + 1])
            words = words[count + 1 :]
        return done.returncode, calls

    return run


def check(script):
    """bash -n, and shellcheck where it is."""
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)
    if shutil.which("shellcheck"):
        done = subprocess.run(
            ["shellcheck", "-s", "bash", "-S", "warning", "-"], input=script, text=True, capture_output=True
        )
        assert done.returncode == 0, done.stdout


def of_files(tmp_path, *words):
    file = tmp_path / "it's mine.toml"
    file.write_text(
        "# it's\n" + '[run]\ndir = "gs://b/r"\nsteps = 3\n[model]\npath = "demo"\n[data]\npath = "gs://b/c"\n'
    )
    return train_job(str(file), words)


@pytest.mark.parametrize("topology", ["h100:1", "h100:16"])
def test_a_slurm_job_asks_for_its_hosts(job, topology):
    where = machine(topology)
    script = slurm(dataclasses.replace(job, grace=90), where, "source '.venv/bin/activate'")
    check(script)
    asked = [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert f"--nodes={where.hosts}" in asked and f"--gpus-per-node={where.chips_of_a_host}" in asked
    assert "--signal=TERM@90" in asked and "--requeue" in asked


@pytest.mark.parametrize(("code", "again"), [(0, False), (75, True), (3, False)])
def test_a_slurm_job_goes_back_to_the_queue_after_75(stage, job, code, again):
    ended, calls = stage(slurm(job, machine("h100:16")), DO_srun=f"exit {code}")
    assert ended == code
    assert calls[-1] == ["scontrol", "requeue", "7"] if again else len(calls) == 1


def test_a_slurm_job_that_is_ended_stays_ended(stage, job):
    """Whoever ends the job as a whole sends its shell SIGTERM, too: it waits for its processes, no more."""
    ended, calls = stage(slurm(job, machine("h100:16")), DO_srun="kill -TERM $PPID; sleep 0.2; exit 75")
    assert ended == 75 and len(calls) == 1


def test_a_slurm_job_without_its_environment_ends(stage, job):
    script = slurm(job, machine("h100:16"), "source /nowhere")
    ended = subprocess.run(["bash"], input=script, text=True, capture_output=True)
    assert ended.returncode == 1 and "/nowhere" in ended.stderr


@settings(max_examples=10, deadline=None)
@given(SETTINGS)
def test_scripts_can_be_read_whatever_is_set(word):
    job = train_job("quick", ["run.dir=gs://b/r", word])
    for script in (slurm(job, machine("h100:16")), tpu_vm(job, machine("v5e:4x4"), "zone")):
        subprocess.run(["bash", "-n"], input=script.encode(), check=True)


def test_settings_come_through_slurm_as_they_are(stage):
    words = ["run.dir=runs/x", HARD]
    _, calls = stage(slurm(train_job("quick", words, shared=True), machine("h100:16")))
    assert calls[0][2:] == ["smollm3", "train", "--config", "quick", *words, "--resume", "auto"]


@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:4x4", "v5p:2x2x2", "v6e:2x4", "h100:4", "h200:16"])
def test_a_task_of_skypilot_is_what_its_schema_says(job, topology, spot):
    jsonschema = pytest.importorskip("jsonschema")
    schemas = json.loads((DATA / "schemas.json").read_text())
    task = yaml.safe_load(manifest([skypilot(job, machine(topology), spot=spot)]))
    jsonschema.validate(task, schemas["task"])
    jsonschema.validate(task["resources"], schemas["resources"])
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    check("#!/bin/bash\n" + task["run"])
    wrong = {**task["resources"], "job_recovery": {"recover_on_exit_codes": [750]}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schemas["resources"])


def test_hosts_of_skypilot_find_each_other(stage):
    words = ["run.dir=gs://b/r", HARD]
    task = skypilot(train_job("quick", words), machine("h100:16"))
    where = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1"}
    code, calls = stage(task["run"], **where, DO_smollm3="exit 75")
    assert code == 75
    job = ["--coordinator", "10.0.0.1:8476", "--processes", "2", "--process", "1"]
    assert calls == [["smollm3", "train", "--config", "quick", *words, "--resume", "auto", *job]]


@pytest.mark.parametrize("workers", ["a:1:10.0.0.1,b:2:10.0.0.2,c:3:10.0.0.3", "10.0.0.1,10.0.0.2,10.0.0.3"])
def test_hosts_of_a_tpu_find_each_other(stage, workers):
    """By what the metadata server says, of either kind."""
    task = skypilot(train_job("quick", ["run.dir=gs://b/r"]), machine("v5e:4x4"))
    answer = f'case "$*" in *agent-worker-number) echo -n 2 ;; *) echo -n {workers} ;; esac'
    code, calls = stage(task["run"], DO_curl=answer)
    assert code == 0
    assert calls[-1][-6:] == ["--coordinator", "10.0.0.1:8476", "--processes", "3", "--process", "2"]


def test_a_host_that_finds_nobody_does_not_train_alone(stage):
    task = skypilot(train_job("quick", ["run.dir=gs://b/r"]), machine("v5e:4x4"))
    code, calls = stage(task["run"], DO_curl="exit 6")
    assert code == 6 and all(call[0] == "curl" for call in calls)


def test_a_file_of_settings_comes_along(stage, tmp_path):
    job = of_files(tmp_path)
    _, calls = stage(skypilot(job, machine("v5e:1x1"))["run"])
    assert Path(calls[-1][calls[-1].index("--config") + 1]).read_text() == job.file


# Plays a queued resource: its states are lines of states.txt, the last of which stays; ssh runs what it is told.
GCLOUD = """
case "$3 $4" in
  "queued-resources describe")
    if [ -s states.txt ]; then head -n 1 states.txt; [ "$(wc -l < states.txt)" -gt 1 ] && sed -i 1d states.txt; exit 0
    else exit 1; fi ;;
  "queued-resources create") printf '%s\\n' $THEN > states.txt ;;
  "queued-resources delete") : > states.txt ;;
  "tpu-vm ssh") last="${@: -1}"; exec bash -c "${last#--command=}" ;;
esac
"""


def test_tpu_machines_are_asked_for_and_given_back(stage):
    words = ["run.dir=gs://b/r", HARD]
    script = tpu_vm(train_job("quick", words), machine("v5e:1x1"), "us-west4-a", spot=True)
    check(script)
    code, calls = stage(script, DO_gcloud=GCLOUD, THEN="PROVISIONING ACTIVE", SMOLLM3_POLL="0")
    assert code == 0
    called = [" ".join(call[:5]) if call[0] == "gcloud" else call[0] for call in calls]
    resources = "gcloud compute tpus queued-resources"
    assert called[:2] == [f"{resources} describe", f"{resources} create"] and called[-1] == f"{resources} delete"
    assert {"--accelerator-type=v5litepod-1", "--zone=us-west4-a", "--spot"} <= set(calls[1])
    (trained,) = [call for call in calls if call[0] == "smollm3"]
    assert trained[1:] == ["train", "--config", "quick", *words, "--resume", "auto"]


def test_a_run_that_has_saved_starts_again_on_the_machine(stage):
    script = tpu_vm(train_job("quick", ["run.dir=gs://b/r"]), machine("v5e:1x1"), "zone")
    twice = "echo >> tries; [ $(wc -l < tries) = 3 ] || exit 75"
    code, calls = stage(script, DO_gcloud=GCLOUD, DO_smollm3=twice, THEN="ACTIVE", SMOLLM3_POLL="0")
    assert code == 0 and [call[0] for call in calls].count("smollm3") == 3
    assert [call[0] for call in calls].count("pip") == 1


def test_a_machine_that_is_taken_away_is_asked_for_again(stage):
    script = tpu_vm(train_job("quick", ["run.dir=gs://b/r"]), machine("v5e:1x1"), "zone")
    lost = "echo >> tries; [ $(wc -l < tries) = 2 ] || { echo SUSPENDED > states.txt; exit 255; }"
    code, calls = stage(script, DO_gcloud=GCLOUD, DO_smollm3=lost, THEN="ACTIVE", SMOLLM3_POLL="0")
    assert code == 0 and sum(call[4:5] == ["create"] for call in calls) == 2


def test_an_error_of_the_run_ends_the_script(stage):
    script = tpu_vm(train_job("quick", ["run.dir=gs://b/r"]), machine("v5e:1x1"), "zone")
    code, calls = stage(script, DO_gcloud=GCLOUD, DO_smollm3="exit 3", THEN="ACTIVE", SMOLLM3_POLL="0")
    assert code == 3 and [call[0] for call in calls].count("smollm3") == 1


def test_mistakes_are_named(job):
    with pytest.raises(OptionError, match="slurm is for h100 and h200"):
        slurm(job, machine("v5e:4x4"))
    with pytest.raises(OptionError, match="tpu-vm is for TPUs"):
        tpu_vm(job, machine("h100:8"), "zone")
    for make in (skypilot, lambda job, where: tpu_vm(job, where, "zone")):
        with pytest.raises(OptionError, match="the Cloud TPU API has no tpu7x"):
            make(job, machine("tpu7x:2x2x1"))
