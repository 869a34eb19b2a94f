"""The folder of a run: its name, its files, and what resuming it means."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING, OmegaConf

from tl import ranks
from tl.config import ConfigError, Interrupted, TrainConfig, absolute_data
from tl.runs.again import begun, check_seen, end_job, note_job
from tl.runs.auditing import (
    audit_features,
    audit_lines,
    audited,
    table_to_audit,
    write_audit,
)
from tl.runs.batches import TABLE, BatchSummary, sum_up_batch
from tl.runs.contents import (
    golden_images,
    job_facts,
    job_params,
    keep_golden,
    keep_trained_on,
    where,
    write_results,
)
from tl.runs.deciding import Advice, brief, confirm, decide_or_keep, fit_settings, records
from tl.runs.folder import (
    CONFIG,
    RunError,
    RunFolder,
    TrainResult,
    data_name,
    read_config,
    run_name,
    write_model,
)
from tl.runs.folds import (
    Fold,
    FoldsSummary,
    create_folds,
    each_fold,
    folds_of,
    folds_params,
    folds_tags,
    note_fold,
    sum_up,
    where_folds,
)
from tl.runs.looking import look
from tl.runs.touched import note_test

if TYPE_CHECKING:  # so that `tl train --help` loads neither torch nor pandas
    from tl.audit import AuditReport
    from tl.data import ImageTable
    from tl.finetuning import Plan
    from tl.models import BuiltModel

__all__ = [
    "TABLE",
    "Advice",
    "BatchSummary",
    "Fold",
    "FoldsSummary",
    "RunError",
    "RunFolder",
    "TrainResult",
    "absolute",
    "audit_features",
    "audit_lines",
    "audited",
    "brief",
    "confirm",
    "create",
    "create_folds",
    "data_name",
    "decide_or_keep",
    "each_fold",
    "end_job",
    "fit_settings",
    "folds_of",
    "folds_params",
    "folds_tags",
    "golden_images",
    "job_facts",
    "job_params",
    "labels",
    "look",
    "note_fold",
    "note_test",
    "open_run",
    "read_config",
    "records",
    "refuse_changes",
    "resumable",
    "run_name",
    "sum_up",
    "sum_up_batch",
    "table_to_audit",
    "where",
    "where_folds",
    "write_results",
]

# What a resumed run may do otherwise than it began: none of it changes a number.
FREE_ON_RESUME = ("resume", "output_dir")


def labels(folder: RunFolder, config: TrainConfig) -> dict[str, Any]:
    """What names a job in MLflow: arguments of `tl.tracking.start_run`."""
    return {
        "config": config.tracking,
        "experiment": data_name(config),
        "run_name": run_name(config),
        "kind": "folds" if config.data.folds and config.data.fold is None else "train",
        "output_dir": folder.path,
        "resume": folder.resumed,
    }


@ranks.on_first
def open_run(config: TrainConfig) -> tuple[RunFolder, TrainConfig]:
    """Folder and config of a job: new ones, or those of the run that `config.resume` names.

    A launcher that starts a job again gives the same command: it goes on with the run that the job
    has begun (`tl.runs.again`). Nothing is written yet; see `create`.

    Raises:
        RunError: There is no run to resume, or the output folder holds another run.
        DataError: A new job names a data folder that is not there.
    """
    asked = Path(config.output_dir).absolute() if config.output_dir else None
    if config.resume is None and (own := begun(absolute(config), asked, FREE_ON_RESUME)):
        config = replace(config, resume=str(own))
    if config.resume is None:
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        words = re.sub(r"[^\w.-]+", "_", run_name(config).replace(" · ", "_"))
        path = asked or Path(_free(f"runs/{stamp}_{words}")).absolute()
        if (path / CONFIG).exists():
            msg = f"{path} holds a run already: resume= continues it; or choose another output_dir"
            raise RunError(msg)
        from tl.data.sources import source_format  # not on the way to --help

        source_format(config.data)
        return RunFolder(path), absolute(config)
    path = Path(config.resume).absolute()
    stored = read_config(path)
    stored.resume = config.resume
    stored.output_dir = str(path)
    return RunFolder(path, resumed=True), stored


def _free(name: str) -> str:
    """The name, numbered where another run of the same second has it."""
    names = (f"{name}_{number}" if number else name for number in (0, *range(2, 1000)))
    return next(n for n in names if not Path(n).exists())


def absolute(config: TrainConfig) -> TrainConfig:
    """The config with absolute paths of data and weights, so that any folder may resume the run."""

    def full(path: str) -> str:
        given = path not in {MISSING, "hub", "none"}
        return str(Path(path).expanduser().absolute()) if given else path

    model = replace(config.model, weights=full(config.model.weights))
    return replace(config, data=absolute_data(config.data), model=model)


@contextmanager
def resumable(folder: RunFolder) -> Iterator[None]:
    """Say how to go on after Ctrl-C or SIGTERM."""
    try:
        yield
    except Interrupted as stop:
        raise Interrupted(f"continue with: tl train resume={folder.path}") from stop


def create(
    folder: RunFolder,
    config: TrainConfig,
    table: ImageTable,
    built: BuiltModel,
    plan: Plan,
    advice: Advice | None = None,
    found: AuditReport | None = None,
) -> None:
    """Make the folder of a new run: its config, its plan, and what export needs to know.

    Of several processes the first does; all must see it.

    Args:
        folder: A resumed run has all that already.
        config: As the user asked.
        table: Images.
        built: The model that the plan trains.
        plan: Phases.
        advice: What was measured and decided, with `finetune=auto`.
        found: What the audit found.

    Raises:
        RunError: The folder cannot be written, or some hosts do not see it.
    """
    _create(folder, config, table, built, plan, advice, found)
    check_seen(folder)


@ranks.on_first
def _create(
    folder: RunFolder,
    config: TrainConfig,
    table: ImageTable,
    built: BuiltModel,
    plan: Plan,
    advice: Advice | None,
    found: AuditReport | None,
) -> None:
    folder.make()
    if folder.resumed:
        return
    folder.checkpoints.mkdir(exist_ok=True)
    note_job(folder)
    if advice is not None:
        advice.write(folder, run_name(config, advice.finetune.method))
    write_model(folder, table, built, plan)
    keep_golden(folder, table, config.export.golden_images)
    keep_trained_on(folder, table)
    if found is not None:
        write_audit(folder, found, table)
    elif len(table.quarantined):
        table.quarantined.to_csv(folder.path / "quarantined.csv", index=False)
    # Written last: a folder with a config is a run that can be resumed.
    folder.write_config(config)


def refuse_changes(keys: Iterable[str], config: TrainConfig) -> None:
    """Refuse overrides that would make a resumed run another one.

    Args:
        keys: Dotted keys and groups that the user set.
        config: What they amount to; `config.resume` names the run.

    Raises:
        ConfigError: Names each key with both values.
        RunError: There is no such run.
    """
    given = OmegaConf.structured(absolute(config))
    stored = OmegaConf.structured(read_config(Path(config.resume or "")))
    problems = []
    for key in keys:
        if key in FREE_ON_RESUME:
            continue
        now, then = (OmegaConf.select(node, key) for node in (given, stored))
        if now != then:
            problems.append(f"resume: {key} was {then} when the run began, and is {now} now")
    if problems:
        problems.append("A resumed run goes on as it began: leave these out, or begin a new run.")
        raise ConfigError(problems)
