"""Manifests for Google Kubernetes Engine: a JobSet that trains, a Deployment that serves."""

from collections.abc import Sequence
from typing import Any

from ..errors import OptionError
from .job import RESTART, TrainJob
from .machines import GPUS, Machine
from .text import kubernetes

FOLDER = "/etc/smollm3"  # where a file of settings is mounted
CONTAINER = "smollm3"
MAX_RESTARTS = 10  # after other ends than exit code 75 and the loss of a host, which cost none
PORT = 8000
PRE_STOP = 10  # seconds until no balancer sends anything to a pod that is to end
LAST = 10  # seconds after the drain


def jobset(job: TrainJob, machine: Machine, image: str, slices: int = 1, spot: bool = False) -> list[dict[str, Any]]:
    """The documents of a run: a JobSet, a job a slice, and a ConfigMap if it has a file of settings.

    Raises:
      OptionError: GPUs, which several pods would have to be told of each other for.
    """
    if machine.is_gpu:
        raise OptionError(
            f"--topology is {machine.name}, of GPUs; gke-train is for TPUs: take `smollm3 launch slurm` or skypilot"
        )
    alone = machine.hosts * slices == 1
    container = {
        "name": CONTAINER,
        "image": image,
        # Without a shell in between: it is Python that gets SIGTERM.
        "command": kubernetes(job.command(f"{FOLDER}/config.toml")),
        "env": [_secret("HF_TOKEN", job.name, "hf-token", optional=True)],
        "resources": {"limits": {"google.com/tpu": machine.chips_of_a_host}},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace,
        **_where(machine, spot),
        "containers": [container],
    }
    if not alone:  # the slices' network is that of the hosts
        pod |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    documents = []
    if job.file:
        metadata = {"name": f"{job.name}-config"}
        container["volumeMounts"] = [{"name": "config", "mountPath": FOLDER, "readOnly": True}]
        pod["volumes"] = [{"name": "config", "configMap": metadata}]
        data = {"config.toml": job.file}
        documents.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})
    return [*documents, _jobset_of(job.name, _job_of(pod, machine.hosts, alone), slices)]


def _job_of(pod: dict[str, Any], hosts: int, alone: bool) -> dict[str, Any]:
    """The job of a slice. It never starts a pod again by itself: all of them begin together, by the JobSet."""
    stopped = {"containerName": CONTAINER, "operator": "In", "values": [RESTART]}
    return {
        "parallelism": hosts,
        "completions": hosts,
        # With an index a process looks for others.
        "completionMode": "NonIndexed" if alone else "Indexed",
        "backoffLimit": 0,
        # These two ends have a reason of their own, PodFailurePolicy, which the JobSet's rule is for.
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": stopped},
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            ]
        },
        "template": {"spec": pod},
    }


def _jobset_of(name: str, job: dict[str, Any], slices: int) -> dict[str, Any]:
    free = {
        "name": "stopped",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            # One job a pool of nodes, and so a slice.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": MAX_RESTARTS, "rules": [free]},
            "replicatedJobs": [{"name": "slice", "replicas": slices, "template": {"spec": job}}],
        },
    }


def serving(
    name: str, model: str, options: Sequence[str], machine: Machine, image: str, drain: int, replicas: int = 1
) -> list[dict[str, Any]]:
    """The documents of a server: a Deployment and its Service.

    Args:
      options: of `smollm3 serve`, beside those that are given here.
      drain: seconds for answers that are under way when it is to end.

    Raises:
      OptionError: the machine has several hosts.
    """
    if machine.hosts > 1:
        raise OptionError(
            f"--topology is {machine.name}, {machine.hosts} hosts; a Deployment's pods have one each: take at most "
            f"{'a host of 8 GPUs' if machine.is_gpu else machine.tpu.whole or machine.tpu.shapes[0]}"
        )
    # Who asks by another name than the pod's address needs the key all the same.
    served = ["--host", "0.0.0.0", "--port", str(PORT), "--allow-host", "*", "--drain-timeout", str(drain)]
    resource = "nvidia.com/gpu" if machine.is_gpu else "google.com/tpu"
    container = {
        "name": CONTAINER,
        "image": image,
        "command": kubernetes(["smollm3", "serve", model, *served, *options]),
        "env": [
            _secret("SMOLLM3_API_KEY", name, "api-key", optional=False),
            _secret("HF_TOKEN", name, "hf-token", optional=True),
        ],
        "ports": [{"name": "http", "containerPort": PORT}],
        # It is healthy while it loads and compiles; before, it may have to fetch the model: half an hour at most.
        "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}, "periodSeconds": 5},
        "startupProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 5, "failureThreshold": 360},
        "livenessProbe": {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10, "timeoutSeconds": 5},
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PRE_STOP)]}}},
        "resources": {"limits": {resource: machine.chips_of_a_host}},
    }
    labels = {"app.kubernetes.io/name": name}
    pod = {
        "terminationGracePeriodSeconds": PRE_STOP + drain + LAST,
        **_where(machine, spot=False),
        "containers": [container],
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    }
    return [deployment, service]


def _where(machine: Machine, spot: bool) -> dict[str, Any]:
    """Which nodes a pod goes to."""
    if machine.is_gpu:
        selector = {"cloud.google.com/gke-accelerator": GPUS[machine.chip][0]}
    else:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": machine.tpu.accelerator,
            "cloud.google.com/gke-tpu-topology": machine.shape,
        }
    if not spot:
        return {"nodeSelector": selector}
    label = "cloud.google.com/gke-spot"
    taint = {"key": label, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    return {"nodeSelector": {**selector, label: "true"}, "tolerations": [taint]}


def _secret(variable: str, name: str, key: str, optional: bool) -> dict[str, Any]:
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": name, "key": key, "optional": optional}}}
