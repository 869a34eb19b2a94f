"""How long a large table takes to open, and how much memory: a fresh process each.

    python benchmarks/table.py [--rows 1000000] [--work FOLDER]

Makes a folder of small images (hard links of 64, so that a million cost no disk) and manifests of
all forms. Each is opened in a process of its own, once without a look at the images
(`data.check=false`) and once with a look that is remembered. The first look, which decodes every
image, is timed on a part of them. Seconds of CPU tell what an idle machine would need.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from PIL import Image

from tl.config import DataConfig
from tl.data import read_table
from tl.data.check import SCHEMA, cache_path, check_images
from tl.data.sources import list_images
from tl.data.stores import Images

IMAGES = 64
FEW = 20_000
FOLDERS = 1000
CLASSES = 1000
FORMS = ("csv", "tsv", "jsonl", "parquet")


def make(work: Path, rows: int) -> Path:
    """The images and manifests; kept for the next time."""
    folder = work / f"rows-{rows}"
    done = folder / "done"
    if done.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pool").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pool" / f"{number}.jpg")
    names = [f"images/{n % FOLDERS:04d}/{n:07d}.jpg" for n in range(rows)]
    for number in range(min(FOLDERS, rows)):
        (folder / "images" / f"{number:04d}").mkdir(parents=True)
    for number, name in enumerate(names):
        os.link(folder / "pool" / f"{number % IMAGES}.jpg", folder / name)
    labels = rng.integers(0, min(CLASSES, rows // 500), rows)
    table = pa.table(
        {
            "path": names,
            "label": [f"class {label}" for label in labels.tolist()],
            "split": np.where(rng.random(rows) < 0.9, "train", "val"),
            "patient": [f"p{number}" for number in rng.integers(0, rows // 10 + 1, rows).tolist()],
            "weight": np.ones(rows, np.float32),
        }
    )
    pa.csv.write_csv(table, folder / "table.csv")
    options = pa.csv.WriteOptions(delimiter="\t")
    pa.csv.write_csv(table, folder / "table.tsv", options)
    pq.write_table(table, folder / "table.parquet")
    with (folder / "table.jsonl").open("w") as stream:
        for batch in table.to_batches(10_000):
            stream.writelines(json.dumps(row) + "\n" for row in batch.to_pylist())
    done.touch()
    return folder


def remember(folder: Path, cache: Path, form: str) -> None:
    """Write down what a first look at all images would: at the few that all of them are."""
    listing = list_images(DataConfig(root=str(folder / f"table.{form}")), None)
    pool = Images.of_files(folder / "pool", [f"{number}.jpg" for number in range(IMAGES)])
    facts = check_images(pool, max_pixels=10**8, cache_file=None, progress=None)
    numbers = [int(name[-11:-4]) % IMAGES for name in listing.names.to_pylist()]
    rows = facts.take(numbers).set_column(0, SCHEMA.field(0), listing.names)
    file = cache_path(cache, listing.key)
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, file)


def opened(file: Path, cache: Path | None, check: bool) -> dict[str, float]:
    """Seconds and peak memory of one reading, in this process."""
    seen = 0

    def progress(done: int, _: int) -> None:
        nonlocal seen
        seen = done

    began, worked = time.perf_counter(), time.process_time()
    config = DataConfig(root=str(file), check=check)
    table = read_table(config, seed=0, cache_dir=cache, progress=progress)
    figures = {
        "rows": len(table.rows),
        "looked": seen,
        "seconds": time.perf_counter() - began,
        "cpu": time.process_time() - worked,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "table_mb": int(table.rows.memory_usage(deep=True).sum()) / 1e6,
    }
    began = time.process_time()
    table.fingerprint()
    return {**figures, "fingerprint": time.process_time() - began}


def main() -> None:
    """Make the files, open each in a fresh process, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "tl-table")
    parser.add_argument("--forms", nargs="+", default=FORMS, choices=FORMS)
    parser.add_argument("--one", nargs=3, metavar=("FILE", "CACHE", "CHECK"))
    args = parser.parse_args()
    if args.one:
        print(json.dumps(opened(Path(args.one[0]), Path(args.one[1]), args.one[2] == "true")))
        return
    cache = args.work / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    few = opened(make(args.work, FEW) / "table.parquet", None, check=True)
    print(
        f"first look at {FEW:,} images of 16 x 16 pixels: {few['seconds']:.0f} s, "
        f"{FEW / few['seconds']:.0f}/s, {1000 * few['cpu'] / FEW:.2f} ms of CPU each\n"
    )
    folder = make(args.work, args.rows)
    print("| form | opened | seconds | of CPU | peak memory, MB | table, MB | fingerprint, s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for form in args.forms:
        remember(folder, cache, form)
        for name, check in (("check=false", "false"), ("look remembered", "true")):
            command = [sys.executable, __file__, "--one", folder / f"table.{form}", cache, check]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout)
            assert (found["rows"], found["looked"]) == (args.rows, 0)
            print(
                f"| {form} | {name} | {found['seconds']:.1f} | {found['cpu']:.1f} | "
                f"{found['peak_mb']:.0f} | {found['table_mb']:.0f} | {found['fingerprint']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
