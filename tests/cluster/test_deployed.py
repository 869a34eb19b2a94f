"""What lies in `deploy` with real programs: kubectl makes manifests, Slurm runs the sbatch files.

Apptainer is in no package registry: in its place a script takes its options away and calls the `tl`
that is installed, so signals, exit codes and the queue are real, and its mounts are not.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import REPO, SCRIPT, UNTRACKED
from slurm import missing, slurm
from test_deploy_kubernetes import FOLDER, KUSTOMIZATIONS, check_all, documents, pods

pytestmark = pytest.mark.cluster
SECONDS = 400  # of a job on a busy machine
APPTAINER = """\
#!/usr/bin/env bash
set -euo pipefail
verb=$1; shift
while [[ $1 = --* ]]; do case $1 in --nv) shift ;; *) shift 2 ;; esac; done
[[ $1 = *.sif ]]; shift
if [[ $verb = run ]]; then exec {tl} "$@"; fi
exec "$@"
"""


# --- Kubernetes ---------------------------------------------------------------------------------


def rendered(folder: Path) -> list[dict]:
    """What `kubectl apply -k` would send."""
    kubectl = shutil.which("kubectl", path=str(Path(sys.executable).parent))
    if kubectl is None:
        pytest.skip("kubectl is missing: tests/cluster/install.sh installs it")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert check_all(done.stdout) >= 5
    return documents(done.stdout)


@pytest.mark.parametrize("name", ["common", "train", "batch", "ray"])
def test_kubectl_makes_valid_manifests(name):
    for document in rendered(FOLDER / name):
        for pod in pods(document):
            (container,) = pod["spec"]["containers"]
            assert container["image"].startswith("registry.example.com/team/tl:0.1.0")
            assert "nvidia.com/gpu" not in container["resources"]["limits"]


@pytest.mark.parametrize("name", ["train-gpu", "batch-gpu", "ray-gpu"])
def test_gpus_are_asked_for(name):
    asked = []
    for document in rendered(FOLDER / name):
        for pod in pods(document):
            (container,) = pod["spec"]["containers"]
            asked.append(container["resources"]["limits"].get("nvidia.com/gpu"))
            if document["kind"] == "Job":
                assert container["args"][-1] == "trainer=gpu"
                assert container["args"][0] == "train"
    assert asked == ([None, "1"] if "ray" in name else ["1"])


def test_every_folder_was_rendered():
    names = {f.parent.name for f in KUSTOMIZATIONS}
    for file in KUSTOMIZATIONS:
        kind = yaml.safe_load(file.read_text())["kind"]
        assert (kind == "Component") == (file.parent.name == "gpu")
    tested = {"common", "train", "batch", "ray", "train-gpu", "batch-gpu", "ray-gpu", "gpu"}
    assert names == tested


# --- Slurm --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with slurm(tmp_path_factory.mktemp("slurm"), nodes=["n1"]) as found:
        yield found


@pytest.fixture
def submit(cluster, tmp_path):
    """`sbatch FILE …` with small limits; returns the number of the job."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "apptainer").write_text(APPTAINER.format(tl=SCRIPT))
    (tools / "apptainer").chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tools}:{SCRIPT.parent}:{os.environ['PATH']}",
        "TL_CACHE": str(tmp_path / "cache"),
        "TL_OUTPUT": str(tmp_path / "batch"),
    }

    def run(file: str, *args: object, options: tuple[str, ...] = ()) -> str:
        limits = ["--parsable", "--cpus-per-task=1", "--mem=3G", f"--output={tmp_path}/log.%j.txt"]
        command = ["sbatch", *limits, *options, REPO / "deploy/slurm" / file, *args]
        return cluster.run([str(c) for c in command], env=env, cwd=tmp_path)

    return run


def wait(ready, what) -> None:
    deadline = time.monotonic() + SECONDS
    while not ready():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)


def text_of(tmp_path: Path) -> str:
    return "\n".join(f.read_text() for f in sorted(tmp_path.glob("log.*.txt")))


def test_a_stopped_job_goes_back_to_the_queue_and_on(cluster, submit, image_folder, tmp_path):
    given = [*UNTRACKED, "finetune=full", "finetune.epochs=40", "finetune.patience=0"]
    number = submit(
        "train.sbatch", f"data.root={image_folder()}", f"output_dir={tmp_path / 'run'}", *given
    )
    text = lambda: text_of(tmp_path)  # noqa: E731
    wait(lambda: re.search(r"all +2/40", text()), text)
    cluster.run(["scancel", "--signal=TERM", number])  # to its step, as --signal does
    wait(lambda: "interrupted" in text(), text)
    wait(lambda: number not in cluster.queue(), lambda: f"{cluster.queue()}\n{text()}")
    first, again = text().split("interrupted", 1)
    assert re.search(r"all +2/40", first)
    assert not re.search(r"all +[12]/40", again)
    assert re.search(r"all +40/40", again)
    assert "val/acc" in json.loads((tmp_path / "run/metrics.json").read_text())


def test_an_array_shares_a_batch(cluster, submit, image_folder, tmp_path):
    given = [a for a in UNTRACKED if "experiment" not in a]
    given += ["experiment=smoke", "finetune=linear_probe", "seed=1,2"]
    number = submit("batch.sbatch", f"data.root={image_folder()}", *given, options=("--array=0-1",))
    text = lambda: text_of(tmp_path)  # noqa: E731
    left = lambda: [j for j in cluster.queue() if j.startswith(number)]  # noqa: E731
    wait(lambda: not left(), text)
    for job in ("0", "1"):
        assert (tmp_path / "batch" / job / "metrics.json").is_file(), text()
    logs = [f.read_text() for f in sorted(tmp_path.glob("log.*.txt"))]
    assert len(logs) == 2
    assert ["job 0 began" in log for log in logs] == [True, False]
    assert ["job 1 began" in log for log in logs] == [False, True]
