"""The arrows of the design: which room may import which, and what stays free of torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
# Room of tl/ -> rooms that it may import. A new room or arrow is a decision, written down here.
MAY_IMPORT = {
    "config": set(),
    "bundle": set(),
    "cores": set(),
    "quiet": set(),
    "fingerprints": set(),
    "data": {"config", "bundle", "cores", "files", "fingerprints"},
    "models": {"config", "bundle", "ranks"},
    "finetuning": {"config", "models"},
    "graph": {"config", "models"},
    "batches": {"config", "cores", "display", "files", "locks", "ranks", "sections"},
    "cache": {"config", "cores", "locks"},
    "engine": {"config", "cores", "quiet"},
    "imbalance": {"config"},
    "losses": {"config", "imbalance"},
    "scores": {"config", "losses"},
    "heads": {"losses"},
    "decision": {"config"},
    "evidence": {"config", "cores", "decision"},
    "advice": {"config", "decision", "display", "files", "figures", "pages", "sections"},
    "files": set(),
    "locks": set(),
    "ranks": {"config", "cores"},
    "environment": set(),
    "launching": {"config", "cores", "environment", "files", "ranks", "runs", "stopping"},
    "sections": set(),
    "stopping": {"config"},
    "module": {"config", "finetuning", "graph", "heads", "losses", "models", "scores"},
    "evaluation": {"config"},
    "audit": {"bundle", "config", "cores", "data", "files", "imbalance", "pages", "sections"},
    "pages": {"config", "cores"},
    "figures": {"config", "evaluation"},
    "display": {"config", "evaluation", "figures", "sections", "ranks"},
    "training": {
        *("config", "data", "models", "finetuning", "graph", "cache", "cores", "engine", "module"),
        *("evaluation", "display", "files", "decision", "evidence"),
        *("losses", "scores", "imbalance", "stopping"),
        *("ranks",),
    },
    "export": {"config", "bundle", "cores", "graph", "models", "quiet", "runs", "ranks"},
    "predictions": {"config", "bundle", "files"},
    "registry": {"bundle", "config", "data", "evaluation", "fingerprints", "tracking"},
    "comparison": {"bundle", "config", "evaluation", "files", "pages", "sections", "tracking"},
    "tracking": {"bundle", "config", "environment", "files", "locks", "ranks"},
    "search": {
        *("config", "data", "models", "finetuning", "training", "module", "evaluation", "runs"),
        *("display", "tracking", "pages", "locks", "cores", "stopping", "launching"),
    },
    "report": {
        *("config", "advice", "data", "decision", "evaluation", "pages", "runs", "sections"),
        *("ranks",),
    },
    "runs": {
        *("config", "data", "models", "finetuning", "training", "evaluation", "figures", "files"),
        *("audit", "decision", "advice", "sections"),
        *("ranks",),
    },
}


def imported(file: Path, package: str) -> Iterator[str]:
    """Every module that `file`, which belongs to `package`, imports anywhere, in functions too."""
    tree = ast.parse(file.read_text(), str(file))
    if package == "tl.pipelines":  # may name the types of what tl hands them
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level]
            module = ".".join((above if node.level else []) + [node.module or ""]).strip(".")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def python_files(folder: str) -> list[Path]:
    files = sorted((REPO / folder).rglob("*.py"))
    assert files, f"no Python file in {folder}/"
    return files


@pytest.mark.parametrize("file", python_files("tl"), ids=lambda f: str(f.relative_to(REPO)))
def test_rooms_import_only_what_the_design_allows(file):
    inside = file.relative_to(REPO / "tl")
    room = inside.parts[0].removesuffix(".py")
    if room in {"__init__", "__main__"}:
        return  # the lazy face of the whole package, and its command
    assert room in MAY_IMPORT, f"tl/{inside} is a new room: add it to MAY_IMPORT and to the docs"
    package = ".".join(["tl", *inside.parts[:-1]])
    found = {name.split(".")[1] for name in imported(file, package) if name.startswith("tl.")}
    assert found - {room} <= MAY_IMPORT[room]


@pytest.mark.parametrize("file", python_files("pipelines"), ids=lambda f: f.name)
def test_pipelines_import_only_tl_and_hydra(file):
    allowed = {"tl", "hydra", "hydra_plugins", "omegaconf", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imported(file, "tl.pipelines")} <= allowed


@pytest.mark.parametrize(
    "module", ["tl", "tl.config", "tl.bundle", "tl.evaluation", "tl.display", "tl.pipelines"]
)
def test_help_and_prediction_do_not_load_torch(module):
    heavy = "{'torch', 'torchvision', 'timm', 'pytorch_lightning', 'mlflow'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
