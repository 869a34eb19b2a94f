"""The wheel: its content, its promises, and that it works far from the repository."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    ours = {"PYTHONPATH", "VIRTUAL_ENV", "MLFLOW_TRACKING_URI"}
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=kept | env, capture_output=True, text=True
    )
    assert done.returncode == 0, (
        f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Built from a copy: setuptools would leave build/ in the repository and pack what lies there.
    source = tmp_path_factory.mktemp("source")
    out = tmp_path_factory.mktemp("dist")
    for name in ("tl", "conf", "pipelines"):
        shutil.copytree(REPO / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", out, source, cwd=source)
    (file,) = out.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Bin folder of an environment with the wheel, and with the running one's other packages."""
    root = tmp_path_factory.mktemp("elsewhere") / "env"
    venv.create(root, with_pip=False)
    python = root / "bin" / "python"
    options = ["--no-deps", "--no-index", "--disable-pip-version-check"]
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel, cwd=root)
    (packages,) = root.glob("lib/python*/site-packages")
    # A path in a .pth file adds the folder, but not the .pth files in it: no editable tl gets in.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return root / "bin"


def test_wheel_holds_code_and_configs_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    files = {
        "tl": [
            *(REPO / "tl").rglob("*.py"),
            REPO / "tl" / "py.typed",
            *(f for kind in ("html", "css", "js") for f in (REPO / "tl").rglob(f"*.{kind}")),
        ],
        "conf": [*(REPO / "conf").rglob("*.yaml"), REPO / "conf" / "__init__.py"],
        "pipelines": [*(REPO / "pipelines").rglob("*.py")],
    }
    assert min(len(found) for found in files.values()) > 1
    expected = {
        ("" if top == "tl" else "tl/") + f.relative_to(REPO).as_posix()
        for top, found in files.items()
        for f in found
    }
    # Hydra takes launchers from a namespace of its own only.
    launcher = "tl/pipelines/hydra_plugin/__init__.py"
    assert names == expected - {launcher} | {"hydra_plugins/tl/__init__.py"}


def test_wheel_promises_script_licence_and_python(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = {
            n.split("/", 1)[1]: archive.read(n) for n in archive.namelist() if ".dist-info/" in n
        }
    assert info["entry_points.txt"].decode().split() == [
        "[console_scripts]",
        "tl",
        "=",
        "tl.pipelines:main",
    ]
    assert "licenses/LICENSE" in info
    metadata = info["METADATA"].decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata


def test_constraints_pin_every_dependency_within_its_bounds():
    lines = [
        line for line in (REPO / "constraints.txt").read_text().splitlines() if line[:1] != "#"
    ]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[^\s;@/]+", line)] == []
    pins = {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    wanted += PROJECT["optional-dependencies"]["server"]  # dev asks for it by `tl[server]`
    for requirement in map(Requirement, wanted):
        if requirement.name == PROJECT["name"]:
            continue
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement} has no exact version"
        assert requirement.specifier.contains(pin), f"{requirement} forbids {pin}"


def test_environment_has_the_pinned_versions_of_the_stack():
    pins = dict(
        line.split("==")
        for line in (REPO / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    for name in ("torch", "torchvision", "timm", "pytorch-lightning", "hydra-core", "mlflow"):
        assert version(name) == pins[name], f"{name}: run `make setup`"


def test_installed_wheel_lists_its_pipelines(installed, tmp_path):
    where = run(installed / "python", "-c", "import tl.conf; print(tl.conf.__file__)", cwd=tmp_path)
    assert Path(where.stdout.strip()).is_relative_to(installed.parent)
    shown = run(installed / "tl", "--help", cwd=tmp_path).stdout
    for name in ("advise", "compare", "demo", "evaluate", "export", "predict", "sync", "train"):
        assert re.search(rf"^  {name} ", shown, re.MULTILINE), f"{name} is missing in:\n{shown}"
    assert run(installed / "tl", "--version", cwd=tmp_path).stdout.split() == [
        "tl",
        PROJECT["version"],
    ]


@pytest.mark.slow
def test_installed_wheel_trains_and_predicts(installed, image_folder, tmp_path):
    data = image_folder()
    tl, cache = installed / "tl", str(tmp_path / "cache")
    train = [f"data.root={data}", "experiment=smoke", "output_dir=run"]
    run(tl, "train", *train, cwd=tmp_path, TL_CACHE_DIR=cache)
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"bundle", "metrics.json", "run.json"}
    predict = ["bundle=run/bundle", f"source={data}/val", "output=found.csv"]
    run(tl, "predict", *predict, cwd=tmp_path, TL_CACHE_DIR=cache)
    header, *rows = (tmp_path / "found.csv").read_text().splitlines()
    assert header.startswith("source,label,score")
    assert len(rows) == len(list(data.glob("val/*/*.png")))
