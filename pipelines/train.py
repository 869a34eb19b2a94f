"""Train: transfer a pretrained network to a folder of images; seal, verify and log the model."""

from __future__ import annotations

import time

from tl.config import TrainConfig, to_yaml
from tl.pipelines import folds, loading, run, together
from tl.runs import TrainResult, open_run


@together.together
@folds.over_folds
def train(config: TrainConfig) -> TrainResult:
    """Do the main job, as `tl.compose` configures it: read, decide, transfer, judge, export, log.

    Raises:
        RequestError: The request was wrong (`ConfigError`, `DataError`, `WeightsError`).
        TlError: The job failed; its folder says how far it came, and `resume` continues it.
    """
    folder, asked = open_run(config)  # before torch is loaded: wrong folders are refused at once
    with loading():
        from tl import data, display, export, finetuning, models, report, runs, tracking, training

        tracking.load(config.tracking)
    began = time.perf_counter()
    training.prepare(asked.trainer, asked.seed, asked.callbacks, asked.logger)
    models.check_request(asked.model, pretrained=asked.finetune.pretrained)
    # A table of (image, label, split), every image looked at once, and what is wrong with it
    with display.bar("checking images") as progress:
        table, found = runs.audited(asked, progress)
    display.sections(runs.audit_lines(found))
    # Backbone, new head, stages, and the preprocessing of these very weights
    built = models.build_model(asked.model, table.classes, pretrained=asked.finetune.pretrained)
    tracking.check_store(asked.tracking, resume=folder.resumed)
    # finetune=auto: measure the images with this backbone, then decide; else as asked
    config, built, advice = runs.decide_or_keep(folder, asked, table, built)
    display.sections(runs.brief(advice))
    images = data.ImageDataModule.from_config(table, built.preprocessing, config)
    # Phases, each with its stages and learning rates
    sizes = {"train_images": len(table.split("train")), "batch_size": config.data.batch_size}
    plan = finetuning.build_plan(config.finetune, built, **sizes)
    runs.create(folder, asked, table, built, plan, advice, found)
    display.facts(runs.run_name(config), runs.job_facts(table, built, plan))
    with runs.resumable(folder), tracking.start_run(**runs.labels(folder, config)) as tracked:
        config, built, plan, advice = runs.confirm(folder, config, built, images, plan, advice)
        params = runs.job_params(config, table, built, plan)
        records = runs.records(config, built, plan, advice, found)
        tracked.log_job(params, to_yaml(asked), table.fingerprint(), *records)
        fit = training.run_plan(
            plan,
            built,
            images,
            folder=folder.checkpoints,
            loggers_from=lambda n: (
                tracked.loggers(n) + training.loggers(config.logger, folder.path, n)
            ),
            log_facts=tracked.log_phase,
            **runs.fit_settings(config),
        )
        reports, predictions = training.judge(fit.predict, images, config.evaluation)
        metrics = runs.write_results(folder, fit, reports, predictions, time.perf_counter() - began)
        tracked.log_results(metrics, fit.steps, folder.path)
        bundle, ms = export.exported(folder, config.export)
        tracked.log_bundle(bundle)
        tracked.log_metrics(ms, step=fit.steps)
        for page in report.attach(folder.path, table):
            tracked.log_file(page)
    places = runs.where(folder, bundle, tracked.run_id, tracked.uri)
    display.summary(reports, places | runs.note_test(table, asked.cache.path(), folder.path))
    return TrainResult(folder.path, metrics | ms, bundle, tracked.run_id, fit.trainable_parameters)


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl train` and of `python pipelines/train.py`."""
    run("train", lambda config: train(config).headline, argv)


if __name__ == "__main__":
    main()
