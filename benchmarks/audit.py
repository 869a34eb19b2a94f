"""How long `tl audit` takes for many photographs, without and with remembered looks.

    python benchmarks/audit.py [--images 10000] [--work FOLDER]

Makes JPEGs of 500 x 375 pixels with the spectrum of photographs, among them a hundred copies in
another size and quality on the other side of the split, and calls `tl audit` twice in processes of
their own: with an empty cache, and again. Prints wall and CPU seconds, memory, and how many of the
copies were found. Seconds of CPU, over two cores, tell what an idle machine would need.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parents[1]
WORK = REPO / "build" / "benchmarks"
WIDTH, HEIGHT = 500, 375
FIELDS, FIELD = 24, (1024, 1536)  # large pictures of which each image is a part
COPIES = 100
CLASSES = 10


def make(folder: Path, images: int) -> Path:
    """`train` and `val` with so many images; kept for the next time."""
    if (folder / "train").is_dir():
        return folder
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    rng = np.random.default_rng(0)
    fields = [field(rng) for _ in range(FIELDS)]
    for number in range(images):
        split = "val" if number // CLASSES % 5 == 4 else "train"
        place = unfinished / split / f"class{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        part(fields[number % FIELDS], rng).save(place / f"{number:06d}.jpg", quality=90)
    for source in sorted((unfinished / "train").rglob("*.jpg"))[:: images // COPIES // 2][:COPIES]:
        smaller = Image.open(source).resize((WIDTH * 3 // 4, HEIGHT * 3 // 4))
        smaller.save(
            unfinished / "val" / source.parent.name / f"copy-{source.stem}.jpg", quality=70
        )
    unfinished.rename(folder)
    return folder


def field(rng: np.random.Generator) -> np.ndarray:
    """Noise whose amplitudes fall as one over the frequency, as in photographs: (H, W, 3) uint8."""
    high, wide = FIELD
    frequency = np.hypot(np.fft.fftfreq(high)[:, None] * high / wide, np.fft.fftfreq(wide)[None, :])
    layers = []
    for _ in range(3):
        spectrum = np.fft.fft2(rng.normal(size=FIELD)) / np.maximum(frequency, 1 / wide)
        values = np.fft.ifft2(spectrum).real
        layers.append(128 + 55 * (values - values.mean()) / values.std())
    return np.stack(layers, axis=-1).clip(0, 255).astype(np.uint8)


def part(pixels: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A random part, turned or mirrored, as an image."""
    top = int(rng.integers(0, FIELD[0] - HEIGHT))
    left = int(rng.integers(0, FIELD[1] - WIDTH))
    cut = pixels[top : top + HEIGHT, left : left + WIDTH]
    return Image.fromarray(np.roll(cut, int(rng.integers(3)), axis=-1))


def measured(data: Path, work: Path) -> dict[str, float]:
    """One audit in a process of its own."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [
            *(sys.executable, "-m", "tl.pipelines.audit", f"data.root={data}"),
            *(f"output_dir={work / 'found'}", "tracking.enabled=false"),
        ],
        env=os.environ | {"TL_CACHE_DIR": str(work / "cache")},
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "peak_mb": after.ru_maxrss / 1024}


def main() -> None:
    """Make the images, audit them twice, print what it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--work", type=Path, default=WORK)
    args = parser.parse_args()
    data = make(args.work / f"audit-{args.images}", args.images)
    work = args.work / f"audit-{args.images}-results"
    shutil.rmtree(work, ignore_errors=True)
    for name in ("first", "remembered"):
        figures = measured(data, work)
        print(name, ", ".join(f"{key} {value:.1f}" for key, value in figures.items()), flush=True)
    report = json.loads((work / "found" / "audit.json").read_text())
    found = {f["kind"]: f["files"] for f in report["findings"]}
    leaks = {f["name"] for f in found.get("near_copies_across_splits", [])}
    copies = sum(Path(name).name.startswith("copy") for name in leaks)
    print(f"{report['images']:,} images; {copies} of {COPIES} copies found, ", end="")
    print(f"{len(leaks) - 2 * copies} others named; findings: {', '.join(found)}")


if __name__ == "__main__":
    main()
