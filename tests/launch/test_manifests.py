"""Manifests against the models that Kubeflow publishes, and tasks against SkyPilot's own loader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models

from launch import kubernetes, sky
from launch.job import Job

ROOT = Path(__file__).parents[2]
KINDS = {
    "TrainJob": models.TrainerV1alpha1TrainJob,
    "TrainingRuntime": models.TrainerV1alpha1TrainingRuntime,
}
JOB = Job("recipes/finetune.py", ("--data", "my photos"), name="first", nodes=2, gpus=8, processes=8, restarts=3)


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def documents(job: Job, **options: Any) -> dict[str, dict[str, Any]]:
    cluster = kubernetes.Cluster(image="registry.example/fine-tuning:1", **options)
    kubernetes.check(job, cluster)
    return {document["kind"]: document for document in yaml.safe_load_all(kubernetes.render(job, cluster)[0])}


def unknown(document: Mapping[str, Any]) -> list[str]:
    """Keys and values that the published model doesn't take over; raises at wrong types and missing fields."""
    return list(lost(document, KINDS[document["kind"]].from_dict(document).to_dict()))


def lost(given: Any, kept: Any, where: str = "") -> list[str]:
    if isinstance(given, dict) and isinstance(kept, dict):
        return [name for key in given for name in lost(given[key], kept.get(key), f"{where}.{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [name for one, other in zip(given, kept, strict=True) for name in lost(one, other, where)]
    return [] if given == kept else [where]


@pytest.mark.parametrize("job", [JOB, Job("recipes/find_lr.py", name="one", seconds=7200, cpus=4, memory=16)])
def test_the_models_know_every_field(job: Job) -> None:
    found = documents(job, namespace="team")
    assert found.keys() == KINDS.keys()
    for document in found.values():
        assert unknown(document) == []


def test_a_field_that_is_unknown_missing_or_of_another_type_is_noticed() -> None:
    found = documents(JOB)
    found["TrainJob"]["spec"]["trainer"]["numNodez"] = 2
    assert unknown(found["TrainJob"]) == [".spec.trainer.numNodez"]
    found["TrainingRuntime"]["spec"]["template"]["spec"]["failurePolicy"]["maxRestart"] = 2
    assert unknown(found["TrainingRuntime"]) == [".spec.template.spec.failurePolicy.maxRestart"]
    for name, value in (("numNodes", "two"), ("args", "one text")):
        wrong = documents(JOB)["TrainJob"]
        wrong["spec"]["trainer"][name] = value
        with pytest.raises(ValueError, match="validation error"):
            unknown(wrong)


def test_what_a_train_job_promises() -> None:
    found = documents(JOB, claim_size="100Gi")
    trainer, runtime = found["TrainJob"]["spec"]["trainer"], found["TrainingRuntime"]["spec"]
    [step] = runtime["template"]["spec"]["replicatedJobs"]
    pod = step["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": "8"}
    assert trainer["args"][-4:] == ["--resume", "auto", "--output", "/runs/first"]
    assert runtime["template"]["spec"]["failurePolicy"] == {"maxRestarts": 3}
    assert {"name": "shared-memory", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}} in pod["volumes"]
    assert {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}} in pod["volumes"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert found["TrainJob"]["spec"]["runtimeRef"]["name"] == found["TrainingRuntime"]["metadata"]["name"]
    assert found["PersistentVolumeClaim"]["spec"]["resources"]["requests"]["storage"] == "100Gi"
    # What the trainer looks for: the step to run, and the container in it.
    assert (step["name"], container["name"]) == ("node", "node")
    assert step["template"]["metadata"]["labels"] == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}


def test_the_launcher_has_time_to_save() -> None:
    """Within the grace that Kubernetes gives to the pod."""
    found = documents(JOB)
    [step] = found["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"]
    variables = {one["name"]: one["value"] for one in found["TrainJob"]["spec"]["trainer"]["env"]}
    grace = step["template"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert 30 < int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace


def task(job: Job, **options: Any) -> dict[str, Any]:
    cloud = sky.Cloud("my-runs", **options)
    sky.check(job, cloud)
    loaded: dict[str, Any] = yaml.safe_load(sky.render(job, cloud)[0])
    return loaded


def test_what_a_sky_task_promises() -> None:
    found = task(JOB, gpu="H100", infra="aws/us-east-1")
    assert found["resources"]["use_spot"] is True
    assert found["resources"]["accelerators"] == "H100:8"
    assert found["resources"]["job_recovery"]["max_restarts_on_errors"] == 3
    assert found["file_mounts"] == {"/runs": {"name": "my-runs", "mode": "MOUNT_CACHED"}}
    assert "--resume auto --output /runs/first" in found["run"]
    assert "use_spot" in found["resources"]
    assert task(JOB, gpu="H100", spot=False)["resources"]["use_spot"] is False


@pytest.mark.parametrize(
    ("job", "options"),
    [
        (JOB, {"gpu": "H100", "infra": "aws/us-east-1"}),
        (
            Job("recipes/finetune.py", ("$(a) ${SKYPILOT_NODE_RANK}\n ;",), name="cpu", cpus=8, memory=32, seconds=60),
            {},
        ),
    ],
)
def test_skypilot_loads_it(tmp_path: Path, job: Job, options: dict[str, str]) -> None:
    """Its loader checks names and types, and must leave the command as it is."""
    loader = pytest.importorskip("sky", reason="pip install skypilot, in an environment of its own")
    wanted = task(job, **options)
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(wanted))
    loaded = loader.Task.from_yaml(str(tmp_path / "task.yaml"))
    assert (loaded.run, loaded.setup, loaded.num_nodes) == (wanted["run"], wanted["setup"], job.nodes)
    assert dict(loaded.envs) == wanted["envs"]
    [resources] = loaded.resources
    assert resources.use_spot
    assert resources.job_recovery["max_restarts_on_errors"] == job.restarts
    assert list(loaded.storage_mounts) == ["/runs"]
