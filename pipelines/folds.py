"""Cross-validation: `tl train` with data.folds trains once for each fold and sums up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps

from tl import ranks
from tl.config import TrainConfig, to_yaml
from tl.pipelines import loading
from tl.runs import TrainResult, each_fold, folds_of, note_fold, open_run, resumable, sum_up

Train = Callable[[TrainConfig], TrainResult]


def over_folds(train: Train) -> Train:
    """Let `train` run once for each fold where `data.folds` is set and `data.fold` is not."""

    @wraps(train)
    def once_or_often(config: TrainConfig) -> TrainResult:
        return cross_validate(config, train) if folds_of(config) else train(config)

    return once_or_often


def cross_validate(config: TrainConfig, train: Train) -> TrainResult:
    """Train and judge once for each fold, each a run of its own within one above them.

    Args:
        config: `data.folds` is set, or `resume` names a run of which it was.
        train: Does one fold.

    Returns:
        Means over the folds in `metrics`; a bundle has each fold alone.

    Raises:
        RequestError: The request was wrong, or the images do not do for so many folds.
        TlError: A fold failed; `resume` goes on with it.
    """
    folder, asked = open_run(config)
    with loading():
        from tl import data, display, models, report, runs, tracking

        tracking.load(asked.tracking)
    models.check_request(asked.model, pretrained=asked.finetune.pretrained)
    # Whether the images do for all folds, before the first begins
    with display.bar("checking images") as progress:
        table = ranks.on_first(data.read_table)(
            asked.data, seed=asked.seed, cache_dir=asked.cache.path(), progress=progress
        )
    above = replace(asked, tracking=replace(asked.tracking, system_metrics=False))
    tracking.check_store(above.tracking, resume=folder.resumed)
    runs.create_folds(folder, asked)
    with resumable(folder), tracking.start_run(**runs.labels(folder, above)) as tracked:
        params, tags = runs.folds_params(asked), runs.folds_tags(asked)
        tracked.log_job(params, to_yaml(asked), table.fingerprint(), tags=tags)
        results, last = [], (asked.data.folds or 0) - 1
        for fold in each_fold(folder, asked):
            known = ": done before" if fold.result else ""
            display.say(f"\n--- fold {fold.number} of 0 to {last}{known} ---\n")
            results.append(fold.result or train(fold.config))
            note_fold(folder, fold, results[-1])
        summary = sum_up(folder, asked, results)
        tracked.log_results(summary.metrics, len(results), folder.path)
        for page in report.attach(folder.path):
            tracked.log_file(page)
    display.results_table(f"val over {len(results)} folds", summary.table)
    display.results_table("folds", summary.runs)
    display.facts(
        "where everything is", runs.where_folds(folder, asked, tracked.run_id, tracked.uri)
    )
    most = max(result.trainable_parameters for result in results)
    return TrainResult(folder.path, summary.metrics, None, tracked.run_id, most)
