"""Audit: find what is wrong with images, labels and splits, before training does; no training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from tl.config import AuditConfig, AuditMode
from tl.pipelines import loading, run

if TYPE_CHECKING:
    from tl.audit import AuditReport


def audit(config: AuditConfig) -> AuditReport:
    """Look at every image once and write what was found; nothing of the data is changed.

    Args:
        config: Images, a network for label errors, and whether errors end the job.

    Returns:
        The findings, the most severe first.

    Raises:
        RequestError: The request was wrong, or `audit=fail` and there are errors.
    """
    with loading():
        from tl import audit as auditing
        from tl import display, runs, tracking

        tracking.load(config.tracking)
    tracking.check_store(config.tracking, resume=False)
    with display.bar("checking images") as progress:
        table = runs.table_to_audit(config, progress)
    report = auditing.audit(table, runs.audit_features(config, table))
    stamp, name = time.strftime("%Y-%m-%d_%H-%M-%S"), Path(config.data.root).resolve().name
    folder = Path(config.output_dir or f"runs/{stamp}_audit_{name}").absolute()
    job = {"experiment": name, "run_name": f"{name} · audit", "kind": "audit"}
    fixing = config.audit is AuditMode.fix
    auditing.write(report, folder, auditing.fixed(table, report) if fixing else table)
    with tracking.start_run(config.tracking, **job, output_dir=folder, resume=False) as tracked:
        tracked.log_dataset(table.fingerprint())
        tracked.log_metrics(report.metrics())
        for file in auditing.files(folder):
            tracked.log_file(file)
    display.sections(auditing.sections(report))
    display.facts("files", {f.name: str(f) for f in auditing.files(folder)})
    if config.audit is AuditMode.fail:
        report.refuse()
    return report


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl audit` and of `python pipelines/audit.py`."""
    run("audit", lambda config: len(audit(config).findings), argv)


if __name__ == "__main__":
    main()
