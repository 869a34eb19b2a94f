"""Evaluate: judge a bundle on labelled images; needs no torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from tl.config import EvaluateConfig
from tl.pipelines import loading, run

if TYPE_CHECKING:
    from tl.evaluation import Report


def evaluate(config: EvaluateConfig) -> Report:
    """Predict the images of a folder with a bundle and compare with their labels.

    Args:
        config: Bundle, data, split.

    Returns:
        Metrics with intervals, per-class table, confusion matrix.

    Raises:
        BundleError: `config.bundle` is no bundle.
        DataError: The folder cannot be read, or has a class that the bundle does not know.
    """
    with loading():
        from tl import data, display
        from tl.bundle import Bundle
        from tl.evaluation import evaluate as judge
        from tl.evaluation import predictions_table
        from tl.runs import RunFolder

    bundle = Bundle.load(config.bundle)
    with display.bar("checking images") as progress:
        table = data.read_table(
            config.data,
            seed=0,
            cache_dir=config.cache.path(),
            required_splits=(),
            classes=bundle.classes,
            progress=progress,
        )
    split = config.split or next(s for s in ("test", "val", "all") if len(table.split(s)))
    rows = table.require(split)
    with display.bar("predicting") as progress:
        probabilities = bundle.probabilities(
            table.paths(split), config.data.batch_size, progress=progress
        )
    report = judge(probabilities, rows["label"].to_numpy(), bundle.classes, split)

    name = f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}_evaluate_{table.root.name}"
    folder = RunFolder(Path(config.output_dir or name).absolute())
    folder.write_report(report, predictions_table(rows, probabilities, bundle.classes))
    display.summary([report], {"results": str(folder.path), "bundle": str(bundle.path)})
    return report


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl evaluate` and of `python pipelines/evaluate.py`."""
    run("evaluate", lambda config: evaluate(config).metrics["acc"], argv)


if __name__ == "__main__":
    main()
