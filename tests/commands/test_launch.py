"""`smollm3 launch` as a user calls it."""

import re
import shlex
from pathlib import Path

import pytest
import tiny
import yaml
from proxies import needs_libtpu

from smollm3_jax.commands.main import main

RUN = ["--config", "quick", "run.dir=gs://bucket/run"]
TPUS = ["--topology", "v5e:4x4"]
TARGETS = {
    "gke-train": [*TPUS, "--image", "image", *RUN],
    "gke-serve": ["HuggingFaceTB/SmolLM3-3B", "--topology", "v5e:2x2", "--image", "image"],
    "slurm": ["--topology", "h100:16", *RUN],
    "skypilot": [*TPUS, *RUN],
    "tpu-vm": [*TPUS, "--zone", "us-west4-a", *RUN],
}


@pytest.mark.parametrize("target", TARGETS)
def test_what_starts_it_is_alone_on_standard_output(target, capsys):
    assert main(["launch", target, *TARGETS[target], "--no-plan"]) == 0
    printed, said = capsys.readouterr()
    if target in ("slurm", "tpu-vm"):
        assert printed.startswith("#!/bin/bash\n")
    else:
        assert all(yaml.safe_load_all(printed))
    assert "smollm3" in printed and printed.endswith("\n")
    assert said.startswith("smollm3: ") and ("2 hosts of 8 H100" if target == "slurm" else "of 4 chips") in said
    assert main(["-q", "launch", target, *TARGETS[target], "--no-plan"]) == 0
    assert capsys.readouterr() == (printed, "")


def test_a_server_gets_its_options_and_all_devices(capsys):
    words = [
        *TARGETS["gke-serve"],
        "--no-plan",
        "--slots",
        "4",
        "--context",
        "4096",
        "--weights",
        "int8",
        "--name",
        "it",
    ]
    assert main(["launch", "gke-serve", *words]) == 0
    deployment, service = yaml.safe_load_all(capsys.readouterr().out)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    options = ["--rules", "serve_tp", "--slots", "4", "--context", "4096", "--weights", "int8"]
    assert container["command"][-len(options) :] == options
    assert service["metadata"]["name"] == deployment["metadata"]["name"] == "it"


def test_nodes_of_slurm_share_a_folder(capsys):
    words = [{"run.dir=gs://bucket/run": "run.dir=/shared/run"}.get(word, word) for word in TARGETS["slurm"]]
    assert main(["launch", "slurm", *words, "--no-plan"]) == 0
    assert "run.dir=/shared/run" in capsys.readouterr().out


def test_the_grace_may_be_given(capsys):
    assert main(["launch", "slurm", *TARGETS["slurm"], "--no-plan", "--grace", "77"]) == 0
    printed, said = capsys.readouterr()
    assert "#SBATCH --signal=TERM@77\n" in printed and "77 s from SIGTERM" in said


@pytest.mark.parametrize(
    ("target", "changed", "code", "words"),
    [
        ("gke-train", {"v5e:4x4": "v5e:3x3"}, 2, "slices of v5e are 1x1, 2x2"),
        ("gke-train", {"v5e:4x4": "h100:8"}, 2, "gke-train is for TPUs"),
        ("gke-train", {"--image": None}, 2, "required: --image"),
        ("gke-train", {"run.dir=gs://bucket/run": "run.dir=here"}, 2, "run.dir is 'here', and the machines have"),
        ("gke-train", {"run.dir=gs://bucket/run": "run.dir=/local"}, 2, "each restart would begin anew"),
        ("skypilot", {"run.dir=gs://bucket/run": "run.dir=/local"}, 2, "each restart would begin anew"),
        ("tpu-vm", {"run.dir=gs://bucket/run": "run.dir=/local"}, 2, "each restart would begin anew"),
        ("gke-train", {"quick": "quik"}, 2, "did you mean quick"),
        ("gke-serve", {"v5e:2x2": "v5e:4x4"}, 2, "4 hosts; a Deployment's pods have one each"),
        ("gke-serve", {"HuggingFaceTB/SmolLM3-3B": None}, 2, "name a model"),
        ("slurm", {"h100:16": "v5e:4x4"}, 2, "slurm is for h100 and h200"),
        ("skypilot", {"v5e:4x4": "tpu7x:2x2x1"}, 2, "the Cloud TPU API has no tpu7x"),
        ("tpu-vm", {"v5e:4x4": "h100:8"}, 2, "tpu-vm is for TPUs"),
        ("tpu-vm", {"--zone": None}, 2, "required: --zone"),
    ],
)
def test_mistakes_are_named_before_anything_is_planned(target, changed, code, words, capsys):
    given = [changed.get(word, word) for word in TARGETS[target]]
    for at in (i for i, word in enumerate(given) if word is None):
        given[at : at + (2 if TARGETS[target][at].startswith("--") else 1)] = []
    try:
        ended = main(["launch", target, *given])
    except SystemExit as exit:
        ended = exit.code
    printed, said = capsys.readouterr()
    assert ended == code and words in said and printed == ""


@needs_libtpu
@pytest.mark.slow
def test_the_plan_says_first_whether_it_fits(tmp_path, capsys):
    model = tiny.talking_checkpoint(tmp_path / "model")
    words = ["--topology", "v5e:1x1", *RUN, f"model.path={model}", "model.config=", "data.rows=4", "data.length=128"]
    assert main(["launch", "skypilot", *words]) == 0
    printed, said = capsys.readouterr()
    assert re.search(r"smollm3: fits: [\d.]+ GiB of 15.8 a device; modelled, not measured: ", said)
    assert yaml.safe_load(printed)["resources"]["accelerators"] == "tpu-v5litepod-1"


PAGE = (Path(__file__).parents[2] / "docs" / "launching.md").read_text()
TRAINING = re.findall(r"^smollm3 (launch (?!gke-serve).+?--config smollm3-sft .+?)(?: >.*)?$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("line", TRAINING)
def test_what_the_page_prints_starts_a_run(line, capsys):
    assert main([*shlex.split(line), "--no-plan"]) == 0
    assert "run.dir=" in capsys.readouterr().out


def test_the_page_has_every_target():
    assert {line.split()[1] for line in TRAINING} == {"gke-train", "slurm", "skypilot", "tpu-vm"}
