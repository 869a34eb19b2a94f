"""What a process may use of its machine: by affinity, control groups, and its share of a batch."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil
import pytest
import torch
from commands import script

from tl.cores import CoresError, free_memory, keep_to_share, memory_limit, usable_cores

ALL = len(os.sched_getaffinity(0))
GB = 10**9


def own_groups(version: int, controller: str, root: Path) -> Path:
    """The folder of this very process below `root`."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    if version == 2:
        path = next((p for _, names, p in lines if not names), "/")
        return root / path.strip("/")
    path = next((p for _, names, p in lines if controller in names.split(",")), "/")
    return root / controller / path.strip("/")


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_cores_respect_the_quota_of_a_container(tmp_path):
    write(tmp_path, cpu__max="100000 100000")
    assert usable_cores(tmp_path) == 1
    write(tmp_path, cpu__max="max 100000")
    assert usable_cores(tmp_path) == ALL


def test_cores_respect_the_quota_of_version_1(tmp_path):
    write(own_groups(1, "cpu", tmp_path), cpu__cfs_quota_us=150000, cpu__cfs_period_us=100000)
    assert usable_cores(tmp_path) == 1
    write(own_groups(1, "cpu", tmp_path), cpu__cfs_quota_us=-1)
    assert usable_cores(tmp_path) == ALL


def test_less_than_a_core_is_one(tmp_path):
    write(tmp_path, cpu__max="20000 100000")
    assert usable_cores(tmp_path) == 1


def test_affinity_counts():
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])"
    done = script("-c", f"{code}\nfrom tl.cores import usable_cores\nprint(usable_cores())",
                  command=(sys.executable,))  # fmt: skip
    assert done.out.strip() == "1", done.err


@pytest.mark.parametrize(("share", "cores"), [("1", 1), ("4000", ALL), ("", ALL), (" 1 ", 1)])
def test_a_batch_gives_each_job_a_share_of_the_cores(monkeypatch, share, cores):
    monkeypatch.setenv("TL_CORES", share)
    assert usable_cores() == cores


@pytest.mark.parametrize("share", ["0", "-1", "1.5", "two", "²"])
def test_a_share_that_is_no_number_of_cores_is_refused(monkeypatch, share):
    monkeypatch.setenv("TL_CORES", share)
    with pytest.raises(CoresError, match=f"TL_CORES must be a whole number from 1, got '{share}'"):
        usable_cores()


def test_a_command_says_what_is_wrong_with_the_share(image_folder):
    done = script("train", f"data.root={image_folder()}", "model=test_resnet", TL_CORES="many")
    assert "TL_CORES must be a whole number from 1, got 'many'; or leave it out" in done.err
    assert done.code == 2
    assert "Traceback" not in done.err


def test_threads_of_the_libraries_follow_the_share(monkeypatch):
    import pyarrow
    from threadpoolctl import threadpool_info

    before = torch.get_num_threads(), pyarrow.cpu_count()
    monkeypatch.setenv("TL_CORES", "1")
    try:
        torch.set_num_threads(2)
        keep_to_share()
        assert torch.get_num_threads() == pyarrow.cpu_count() == 1
        assert {p["num_threads"] for p in threadpool_info() if p["user_api"] == "blas"} <= {1}
        monkeypatch.setenv("TL_CORES", "2")
        keep_to_share()
        assert torch.get_num_threads() == 1  # what someone set lower stays
    finally:
        torch.set_num_threads(before[0])
        pyarrow.set_cpu_count(before[1])


def test_a_job_computes_loads_and_seals_with_its_share(image_folder, tmp_path):
    """One thread of torch, one of ONNX Runtime, one loader process: what a job really has."""
    # The job itself runs; each place that starts threads or processes notes how many.
    code = """
import threading, onnxruntime, torch
found = {"torch": set(), "onnx": set(), "workers": set()}
step, session = torch.optim.AdamW.step, onnxruntime.InferenceSession.__init__
loader = torch.utils.data.DataLoader.__iter__
def note_step(*args, **kw):
    found["torch"].add(torch.get_num_threads())
    return step(*args, **kw)
def note_session(self, path, options=None, *args, **kw):
    found["onnx"].add(options.intra_op_num_threads)
    return session(self, path, options, *args, **kw)
def note_loader(self):
    found["workers"].add(self.num_workers)
    return loader(self)
torch.optim.AdamW.step = note_step
onnxruntime.InferenceSession.__init__ = note_session
torch.utils.data.DataLoader.__iter__ = note_loader
import atexit
atexit.register(lambda: print("FOUND", {k: sorted(v) for k, v in found.items()}))
from tl.pipelines import main
main()
"""
    data = image_folder(splits={"train": 30, "val": 4})
    done = script(
        "-c", code, "train", f"data.root={data}", "experiment=smoke", "model.image_size=32",
        "finetune=full", "finetune.epochs=1", "cache=off", "tracking.enabled=false",
        "data.num_workers=null",
        f"output_dir={tmp_path / 'run'}",
        command=(sys.executable,), TL_CORES="1",
    )  # fmt: skip
    assert done.code == 0, done.err
    (line,) = [line for line in done.out.splitlines() if line.startswith("FOUND")]
    assert line == "FOUND {'torch': [1], 'onnx': [1], 'workers': [0, 1]}"


# --- memory -------------------------------------------------------------------------------------


def test_memory_of_a_machine_without_limits(tmp_path):
    assert memory_limit(tmp_path) is None
    assert free_memory(tmp_path) == pytest.approx(psutil.virtual_memory().available, rel=0.05)


@pytest.mark.parametrize("version", [1, 2])
def test_memory_of_a_container_is_what_is_left_of_its_limit(tmp_path, version):
    most, now = (
        ("memory__max", "memory__current")
        if version == 2
        else ("memory__limit_in_bytes", "memory__usage_in_bytes")
    )
    folder = tmp_path if version == 2 else tmp_path / "memory"
    write(folder, **{most: GB, now: GB - 3 * 10**8})
    assert memory_limit(tmp_path) == GB
    assert free_memory(tmp_path) == 3 * 10**8
    # The kernel gives back what it keeps of files.
    write(folder, memory__stat=f"anon 5\ninactive_file {10**8}")
    assert free_memory(tmp_path) == 4 * 10**8
    write(folder, **{now: 2 * GB})
    assert free_memory(tmp_path) == 0


def test_a_limit_on_a_group_above_counts(tmp_path):
    # As Slurm has it: the job is limited, its processes are in groups below.
    groups = own_groups(1, "memory", tmp_path)
    write(groups, memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=5)
    write(tmp_path / "memory", memory__limit_in_bytes=GB, memory__usage_in_bytes=0)
    assert memory_limit(tmp_path) == GB
