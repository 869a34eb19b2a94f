"""What jobs really take of memory, beside what `tl.batches.memory` estimates before they start.

    python benchmarks/batch_memory.py mobilenetv2_100:full:16 regnetx_002:linear_probe:64

Reads TL_ASSETS: weights/<model>.safetensors and data/hymenoptera. Each job runs one epoch with an
empty cache; its processes are looked at twice a second.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tl.batches.memory import job_memory
from tl.config import compose

GB = 1e9
LOAD = "tl.pipelines.batches:load"


def kilobytes(file: Path, name: str) -> int:
    """A figure of a file below /proc; 0 where the process is gone."""
    try:
        lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
        return int(lines[name].split()[0])
    except (OSError, KeyError):
        return 0


def taken(pid: int) -> tuple[int, int]:
    """Bytes of a job's processes together, libraries counted once; largest of the main one."""
    try:
        children = [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.Error:
        children = []
    total = kilobytes(Path(f"/proc/{pid}/status"), "RssFile")
    for number in (pid, *children):
        rollup = Path(f"/proc/{number}/smaps_rollup")
        total += kilobytes(rollup, "Pss_Anon") + kilobytes(rollup, "Pss_Shmem")
    return 1024 * total, 1024 * kilobytes(Path(f"/proc/{pid}/status"), "VmHWM")


def main() -> None:
    """Run the jobs of the command line, one after the other, and print a table."""
    assets = Path(os.environ["TL_ASSETS"])
    print("| job | images a batch | estimate, GB | took, GB | main process, GB |")
    for case in sys.argv[1:]:
        model, method, batch = case.split(":")
        with tempfile.TemporaryDirectory() as place:
            settings = [
                f"model={model}",
                f"model.weights={assets}/weights/{model}.safetensors",
                f"finetune={method}",
                f"data.batch_size={batch}",
                "finetune.epochs=1",
                "tracking.enabled=false",
                f"cache.dir={place}/cache",
            ]
            data = f"{assets}/data/hymenoptera"
            cores = len(os.sched_getaffinity(0))
            estimate = job_memory(
                [compose("train", settings, {"data.root": data})], cores, load=LOAD
            )
            command = [sys.executable, "-m", "tl", "train", f"data.root={data}", *settings]
            with subprocess.Popen(
                [*command, f"output_dir={place}/run"], stdout=subprocess.DEVNULL
            ) as job:
                most = [0, 0]
                while job.poll() is None:
                    most = [max(pair) for pair in zip(most, taken(job.pid), strict=True)]
                    time.sleep(0.5)
            assert job.returncode == 0, case
        took, alone = most
        figures = f"{estimate.bytes / GB:.2f} | {took / GB:.2f} | {alone / GB:.2f}"
        print(f"| {model}, {method} | {batch} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
