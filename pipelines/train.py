"""Train: transfer a pretrained network to a folder of images; seal, verify and log the model."""

from __future__ import annotations

import time

from tl.pipelines import run

from tl.config import TrainConfig, to_yaml
from tl.runs import TrainResult


def train(config: TrainConfig) -> TrainResult:
    """Do the main job: read, transfer, judge, export, log.

    Args:
        config: As `tl.compose` makes it; folders are relative to the working directory.

    Returns:
        Folder, metrics, bundle and MLflow run of the job.

    Raises:
        RequestError: The request was wrong (`ConfigError`, `DataError`, `WeightsError`).
        TlError: The job failed; its folder says how far it came, and `resume` continues it.

    Example:
        >>> import tl
        >>> config = tl.compose("train", ["data.root=photos", "finetune=lp_ft"])
        >>> tl.train(config).metrics["val/acc"]  # doctest: +SKIP
    """
    from tl import data, display, export, finetuning, models, runs, tracking, training

    began = time.perf_counter()
    folder, config = runs.open_run(config)
    training.prepare(config.trainer, config.seed)

    # A table of (image, label, split), every image looked at once
    with display.bar("checking images") as progress:
        table = data.read_folder(
            config.data, seed=config.seed, cache_dir=config.cache.path(), progress=progress
        )
    # Backbone, new head, stages, and the preprocessing of these very weights
    built = models.build_model(
        config.model, len(table.classes), pretrained=config.finetune.pretrained
    )
    images = data.ImageDataModule(
        table,
        built.preprocessing,
        config.augment,
        batch_size=config.data.batch_size,
        num_workers=config.data.num_workers,
        seed=config.seed,
        max_pixels=config.data.max_pixels,
    )
    # Phases, each with its stages and learning rates
    plan = finetuning.build_plan(
        config.finetune,
        built.stages,
        train_images=len(table.split("train")),
        batch_size=config.data.batch_size,
        pretrained=built.weights.source != models.RANDOM,
    )
    runs.create(folder, config, table, built, plan)
    display.facts(runs.run_name(config), runs.job_facts(table, built, plan))

    with tracking.start_run(
        config.tracking,
        experiment=runs.data_name(config),
        run_name=runs.run_name(config),
        output_dir=folder.path,
        resume=folder.resumed,
    ) as tracked:
        tracked.log_params(runs.job_params(config, table, built, plan))
        tracked.log_config(to_yaml(config))
        tracked.log_dataset(table.fingerprint())
        tracked.log_environment()
        fit = training.run_plan(
            plan,
            built,
            images,
            folder=folder.checkpoints,
            trainer=config.trainer,
            callbacks=config.callbacks,
            loggers_from=lambda step: [*tracked.loggers(step), *training.loggers(config.logger)],
            log_rows=lambda rows, name: tracked.log_dict({"stages": rows}, f"phases/{name}.json"),
            seed=config.seed,
        )
        reports, predictions = training.judge(built.model, images, fit.device)
        metrics = runs.write_results(folder, fit, reports, predictions, time.perf_counter() - began)
        tracked.log_metrics(metrics, step=fit.steps)
        tracked.log_file(folder.pictures, "pictures")
        bundle = None
        if config.export.enabled:
            bundle, _seal = export.export_run(folder, config.export)
            tracked.log_bundle(bundle)
    display.summary(reports, runs.where(folder, bundle, tracked.run_id, tracked.uri))
    return TrainResult(folder.path, metrics, bundle, tracked.run_id, fit.trainable_parameters)


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl train` and of `python pipelines/train.py`."""
    run("train", lambda config: train(config).metrics["val/acc"], argv)


if __name__ == "__main__":
    main()
