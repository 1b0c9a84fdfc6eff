"""Manifests are what Kubernetes and JobSet take, and stop and start as a run has to."""

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from odd_words import SETTINGS

from smollm3_jax.errors import OptionError
from smollm3_jax.launch.gke import LAST, PRE_STOP, jobset, serving
from smollm3_jax.launch.job import train_job
from smollm3_jax.launch.machines import machine
from smollm3_jax.launch.text import manifest

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
models = pytest.importorskip("kubeflow_trainer_api.models", reason="kubeflow-trainer-api is not installed")

VERSIONS = ("1.31", "1.35")  # of Kubernetes, at GKE
CRD = os.environ.get("JOBSET_CRD", "")  # jobset.x-k8s.io_jobsets.yaml of the JobSet that is to take them


def read(documents):
    """What a reader of YAML finds."""
    return list(yaml.safe_load_all(manifest(documents)))


def validate(document):
    for version in VERSIONS:
        kubernetes_validate.validate(document, version, strict=True)


def validate_jobset(document):
    """Each field is one that JobSet's own models have, of their type, and its jobs are Kubernetes' own."""
    model = models.JobsetV1alpha2JobSet.from_dict(document)
    assert json.loads(model.to_json()) == document
    for replicated in document["spec"]["replicatedJobs"]:
        validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]})
    if CRD:
        import jsonschema

        jsonschema.validate(document, crd())


@functools.cache
def crd():
    (served,) = yaml.load(Path(CRD).read_text(), yaml.CSafeLoader)["spec"]["versions"]
    return strict(served["schema"]["openAPIV3Schema"])


def strict(schema: Any) -> Any:
    """As a server is that refuses unknown fields; Kubernetes' own types are not JSON schema's."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    made = {key: strict(value) for key, value in schema.items()}
    closed = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    return {**made, "additionalProperties": False} if closed else made


def pod_of(document):
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("spot", [False, True])
@pytest.mark.parametrize(("topology", "slices"), [("v5e:1x1", 1), ("v5e:2x4", 2), ("v5p:2x2x2", 1), ("tpu7x:4x4x4", 2)])
def test_a_jobset_is_what_its_schema_says(job, topology, slices, spot):
    where = machine(topology)
    (document,) = read(jobset(dataclasses.replace(job, grace=90), where, "image", slices, spot))
    validate_jobset(document)
    (replicated,) = document["spec"]["replicatedJobs"]
    of_a_slice, pod = replicated["template"]["spec"], pod_of(document)
    assert replicated["replicas"] == slices
    assert of_a_slice["parallelism"] == of_a_slice["completions"] == where.hosts
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": where.chips_of_a_host}
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == where.shape
    assert pod["nodeSelector"].get("cloud.google.com/gke-spot") == ("true" if spot else None)
    assert pod["terminationGracePeriodSeconds"] == 90
    # One host alone has nobody to look for: it has no index, and its own network.
    alone = where.hosts * slices == 1
    assert of_a_slice["completionMode"] == ("NonIndexed" if alone else "Indexed")
    assert pod.get("hostNetwork", False) is not alone


def test_what_schemas_do_not_know_is_seen(job):
    (document,) = read(jobset(job, machine("v5e:4x4"), "image"))
    document["spec"]["failurePolicy"]["restarts"] = 3
    with pytest.raises(AssertionError):
        validate_jobset(document)
    deployment, _ = read(serving("name", "MODEL", [], machine("v5e:2x2"), "image", 60))
    deployment["spec"]["template"]["spec"]["gracePeriod"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(deployment)


def test_a_run_that_has_saved_is_started_again_for_nothing(job):
    """Exit code 75, or a host that was taken away: the job ends with the reason that the JobSet's rule restarts for."""
    (document,) = read(jobset(job, machine("v5e:4x4"), "image"))
    of_a_slice = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    policy = document["spec"]["failurePolicy"]
    codes, lost = of_a_slice["podFailurePolicy"]["rules"]
    assert codes["onExitCodes"]["values"] == [75] and codes["action"] == lost["action"] == "FailJob"
    assert lost["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert of_a_slice["backoffLimit"] == 0 and pod_of(document)["restartPolicy"] == "Never"
    assert policy["maxRestarts"] > 0
    assert policy["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"


@settings(max_examples=30, deadline=None)
@given(SETTINGS)
def test_any_setting_is_what_the_container_gets(word):
    (document,) = read(jobset(train_job("quick", ["run.dir=gs://b/r", word]), machine("v5e:4x4"), "image"))
    command = pod_of(document)["containers"][0]["command"]
    assert command[0] == "smollm3"  # no shell in between
    assert [x.replace("$$", "$") for x in command] == [*job_words(), word, "--resume", "auto"]


def job_words():
    return ["smollm3", "train", "--config", "quick", "run.dir=gs://b/r"]


def test_a_file_of_settings_is_mounted(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        '# $(HOME)\n[run]\ndir = "gs://b/r"\nsteps = 3\n[model]\npath = "demo"\n[data]\npath = "gs://b/c"\n'
    )
    config, document = read(jobset(train_job(str(file), []), machine("v5e:4x4"), "image"))
    validate(config)
    validate_jobset(document)
    (container,), (volume,) = pod_of(document)["containers"], pod_of(document)["volumes"]
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    (mounted,) = container["volumeMounts"]
    path = container["command"][container["command"].index("--config") + 1]
    assert config["data"][Path(path).name] == file.read_text() and str(Path(path).parent) == mounted["mountPath"]


@pytest.mark.parametrize(("topology", "resource"), [("v5e:2x4", "google.com/tpu"), ("h100:8", "nvidia.com/gpu")])
def test_a_server_drains(topology, resource):
    deployment, service = read(serving("name", "MODEL", ["--slots", "4"], machine(topology), "image", 60, 2))
    validate(deployment)
    validate(service)
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    command = container["command"]
    assert command[:3] == ["smollm3", "serve", "MODEL"] and command[-2:] == ["--slots", "4"]
    assert command[command.index("--drain-timeout") + 1] == "60"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", str(PRE_STOP)]
    assert pod["spec"]["terminationGracePeriodSeconds"] == PRE_STOP + 60 + LAST
    assert container["resources"]["limits"] == {resource: 8}
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]


def test_mistakes_are_named(job):
    with pytest.raises(OptionError, match="gke-train is for TPUs"):
        jobset(job, machine("h100:8"), "image")
    with pytest.raises(OptionError, match="4 hosts; a Deployment's pods have one each: take at most 2x4"):
        serving("name", "MODEL", [], machine("v5e:4x4"), "image", 60)
