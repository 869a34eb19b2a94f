"""When may a fit stop early? lp_ft with all epochs that the recipe plans, at several patiences.

    python benchmarks/patience.py
    python benchmarks/patience.py --preset lp_ft

Cells of the regret benchmark whose validation images choose the epoch, one seed. The rate falls by
a cosine, and val/loss is noisy while it is high: a short patience ends a fit before it falls.
With `--preset` it trains that preset as `tl train finetune=NAME` would, with images as small.
Prints test accuracy, the epochs that ran of those planned, and seconds of a core.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from images import WORK
from regret_cells import BACKBONES, Cell

SHARES = (0.15, 0.5, 1.0)  # of the planned epochs, 5 at least; 1: never
SETS = (("sign_digits", 25), ("hymenoptera", 100), ("flowers5", 100), ("sign_digits", 100))


def train(cell: Cell, preset: str) -> list[tuple[float, int, int, float]]:
    """Test accuracy, epochs, planned epochs and seconds at each of `SHARES`."""
    import regret_fits
    import torch
    from regret_rates import method_config

    import tl
    from tl.decision.recipes import patience

    torch.set_num_threads(1)
    found = []
    work = WORK / "regret"
    folder = work / "patience" / "-".join(map(str, cell.key().values()))
    shutil.rmtree(folder, ignore_errors=True)
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
        given = regret_fits.setting(cell, work)
        if preset:
            config = tl.compose("train", [f"finetune={preset}"], {"data.root": "images"}).finetune
        else:
            config = method_config("lp_ft", regret_fits.measure(given)[0], "quick")
        fit = regret_fits.CellTrainer(given, regret_fits.Limits(views=10**9), folder)
        last = [*config.phases][-1]
        planned = config.phases[last].epochs or config.epochs
        assert planned is not None
        for share in SHARES:
            most = patience(planned, chooses=True, share=share)
            phases = {**config.phases, last: replace(config.phases[last], patience=most)}
            began = time.process_time()
            row = fit.run(replace(config, phases=phases), 1.0, folder / str(share))
            seconds = time.process_time() - began
            found.append((row["acc"], row["epochs"][-1], planned, seconds))
    shutil.rmtree(folder)
    return found


def table(cells: Sequence[Cell], found: Sequence[list[tuple[float, int, int, float]]]) -> str:
    """A row a cell, and the means."""
    names = ["never" if share == 1 else f"{share:.0%} of the epochs" for share in SHARES]
    lines = [f"| patience | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    for cell, fits in zip(cells, found, strict=True):
        said = [f"{100 * acc:.1f} ({n}/{of}, {s:.0f} s)" for acc, n, of, s in fits]
        lines.append(f"| {cell} | {' | '.join(said)} |")
    columns = list(zip(*found, strict=True))
    accuracies = [100 * sum(fit[0] for fit in fits) / len(fits) for fits in columns]
    seconds = [sum(fit[3] for fit in fits) / len(fits) for fits in columns]
    means = [f"{acc:.1f} ({s:.0f} s)" for acc, s in zip(accuracies, seconds, strict=True)]
    return "\n".join([*lines, f"| mean | {' | '.join(means)} |"])


def main() -> None:
    """Train in two processes of one thread each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="", help="of finetune, instead of what auto plans")
    preset = parser.parse_args().preset
    os.environ["OMP_NUM_THREADS"] = "1"
    cells = [Cell(name, amount, backbone, 0) for name, amount in SETS for backbone in BACKBONES]
    with ProcessPoolExecutor(2) as pool:
        print(table(cells, list(pool.map(train, cells, [preset] * len(cells)))))


if __name__ == "__main__":
    main()
