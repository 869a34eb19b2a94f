"""What the image is made of, the job of compose.yaml, and the files for Slurm."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from commands import REPO
from compose import composed
from test_team_server import HOSTED

from tl.pipelines.commandline import check_overrides, spelled

TOOLS = Path(sys.executable).parent
MAKE_LISTS = REPO / "deploy/image/requirements.py"
SBATCH = sorted((REPO / "deploy/slurm").glob("*.sbatch"))
SCRIPTS = [*SBATCH, REPO / "tests/cluster/install.sh", REPO / "deploy/mlflow/start.sh"]


def tool(name: str) -> str:
    """A program of the development extra."""
    found = shutil.which(name, path=str(TOOLS)) or shutil.which(name)
    assert found, f"{name} is missing: make setup"
    return found


# --- the image ----------------------------------------------------------------------------------


def lists(tmp_path: Path, *extras: str) -> dict[str, list[str]]:
    """The lines of each layer's file."""
    command = [sys.executable, "-I", MAKE_LISTS, REPO / "pyproject.toml", REPO / "constraints.txt"]
    subprocess.run([*command, tmp_path, *extras], check=True)
    return {f.stem: f.read_text().splitlines() for f in tmp_path.glob("*.txt")}


def test_each_layer_of_the_image_has_its_own_packages(tmp_path):
    found = lists(tmp_path, "image")
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    pair = [d for d in project["dependencies"] if re.match("torch(vision)?==", d)]
    assert sorted(found["torch"]) == sorted(pair)
    assert all("==" in line for line in found["cuda"])
    assert {"nvidia-cublas", "nvidia-nccl-cu13", "triton"} <= {
        line.partition("==")[0] for line in found["cuda"]
    }
    rest = {re.split(r"[\[<>=]", line)[0] for line in found["rest"]}
    asked = {re.split(r"[\[<>=]", d)[0] for d in project["dependencies"]}
    assert asked - {"torch", "torchvision"} <= rest
    # What jobs in a cluster need: batches, data of object stores, a database for a search.
    assert {"submitit", "s3fs", "gcsfs", "datasets", "psycopg", "dumb-init"} <= rest
    assert not {"ray", "pytest"} & rest
    assert {"ray", "submitit"} <= {
        re.split(r"[\[<>=]", r)[0] for r in lists(tmp_path, "ray")["rest"]
    }


def test_every_package_of_the_image_has_a_version(tmp_path):
    named = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (REPO / "constraints.txt").read_text().splitlines()
    }
    for line in lists(tmp_path, "image", "ray")["rest"]:
        assert re.split(r"[\[<>=]", line)[0] in named, f"{line}: make constraints"


def test_an_unknown_extra_is_refused(tmp_path):
    main = runpy.run_path(str(MAKE_LISTS))["main"]
    with pytest.raises(SystemExit, match=r"EXTRAS names 'rey', .*it has .*ray, s3"):
        main(str(REPO / "pyproject.toml"), str(REPO / "constraints.txt"), str(tmp_path), "rey")


def test_secrets_of_a_server_do_not_reach_a_build():
    ignored = (REPO / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    offered = {line[1:] for line in ignored if line.startswith("!")}
    assert {"deploy/image", "deploy/mlflow"} == {o for o in offered if o.startswith("deploy")}


# --- compose.yaml -------------------------------------------------------------------------------


def test_compose_is_as_its_schema_says(tmp_path):
    check = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*check, REPO / "compose.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "compose.yaml"
    wrong.write_text((REPO / "compose.yaml").read_text().replace("read_only:", "readonly:"))
    assert subprocess.run([*check, wrong], capture_output=True).returncode == 1


def test_the_job_of_compose_finds_the_server_and_may_write_where_volumes_are():
    content = composed({**HOSTED, "DATA": "/photos"})
    job, server = content["services"]["train"], content["services"]["mlflow"]
    assert job["profiles"] == ["train"]
    assert job["depends_on"] == {"mlflow": {"condition": "service_healthy"}}
    host = job["environment"]["MLFLOW_TRACKING_URI"].removeprefix("http://")
    assert host in server["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert set(job["networks"]) <= set(server["networks"])
    assert job["read_only"] is True
    assert job["cap_drop"] == ["ALL"]
    places = {v["target"]: v["source"] for v in job["volumes"] if isinstance(v, dict)}
    assert places == {"/data": "/photos"}
    named = dict(v.split(":") for v in job["volumes"] if isinstance(v, str))
    assert named == {"output": "/output", "cache": "/cache"}
    assert set(named) <= set(content["volumes"])
    program, pipeline, *given = job["entrypoint"][job["entrypoint"].index("--") + 1 :]
    assert program == "tl"
    check_overrides(pipeline, spelled(pipeline, given))


def test_the_image_starts_as_compose_and_the_dockerfile_say():
    line = re.search(r"^ENTRYPOINT (.*)$", (REPO / "Dockerfile").read_text(), re.MULTILINE)
    assert line is not None
    entry = yaml.safe_load(line[1])
    assert composed(HOSTED)["services"]["train"]["entrypoint"][: len(entry)] == entry


# --- Slurm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.name)
def test_scripts_are_clean(script):
    done = subprocess.run([tool("shellcheck"), script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SBATCH, ids=lambda s: s.stem)
def test_slurm_jobs_are_stopped_with_time_for_a_checkpoint_and_started_again(script):
    text = script.read_text()
    options = re.findall(r"^#SBATCH (--\S+)$", text, re.MULTILINE)
    assert {"--requeue", "--open-mode=append"} <= set(options)
    (signal,) = [o for o in options if o.startswith("--signal=")]
    assert int(signal.partition("@")[2]) >= 120
    assert "scontrol requeue" in text
    # Slurm reads its options above the first command only.
    body = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert body[0] == "set -euo pipefail"


@pytest.mark.parametrize("script", SBATCH, ids=lambda s: s.stem)
def test_slurm_jobs_are_commands(script):
    text = re.sub(r"\\\n", " ", script.read_text())
    (line,) = re.findall(r'^srun apptainer .*"\$image".*? train (.*?)(?: \|\| .*| &)$', text, re.M)
    text = line.replace("$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT", "0/4").replace('"$@"', "")
    check_overrides("train", spelled("train", ["data.root=x", *shlex.split(text)]))
