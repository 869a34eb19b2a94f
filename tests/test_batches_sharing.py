"""Jobs of a batch on one machine: cores, the activation cache, and the request to stop."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from commands import UNTRACKED, start
from processes import timeless

from tl.batches.ledger import Ledger

TEN = [round(0.001 * n, 3) for n in range(1, 11)]


def batch(place: Path, data: Path, *settings: str) -> subprocess.Popen[str]:
    fixed = ["hydra/launcher=local", "cache.mode=on", "augment=none", "data.num_workers=0"]
    return start(
        *("train", "-m", f"data.root={data}", *UNTRACKED, f"output_dir={place}"),
        *(*fixed, *settings),
    )


def most_at_once(place: Path) -> int:
    """How many jobs ran beside each other."""
    tries = [attempt for entry in Ledger(place).all() for attempt in entry.attempts]
    return max(sum(a.began <= b.began < a.ended for a in tries) for b in tries)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch, tmp_path):
    """Of this machine, which others may use, too."""
    monkeypatch.setenv("TL_CORES", "2")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.mark.slow
def test_ten_jobs_over_one_data_set_and_backbone_embed_once(image_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TL_CACHE_DIR", str(cache := tmp_path / "cache"))
    place = tmp_path / "batch"
    rates = ",".join(map(str, TEN))
    process = batch(
        place, image_folder(splits={"train": 30, "val": 6, "test": 3}),
        "finetune=linear_probe", "finetune.epochs=2", f"finetune.head_lr={rates}",
    )  # fmt: skip
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert "2 at once" in out
    assert most_at_once(place) == 2
    said = [(place / f"logs/{n}.txt").read_text() for n in range(10)]
    # Of train and val, before a phase; test comes later, and is computed once, too.
    computed = [re.findall(r"^computed +(\d+) views in", text, re.MULTILINE) for text in said]
    assert sum(int(views) for job in computed for views in job) == 3 * (30 + 6)
    nothing = [t for t in said if re.search(r"computed +nothing: (all of it|another job)", t)]
    assert len(nothing) == 9
    shelves = [json.loads(f.read_text()) for f in cache.glob("activations/*/*/segment.json")]
    assert sum(shelf["images"] for shelf in shelves) == 3 * (30 + 6 + 3)
    # What engines cost is remembered for the threads that they had: those of one core.
    known = (cache / "engines.json").read_text()
    assert " 1 threads" in known
    assert " 2 threads" not in known


@pytest.mark.slow
def test_a_batch_that_is_asked_to_stop_checkpoints_its_jobs_and_goes_on(image_folder, tmp_path):
    data, place = image_folder(splits={"train": 30, "val": 4}), tmp_path / "batch"
    settings = ["finetune=full", "finetune.epochs=15", "finetune.patience=0", "seed=1,2,3"]
    process = batch(place, data, *settings)
    deadline = time.monotonic() + 240
    while len(list(place.glob("*/checkpoints/*/last.ckpt"))) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, out + err
    assert "the same command goes on" in err
    said = [(place / f"logs/{n}.txt").read_text() for n in range(2)]
    saved = [re.search(r"checkpoint saved at epoch (\d+), step", text) for text in said]
    assert all(saved), said
    assert [e.state for e in Ledger(place).all()] == ["interrupted", "interrupted", "waiting"]

    process = batch(place, data, *settings)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert [e.state for e in Ledger(place).all()] == ["done"] * 3
    # The first job in peace, with as many threads.
    whole = subprocess.run(
        [sys.executable, "-m", "tl", "train", f"data.root={data}", *UNTRACKED, "augment=none",
         "cache.mode=on", "data.num_workers=0", *settings[:3], "seed=1",
         f"output_dir={tmp_path / 'whole'}"],
        env={**os.environ, "TL_CORES": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    left, right = (
        timeless(json.loads((run / "metrics.json").read_text()))
        for run in (place / "0", tmp_path / "whole")
    )
    assert left == right
