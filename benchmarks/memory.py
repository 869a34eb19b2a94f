"""Peak memory of a linear probe over 100,000 images of 224 px: does it stay flat?

    python benchmarks/memory.py                    # 100,000 images: about an hour on 2 cores
    python benchmarks/memory.py --images 2000      # a trial
    python benchmarks/memory.py cache.views=0      # further settings of the job

Samples all processes of `tl train` each second. RSS counts pages that processes share in each of
them, and cached activations that are mapped; PSS shares them out, USS leaves them out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from images import ASSETS, WORK
from measuring import TL, Results
from PIL import Image

LIMIT = 3e9  # bytes
CLASSES = 10
SIZE = 224
PART = 500  # images a task makes


def make_images(folder: Path, images: int) -> None:
    """So many distinct JPEGs in `<class>/<part>/`; those that are there stay."""
    parts = range(0, images, PART)
    with ProcessPoolExecutor(2) as pool:
        for done, _ in enumerate(pool.map(partial(make_part, folder, images), parts), 1):
            if done % 20 == 0:
                print(f"  {done * PART:,} images", flush=True)


def make_part(folder: Path, images: int, start: int) -> None:
    """Images `start` and following: a random smooth surface, in a colour that its class likes."""
    for number in range(start, min(start + PART, images)):
        label = number % CLASSES
        target = folder / f"class{label}" / f"{number:06}.jpg"
        if target.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number)
        colour = np.random.default_rng(label).integers(60, 196, 3)
        surface = np.clip(colour + rng.normal(0, 40, (8, 8, 3)), 0, 255).astype(np.uint8)
        picture = Image.fromarray(surface).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        unfinished = target.with_suffix(".tmp")
        picture.save(unfinished, "JPEG", quality=70)
        unfinished.rename(target)


def sample(main: psutil.Process) -> dict[str, float]:
    """Bytes of the main process, of its children, and of all together."""
    sizes = {"main RSS": 0.0, "workers RSS": 0.0, "all RSS": 0.0, "all PSS": 0.0, "all USS": 0.0}
    for process in [main, *main.children(recursive=True)]:
        try:
            used = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        sizes["main RSS" if process == main else "workers RSS"] += used.rss
        sizes["all RSS"] += used.rss
        sizes["all PSS"] += getattr(used, "pss", 0)
        sizes["all USS"] += used.uss
    return sizes


def watch(command: list[str], folder: Path) -> tuple[int, float, dict[str, float]]:
    """Exit code, seconds and peaks of a process and its children."""
    began, peaks = time.perf_counter(), dict.fromkeys(sample(psutil.Process()), 0.0)
    env = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}"}
    process = subprocess.Popen(command, cwd=folder, env=env)
    main = psutil.Process(process.pid)
    while process.poll() is None:
        peaks = {name: max(peaks[name], size) for name, size in sample(main).items()}
        time.sleep(1)
    return process.returncode, time.perf_counter() - began, peaks


def main() -> None:
    """Make the images, train, tell the peaks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, help="of the images; default: one for this number")
    parser.add_argument("--model", default="tf_mobilenetv3_small_100")
    parser.add_argument("--results", type=Path, default=WORK / "results.jsonl")
    parser.add_argument("settings", nargs="*", help="key=value for the job")
    args = parser.parse_args()
    data = (args.folder or WORK / f"images-{args.images}").resolve()
    began = time.perf_counter()
    make_images(data, args.images)
    print(f"{args.images:,} images at {data} in {time.perf_counter() - began:.0f} s", flush=True)
    file = ASSETS / "weights" / f"{args.model}.safetensors"
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        folder = Path(name)
        command = [str(TL), "train", f"data.root={data}", f"model={args.model}"]
        command += [f"model.weights={file if file.exists() else 'none'}", "finetune=linear_probe"]
        command += [f"cache.dir={folder / 'cache'}", f"output_dir={folder / 'run'}"]
        code, seconds, peaks = watch([*command, *args.settings], folder)
    about = {"images": args.images, "model": args.model, "settings": args.settings}
    row = {"seconds": round(seconds, 1), "exit_code": code, "peaks": peaks}
    Results(args.results, about).add("memory", row)
    print(json.dumps(row))
    for kind, peak in peaks.items():
        print(
            f"{kind:<12} {peak / 1e9:6.2f} GB, {peak / LIMIT:.2f} of the {LIMIT / 1e9:g} GB allowed"
        )
    sys.exit(code)


if __name__ == "__main__":
    main()
