"""Memory of the loaders over a table of 1,000,000 rows: flat over epochs, workers share the rows.

    python benchmarks/rows.py                   # 4 epochs of 20,000 images drawn from a million
    python benchmarks/rows.py --naive           # the same with a Python list of paths and labels

The rows name 64 small images, again and again: what is measured is what the table costs main
process and workers, not the disk. Own memory (USS) is what would be free if the process ended.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from PIL import Image
from torch.utils.data import Dataset

from tl.bundle import Preprocessing
from tl.data.datamodule import ImageDataset
from tl.data.loading import ImageLoader, loader_settings
from tl.data.sampling import EpochSampler
from tl.data.stores import FileStore, Images
from tl.data.transforms import eval_transform

FILES, SIDE, BATCH = 64, 32, 100


class Naive(Dataset[dict[str, Any]]):
    """What many tutorials write: a Python object for every path and label."""

    def __init__(self, root: Path, names: list[str], labels: list[int], transform: Any) -> None:
        self.items = [(root / name, label) for name, label in zip(names, labels, strict=True)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        path, label = self.items[key[1]]
        return {
            "image": self.transform(Image.open(path).convert("RGB")),
            "label": label,
            "index": key[1],
        }


def make_images(folder: Path) -> list[str]:
    """Small JPEG files, and their names."""
    rng = np.random.default_rng(0)
    names = []
    for number in range(FILES):
        names.append(f"class_{number % 10}/a_photograph_with_a_name_{number:08}.jpg")
        file = folder / names[-1]
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(file)
    return names


def own(process: psutil.Process) -> float:
    """Own memory of a process, MB."""
    return float(process.memory_full_info().uss) / 1e6


def main() -> None:
    """Print one row an epoch."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=20_000, help="of an epoch that are read")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--naive", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transform = eval_transform(Preprocessing((3, SIDE, SIDE), (0.5,) * 3, (0.5,) * 3))
    me = psutil.Process()
    with tempfile.TemporaryDirectory() as place:
        names = make_images(Path(place))
        before = own(me)
        numbers = np.arange(given.rows) % FILES
        labels = numbers % 10
        if given.naive:
            every = [names[number] + "" for number in numbers]
            dataset: Dataset[Any] = Naive(Path(place), every, labels.tolist(), transform)
        else:
            column = pa.array(names, pa.large_string()).take(pa.array(numbers))
            images = Images(FileStore(Path(place)), column)
            dataset = ImageDataset(images, labels, transform, seed=0)
        sampler = EpochSampler(given.rows, seed=0, shuffle=True)
        loader = ImageLoader(
            dataset,
            batch_size=BATCH,
            sampler=sampler,
            persistent_workers=True,
            **loader_settings(given.workers),
        )
        print(f"{given.rows:,} rows: {own(me) - before:.0f} MB in the main process\n")
        print("| epoch | main process, own MB | workers, own MB | images/s |")
        print("| --- | --- | --- | --- |")
        for epoch in range(given.epochs):
            sampler.set_epoch(epoch)
            began = time.perf_counter()
            batches = iter(loader)
            for _ in itertools.islice(batches, given.images // BATCH):
                pass
            rate = given.images / (time.perf_counter() - began)
            workers = [own(child) for child in me.children()]
            shown = " + ".join(f"{megabytes:.0f}" for megabytes in workers)
            print(f"| {epoch + 1} | {own(me):.0f} | {shown} | {rate:.0f} |", flush=True)


if __name__ == "__main__":
    main()
