"""Every engine for the frozen part of a network, side by side, and what shares the cores with it.

    python benchmarks/engines.py [--model mobilenetv2_100] [--weights FILE|none] [--size 224]
        [--batch 32] [--device cpu] [--memory FILE] [--loading FOLDER]

Prints one table: seconds of set-up, milliseconds an image (the best of three passes), the ratio to
timm's network in eager mode and its default memory format, and the relative difference to it. The
images are noise: the time of a network does not depend on them.

With `--loading`, another table: JPEG files of that folder through decoding and ONNX Runtime, for
numbers of loader processes, or of decoding threads in the same process, and of threads of the
engine. Images a second are the median and the best of three passes, in turn; core milliseconds are
the processor time of all processes, which a busy machine changes less.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import tl  # noqa: F401  # sets the wait policy of OpenMP
from tl.config import ModelConfig
from tl.data.datamodule import ImageDataset
from tl.data.stores import Images
from tl.data.transforms import eval_transform
from tl.engine import choose_engine, workers_and_threads
from tl.engine.comparing import relative_difference
from tl.graph import split
from tl.models import BuiltModel, build_model

ASSETS = Path(os.environ.get("TL_ASSETS", Path(__file__).parents[1] / "../shared/assets"))
PASSES = 3


def frozen(name: str, weights: str, size: int | None) -> tuple[BuiltModel, nn.Module]:
    """A model and its part below a linear head."""
    built = build_model(ModelConfig(name=name, weights=weights, image_size=size), 2)
    head = set(built.stages[-1].parameters)
    for parameter, value in built.model.named_parameters():
        value.requires_grad_(parameter in head)
    built.model.eval()
    sample = torch.zeros(2, *built.preprocessing.input_size)
    return built, split(built.model, built.stages, sample).prefix


def best(run: Callable[[], object], images: int) -> float:
    """Seconds an image, the best of some passes after one to warm up."""
    seconds = []
    for _ in range(PASSES + 1):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:]) / images


def engines(prefix: nn.Module, images: Tensor, device: torch.device, memory: Path | None) -> None:
    """Print the table of engines."""
    print("| engine | set-up, s | ms an image | ratio to timm eager | difference | note |")
    print("| --- | --- | --- | --- | --- | --- |")

    def row(name: str, setup: float, seconds: float, ratio: float, gap: float, note: str) -> None:
        figures = f"{setup:.1f} | {1e3 * seconds:.2f} | {ratio:.2f} | {gap:.0e}"
        print(f"| {name} | {figures} | {note} |", flush=True)

    def timm_eager() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return tuple(value.cpu() for value in prefix(images.to(device)))

    prefix.to(device)
    reference, base = timm_eager(), best(timm_eager, len(images))
    row("timm eager, default format", 0, base, 1, 0, "")
    for choice in ("eager", "bf16", "onnxruntime", "compile"):
        engine = choose_engine(
            prefix, images, device=device, images_to_run=100_000, choice=choice, memory=memory
        )
        seconds = best(lambda engine=engine: engine(images), len(images))
        gap = relative_difference(engine(images), reference)
        name = choice if engine.name == choice else f"{choice} -> {engine.name}"
        row(name, engine.setup_seconds, seconds, seconds / base, gap, "; ".join(engine.notes))
    for number in (10, 500, 50_000):
        begin = time.perf_counter()
        engine = choose_engine(prefix, images, device=device, images_to_run=number, memory=memory)
        chosen = time.perf_counter() - begin
        print(f"\n{number} images, chosen in {chosen:.1f} s: {engine.line()}", flush=True)


def passes(built: BuiltModel, prefix: nn.Module, files: list[Path]) -> None:
    """Print the table of workers and threads."""
    data = ImageDataset(
        Images.of_files(Path(), list(map(str, files))),
        np.zeros(len(files), np.int64),
        eval_transform(built.preprocessing),
        seed=0,
    )
    begin = time.perf_counter()
    first = torch.stack([data[i]["image"] for i in range(16)])
    decode = (time.perf_counter() - begin) / 16
    cores = len(os.sched_getaffinity(0))
    engines = {
        threads: choose_engine(
            prefix,
            first,
            device=torch.device("cpu"),
            images_to_run=10_000,
            choice="onnxruntime",
            threads=threads,
        )
        for threads in {1, cores}
    }

    def processes(workers: int) -> Iterator[Tensor]:
        loader = DataLoader(data, 32, num_workers=workers, multiprocessing_context="fork")
        return (batch["image"] for batch in loader)

    def in_threads(workers: int) -> Iterator[Tensor]:
        with ThreadPoolExecutor(workers) as pool:
            items = [pool.submit(data.__getitem__, i) for i in range(len(data))]
            for i in range(0, len(items), 32):
                yield torch.stack([item.result()["image"] for item in items[i : i + 32]])

    def rate(
        source: Callable[[int], Iterator[Tensor]], workers: int, threads: int
    ) -> tuple[float, float]:
        begin, used = time.perf_counter(), sum(os.times()[:4])
        for batch in source(workers):
            engines[threads](batch)
        seconds = time.perf_counter() - begin
        return len(data) / seconds, (sum(os.times()[:4]) - used) / len(data)

    cases = [(s, w, t) for s in (processes, in_threads) for w in (1, cores) for t in (1, cores)]
    rates: list[list[tuple[float, float]]] = [[] for _ in cases]
    for _ in range(PASSES):
        for case, found in zip(cases, rates, strict=True):
            found.append(rate(*case))
    print(f"\n{len(data)} images, {cores} cores, decoding {1e3 * decode:.1f} ms an image\n")
    print("| decoding in | workers | threads of the engine | images/s, median | best | core ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (source, workers, threads), found in zip(cases, rates, strict=True):
        how = "processes" if source is processes else "threads"
        speeds, cores_used = zip(*found, strict=True)
        figures = f"{statistics.median(speeds):.0f} | {max(speeds):.0f}"
        figures += f" | {1e3 * statistics.median(cores_used):.1f}"
        print(f"| {how} | {workers} | {threads} | {figures} |")
    advice = workers_and_threads(decode, engines[1].seconds_per_image, cores)
    print(f"\nworkers_and_threads: {advice[0]} workers, {advice[1]} threads")


def main() -> None:
    """Print the tables that are asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--weights", help="file, or none; default: that of the model in TL_ASSETS")
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=Path)
    parser.add_argument("--loading", type=Path)
    given = parser.parse_args()
    weights = given.weights or str(ASSETS / "weights" / f"{given.model}.safetensors")
    built, prefix = frozen(given.model, weights, given.size)
    images = torch.randn(given.batch, *built.preprocessing.input_size)
    print(f"{given.model}, {tuple(images.shape)}, load {os.getloadavg()[0]:.1f}\n")
    if given.loading:
        passes(built, prefix, sorted(given.loading.rglob("*.jpg"))[:128])
    else:
        engines(prefix, images, torch.device(given.device), given.memory)


if __name__ == "__main__":
    main()
