"""An audit for people: sections for the screen, and a page with small pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tl.audit.findings import Finding, Severity
from tl.audit.report import AuditError, AuditReport
from tl.config import Task
from tl.data.table import ImageTable
from tl.files import write_texts
from tl.pages import render, thumbnails
from tl.sections import Section

JSON, PAGE, LIST = "audit.json", "audit.html", "quarantined.csv"
TEMPLATE = "page.html"
SHOWN = 24  # images of a finding on the page; audit.json has them all


def sections(
    report: AuditReport, most: Severity = Severity.note, *, brief: bool = False
) -> list[Section]:
    """A table of the findings, and a sentence about each.

    Args:
        report: What was found.
        most: Findings that matter less are left out.
        brief: Without the table, and without what was not looked at.
    """
    order = [*Severity]
    found = [f for f in report.findings if order.index(f.severity) <= order.index(most)]
    table = [{"severity": f.severity.value, "finding": f.kind, "count": f.count} for f in found]
    texts = [{"text": f"{f.kind}: {f.text}. Remedy: {f.remedy}"} for f in found]
    left = [{"text": f"{what}: {why}"} for what, why in report.unchecked.items()]
    title = f"audit: {report.heading}"
    if brief:
        return [Section(title, "list", texts)]
    parts = [Section(title, "table", table), Section("what to do", "list", texts)]
    parts = parts if found else [Section(title, "text", [])]
    return [*parts, Section("not looked at", "list", left)] if left else parts


def files(folder: Path) -> list[Path]:
    """What `write` has written there."""
    return [folder / name for name in (PAGE, JSON, LIST) if (folder / name).is_file()]


def write(report: AuditReport, folder: Path, table: ImageTable | None = None) -> None:
    """Write `audit.json` and `audit.html`, and `quarantined.csv` where images are left out.

    Args:
        report: What was found.
        folder: Made where it is missing.
        table: Whose list of images that are left out is written; None: that of the report.

    Raises:
        AuditError: The folder cannot be written.
    """
    texts = {JSON: report.to_json(), PAGE: page(report)}
    quarantined = (table or report.table).quarantined
    if len(quarantined):
        texts[LIST] = quarantined.to_csv(index=False)
    write_texts(folder, texts, AuditError)


def page(report: AuditReport) -> str:
    """HTML text of one page that needs nothing else; what comes from file names is escaped."""
    table = report.table
    return render(
        "tl.audit",
        TEMPLATE,
        title=f"Audit of {table.root.name}",
        heading=report.heading,
        root=str(table.root),
        findings=[_shown(report, finding) for finding in report.findings],
        unchecked=report.unchecked,
        counts={} if table.task is Task.regression else table.counts(),
        classes=table.classes,
    )


def _shown(report: AuditReport, finding: Finding) -> dict[str, Any]:
    """What the page shows of a finding."""
    rows = report.table.rows
    taken = set(finding.fix.tolist())
    at = finding.rows[:SHOWN]
    if len(finding.sets) and len(finding.rows) > SHOWN:  # the last set is whole, or is not shown
        last = finding.sets[SHOWN]
        at = at[finding.sets[:SHOWN] != last] if last != finding.sets[0] else at
    paths, splits = rows["path"].iloc[at].tolist(), rows["split"].iloc[at].astype(str).tolist()
    pictures = thumbnails(report.table.images(rows.iloc[at]))
    cards = [
        {
            "path": paths[i],
            "label": _label(report, int(row)),
            "lines": [splits[i], finding.notes[i] if len(finding.notes) else ""],
            "picture": pictures[i],
            "out": "audit=fix takes it out" if int(row) in taken else "",
            "begins": bool(len(finding.sets))
            and (i == 0 or finding.sets[i] != finding.sets[i - 1]),
        }
        for i, row in enumerate(at)
    ]
    names = [
        {"name": name, "note": finding.notes[i] if len(finding.notes) else ""}
        for i, name in enumerate(list(finding.names)[:SHOWN])
    ]
    return {
        "kind": finding.kind,
        "severity": finding.severity.value,
        "count": finding.count,
        "text": finding.text,
        "remedy": finding.remedy,
        "cards": cards,
        "names": names,
        "more": finding.count - len(cards) - len(names),
    }


def _label(report: AuditReport, row: int) -> str:
    table = report.table
    if table.task is Task.regression:
        return f"{float(table.rows['target'].iloc[row]):.4g}"
    if table.task is Task.single:
        return table.classes[int(table.rows["label"].iloc[row])]
    return ", ".join(table.classes[i] for i in table.rows["labels"].iloc[row]) or "none"
