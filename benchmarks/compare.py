"""Hold tl against the tools its users know, and against itself: one line per goal.

    python benchmarks/compare.py probe second-job --data hymenoptera --repeats 3
    python benchmarks/compare.py --list

Every process is timed from outside, on the same images, weights and input size; ratios are taken
within one repetition, and the table at the end has the medians. Each figure is also a line of the
file `--results` as soon as it is known; `--resume` leaves out what that file has. `--tiny` shows in
seconds that a line works.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from images import ASSETS, NAMES, REPO, WORK, every_image, prepare
from measuring import (
    PEER_BIN,
    TL,
    Bench,
    BenchmarkError,
    Finding,
    Job,
    Results,
    medians,
    timed,
    told,
)

Found = Iterator[Job | Finding]
RATES = [f"{10 ** (-4 + 3 * i / 19):.2e}" for i in range(20)]
TIMES = 5
# Who works, by the first matching place in a stack of the main thread.
SHARES = {
    "audit": r"\b(audit|stage_hashes) \(",
    "tracking": r"/mlflow/|/tl/tracking/|LearningRateMonitor",
    "tables": r"/tl/(display|figures)\.py|/tl/runs/|predictions_table|stage_rows",
}
WAITING = r"(wait|_wait|sleep|select|poll|acquire|get|accept|recv|read|run) \([^;]*$"


@dataclass(frozen=True)
class Line:
    """A row of the issue's table."""

    about: str
    measure: Callable[[Bench], Found]


def against(script: str, speed: dict[str, float] | float | None, points: float) -> Callable:
    """A cold linear probe of tl against a peer.

    Args:
        script: Of the peer.
        speed: How many times faster tl should be; by data set where that matters.
        points: By how many points of accuracy tl may be worse.
    """

    def measure(bench: Bench) -> Found:
        ours = bench.cold
        yield ours
        theirs = bench.peer(script)
        yield theirs
        goal = speed.get(bench.root.name) if isinstance(speed, dict) else speed
        yield Finding(f"{theirs.tool}: its time / tl's", theirs.seconds / ours.seconds, goal)
        more = 100 * ((ours.accuracy or 0) - (theirs.accuracy or 0))
        yield Finding(f"accuracy of tl - of {theirs.tool}, points", more, points)

    return measure


def second_job(bench: Bench) -> Found:
    """The same data and backbone with another learning rate."""
    yield bench.cold
    again = bench.train("again", "finetune=linear_probe", "finetune.head_lr=0.003", place="cold")
    yield again
    ratio = again.seconds / bench.cold.seconds
    yield Finding("second job / first job", ratio, 0.4, at_least=False)


def trials(bench: Bench) -> Found:
    """20 learning rates in one process from an empty cache; the trials write no bundles."""
    yield bench.cold
    rates = ",".join(RATES[: 3 if bench.tiny else None])
    job = bench.train(
        "trials", "finetune=linear_probe", f"finetune.head_lr={rates}", "export.enabled=false", "-m"
    )
    yield job
    ratio = job.seconds / bench.cold.seconds
    yield Finding("20 trials without bundles / one cold job", ratio, 1.5, at_least=False)


def partial(bench: Bench) -> Found:
    """Epochs of the head and the last stage with cached and with computed activations."""
    seconds: dict[str, list[float]] = {"on": [], "off": []}
    accuracy: dict[str, list[float]] = {"on": [], "off": []}
    for seed in range(bench.seeds):
        for mode in ("on", "off"):
            job = bench.train(
                f"cache-{mode}-{seed}", "finetune=partial", f"cache={mode}", f"seed={seed}"
            )
            seconds[mode].append(epoch_seconds(job))
            accuracy[mode].append(job.accuracy or 0)
            yield Job(job.tool, job.seconds, job.accuracy, None, {"epoch": seconds[mode][-1]})
    ratio = statistics.median(seconds["off"]) / statistics.median(seconds["on"])
    yield Finding("epoch uncached / epoch cached", ratio, 2)
    points = 100 * (statistics.mean(accuracy["on"]) - statistics.mean(accuracy["off"]))
    yield Finding(f"accuracy cached - uncached over {bench.seeds} seeds, points", points, -1)


def epoch_seconds(job: Job) -> float:
    """Median seconds of a run's epochs, the first one (start of the loaders) left out."""
    assert job.folder is not None
    seconds = pd.read_csv(job.folder / "history.csv")["seconds"]
    return round(float(seconds.iloc[1 if len(seconds) > 1 else 0 :].median()), 4)


def prefix(bench: Bench) -> Found:
    """One pass over all images, decoding included: tl's way, and timm's model as it comes."""
    settings = ("finetune=linear_probe", "augment=none", "cache=on")
    rates = []
    for loop, tool, env in (
        ("prefix", "tl prefix pass", {"OMP_WAIT_POLICY": "PASSIVE"}),
        ("eager", "timm eager pass", {}),
    ):
        said = bench.loop(loop, *settings, **env)
        rates.append(said["images"] / said["seconds"])
        details = {"images/s": round(rates[-1], 1)} | said
        yield Job(tool, said["seconds"], details=details)
    goal = 3.0 if bench.root.name == "four" else None
    yield Finding("prefix images/s / timm eager images/s", rates[0] / rates[1], goal)


def full(bench: Bench) -> Found:
    """Epochs (train and val) of full fine-tuning in tl and in a plain loop over the same parts."""
    settings = ["finetune=full", "finetune.patience=0", "cache=off"]
    settings += [] if bench.tiny else ["finetune.epochs=4"]
    job = bench.train("full", *settings, "export.enabled=false")
    ours = epoch_seconds(job)
    yield Job(job.tool, job.seconds, job.accuracy, None, {"epoch": ours})
    said = bench.loop("plain", *settings)
    theirs = statistics.median(said["epochs"][1:] or said["epochs"])
    details = {"epoch": round(theirs, 4)}
    yield Job("plain PyTorch loop", sum(said["epochs"]), said["accuracy"], None, details)
    yield Finding("full fine-tuning, images/s / plain loop's", theirs / ours, 0.97)


def overhead(bench: Bench) -> Found:
    """Share of tracking, tables and audit: where the stacks of a job are, 50 times a second."""
    profile = bench.folder / "profile.txt"
    spy = [PEER_BIN / "py-spy", "record", "--idle", "--threads", "--nonblocking", "--rate", "50"]
    spy += ["--format", "raw", "--full-filenames", "--output", profile, "--", sys.executable]
    length = [] if bench.tiny else ["finetune.epochs=20", "finetune.patience=0"]
    job = bench.train("profiled", "finetune=full", *length, prefix=spy)
    counts, total = shares(profile.read_text())
    parts = {name: round(number / total, 5) for name, number in counts.items()}
    yield Job(job.tool, job.seconds, job.accuracy, None, parts)
    share = sum(counts.values()) / total
    yield Finding("tracking, tables and audit / wall time", share, 0.02, at_least=False)


def shares(profile: str) -> tuple[Counter[str], int]:
    """Samples of each of `SHARES`, and samples of the main thread, in py-spy's folded stacks.

    Threads of MLflow count where they do not wait: they take a core from the job.
    """
    counts: Counter[str] = Counter()
    total = 0
    found = re.search(r"^(thread \(\w+\)): MainThread", profile, re.MULTILINE)
    for line in profile.splitlines():
        stack, _, number = line.rpartition(" ")
        main = found is not None and stack.startswith(found[1])
        total += int(number) if main else 0
        name = next((n for n, place in SHARES.items() if re.search(place, stack)), None)
        if name and (main or not re.search(WAITING, stack)):
            counts[name if main else "threads of MLflow"] += int(number)
    return counts, total


def startup(bench: Bench) -> Found:
    """What should be there at once; medians of five."""
    job = bench.train("bundle", "finetune=linear_probe", "finetune.epochs=1")
    assert job.folder is not None
    bundle, image = f"bundle={job.folder / 'bundle'}", every_image(bench.root)[0]
    commands = {
        "tl --help, s": (["--help"], 0, 0.3),
        "a config error, s": (["train", "data.root=x", "finetune.head_lr=-1"], 2, 1.5),
        "tl predict on one image, s": (["predict", bundle, f"source={image}"], 0, 1.5),
    }
    for name, (words, code, goal) in commands.items():
        runs = [timed([TL, *words], bench.folder / "home", code=code)[0] for _ in range(TIMES + 1)]
        seconds = statistics.median(runs[1:])
        yield Job(name.removesuffix(", s"), seconds)
        yield Finding(name, seconds, goal, at_least=False)


LINES = {
    "probe": Line(
        "cold linear probe against scikit-learn on timm features",
        against("sklearn_probe.py", {"hymenoptera": 1.0, "four": 1.5}, -1),
    ),
    "fastai": Line("the same against fastai, frozen, 5 epochs", against("fastai_frozen.py", 5, 0)),
    "lightning": Line(
        "the same against Lightning's BackboneFinetuning, frozen, 5 epochs",
        against("lightning_finetuning.py", None, 0),
    ),
    "huggingface": Line(
        "the same against the Hugging Face Trainer, frozen, 5 epochs",
        against("hf_trainer.py", None, 0),
    ),
    "second-job": Line("another learning rate on the same data and backbone", second_job),
    "trials": Line("20 learning rates in one process against one cold job", trials),
    "partial": Line("epochs of `partial`, cached against uncached, 3 seeds", partial),
    "prefix": Line("one pass over the images against timm eager", prefix),
    "full": Line("full fine-tuning against a plain PyTorch loop", full),
    "overhead": Line("share of tracking, tables and audit in a job of 5 minutes", overhead),
    "startup": Line("--help, a config error, predict on one image", startup),
}


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lines", nargs="*", choices=[*LINES, []], help="see --list")
    parser.add_argument("--list", action="store_true", help="name the lines and stop")
    parser.add_argument("--data", choices=NAMES, default="hymenoptera")
    parser.add_argument("--model", default="mobilenetv2_100", help="a model preset of tl")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="of the line `partial`")
    parser.add_argument("--set", nargs="*", default=[], help="key=value for all jobs of tl")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for images and runs")
    parser.add_argument("--results", type=Path, help="default: results.jsonl in --work")
    parser.add_argument("--resume", action="store_true", help="leave out what --results has")
    parser.add_argument("--tiny", action="store_true", help="24 images, a tiny network")
    return parser.parse_args()


def main() -> None:
    """Run the lines, each as often as asked, and print the table."""
    args = arguments()
    if args.list or not args.lines:
        for name, line in LINES.items():
            print(f"{name:<12} {line.about}")
        return
    if args.tiny:
        args.data, args.model, args.seeds = "tiny", "test_resnet", 1
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    root = prepare(args.data, work)
    for file in every_image(root):  # all tools find the images in the system's page cache
        file.read_bytes()
    about = {"data": args.data, "model": args.model, "set": args.set, "commit": commit()}
    results = Results(
        args.results or work / "results.jsonl", about | {"cores": len(os.sched_getaffinity(0))}
    )
    weights = "none" if args.tiny else str(ASSETS / "weights" / f"{args.model}.safetensors")
    findings: dict[str, list[Finding]] = {name: [] for name in args.lines}
    failed = False
    for repeat in range(args.repeats):
        with tempfile.TemporaryDirectory(dir=work) as folder:
            bench = Bench(root, args.model, weights, Path(folder), args.set, args.seeds, args.tiny)
            for name in args.lines:
                known = results.findings(line=name, repeat=repeat) if args.resume else []
                try:
                    findings[name] += known or run(name, bench, results, repeat)
                except BenchmarkError as error:
                    failed = True
                    print(f"{name}: {error}", file=sys.stderr)
    print(f"\n{args.data}, {args.model}, medians of {args.repeats}\n")
    print("| measure | goal | found |\n| --- | --- | --- |")
    for found in findings.values():
        for finding in medians(found):
            print(finding.words)
    sys.exit(failed)


def run(name: str, bench: Bench, results: Results, repeat: int) -> list[Finding]:
    """One repetition of a line, told and kept as it goes."""
    print(f"{name}, repetition {repeat + 1}: {LINES[name].about}", flush=True)
    findings = []
    for found in LINES[name].measure(bench):
        if bench.tiny and isinstance(found, Finding):
            found = replace(found, goal=None)  # what takes seconds says nothing about goals
        kind = "finding" if isinstance(found, Finding) else "job"
        results.add(kind, asdict(found), line=name, repeat=repeat)
        if isinstance(found, Finding):
            findings.append(found)
        print(found.words if isinstance(found, Finding) else told(found), flush=True)
    return findings


def commit() -> str:
    """Commit that is measured."""
    words = ["git", "-C", str(REPO), "describe", "--always", "--dirty"]
    return subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
