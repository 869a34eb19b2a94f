"""Ctrl-C and SIGTERM: at once, or after the running step; resumed fits end as undisturbed ones."""

from __future__ import annotations

import os
import signal
import time

import pytest
from commands import _signals_kept
from methods import assert_same, run
from processes import start

from tl import stopping
from tl.config import Interrupted
from tl.module import TransferModule
from tl.training.lightning import Checkpoints

IMAGES = [
    "augment=strong", "model.image_size=32", "model.drop_rate=0.2", "cache=off", "finetune=full",
    "finetune.epochs=2", "finetune.ema=true", "finetune.accumulate=2", "data.num_workers=2",
    "finetune.batch_norm=train",
]  # fmt: skip


@pytest.fixture(autouse=True)
def installed():
    with _signals_kept():
        stopping.install()
        yield
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def me(signum=signal.SIGTERM):
    os.kill(os.getpid(), signum)


# --- the face -----------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_outside_of_a_fit_a_signal_ends_the_job_at_once_and_the_next_ones_are_not_heard(signum):
    with pytest.raises(Interrupted):
        me(signum)
    assert stopping.requested()
    me(signum)  # in the clean-up
    me(signal.SIGINT)
    stopping.install()  # the next job of this process
    assert not stopping.requested()


def test_within_a_fit_it_is_a_wish_until_the_fit_ends():
    done = []
    with pytest.raises(Interrupted), stopping.after_step():  # noqa: PT012
        me()
        done.append(stopping.requested())
        me(signal.SIGINT)  # what a terminal sends beside a launcher
        me()
        done.append("step")
    assert done == [True, "step"]


def test_a_step_that_does_not_end_is_cut(monkeypatch):
    monkeypatch.setenv("TL_STOP_SECONDS", "0.2")
    stopping.install()
    began = time.monotonic()
    with pytest.raises(Interrupted), stopping.after_step():  # noqa: PT012
        me()
        time.sleep(30)
    assert 0.1 < time.monotonic() - began < 5


@pytest.mark.parametrize("seconds", ["soon", "0", "-3", "nan", "inf"])
def test_a_time_that_is_none_is_refused(tl, monkeypatch, seconds):
    monkeypatch.setenv("TL_STOP_SECONDS", seconds)
    tl("train", "data.root=x").refused(
        f"TL_STOP_SECONDS must be a number of seconds, got '{seconds}'"
    )


def test_what_is_written_after_the_step_may_take_its_time(monkeypatch):
    monkeypatch.setenv("TL_STOP_SECONDS", "0.1")
    stopping.install()
    written = []
    with pytest.raises(Interrupted), stopping.after_step():  # noqa: PT012
        me()
        stopping.in_time()
        time.sleep(0.3)
        written.append(True)
        stopping.stop()
    assert written


def test_a_second_signal_is_heard_at_once(monkeypatch):
    monkeypatch.setattr(stopping, "SAME_SECONDS", 0.05)
    began = time.monotonic()
    with pytest.raises(Interrupted), stopping.after_step():  # noqa: PT012
        me(signal.SIGINT)
        time.sleep(0.1)
        me(signal.SIGTERM)  # a launcher, after its own Ctrl-C
        me(signal.SIGINT)
        time.sleep(30)
    assert time.monotonic() - began < 4


def test_a_fit_that_nobody_asks_to_stop_goes_on():
    with stopping.after_step():
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


# --- a fit --------------------------------------------------------------------------------------


def stop_at(patch, epoch, batch, phase=None):
    """Ask this process to stop in the middle of a step."""
    as_always = TransferModule.on_train_batch_start

    def on_train_batch_start(module, batch_values, batch_idx):
        as_always(module, batch_values, batch_idx)
        if (module.current_epoch, batch_idx) == (epoch, batch) and phase in (
            None,
            module.phase.name,
        ):
            me()

    patch.setattr(TransferModule, "on_train_batch_start", on_train_batch_start)


def interrupted_and_whole(folder, tmp_path, monkeypatch, capsys, settings, at):
    """What a stop said; that the resumed run found what an undisturbed one found."""
    whole = run(folder, tmp_path / "whole", *settings)
    stopping.install()
    with monkeypatch.context() as patch:
        stop_at(patch, *at)
        # Nothing is written but by the stop.
        patch.setattr(Checkpoints, "affordable", lambda _: False)
        with pytest.raises(Interrupted):
            run(folder, tmp_path / "broken", *settings)
    said = capsys.readouterr().out
    stopping.install()
    broken = run(folder, tmp_path / "broken", *settings)
    assert_same(whole, broken)
    return said + capsys.readouterr().out


@pytest.mark.parametrize("minutes", [0, 5])
def test_a_stop_within_an_epoch_of_images(image_folder, tmp_path, monkeypatch, capsys, minutes):
    data = image_folder(splits={"train": 14, "val": 4})
    settings = [*IMAGES, f"checkpoint_minutes={minutes}"]
    said = interrupted_and_whole(data, tmp_path, monkeypatch, capsys, settings, (1, 2))
    # Batch 2 begins an optimizer step, which ends with batch 3.
    assert "checkpoint saved at epoch 2, step 5" in said
    assert "going on in epoch 2, after 4 of 6 batches" in said


def test_a_stop_at_the_last_batch_of_the_last_epoch(image_folder, tmp_path, monkeypatch, capsys):
    data = image_folder(splits={"train": 14, "val": 4})
    said = interrupted_and_whole(data, tmp_path, monkeypatch, capsys, IMAGES, (1, 5))
    assert "checkpoint saved at epoch 2, step 6" in said


@pytest.mark.parametrize(
    ("at", "said"),
    [
        ((1, 0, "head"), "checkpoint saved at epoch 2, step 12"),
        ((1, 0, "all"), "checkpoint saved at epoch 2, step 12"),
    ],
)
def test_a_stop_in_a_phase_on_cached_values(image_folder, tmp_path, monkeypatch, capsys, at, said):
    data = image_folder(splits={"train": 14, "val": 4})
    settings = ["finetune=lp_ft", "finetune.phases.all.train_stages=1", "finetune.epochs=3"]
    settings += ["cache.mode=on", "data.num_workers=0", "finetune.patience=0"]
    found = interrupted_and_whole(data, tmp_path, monkeypatch, capsys, settings, at)
    assert said in found


# --- a job --------------------------------------------------------------------------------------


def test_a_group_of_processes_that_is_asked_to_stop_writes_its_state(image_folder, tmp_path):
    # As Slurm does: SIGTERM goes to the loader processes, too.
    data, folder = image_folder(splits={"train": 40, "val": 4}), tmp_path / "run"
    job = start(
        f"data.root={data}", f"output_dir={folder}", "experiment=smoke", "finetune=full",
        "cache=off", "model.image_size=32", "finetune.epochs=500", "finetune.patience=0",
        "data.num_workers=2", "data.batch_size=4", "tracking.enabled=false",
        "export.enabled=false", group=True,
    )  # fmt: skip
    last = folder / "checkpoints/1-all/last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    before, began = last.stat().st_mtime_ns, time.monotonic()
    os.killpg(job.pid, signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    took = time.monotonic() - began
    assert job.returncode == 130, output
    assert "checkpoint saved at epoch" in output
    assert f"continue with: tl train resume={folder}" in output
    assert last.stat().st_mtime_ns > before
    assert took < 8
