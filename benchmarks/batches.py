"""What a batch costs beside its jobs: `python benchmarks/batches.py [jobs=200] [at_once=2]`.

Trains the smallest network on a few images, once for each seed, with `hydra/launcher=local`; with
an own Ray of this machine where `launcher=ray` is given. Compares what a job takes of a place, what
the ledger says of its own process, and its own `total_seconds`, which begin when torch is loaded
and end when the model is judged. Prints the memory of the process that drives the batch, too.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from images import prepare

from tl.batches.ledger import Ledger

SETTINGS = (
    *("experiment=smoke", "model.image_size=32", "finetune=linear_probe", "finetune.epochs=1"),
    *("export.enabled=false", "tracking.system_metrics=false", "cache.mode=off"),
)


def main(jobs: int | str = 200, at_once: int | str = 2, launcher: str = "local") -> None:
    """Run a batch and print what it cost."""
    jobs, at_once = int(jobs), int(at_once)
    ray = ("hydra.launcher.address=local", "hydra.launcher.num_cpus=1", "hydra.launcher.num_gpus=0")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        data = f"data.root={prepare('tiny')}"
        seeds = f"seed=range({jobs})"
        command = [
            *(str(Path(sys.executable).with_name("tl")), "train", "-m", data),
            *(*SETTINGS, seeds, f"batch.jobs={at_once}", f"output_dir={place}/batch"),
            *(f"hydra/launcher={launcher}", f"tracking.uri=sqlite:///{place}/mlflow.db"),
            *(ray if launcher == "ray" else ()),
        ]
        began = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            memory = watch(process, place / "batch")
        report(place / "batch", time.monotonic() - began, at_once, memory)


def watch(process: subprocess.Popen[bytes], place: Path) -> dict[int, float]:
    """Jobs done -> MB of the driver's memory, until it ends."""
    driver, found = psutil.Process(process.pid), {}
    while process.poll() is None:
        done = len(list(place.glob("*/metrics.json"))) if place.is_dir() else 0
        try:
            found[done] = driver.memory_info().rss / 1e6
        except psutil.Error:
            break
        time.sleep(1)
    process.wait()
    assert process.returncode == 0, process.returncode
    return found


def report(place: Path, wall: float, at_once: int, memory: dict[int, float]) -> None:
    """Print times a job, and the memory at the beginning, the middle and the end."""
    entries = Ledger(place).all()
    own = [json.loads((place / f"{e.number}/metrics.json").read_text()) for e in entries]
    inside = [metrics["total_seconds"] for metrics in own]
    outside = [entry.attempts[-1].seconds for entry in entries]
    first = min(entry.attempts[-1].began for entry in entries)
    last = max(entry.attempts[-1].ended or 0.0 for entry in entries)
    print(f"{len(entries)} jobs, {at_once} at once: {wall:.1f} s")
    print(f"before the first job begins and after the last one ends: {wall - (last - first):.1f} s")
    per_job = (last - first) * at_once / len(entries)
    rows = {
        "a job takes of one of the places": per_job,
        "its own process, from begin to end": statistics.mean(outside),
        "total_seconds in its metrics.json": statistics.mean(inside),
    }
    for name, seconds in rows.items():
        print(f"{name:<40} {seconds:6.2f} s")
    print(f"{'beside its own process':<40} {per_job - statistics.mean(outside):6.2f} s a job")
    counts = sorted(memory)
    some = [counts[round(share * (len(counts) - 1))] for share in (0.05, 0.5, 1.0)]
    text = ", ".join(f"{memory[n]:.0f} MB after {n} jobs" for n in some)
    print(f"memory of the driver: {text}")


if __name__ == "__main__":
    main(**{k: v for k, _, v in (arg.partition("=") for arg in sys.argv[1:])})
