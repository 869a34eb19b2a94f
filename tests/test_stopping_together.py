"""Processes that train together stop together, though one alone was asked to."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("stopped_together.py")


def two(cache: str, folder: Path, at: str = "") -> tuple[list[object], str]:
    """What became of both processes, and what they said."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    done = subprocess.run(
        [sys.executable, *launcher, SCRIPT, cache, folder, at],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TL_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return found, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache", "at", "saved"),
    [
        ("off", "head:1:1", "checkpoint saved at epoch 2, step"),
        ("on", "head:0:0", "checkpoint saved at epoch 1, step"),
    ],
)
def test_two_processes_stop_at_the_same_step_and_go_on_together(cache, at, saved, tmp_path):
    whole, _ = two(cache, tmp_path / "whole")
    broken, said = two(cache, tmp_path / "broken", at)
    assert broken == ["interrupted", "interrupted"]
    assert saved in said
    again, said = two(cache, tmp_path / "broken")
    assert again == whole
    if cache == "off":
        assert "going on in epoch 2, after" in said
