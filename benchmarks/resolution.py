"""Are small images worth a large input? Sets scaled down, then read at several sizes.

    python benchmarks/resolution.py

The sets of the regret benchmark at 25 images a class, one seed, scaled down to a shorter side of
`NATIVE` pixels. At each size of the input a linear classifier and all stages (`lp_ft`, at most
1,000 images seen) are trained. Prints test accuracy, means over sets and backbones with the error
of the paired difference from the largest size, and seconds of a core.
"""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path

import numpy as np
from images import FOUR, WORK
from regret_cells import BACKBONES, Cell

NATIVE = (32, 64)
SIZES = (224, 160, 128, 96)
PER_CLASS = 25
CHOSEN = BACKBONES[:2]
METHODS = ("linear_probe", "lp_ft")
Fits = dict[str, list[tuple[float, float]]]


def train(job: tuple[int, Cell]) -> Fits:
    """For each method accuracy on test and seconds, a pair for each of `SIZES`."""
    import regret_fits
    import torch
    from regret_rates import method_config

    native, cell = job
    torch.set_num_threads(1)
    work = WORK / "resolution" / str(native)
    folder = work / "fits" / "-".join(map(str, cell.key().values()))
    shutil.rmtree(folder, ignore_errors=True)
    found: Fits = {method: [] for method in METHODS}
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
        for size in SIZES:
            given = regret_fits.setting(cell, work, image_size=size, side=native)
            evidence, _ = regret_fits.measure(given)
            fit = regret_fits.CellTrainer(given, regret_fits.Limits(), folder / str(size))
            for method in METHODS:
                config = method_config(method, evidence, "quick")
                began = time.process_time()
                row = fit.run(config, 1.0, folder / f"{size}-{method}")
                found[method].append((100 * row["acc"], time.process_time() - began))
    shutil.rmtree(folder)
    return found


def main() -> None:
    """Train in two processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    cells = [Cell(name, PER_CLASS, backbone, 0) for name in FOUR for backbone in CHOSEN]
    jobs = list(product(NATIVE, cells))
    with ProcessPoolExecutor(2) as pool:
        found = dict(zip(jobs, pool.map(train, jobs), strict=True))
    print(f"| images, method | {' | '.join(map(str, SIZES))} |")
    print("| --- |" + " --- |" * len(SIZES))
    for native, method in product(NATIVE, METHODS):
        every = []
        for (side, cell), fits in found.items():
            if side == native:
                every.append(fits[method])
                said = " | ".join(f"{acc:.1f} ({seconds:.0f} s)" for acc, seconds in fits[method])
                print(f"| {native}, {method}: {cell.set}, {cell.backbone} | {said} |")
        table = np.array(every)  # cells, sizes, (accuracy, seconds)
        means, differences = table.mean(axis=0), table[:, :, 0] - table[:, :1, 0]
        errors = differences.std(axis=0, ddof=1) / len(table) ** 0.5
        rest = zip(means, differences.mean(axis=0), errors, strict=True)
        said = " | ".join(f"{a:.1f} ({d:+.1f} ± {e:.1f}; {s:.0f} s)" for (a, s), d, e in rest)
        print(f"| **{native} pixels, {method}, mean** | {said} |")


if __name__ == "__main__":
    main()
