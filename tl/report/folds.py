"""The page of a cross-validation: what its folds amount to."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from tl.report.files import METRICS, read_json, titled
from tl.report.judging import METRIC_WORDS
from tl.report.parts import Block, Part, number, share, step, tile
from tl.runs import RunError, read_config, run_name

SUMMARY = "folds.json"
HEADLINES = {"val/acc": "accuracy", "val/map": "mAP", "val/mae": "mean absolute error"}


class FoldsFiles:
    """The files of a cross-validation.

    Args:
        path: Folder above those of its folds.

    Raises:
        RunError: Not all folds are done.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_config(path)
        if not (path / METRICS).is_file():
            msg = f"{path} is not finished: tl train resume={path} goes on with its folds"
            raise RunError(msg)

    @staticmethod
    def here(path: Path) -> bool:
        """Whether a folder is one of a cross-validation."""
        return (path / SUMMARY).is_file()

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Means over the folds."""
        return read_json(self.path / METRICS)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Of `folds.json`."""
        return read_json(self.path / SUMMARY)

    @cached_property
    def name(self) -> str:
        """Data · model · method, and how many folds."""
        return titled(f"{run_name(self.config)} · {self.summary['folds']} folds", self.path)

    @property
    def model(self) -> dict[str, Any]:
        """Nothing: each fold has its own."""
        return {}


def parts_of_folds(run: FoldsFiles) -> list[Part]:
    """Headline with its spread, each metric by fold, and where each fold's own page is."""
    metrics: dict[str, dict[str, Any]] = run.summary["metrics"]
    key = next(key for key in HEADLINES if key in metrics)
    found, shown = metrics[key], share if key == "val/acc" else number
    low, high = shown(min(found["values"])), shown(max(found["values"]))
    spread = f"± {shown(found['std'])} between {len(found['values'])} folds"
    each = "each judged by the fold that did not train on it"
    tiles = [
        tile(f"{HEADLINES[key]} on val", shown(found["mean"]), spread),
        tile("lowest and highest fold", f"{low} to {high}"),
        tile("images", f"{run.metrics['val/images']:,.0f}", each),
    ]
    text = (
        "The spread says how much the figure depends on which images are val. It is no error of "
        "the mean, as the folds share most of their training images."
    )
    numbers = [f"fold {n}" for n in range(len(found["values"]))]
    rows = [
        [METRIC_WORDS.get(name.split("/", 1)[-1], name), name, number(m["mean"]), number(m["std"]),
         *map(number, m["values"])]
        for name, m in metrics.items()
    ]  # fmt: skip
    columns = {"metric": False, "key": False, "mean": True, "spread": True}
    table = {"columns": columns | dict.fromkeys(numbers, True), "rows": rows}
    pages = [
        step(f"Fold {fold['fold']}", fold["method"], page=f"{fold['folder']}/report.html")
        for fold in run.summary["runs"]
    ]
    return [
        Part("result", "result", [text], [Block("numbers", tiles)], [METRICS, SUMMARY]),
        Part("metrics", "metrics", [], [Block("table", table)], [SUMMARY]),
        Part("folds", "pages of the folds", [], [Block("steps", pages)], [SUMMARY]),
    ]
