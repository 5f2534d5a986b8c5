"""A TrainJob of Kubeflow Trainer (v2), and the runtime it refers to, which holds volumes and restarts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from launch import engine, far
from launch.errors import LaunchError
from launch.job import Job, made_resumable
from launch.yaml_text import Value, dump

RUNS = "/runs"  # where the volume of runs is mounted
GRACE = 90  # seconds from SIGTERM to SIGKILL of a pod; its launcher waits as long for the recipe, less a margin
MARGIN = 15
_SIZE = re.compile(r"[1-9][0-9]*(Mi|Gi|Ti|M|G|T)")
_CLAIM = re.compile(r"[a-z0-9]([-a-z0-9]{0,60}[a-z0-9])?")
# The trainer gives these to every pod of a torch runtime.
MEETING = engine.Meeting('"$PET_NODE_RANK"', '"$PET_MASTER_ADDR"', '"$PET_MASTER_PORT"')


@dataclass(frozen=True)
class Cluster:
    """What only Kubernetes needs.

    Attributes:
        image: container image with Python, the project and its packages.
        workdir: folder of the project in the image.
        claim: PersistentVolumeClaim for runs, which all pods may write to.
        claim_size: makes the claim, of this size; None = it exists.
        shared_memory: size of /dev/shm, through which loader processes hand over pictures.
        namespace: None = kubectl's own.
    """

    image: str
    workdir: str = "/workspace"
    claim: str = "runs"
    claim_size: str | None = None
    shared_memory: str = "16Gi"
    namespace: str | None = None


def check(job: Job, cluster: Cluster) -> None:
    """Refuse what Kubernetes would refuse, and what would lose a run.

    Raises:
        LaunchError: names the option, the value and the remedy.
    """
    if not cluster.image or re.search(r"\s", cluster.image):
        raise LaunchError(
            f"--image is {cluster.image!r}; it must be one word, such as registry.example/team/fine-tuning:1."
        )
    for option, name in (("--claim", cluster.claim), ("--namespace", cluster.namespace)):
        if name is not None and not _CLAIM.fullmatch(name):
            raise LaunchError(f"{option} is {name!r}; it must hold small letters, digits and dashes.")
    for option, size in (("--shared-memory", cluster.shared_memory), ("--claim-size", cluster.claim_size)):
        if size is not None and not _SIZE.fullmatch(size):
            raise LaunchError(f"{option} is {size!r}; write a size such as 16Gi.")
    if not cluster.workdir.startswith("/"):
        raise LaunchError(f"--workdir is {cluster.workdir!r}; it must be an absolute path in the image.")
    far.check(job, RUNS)


def render(job: Job, cluster: Cluster) -> tuple[str, list[str]]:
    """The manifests, and a sentence for everything that was added to the recipe's flags."""
    ready, said = made_resumable(job, f"{RUNS}/{job.name}")
    documents = [_runtime(ready, cluster), _train_job(ready, cluster)]
    if cluster.claim_size is not None:
        documents.insert(0, _claim(cluster))
    return "---\n".join(dump(document) for document in documents), said


def _metadata(name: str, cluster: Cluster, labels: Mapping[str, str] | None = None) -> dict[str, Value]:
    place = {"namespace": cluster.namespace} if cluster.namespace else {}
    return {"name": name, **place, **({"labels": labels} if labels else {})}


def _claim(cluster: Cluster) -> dict[str, Value]:
    wanted: dict[str, Value] = {"requests": {"storage": str(cluster.claim_size)}}
    spec: dict[str, Value] = {"accessModes": ["ReadWriteMany"], "resources": wanted}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(cluster.claim, cluster),
        "spec": spec,
    }


def _runtime(job: Job, cluster: Cluster) -> dict[str, Value]:
    """A JobSet of one pod a machine. A pod that fails ends its Job, and the JobSet starts all of them anew."""
    limit: dict[str, Value] = {"activeDeadlineSeconds": job.seconds} if job.seconds else {}
    one_step: dict[str, Value] = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {"backoffLimit": 0, **limit, "template": {"spec": _pod(cluster)}},
        },
    }
    jobs: dict[str, Value] = {"failurePolicy": {"maxRestarts": job.restarts}, "replicatedJobs": [one_step]}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainingRuntime",
        "metadata": _metadata(job.name, cluster, {"trainer.kubeflow.org/framework": "torch"}),
        "spec": {"mlPolicy": {"numNodes": job.nodes, "torch": {}}, "template": {"spec": jobs}},
    }


def _pod(cluster: Cluster) -> dict[str, Value]:
    mounts: list[Value] = [{"name": "runs", "mountPath": RUNS}, {"name": "shared-memory", "mountPath": "/dev/shm"}]
    container: dict[str, Value] = {"name": "node", "workingDir": cluster.workdir, "volumeMounts": mounts}
    volumes: list[Value] = [
        {"name": "runs", "persistentVolumeClaim": {"claimName": cluster.claim}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": cluster.shared_memory}},
    ]
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "containers": [container],
        "volumes": volumes,
    }


def _train_job(job: Job, cluster: Cluster) -> dict[str, Value]:
    start = engine.launcher(job, supervised=True, meeting=MEETING if job.nodes > 1 else None)
    wanted = {"nvidia.com/gpu": job.gpus, "cpu": job.cpus, "memory": f"{job.memory}Gi" if job.memory else None}
    resources = {name: str(amount) for name, amount in wanted.items() if amount}
    named = engine.variables(job, GRACE - MARGIN).items()
    trainer: dict[str, Value] = {
        "image": cluster.image,
        "numNodes": job.nodes,
        "numProcPerNode": job.processes,
        "command": [kept(word) for word in ("bash", "-c", f'exec {start} "$@"', "launch")],
        "args": [kept(word) for word in (job.recipe, *job.flags)],
        "env": [{"name": name, "value": kept(value)} for name, value in named],
        **({"resourcesPerNode": {"limits": resources, "requests": resources}} if resources else {}),
    }
    reference = {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": job.name}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": _metadata(job.name, cluster),
        "spec": {"runtimeRef": reference, "trainer": trainer},
    }


def kept(word: str) -> str:
    """*word* so that Kubernetes hands it on as it is: it replaces ``$(NAME)`` and reads ``$$`` as ``$``."""
    return word.replace("$", "$$")
