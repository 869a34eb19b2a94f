"""The table of a job, and what is wrong with it: for `tl train` as it asks, for `tl audit` all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from tl import ranks
from tl.config import AuditConfig, AuditMode, BadImages, DataConfig, FinetuneConfig, TrainConfig

if TYPE_CHECKING:  # so that `tl audit` loads torch only where a network is asked for
    from tl.audit import AuditReport, Features
    from tl.data import ImageTable
    from tl.runs.folder import RunFolder
    from tl.sections import Section

Progress = Callable[[int, int], None]
NO_NETWORK = "none"


@ranks.on_first
def audited(config: TrainConfig, progress: Progress) -> tuple[ImageTable, AuditReport | None]:
    """Read the images of a job and look for what is wrong with them.

    Args:
        config: With `audit=fix` what is unreadable, labelled in two ways or leaked is left out.
        progress: Called with (done, total) while images are checked.

    Returns:
        The table to train on, and the report; None with `audit=off`.

    Raises:
        DataError: The images cannot be used.
        AuditError: `audit=fail`, and there are errors.
    """
    from tl.audit import audit, fixed
    from tl.data import read_table

    data = config.data
    if config.audit is AuditMode.fix:
        data = replace(data, bad_images=BadImages.skip)
    table = read_table(data, seed=config.seed, cache_dir=config.cache.path(), progress=progress)
    if config.audit is AuditMode.off:
        return table, None
    report = audit(table)
    if config.audit is AuditMode.fail:
        shows = f"tl audit data.root={config.data.root} shows the images"
        report.refuse(f"{shows}; audit=warn goes on all the same")
    return (fixed(table, report) if config.audit is AuditMode.fix else table), report


def audit_lines(report: AuditReport | None) -> list[Section]:
    """What `tl train` says of an audit: what matters, in few lines."""
    from tl.audit import Severity, sections

    return [] if report is None else sections(report, Severity.warning, brief=True)


def write_audit(folder: RunFolder, report: AuditReport, table: ImageTable) -> None:
    """Write `audit.json`, `audit.html`, and the list of images that are left out.

    Raises:
        AuditError: The folder cannot be written.
    """
    from tl.audit import write

    write(report, folder.path, table)


def table_to_audit(config: AuditConfig, progress: Progress) -> ImageTable:
    """All that can be read, with val taken as `tl train` would take it, if it can be.

    Raises:
        DataError: It cannot be understood at all.
    """
    from tl.data import DataError, read_table

    data: DataConfig = replace(config.data, bad_images=BadImages.skip)
    settings = {"seed": config.seed, "cache_dir": config.cache.path(), "progress": progress}
    try:
        return read_table(data, **settings)  # type: ignore[arg-type] # as the names say
    except DataError:  # a split without all classes is something to report here
        return read_table(data, **settings, required_splits=())  # type: ignore[arg-type]


def audit_features(config: AuditConfig, table: ImageTable) -> Features | None:
    """Features of all images by `config.model`, through the activation cache; None without one.

    Raises:
        ConfigError: There is no such model.
        WeightsError: Its weights cannot be had.
    """
    if config.model.name == NO_NETWORK:
        return None
    from pytorch_lightning import seed_everything

    from tl.audit import Features
    from tl.config import AdviseConfig
    from tl.data import ImageDataModule
    from tl.models import build_model
    from tl.training.evidence import features_of

    seed_everything(config.seed, verbose=False)  # random weights are those of the seed, too
    built = build_model(config.model, table.classes)
    asked = AdviseConfig(
        data=config.data,
        model=config.model,
        finetune=FinetuneConfig(method="auto"),
        cache=config.cache,
        seed=config.seed,
    )
    images = ImageDataModule.from_config(table, built.preprocessing, asked)
    rows = table.rows.drop_duplicates("sha256")
    values = features_of(built, images, config.cache, rows)
    return Features(values, rows.index.to_numpy(), built.name)
