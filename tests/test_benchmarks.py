"""The benchmark programs work: their images, their sums, and whole lines on 24 tiny images."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
BENCHMARKS = REPO / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """Import of a program as it sees itself: from its own folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module


def compare(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARKS / "compare.py", *map(str, args)],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def test_four_sets_become_one_with_one_split(module, image_folder, tmp_path):
    images = module("images")
    data = tmp_path / "data"
    image_folder(data / "hymenoptera", {"train": 3, "val": 2}, classes=["ants", "bees"])
    for name, classes in (
        ("flowers5", ["rose"]),
        ("sign_digits", ["0", "1"]),
        ("neu_surface", ["a"]),
    ):
        image_folder(data / name, {"": 40}, classes=classes)
    copy = data / "flowers5" / "rose" / "copy.PNG"
    copy.write_bytes((data / "sign_digits" / "0" / "00.png").read_bytes())
    made = images.prepare("four", tmp_path / "work", tmp_path)
    files = images.every_image(made)
    assert len(files) == 2 * 3 + 2 * 2 + 4 * 40 + 1
    assert {f.parent.name for f in files if f.parents[1].name == "val"} >= {
        "hymenoptera_ants", "flowers5_rose", "sign_digits_0", "neu_surface_a",
    }  # fmt: skip
    assert len(list(made.glob("val/hymenoptera_ants/*"))) == 2
    content: dict[str, set[bytes]] = {"train": set(), "val": set()}
    for file in files:
        if not file.parent.name.startswith("hymenoptera"):  # its split is given
            content[file.parents[1].name].add(file.read_bytes())
    assert not content["train"] & content["val"]
    assert 0.1 < len(content["val"]) / (len(content["train"]) + len(content["val"])) < 0.35
    assert images.prepare("four", tmp_path / "work", tmp_path) == made


def test_images_of_the_memory_test_are_small_and_differ(module, tmp_path):
    memory = module("memory")
    memory.make_images(tmp_path, 30)
    files = list(tmp_path.rglob("*.jpg"))
    assert len({file.read_bytes() for file in files}) == 30
    assert max(file.stat().st_size for file in files) < 20_000
    assert len(list(tmp_path.iterdir())) == memory.CLASSES
    memory.make_images(tmp_path, 31)
    assert len(list(tmp_path.rglob("*.jpg"))) == 31


def test_shares_of_a_profile(module):
    profile = """\
thread (7);<module> (site.py:1) 10
thread (7): MainThread;fit (/lib/pytorch_lightning/trainer.py:1);step (/lib/torch/optim.py:2) 60
thread (7): MainThread;fit (/lib/pytorch_lightning/trainer.py:1);log (/lib/mlflow/client.py:9) 20
thread (7): MainThread;run (/repo/tl/training/__init__.py:3);stage_hashes (/repo/tl/hash.py:4) 6
thread (7): MainThread;train (/repo/pipelines/train.py:1);save_curves (/repo/tl/figures.py:4) 4
thread (8): Thread-1;metrics (/lib/mlflow/system.py:9);wait (/lib/threading.py:1) 90
thread (8): Thread-1;metrics (/lib/mlflow/system.py:9);cpu_percent (/lib/psutil/__init__.py:1) 3
thread (9): QueueFeeder;work (/lib/torch/data.py:9) 50
"""
    counts, total = module("compare").shares(profile)
    assert total == 100
    assert counts == {"tracking": 20, "audit": 6, "tables": 4, "threads of MLflow": 3}


def test_findings_are_kept_and_found_again(module, tmp_path):
    measuring = module("measuring")
    file = tmp_path / "deep" / "results.jsonl"
    measuring.Results(file, {"data": "tiny"}).add("job", {"tool": "tl"}, line="probe", repeat=0)
    results = measuring.Results(file, {"data": "four", "commit": "a"})
    for repeat, value in enumerate((3.0, 1.0, 1.2)):
        row = {"measure": "a / b", "value": value, "goal": 1.5, "at_least": True}
        results.add("finding", row, line="probe", repeat=repeat)
    assert results.findings(line="probe", repeat=1) == [measuring.Finding("a / b", 1.0, 1.5)]
    assert results.findings(line="fastai") == []
    assert measuring.Results(file, {"data": "tiny"}).findings(line="probe") == []
    assert measuring.Results(file, {"data": "four", "commit": "b"}).findings(line="probe")
    [median] = measuring.medians(results.findings(line="probe"))
    assert (median.value, median.reached) == (1.2, False)
    assert median.words == "| a / b | ≥ 1.5 | 1.2, missed |"


def test_every_line_is_listed_and_has_its_command_in_the_docs(module):
    page = (REPO / "docs" / "performance.md").read_text()
    listed = [line.split()[0] for line in compare("--list").stdout.splitlines()]
    assert listed == list(module("compare").LINES)
    commands = [line for line in page.splitlines() if "benchmarks/compare.py" in line]
    assert {name for name in listed if not any(f" {name}" in line for line in commands)} == set()


@pytest.mark.slow
def test_lines_without_peers_on_tiny_images(tmp_path):
    file = tmp_path / "results.jsonl"
    lines = ("prefix", "full")
    done = compare(*lines, "--tiny", "--work", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["line"] for row in rows if row["kind"] == "finding"] == list(lines)
    assert all(row["value"] > 0 for row in rows if row["kind"] == "finding")
    assert {row["tool"] for row in rows if row["kind"] == "job"} >= {
        "tl full",
        "plain PyTorch loop",
    }
    again = compare(*lines, "--tiny", "--work", tmp_path, "--resume")
    assert "repetition" not in again.stdout
    assert again.stdout.count("|") > done.stdout.count("|") / 3
