"""Run a tool in a process of its own, take its time from outside, and keep every figure."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from images import REPO

TL = Path(sys.executable).with_name("tl")
PEERS = REPO / "benchmarks" / "peers"
PEER_BIN = PEERS / ".venv" / "bin"
# A job in seconds, to see that the programs work.
TINY = (
    *("model.image_size=32", "data.batch_size=8", "data.num_workers=0", "trainer=cpu"),
    *("finetune.epochs=2", "tracking.system_metrics=false"),
)


class BenchmarkError(Exception):
    """A tool failed; says which, and its last lines."""


@dataclass(frozen=True)
class Job:
    """One process that was measured; `accuracy` of val in [0, 1]."""

    tool: str
    seconds: float
    accuracy: float | None = None
    folder: Path | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """A figure to hold against a goal; without `goal` it is only told."""

    measure: str
    value: float
    goal: float | None = None
    at_least: bool = True

    @property
    def reached(self) -> bool | None:
        """Whether the goal is."""
        if self.goal is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    @property
    def words(self) -> str:
        """The cells of a table: measure, goal, value."""
        sign = "≥" if self.at_least else "≤"
        goal = "–" if self.goal is None else f"{sign} {self.goal:g}"
        missed = ", missed" if self.reached is False else ""
        return f"| {self.measure} | {goal} | {self.value:.3g}{missed} |"


class Results:
    """A file with one JSON object a line: every job and every finding, with its circumstances."""

    def __init__(self, file: Path, circumstances: dict[str, Any]) -> None:
        self.file = file
        self.circumstances = circumstances
        file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, row: dict[str, Any], **where: Any) -> None:
        """Append a row at once: an interrupted series keeps what it has."""
        now = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "load": round(os.getloadavg()[0], 2)}
        with self.file.open("a") as lines:
            line = {"kind": kind, **where, **row, **now, **self.circumstances}
            lines.write(json.dumps(line, default=str) + "\n")

    def findings(self, **where: Any) -> list[Finding]:
        """What an earlier series found under the same circumstances, whatever the commit."""
        wanted = {"kind": "finding", **where, **self.circumstances}
        wanted.pop("commit", None)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        rows = [row for row in map(json.loads, lines) if wanted.items() <= row.items()]
        keys = ("measure", "value", "goal", "at_least")
        return [Finding(**{key: row[key] for key in keys}) for row in rows]


@dataclass
class Bench:
    """One repetition: a folder that begins empty, and how to start the tools on the same images.

    Args:
        root: Images, with train/ and val/.
        model: timm name, a preset of tl.
        weights: File, or `none`.
        folder: Empty; caches, tracking stores and runs of this repetition.
        options: Further settings of each job of tl.
        seeds: How many, where a line compares accuracies over seeds.
        tiny: Jobs of seconds.
    """

    root: Path
    model: str
    weights: str
    folder: Path
    options: Sequence[str]
    seeds: int
    tiny: bool

    @cached_property
    def cold(self) -> Job:
        """A linear probe with an empty cache, as users run it: evaluation, MLflow, bundle."""
        return self.train("cold", "finetune=linear_probe")

    def train(self, name: str, *settings: str, place: str = "", prefix: Sequence[Any] = ()) -> Job:
        """`tl train` in a folder `name`.

        Args:
            name: Of the run's folder.
            settings: Overrides and flags.
            place: Whose cache and tracking store it reads; default: its own, empty.
            prefix: Command that starts it, such as a profiler.
        """
        home = self.folder / f"home-{place or name}"
        run = self.folder / name
        command = [*prefix, TL, "train", *self.inputs(), *settings]
        command += [f"cache.dir={home / 'cache'}", f"output_dir={run}"]
        seconds, _ = timed(command, home)
        files = sorted(run.rglob("metrics.json"))
        found = [json.loads(file.read_text())["val/acc"] for file in files]
        return Job(f"tl {name}", seconds, max(found), run, {"settings": " ".join(settings)})

    def inputs(self) -> list[str]:
        """Settings that say what is trained on what."""
        own = [f"data.root={self.root}", f"model={self.model}", f"model.weights={self.weights}"]
        return [*own, *(TINY if self.tiny else ()), *self.options]

    def peer(self, script: str) -> Job:
        """A script of the peers in their own interpreter; the time of the whole process."""
        if not (PEER_BIN / "python").exists():
            raise BenchmarkError("the peers are not installed: run benchmarks/peers/setup.sh")
        command = [PEER_BIN / "python", PEERS / script, "--data", self.root, "--model", self.model]
        command += ["--weights", self.weights] if self.weights != "none" else []
        command += ["--size", 32] if self.tiny else []
        seconds, out = timed(command, self.folder / f"home-{script}")
        said = last_json(out)
        return Job(said["tool"], seconds, said["accuracy"], details=said["seconds"])

    def loop(self, name: str, *settings: str, **env: str) -> dict[str, Any]:
        """What a loop of `loops.py` prints, run by tl's interpreter on the same job."""
        home = self.folder / f"home-{name}-{len(list(self.folder.iterdir()))}"
        own = [*self.inputs(), *settings, f"cache.dir={home / 'cache'}"]
        loops = REPO / "benchmarks" / "loops.py"
        return last_json(timed([sys.executable, loops, name, *own], home, **env)[1])


def timed(command: Sequence[Any], home: Path, *, code: int = 0, **env: str) -> tuple[float, str]:
    """Wall time and output of a process that keeps whatever it caches below `home`.

    Args:
        command: Program and arguments.
        home: Its working folder.
        code: Exit code that it should end with.
        env: Further variables of its environment.

    Raises:
        BenchmarkError: It ended with another exit code.
    """
    home.mkdir(parents=True, exist_ok=True)
    own = {
        "HF_HOME": home / "hub",
        "HF_HUB_OFFLINE": "1",
        "MLFLOW_TRACKING_URI": f"sqlite:///{home / 'mlflow.db'}",
        "TORCHINDUCTOR_CACHE_DIR": home / "inductor",
    }
    began = time.perf_counter()
    done = subprocess.run(
        [str(word) for word in command],
        cwd=home, env=os.environ | {k: str(v) for k, v in own.items()} | env,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    if done.returncode != code:
        raise BenchmarkError(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}")
    return seconds, done.stdout


def last_json(output: str) -> dict[str, Any]:
    """The last line of an output that is a JSON object."""
    found: dict[str, Any] = json.loads([x for x in output.splitlines() if x.startswith("{")][-1])
    return found


def told(job: Job) -> str:
    """A job in one line."""
    accuracy = "" if job.accuracy is None else f"   accuracy {100 * job.accuracy:.1f} %"
    more = f"   {job.details}" if job.details else ""
    return f"  {job.tool:<32} {job.seconds:9.2f} s{accuracy}{more}"


def medians(findings: Sequence[Finding]) -> list[Finding]:
    """One finding a measure, the median of its repetitions."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.measure, []).append(finding)
    return [
        Finding(**asdict(group[0]) | {"value": statistics.median(f.value for f in group)})
        for group in groups.values()
    ]
