"""`deploy/kubernetes`: against the published schemas, and that its commands are commands of `tl`.

Kubernetes' schemas are those that the package kubernetes-validate brings; fields that they do not
have are refused. That of KubeRay's RayJob is too large to be kept here: `RAY_JOB` has the fields of
KubeRay 1.6 that a manifest of ours may use, and its pods are checked as Kubernetes' own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from commands import REPO

from tl.config import BatchConfig
from tl.pipelines.commandline import check_overrides, spelled

FOLDER = REPO / "deploy/kubernetes"
MANIFESTS = sorted(f for f in FOLDER.rglob("*.yaml") if f.name != "kustomization.yaml")
KUSTOMIZATIONS = sorted(FOLDER.rglob("kustomization.yaml"))
VERSION = "1.37"


def words(**properties: Any) -> dict[str, Any]:
    """Schema of an object that has no other fields."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
POD = {"type": "object", "required": ["spec"]}  # a PodTemplateSpec, checked by itself
GROUP = {"rayStartParams": TEXTS, "template": POD}
CLUSTER = words(
    rayVersion=TEXT,
    authOptions=words(mode={"enum": ["token", "disabled"]}, secretName=TEXT),
    headGroupSpec={**words(**GROUP, serviceType=TEXT), "required": ["template"]},
    workerGroupSpecs={
        "type": "array",
        "items": {
            **words(
                **GROUP, groupName=TEXT, replicas=NUMBER, minReplicas=NUMBER, maxReplicas=NUMBER,
                numOfHosts=NUMBER,
            ),
            "required": ["groupName", "template"],
        },
    },
)  # fmt: skip
RAY_JOB = {
    **words(
        apiVersion={"const": "ray.io/v1"},
        kind={"const": "RayJob"},
        metadata=words(name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS),
        spec=words(
            entrypoint=TEXT,
            submissionMode={"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
            backoffLimit=NUMBER,
            activeDeadlineSeconds={"type": "integer", "minimum": 1},
            shutdownAfterJobFinishes=FLAG,
            ttlSecondsAfterFinished=NUMBER,
            suspend=FLAG,
            rayClusterSpec={**CLUSTER, "required": ["headGroupSpec"]},
        ),
    ),
    "required": ["apiVersion", "kind", "metadata", "spec"],
}


def documents(text: str) -> list[dict[str, Any]]:
    return [d for d in yaml.safe_load_all(text) if d]


def pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Pod templates of a Job or RayJob."""
    if document["kind"] == "Job":
        yield document["spec"]["template"]
    if document["kind"] == "RayJob":
        cluster = document["spec"]["rayClusterSpec"]
        yield cluster["headGroupSpec"]["template"]
        yield from (group["template"] for group in cluster["workerGroupSpecs"])


def check(document: dict[str, Any]) -> None:
    """Refuse a document that its schema does not allow."""
    if document["kind"] != "RayJob":
        kubernetes_validate.validate(document, VERSION, strict=True)
        return
    jsonschema.validate(document, RAY_JOB)
    for pod in pods(document):
        template = {"apiVersion": "v1", "kind": "PodTemplate", "template": pod}
        kubernetes_validate.validate(template, VERSION, strict=True)


def check_all(text: str) -> int:
    """How many documents of a file are as they should be."""
    found = documents(text)
    for document in found:
        check(document)
    return len(found)


def loaded(name: str, kind: str) -> dict[str, Any]:
    (found,) = [d for d in documents((FOLDER / name).read_text()) if d["kind"] == kind]
    return found


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda f: str(f.relative_to(FOLDER)))
def test_manifests_are_as_their_schemas_say(file):
    assert check_all(file.read_text()) >= 1


@pytest.mark.parametrize(
    ("file", "wrong"),
    [
        ("train/job.yaml", ("backoffLimit: 3", "backoffLimits: 3")),
        ("train/job.yaml", ("values: [130]", "values: ['130']")),
        ("batch/job.yaml", ("runAsNonRoot: true", "runAsNonRoot: 1")),
        ("ray/rayjob.yaml", ("backoffLimit: 2", "backOffLimit: 2")),
        ("ray/rayjob.yaml", ("readOnlyRootFilesystem", "readOnlyRootFileSystem")),
        ("common/volumes.yaml", ("storage: 100Gi", "storage: [100Gi]")),
    ],
)
def test_a_wrong_field_is_found(file, wrong):
    text = (FOLDER / file).read_text()
    assert wrong[0] in text
    with pytest.raises((kubernetes_validate.ValidationError, jsonschema.ValidationError)):
        check_all(text.replace(*wrong))


@pytest.mark.parametrize("file", KUSTOMIZATIONS, ids=lambda f: f.parent.name)
def test_kustomizations_name_what_there_is(file):
    (content,) = documents(file.read_text())
    for name in [*content.get("resources", []), *content.get("components", [])]:
        assert (file.parent / name).exists(), name


@pytest.mark.parametrize("name", ["train/job.yaml", "batch/job.yaml", "ray/rayjob.yaml"])
def test_pods_may_do_nothing_that_a_restricted_namespace_forbids(name):
    document = loaded(name, "RayJob" if "ray" in name else "Job")
    claimed = {
        d["metadata"]["name"] for d in documents((FOLDER / "common/volumes.yaml").read_text())
    }
    for pod in pods(document):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["terminationGracePeriodSeconds"] >= 60
        (container,) = spec["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        limits = container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(limits)
        assert container["resources"]["requests"] == limits
        mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
        assert {"/data", "/output", "/cache", "/tmp", "/dev/shm"} <= set(mounts)
        volumes = {v["name"]: v for v in spec["volumes"]}
        assert set(volumes) == set(mounts.values())
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        found = {c["claimName"] for v in volumes.values() if (c := v.get("persistentVolumeClaim"))}
        assert found == claimed


def test_a_wrong_request_ends_a_job_and_an_interruption_does_not():
    for name in ("train/job.yaml", "batch/job.yaml"):
        spec = loaded(name, "Job")["spec"]
        assert spec["template"]["spec"]["restartPolicy"] == "Never"
        codes = {
            code: rule["action"]
            for rule in spec["podFailurePolicy"]["rules"]
            for code in rule.get("onExitCodes", {}).get("values", [])
        }
        assert codes == {2: "FailJob", 130: "Ignore"}


# --- what the pods run ----------------------------------------------------------------------------


@pytest.fixture
def presets(tmp_path: Path) -> Path:
    """The folder of presets as the ConfigMap puts it into a pod."""
    maps = documents((FOLDER / "common/config.yaml").read_text())
    (found,) = [m["data"] for m in maps if m["metadata"]["name"] == "tl-experiments"]
    (tmp_path / "experiment").mkdir()
    for name, text in found.items():
        (tmp_path / "experiment" / name).write_text(text)
    return tmp_path


def command_of(name: str) -> list[str]:
    """What a manifest runs, after `tl`."""
    if "ray" in name:
        program, *args = loaded(name, "RayJob")["spec"]["entrypoint"].split()
        assert program == "tl"
        return args
    (container,) = loaded(name, "Job")["spec"]["template"]["spec"]["containers"]
    return list(container["args"])


def test_the_job_is_a_command_with_the_preset_of_the_config_map(presets):
    args = [a.replace("/config", str(presets)) for a in command_of("train/job.yaml")]
    code = "import sys, tl.pipelines as p; p.main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, *args, "--cfg", "job"],
        capture_output=True, text=True, check=False, cwd=presets,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "experiment: nightly" in done.stdout
    assert "root: /data" in done.stdout


@pytest.mark.parametrize("name", ["batch/job.yaml", "ray/rayjob.yaml"])
def test_batches_are_commands(name):
    pipeline, *args = command_of(name)
    assert pipeline == "train"
    assert {"-m", "--config-dir"} <= set(args)
    check_overrides("train", spelled("train", [a.replace("$(INDEX)", "0") for a in args]))


def test_every_index_of_the_batch_has_its_share():
    spec = loaded("batch/job.yaml", "Job")["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    (shard,) = [a for a in container["args"] if a.startswith("batch.shard=")]
    assert "INDEX" in {e["name"] for e in container["env"]}
    assert spec["completionMode"] == "Indexed"
    for index in range(spec["completions"]):
        text = shard.partition("=")[2].replace("$(INDEX)", str(index))
        assert BatchConfig(shard=text).shard_of() == (index, spec["completions"])
