"""Figures of a job in two processes: those of one, though val cannot be shared out evenly."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("together.py")
HEADLINE = {"single": "acc", "multi": "map", "regression": "mae"}


def found_by(processes: int, task: str, cache: str, folder: Path) -> list[dict]:
    """What each process of one training found."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), SCRIPT, task, cache, folder],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TL_CACHE_DIR": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize(
    ("task", "cache"),
    [
        ("single", "off"),
        pytest.param("single", "on", marks=pytest.mark.slow),
        pytest.param("multi", "off", marks=pytest.mark.slow),
        pytest.param("regression", "on", marks=pytest.mark.slow),
    ],
)
def test_no_image_counts_twice_where_two_processes_share_val(task, cache, tmp_path):
    (alone,) = found_by(1, task, cache, tmp_path / "one")
    both = found_by(2, task, cache, tmp_path / "two")
    assert both[0] == both[1]
    assert (both[0]["images"], both[0]["different"]) == (21 + 13, 21 + 13)
    score = f"val/{HEADLINE[task]}"
    for found in (alone, both[0]):
        # A fit keeps the weights of an epoch; val of that epoch is val of the trained model.
        kept = found["best"][0] - 1
        row = found["history"][kept]
        assert found["kept"] == [True, False]
        assert row["val/loss"] == pytest.approx(found["metrics"]["val/loss"], rel=1e-4)
        assert row[score] == pytest.approx(found["metrics"][score], rel=1e-4)
    # The head trains alike: the same images make a step, and their gradients are averaged.
    for one, two in zip(alone["history"][:2], both[0]["history"][:2], strict=True):
        assert two == pytest.approx(one, rel=1e-4)
    assert both[0]["metrics"] == pytest.approx(alone["metrics"], rel=1e-3, abs=1e-4)
