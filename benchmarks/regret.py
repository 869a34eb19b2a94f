"""Is the automatic choice right? Regret of finetune=auto against every transfer method.

    python benchmarks/regret.py fit --quick
    python benchmarks/regret.py fit --minutes 120
    python benchmarks/regret.py evidence
    python benchmarks/regret.py report

`fit` trains the cells of a grid (set x images a class x backbone x seed) by every method at three
learning rates, and appends one line a fit to the file `--results`; it goes on where an earlier call
ended. Each cell keeps its evidence, so that `report` asks the decision anew, in seconds, and fits
its thresholds with one set left out; only `evidence` measures it again, without training. The page
about it is docs/decision-table.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from images import REPO, WORK
from regret_cells import SEEDS, Cell, grid
from regret_rates import METHODS, RATES, of_today, share_of_today

from tl.decision.evidence import Evidence

Rows = list[dict[str, Any]]


def work(args: argparse.Namespace) -> None:
    """Measure and train what is missing, in several processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    cells = [c for c in grid(args.quick, args.seeds) if all(word in str(c) for word in args.only)]
    deadline = time.time() + 60 * args.minutes
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        jobs = [pool.submit(train_cell, cell, args, deadline) for cell in cells]
        for number, done in enumerate(as_completed(jobs), 1):
            print(f"{number}/{len(cells)}  {done.result()}", flush=True)


def train_cell(cell: Cell, args: argparse.Namespace, deadline: float) -> str:
    """Evidence and missing fits of one cell; returns a line about it."""
    import regret_fits
    import torch

    torch.set_num_threads(1)
    began, parent = time.time(), os.getppid()
    limits = regret_fits.Limits(args.budget, args.views)
    mine = [row for row in read(args.results) if cell.key().items() <= row.items()]
    known = [Evidence.from_dict(r["evidence"]) for r in mine if r["kind"] == "cell"]
    if began > deadline:
        return f"{cell}: no time left"
    if args.do == "fit" and known and not missing(mine, known[-1], args):
        return f"{cell}: nothing is missing"
    circumstances = {**cell.key(), **asdict(limits), "commit": commit()}
    number = 0
    with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
        given = regret_fits.setting(cell, args.results.parent)
        if args.do == "fit" and known:
            evidence = known[-1]
        else:
            evidence, seconds = regret_fits.measure(given)
            about = {"evidence": evidence.to_dict(), "counts": given.sizes(), "seconds": seconds}
            append(args.results, {"kind": "cell", **circumstances, **about})
        wanted = missing(mine, evidence, args)
        for row in regret_fits.fits(given, evidence, limits, wanted):
            append(args.results, {"kind": "fit", **circumstances, **row})
            number += 1
            if time.time() > deadline or os.getppid() != parent:  # it was killed
                break
    return f"{cell}: {number} of {len(wanted)} fits in {time.time() - began:.0f} s"


def missing(rows: Rows, evidence: Evidence, args: argparse.Namespace) -> list[tuple[str, float]]:
    """Methods and rates of a cell that have no fit yet at what is their rate today."""
    fits = [row for row in rows if row["kind"] == "fit" and "error" not in row]
    today = [row for row in fits if of_today(row, evidence)]
    done = {(row["method"], share_of_today(row, evidence)) for row in today}
    methods = [] if args.do == "evidence" else args.methods or list(METHODS)
    return [(m, r) for m in methods for r in args.rates or RATES if (m, r) not in done]


def read(file: Path) -> Rows:
    """All lines of the results."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def append(file: Path, row: dict[str, Any]) -> None:
    """Add a line in one write: several processes share the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as out:
        out.write(json.dumps(row).encode() + b"\n")


@cache
def commit() -> str:
    """Of the code that is measured: that which this process began with."""
    command = ["git", "-C", str(REPO), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def report(args: argparse.Namespace) -> None:
    """Print the tables, and draw the picture."""
    import regret_report

    rows = read(args.results)
    trained = [row["method"] for row in rows if row["kind"] == "fit"]
    if not trained:
        raise SystemExit(f"{args.results} has no fits: python benchmarks/regret.py fit")
    methods = args.methods or list(dict.fromkeys(trained))
    print(regret_report.text(rows, methods, every_fit=args.every_fit))
    if args.picture:
        regret_report.draw(rows, methods, args.picture)
        print(f"picture: {args.picture}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("do", choices=["fit", "evidence", "report"])
    parser.add_argument("--results", type=Path, default=WORK / "regret" / "results.jsonl")
    parser.add_argument("--quick", action="store_true", help="a reduced grid")
    parser.add_argument("--only", nargs="*", default=[], help="cells whose line has these words")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS, help="default: 0 and 1")
    parser.add_argument("--methods", nargs="*", help="default: all")
    parser.add_argument("--rates", nargs="*", type=float, choices=RATES, help="default: all")
    parser.add_argument("--minutes", type=float, default=120, help="no fit begins afterwards")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread")
    parser.add_argument("--budget", default="quick", choices=["quick", "normal", "thorough"])
    parser.add_argument("--views", type=int, default=1_000, help="most images seen by a phase")
    parser.add_argument(
        "--every-fit", action="store_true", help="report: the oracle may be of a former recipe"
    )
    parser.add_argument("--picture", type=Path, help="file of the picture of the report")
    return parser.parse_args()


if __name__ == "__main__":
    chosen = arguments()
    (report if chosen.do == "report" else work)(chosen)
