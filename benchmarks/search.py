"""What a search costs against one job of the same kind, with an empty cache each.

    python benchmarks/search.py --data DIR --model mobilenetv2_100 --weights FILE

Runs `tl train finetune=linear_probe` and `tl search finetune=linear_probe` of 20 trials in turn,
the winner trained, exported and judged as well, and prints seconds of the clock and of the
processor, and ratios. On a machine that does other things, too, the processor's seconds tell more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

from measuring import TL, timed

GOAL = 1.5  # jobs that 20 trials of a linear probe may cost
KINDS = {
    "job": ("train",),
    "search by val": ("search", "search.folds=0"),
    "search by folds": ("search", "search.folds=3"),
}


def measure(kind: str, args: argparse.Namespace, folder: Path) -> tuple[float, float]:
    """Seconds of the clock and of the processor of one command in an empty home."""
    name, *settings = KINDS[kind]
    home = folder / kind.replace(" ", "-")
    command = [TL, name, f"data.root={args.data}", f"model={args.model}"]
    command += [f"model.weights={args.weights}", "finetune=linear_probe", *settings, *args.options]
    command += [f"cache.dir={home / 'cache'}", f"output_dir={home / 'run'}"]
    before, began = os.times(), time.perf_counter()
    timed(command, home)
    seconds, after = time.perf_counter() - began, os.times()
    used = after.children_user + after.children_system
    return seconds, used - before.children_user - before.children_system


def main() -> None:
    """Measure in turn, so that a change of the machine's load meets all alike."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="mobilenetv2_100")
    parser.add_argument("--weights", default="hub")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("options", nargs="*", help="further settings of all commands")
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for kind in KINDS:
                found[kind].append(measure(kind, args, Path(folder)))
                print(f"{kind}: {found[kind][-1][0]:.1f} s, {found[kind][-1][1]:.1f} s of CPU")
    print("\n| what | seconds | of a job | CPU seconds | of a job | goal |")
    print("| --- | --- | --- | --- | --- | --- |")
    job = [statistics.median(part) for part in zip(*found["job"], strict=True)]
    for kind, pairs in found.items():
        clock, cpu = (statistics.median(part) for part in zip(*pairs, strict=True))
        ratios = f"{clock:.1f} | {clock / job[0]:.2f} | {cpu:.1f} | {cpu / job[1]:.2f}"
        print(f"| {kind} | {ratios} | {'–' if kind == 'job' else f'≤ {GOAL}'} |")


if __name__ == "__main__":
    main()
