"""Evaluate: judge a bundle on labelled images; needs no torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl.config import EvaluateConfig
from tl.cores import usable_cores
from tl.pipelines import loading, run

if TYPE_CHECKING:
    from tl.evaluation import Report


def evaluate(config: EvaluateConfig) -> Report:
    """Predict the images of a folder with a bundle and compare with their labels.

    Args:
        config: Bundle, data, split.

    Returns:
        Metrics with intervals, per-class table, confusion matrix; for the task of the bundle.

    Raises:
        BundleError: `config.bundle` is no bundle.
        DataError: The folder cannot be read, or has a class that the bundle does not know.
    """
    with loading():
        from tl import data, display
        from tl import evaluation as judging
        from tl.bundle import Bundle
        from tl.config import Task
        from tl.runs import RunFolder, note_test

    bundle = Bundle.load(config.bundle, threads=usable_cores())
    with display.bar("checking images") as progress:
        table = data.read_table(
            config.data,
            seed=0,
            cache_dir=config.cache.path(),
            required_splits=(),
            classes=bundle.classes,
            task=Task(bundle.task),
            progress=progress,
        )
    split = config.split or next(s for s in ("test", "val", "all") if len(table.split(s)))
    rows = table.require(split)
    with display.bar("predicting") as progress:
        images = table.images(rows)
        outputs = bundle.answers(images, config.data.batch_size, progress=progress)
    targets, classes, told = table.targets(rows), bundle.classes, bundle.outputs
    meant: dict[str, Any] = {"task": table.task, "thresholds": told.thresholds or None}
    promised = {"temperature": told.temperature, "abstain": told.abstain, "scale": told.std}
    more: dict[str, Any] = {**meant, **promised, "groups": rows.get("group")}
    report = judging.evaluate(outputs, targets, classes, split, **more)
    said = judging.predictions_table(rows, outputs, classes, targets=targets, **meant)

    name = f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}_evaluate_{table.root.name}"
    folder = RunFolder(Path(config.output_dir or name).absolute())
    folder.write_report(report, said)
    places = {"results": str(folder.path), "bundle": str(bundle.path)}
    if split == "test":
        places |= note_test(table, config.cache.path(), bundle.path)
    display.summary([report], places)
    return report


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl evaluate` and of `python pipelines/evaluate.py`."""
    run("evaluate", lambda config: evaluate(config).headline, argv)


if __name__ == "__main__":
    main()
