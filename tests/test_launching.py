"""`tl train` in several processes that it starts itself: one run, one message, whatever dies."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from processes import finish, start, timeless

from tl.runs import RunFolder

TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
SMALL = (
    "model=test_resnet",
    "model.weights=none",
    "finetune.patience=0",
    "finetune.batch_norm=frozen",
    "data.batch_size=8",
    "data.num_workers=0",
)
SECONDS = 300


@pytest.fixture
def images(image_folder) -> Path:
    return image_folder(splits={"train": 9, "val": 5})


def workers(job: subprocess.Popen[str]) -> list[int]:
    """The processes that train, in the order of their ranks."""
    found = {}
    for process in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error, KeyError):
            if "tl.pipelines.together" in process.cmdline():
                found[process.environ()["RANK"]] = process.pid
    return [found[rank] for rank in sorted(found)]


def until(job: subprocess.Popen[str], file: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not file.exists():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline, f"{file} never appeared"
        time.sleep(0.01)


def runs() -> list[tuple[str]]:
    store = os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(store)) as database:
        return database.execute("select status from runs").fetchall()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.root=nowhere", "DataError: data.root: there is no folder"),
        ("model.name=no_such_net", "ConfigError: "),
    ],
)
@pytest.mark.slow
def test_an_error_is_one_message_with_its_code(setting, message, images):
    job = start(f"data.root={images}", *SMALL, *TWO, setting)
    output, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 2, output
    assert output.count(message) == 1, output
    assert "Traceback" not in output
    assert not Path("runs").exists()


@pytest.mark.slow
def test_two_processes_are_one_run_and_compute_once(images, tmp_path):
    folder = tmp_path / "run"
    method = ("finetune=linear_probe", "finetune.epochs=2", "cache.mode=on")
    output = finish(start(f"data.root={images}", f"output_dir={folder}", *method, *SMALL, *TWO))
    assert output.count("audit: 42 images") == output.count("phase 1 of 1: head, after") == 1
    assert runs() == [("FINISHED",)]
    assert (folder / "bundle/model.onnx").is_file()
    assert not (folder / "checkpoints/job.json").exists(), "a job that has ended is none to go on"
    # Each view of an image is computed once, by either process; val is read in one view.
    cache = Path(os.environ["TL_CACHE_DIR"], "activations")
    parts = [
        sorted(json.loads(file.read_text())["images"] for file in shelf.glob("*/segment.json"))
        for shelf in cache.iterdir()
        if shelf.is_dir()
    ]
    assert all(len(part) == 2 for part in parts), parts
    assert max(map(sum, parts)) == 27 + 15
    assert all(sum(part) in {27, 27 + 15} for part in parts)


@pytest.mark.slow
def test_a_killed_process_is_started_again(images, tmp_path):
    method = ("finetune=lp_ft", "finetune.epochs=8", "cache.mode=off", "export.enabled=false")
    place, whole = tmp_path / "run", tmp_path / "whole"
    finish(start(f"data.root={images}", f"output_dir={whole}", *method, *SMALL, *TWO))
    job = start(f"data.root={images}", f"output_dir={place}", *method, *SMALL, *TWO)
    until(job, place / "checkpoints/2-all/last.ckpt")
    os.kill(workers(job)[1], signal.SIGKILL)
    output = finish(job)
    assert "process 1 was killed (SIGKILL): starting again at the last checkpoint" in output
    assert "phase head is done already" in output
    found, expected = (timeless(RunFolder(p).read_metrics()) for p in (place, whole))
    assert found == pytest.approx(expected, rel=1e-6)
    assert runs() == [("FINISHED",), ("FINISHED",)]


@pytest.mark.slow
def test_sigterm_ends_all_after_a_step_and_resume_goes_on(images, tmp_path):
    method = ("finetune=lp_ft", "finetune.epochs=8", "cache.mode=off", "export.enabled=false")
    place = tmp_path / "run"
    job = start(f"data.root={images}", f"output_dir={place}", *method, *SMALL, *TWO)
    until(job, place / "checkpoints/2-all/last.ckpt")
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 130, output
    assert output.count(f"interrupted; continue with: tl train resume={place}") == 1, output
    assert output.count("checkpoint saved at epoch") == 1, output
    assert "Traceback" not in output
    assert runs() == [("KILLED",)]
    output = finish(start(f"resume={place}"))
    assert "phase head is done already" in output
    assert runs() == [("FINISHED",)]


@pytest.mark.slow
def test_fsdp_trains_as_one_process_does_and_goes_on_after_a_kill(images, tmp_path):
    method = ("finetune=lp_ft", "finetune.epochs=4", "cache.mode=off", "export.enabled=false")
    net = (*SMALL[1:], "model.name=test_vit")
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start(f"data.root={images}", f"output_dir={one}", *method, *net, "trainer=cpu"))
    how = ("trainer=fsdp", *TWO[1:])
    job = start(f"data.root={images}", f"output_dir={two}", *method, *net, *how)
    until(job, two / "checkpoints/2-all/last.ckpt")
    os.kill(workers(job)[0], signal.SIGKILL)
    output = finish(job)
    assert "phase head is done already" in output
    found = [timeless(RunFolder(folder).read_metrics()) for folder in (one, two)]
    assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-4)
