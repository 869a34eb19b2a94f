"""Settings of `tl compare`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tl.config.schemas import TrackingConfig
from tl.config.settings import Request, setting

# Keys whose values are names and conditions, which Hydra's grammar knows other meanings for.
PLAIN_KEYS = (
    *("experiment", "filter", "baseline", "output_dir", "tracking.experiment"),
    *("run", "name"),  # of tl register and tl promote
)
ALIASES = {"experiment": "tracking.experiment"}


@dataclass
class CompareConfig(Request):
    """Config of `tl compare`."""

    runs: list[str] = setting(
        factory=list,
        help="runs to compare: MLflow ids, names that no other run has, or output folders (a "
        "folder of runs stands for all of them); default: all of the experiment",
        common=True,
    )
    filter: str | None = setting(
        None,
        "runs of the experiment that fulfil a condition, as MLflow has it: params.model.name = "
        "'resnet18' and metrics.`val/acc` > 0.9",
        common=True,
    )
    split: str | None = setting(
        None,
        "images to compare on; default: test, or val where no run has test images",
        choices=("val", "test"),
        common=True,
    )
    baseline: str | None = setting(
        None,
        "run that all others are compared with, as in `runs`; default: the best, and all pairs "
        "up to 20 runs",
        common=True,
    )
    confidence: float = setting(
        0.95, "of intervals and verdicts; 1 - confidence is the chance of a false one", low=0.5,
        high=0.9999,
    )  # fmt: skip
    thumbnails: bool = setting(True, "small pictures of the images whose answer changed")
    tracking: TrackingConfig = setting(
        factory=TrackingConfig, help="MLflow; experiment=NAME is tracking.experiment=NAME"
    )
    output_dir: str | None = setting(
        None, "folder of the comparison; default: runs/<date>_compare_<experiment>", common=True
    )

    def problems(self) -> list[str]:
        """There is something to compare."""
        found = []
        if not self.runs and not self.tracking.experiment:
            found.append("name an experiment (experiment=NAME) or at least two runs (runs=A,B)")
        if self.filter and self.runs:
            found.append("filter chooses from an experiment, runs names them: use one of both")
        if len(self.runs) != len(set(self.runs)):
            twice = sorted({run for run in self.runs if self.runs.count(run) > 1})
            found.append(f"runs names {', '.join(twice)} twice")
        return found


def plain_names(args: Sequence[str]) -> list[str]:
    """Arguments of `tl compare` and its likes as Hydra reads them: names and conditions in quotes.

    `runs=A,B` is a list here and no sweep, and `experiment=NAME` no preset.

    Example:
        >>> plain_names(["runs=a · 1f3c,b", "experiment=birds", "split=val"])
        ['runs=["a · 1f3c","b"]', 'tracking.experiment="birds"', 'split=val']
    """
    return [_plain(arg) for arg in args]


def _plain(arg: str) -> str:
    key, equals, value = arg.partition("=")
    if not equals or "${" in value:
        return arg
    if key == "runs" and not value.startswith("["):
        return "runs=[" + ",".join(_quoted(name) for name in value.split(",") if name) + "]"
    if key == "runs":
        names = [name.strip() for name in value.removeprefix("[").removesuffix("]").split(",")]
        return "runs=[" + ",".join(_quoted(name) for name in names if name) + "]"
    if key in PLAIN_KEYS and value and value != "null":
        return f"{ALIASES.get(key, key)}={_quoted(value)}"
    return arg


def _quoted(text: str) -> str:
    if re.fullmatch(r"\"[^\"]*\"|'[^']*'", text):
        return text
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)  # Hydra halves the backslashes before a quote
    return f'"{escaped}"'
