"""How many jobs a machine holds, and how batches on one machine share it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tl.batches import resources
from tl.batches.gpus import Gpu, chosen, visible_gpus
from tl.batches.resources import Machine, Slots, machine, slots, take_slot
from tl.cores import usable_cores

GB = 10**9
TWO = tuple(Gpu(f"GPU-{n}", str(n), 40 * GB) for n in "ab")


@pytest.fixture(autouse=True)
def own_temp_folder(tmp_path, monkeypatch):
    """Batches that run meanwhile on this machine are no part of these tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def no_limits(monkeypatch, cores=4):
    """As on a machine of so many cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10, 10 + cores)))


# --- how many -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "jobs", "memory", "at", "gpus", "count", "cores", "reason"),
    [
        (None, 9, 0, Machine(2, 24 * GB), 0, 2, 1, "2 cores hold 2"),
        (None, 9, 5 * GB, Machine(8, 24 * GB), 0, 4, 2,
         "24 GB of free memory hold 4, 8 cores hold 8"),
        (None, 3, 0, Machine(8, 24 * GB), 0, 3, 2, "8 cores hold 8"),
        (1, 9, 5 * GB, Machine(2, 24 * GB), 0, 1, 2,
         "batch.jobs=1, 2 cores hold 2, 24 GB of free memory hold 4"),
        (16, 99, 0, Machine(2, 24 * GB), 0, 2, 1, "2 cores hold 2, batch.jobs=16"),
        (None, 9, 1 * GB, Machine(16, 64 * GB, TWO), 1, 2, 8,
         "2 GPUs hold 2, 16 cores hold 16, 64 GB of free memory hold 57"),
        (None, 9, 0, Machine(4, 64 * GB, TWO), 0, 4, 1, "4 cores hold 4"),
        (None, 9, 0, Machine(8, 64 * GB, TWO), 2, 1, 8, "2 GPUs hold 1, 8 cores hold 8"),
        (None, 9, 0, Machine(8, 64 * GB, TWO), 5, 1, 8, "2 GPUs hold 1, 8 cores hold 8"),
        (None, 9, 0, Machine(1, 64 * GB, TWO[:1]), 1, 1, 1, "1 GPU holds 1, 1 core holds 1"),
    ],
)  # fmt: skip
def test_a_machine_holds_as_many_jobs_as_all_of_its_parts(
    requested, jobs, memory, at, gpus, count, cores, reason
):
    found = slots(requested, jobs, memory=memory, gpus_each=gpus, at=at)
    assert (found.count, found.cores) == (count, cores)
    assert sorted(found.reason.split(", ")) == sorted(reason.split(", "))
    assert found.reason.split(", ")[0] == reason.split(", ")[0]
    assert found.gpus == (at.gpus if gpus else ())
    assert not found.warning


def test_a_job_that_does_not_fit_runs_alone_and_that_is_said():
    found = slots(None, 9, memory=30 * GB, at=Machine(8, 24 * GB))
    assert (found.count, found.cores) == (1, 8)
    assert found.warning == (
        "a job takes about 30 GB, and 24 GB are free: it may be killed; a smaller "
        "data.batch_size takes less"
    )


def test_this_machine_as_it_is():
    found = machine()
    assert found.cores == usable_cores()
    assert 0 < found.memory < 2**50
    assert found.gpus == visible_gpus()


def test_gpus_that_cuda_shows():
    there = [("GPU-aa1", 5), ("GPU-ab2", 6), ("GPU-c", 7)]
    names = lambda shown: [g.name for g in chosen(there, shown)]  # noqa: E731
    assert names(None) == ["GPU-aa1", "GPU-ab2", "GPU-c"]
    assert names("2, 0") == ["GPU-c", "GPU-aa1"]
    assert names("1,9,0") == ["GPU-ab2"]  # what comes after nonsense does not count
    assert names("GPU-c,GPU-ab") == ["GPU-c", "GPU-ab2"]
    assert names("GPU-a,0") == []  # two begin so
    assert names("0,0") == []
    assert [g.visible_as for g in chosen(there, "MIG-7,1")] == ["MIG-7", "1"]
    assert chosen(there, "1")[0].memory == 6


@pytest.mark.parametrize("shown", ["", "-1", " "])
def test_no_gpus_where_cuda_shows_none(monkeypatch, shown):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert visible_gpus() == ()


# --- shares of a machine ------------------------------------------------------------------------


def test_slots_are_taken_and_given_back(monkeypatch, tmp_path):
    no_limits(monkeypatch)
    shares = Slots(2, 2)
    first, second = take_slot(shares), take_slot(shares)
    assert (first.index, second.index) == (10, 12)  # numbers of cores
    assert first.environment == {"TL_CORES": "2", "OMP_NUM_THREADS": "2"}
    assert take_slot(shares) is None
    first.release()
    assert take_slot(shares).index == 10
    assert {f.name for f in tmp_path.glob("tl-slots-*/slot-*")} == {
        f"slot-{n}.lock" for n in (10, 11, 12, 13)
    }


def test_a_worker_that_runs_a_job_knows_all_slots(monkeypatch):
    no_limits(monkeypatch, cores=2)
    shares = Slots(2, 1)
    first = take_slot(shares)
    for name, value in first.environment.items():  # of its job, which it may keep
        monkeypatch.setenv(name, value)
    assert take_slot(shares).index == 11


def test_batches_of_different_sizes_share_the_cores(monkeypatch):
    no_limits(monkeypatch)
    wide, narrow = Slots(1, 3), Slots(4, 1)
    first = take_slot(narrow)
    second = take_slot(wide)
    assert (first.index, second.index) == (10, 11)
    assert take_slot(narrow) is None
    first.release()
    assert take_slot(wide) is None  # all or nothing
    assert take_slot(narrow).index == 10


def test_each_job_has_a_gpu_of_its_own(monkeypatch):
    no_limits(monkeypatch)
    shares = Slots(2, 1, TWO)
    found = [take_slot(shares) for _ in range(2)]
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in found] == ["a", "b"]
    assert take_slot(shares) is None  # though two cores are free
    assert take_slot(Slots(4, 1)).environment == {"TL_CORES": "1", "OMP_NUM_THREADS": "1"}
    found[1].release()
    assert take_slot(shares).environment["CUDA_VISIBLE_DEVICES"] == "b"


def test_a_job_on_two_gpus_takes_both(monkeypatch):
    no_limits(monkeypatch)
    both = Slots(1, 1, TWO, gpus_each=2)
    one = take_slot(Slots(2, 1, TWO))
    assert take_slot(both) is None
    one.release()
    assert take_slot(both).environment["CUDA_VISIBLE_DEVICES"] == "a,b"


def test_memory_that_others_will_take_is_theirs(monkeypatch):
    import psutil

    no_limits(monkeypatch, cores=8)
    total = psutil.virtual_memory().total
    heavy, light = Slots(8, 1, memory=int(0.6 * total)), Slots(8, 1, memory=int(0.2 * total))
    first = take_slot(heavy)
    assert take_slot(heavy) is None
    assert take_slot(light) is not None
    assert take_slot(light) is None
    first.release()
    assert take_slot(light) is not None
    alone = Slots(8, 1, memory=2 * total)
    assert take_slot(alone) is None


def test_a_job_that_wants_more_than_there_is_may_run_alone():
    assert take_slot(Slots(1, 1, memory=10**18)) is not None


def hold_a_slot(folder: Path) -> subprocess.Popen[str]:
    code = (
        "import sys, time; from pathlib import Path; from tl.batches.resources import *\n"
        "slot = take_slot(Slots(1, 1), Path(sys.argv[1])); print(slot.index, flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    return process


def test_the_slot_of_a_process_that_was_killed_is_free(monkeypatch, tmp_path):
    monkeypatch.setenv("TL_CORES", "1")
    victim = hold_a_slot(tmp_path)
    try:
        assert take_slot(Slots(1, 1), tmp_path) is None
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    assert take_slot(Slots(1, 1), tmp_path) is not None


def test_a_child_keeps_the_slot_of_a_worker_that_was_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("TL_CORES", "1")
    slot = take_slot(Slots(1, 1), tmp_path)
    job = os.fork()
    if not job:
        time.sleep(60)
        os._exit(0)
    for lock in slot.locks:  # as the kernel does when the worker dies
        os.close(lock.descriptor)
    try:
        assert take_slot(Slots(1, 1), tmp_path) is None
    finally:
        os.kill(job, signal.SIGKILL)
        os.waitpid(job, 0)
    assert take_slot(Slots(1, 1), tmp_path) is not None


def test_a_temp_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    found = slots(None, 9, at=Machine(2, 24 * GB))
    assert found.warning == (
        f"{tmp_path}/file/tl-slots-{os.getuid()} cannot be locked: what other batches of this "
        "machine run is not seen"
    )
    slot = take_slot(found)
    assert slot.environment == {"TL_CORES": "1", "OMP_NUM_THREADS": "1"}
    slot.release()


def test_the_folder_of_somebody_else_is_not_trusted(monkeypatch):
    assert resources._place() is not None
    before = os.getuid()
    folder = resources._folder()
    monkeypatch.setattr(os, "getuid", lambda: before + 1)
    folder.rename(resources._folder())
    assert resources._place() is None
