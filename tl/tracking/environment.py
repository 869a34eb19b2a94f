"""What a run ran on: revision of the code, versions, machine."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from .store import redacted

MAIN_PACKAGES = (
    *("tl", "torch", "torchvision", "timm", "pytorch-lightning", "torchmetrics", "mlflow"),
    *("onnx", "onnxruntime", "numpy", "pandas", "pillow", "scikit-learn"),
)


def environment() -> dict[str, Any]:
    """A description of this process, fit for JSON; what cannot be found out is None."""
    return {
        "command": redacted(shlex.join(sys.argv)),
        "working_directory": str(Path.cwd()),
        "git": _own_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "devices": devices(),
        "packages": packages(),
    }


@cache
def _own_revision() -> dict[str, Any] | None:
    """Revision of the code that this process has loaded; it stays what it was at the first job."""
    return git_revision(_code_folder())


def _code_folder() -> Path:
    """The repository that this code lies in; for an installed tl, the working directory."""
    source = Path(__file__).resolve().parents[2]
    return source if (source / ".git").exists() else Path.cwd()


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Commit of a working tree and whether it has changes; None without git or a repository."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changes = _git(folder, "status", "--porcelain")
    return {
        "commit": commit,
        "branch": _git(folder, "rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": None if changes is None else bool(changes),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError, UnicodeError):
        return None
    return done.stdout.strip()


@cache
def packages() -> dict[str, str]:
    """Installed distributions and their versions, by name; read once, they stay for a process."""
    # Each `metadata` parses its file again, and each file is hundreds of lines.
    about = [distribution.metadata for distribution in metadata.distributions()]
    found = {text["Name"]: text["Version"] for text in about if text["Name"]}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def main_packages(installed: dict[str, str]) -> dict[str, str]:
    """The versions that matter most for a result."""
    by_name = {name.lower().replace("_", "-"): version for name, version in installed.items()}
    return {name: by_name[name] for name in MAIN_PACKAGES if name in by_name}


def devices() -> list[str]:
    """Names of the GPUs that PyTorch sees, or of the processor."""
    import torch

    if torch.cuda.is_available():
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [_processor()]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
