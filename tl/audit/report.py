"""All checks over one table: what they found, and what they could not look at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from tl.audit.alike import alike_across_splits
from tl.audit.classes import class_counts, groups, target_values
from tl.audit.copies import copies, near_copies
from tl.audit.files import TAKEN, odd_images, unreadable
from tl.audit.findings import Finding, Rows, Severity, by_severity, images
from tl.audit.labels import label_errors
from tl.audit.near import TURNED
from tl.audit.shortcuts import file_facts
from tl.config import RequestError, Task
from tl.data.errors import DataError
from tl.data.table import ImageTable

VERSION = 1  # of audit.json


class AuditError(RequestError):
    """`audit=fail`, and there are errors; or the result cannot be written."""


@dataclass(frozen=True)
class Features:
    """Features of some images of a table by a pretrained network.

    Args:
        values: (N, D).
        rows: (N,) position of each image in the table's rows.
        model: Name of the network.
    """

    values: np.ndarray[Any, np.dtype[np.float32]]
    rows: Rows
    model: str


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Args:
        table: The images.
        findings: The most severe first.
        unchecked: What could not be looked at -> why.
    """

    table: ImageTable
    findings: tuple[Finding, ...]
    unchecked: Mapping[str, str]

    def count(self, severity: Severity) -> int:
        """How many findings are so severe."""
        return sum(finding.severity is severity for finding in self.findings)

    @property
    def heading(self) -> str:
        """`397 images of 2 classes: 1 error, 2 warnings, 0 notes`."""
        classes = len(self.table.classes)
        counts = [f"{n} {s.value}{'s' * (n != 1)}" for s in Severity if (n := self.count(s))]
        found = ", ".join(counts) or "nothing found"
        kind = f" of {classes:,} classes" if self.table.task is not Task.regression else ""
        return f"{images(len(self.table.rows))}{kind}: {found}"

    def metrics(self) -> dict[str, float]:
        """`audit/errors`, `audit/warnings`, and `audit/<kind>`: images, files or classes."""
        totals = {f"audit/{s.value}s": float(self.count(s)) for s in Severity}
        return totals | {f"audit/{f.kind}": float(f.count) for f in self.findings}

    def to_dict(self) -> dict[str, Any]:
        """As in `audit.json`."""
        paths = self.table.rows["path"]
        return {
            "version": VERSION,
            "root": str(self.table.root),
            "images": len(self.table.rows),
            "classes": list(self.table.classes),
            "task": self.table.task.value,
            "counts": {s.value: self.count(s) for s in Severity},
            "findings": [finding.to_dict(paths) for finding in self.findings],
            "unchecked": dict(self.unchecked),
        }

    def to_json(self) -> str:
        """Text of `audit.json`."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    def refuse(self, advice: str = "audit=warn goes on all the same") -> None:
        """Stop at errors.

        Args:
            advice: What to do, for the message.

        Raises:
            AuditError: There are some; says which.
        """
        found = [f for f in self.findings if f.severity is Severity.error]
        if found:
            number = f"{len(found)} error{'s' * (len(found) > 1)}"
            lines = [f"  {f.kind}: {f.text}; {f.remedy}" for f in found]
            head = f"the audit of {self.table.root} found {number}:"
            raise AuditError("\n".join([head, *lines, f"  {advice}"]))


def audit(table: ImageTable, features: Features | None = None) -> AuditReport:
    """Look for what is wrong with images, labels and splits. Nothing is decoded, nothing changed.

    Args:
        table: Every image was looked at when it was read (`data.check`), or little can be said.
        features: Of a pretrained network, by which label errors are found.
    """
    rows, unchecked = table.rows, {}
    labels = _label_numbers(table)
    found = [*unreadable(table.quarantined, table.root), *odd_images(rows), *copies(rows, labels)]
    if "phash" in rows and rows["phash"].ne("").any():
        found += near_copies(rows, labels)
        if len(rows) > TURNED:
            unchecked["mirrored and turned copies"] = f"there are more than {TURNED:,} images"
    else:
        unchecked["looks, near copies"] = "the images were not decoded: data.check=false"
    if "group" in rows:
        found += groups(rows)
    else:
        unchecked["groups across splits"] = "the data name no groups (data.columns.group)"
    if table.task is Task.regression:
        found += target_values(table)
    else:
        found += class_counts(table)
    if table.task is Task.single:
        found += file_facts(rows, labels)
    if features is None:
        unchecked["label errors, cut copies"] = "they need a network: tl audit model=NAME"
    else:
        found += _by_network(table, features, labels, found)
        if table.task is not Task.single:
            unchecked["label errors"] = "only for images of one class each"
    return AuditReport(table, tuple(by_severity(found)), unchecked)


def _by_network(
    table: ImageTable, features: Features, labels: Rows, found: Sequence[Finding]
) -> Iterator[Finding]:
    copies_known = {int(row) for f in found if "copies" in f.kind for row in f.rows}
    values, at, model = features.values, features.rows, features.model
    yield from alike_across_splits(values, at, table.rows, copies_known, model)
    if table.task is Task.single:
        yield from label_errors(values, labels[at], at, table.classes, model)


def _label_numbers(table: ImageTable) -> Rows:
    """A number for what each image is labelled, equal for equal labels."""
    rows = table.rows
    if table.task is Task.single:
        return rows["label"].to_numpy(np.int64)
    if table.task is Task.regression:
        return pd.factorize(rows["target"])[0].astype(np.int64)
    return np.unique(table.targets("all"), axis=0, return_inverse=True)[1].astype(np.int64)


def fixed(table: ImageTable, report: AuditReport) -> ImageTable:
    """The table without what can be put right by leaving it out; the list is in `quarantined`.

    Raises:
        DataError: A class would have no image left in train, or train none at all.
    """
    reasons: dict[int, str] = {}
    for finding in report.findings:
        reasons |= {int(row): finding.kind for row in finding.fix if int(row) not in reasons}
    if not reasons:
        return table
    out = np.array(sorted(reasons), np.int64)
    left = table.rows.drop(index=table.rows.index[out]).reset_index(drop=True)
    moved = table.rows.iloc[out][["path", "split"]].astype(str)
    moved["reason"] = [TAKEN + reasons[row] for row in out.tolist()]
    note = f"audit=fix left out {images(len(out))}: " + ", ".join(
        f"{number:,} {kind}" for kind, number in pd.Series(reasons).value_counts().items()
    )
    result = replace(
        table,
        rows=left,
        notes=[*table.notes, note],
        quarantined=pd.concat([table.quarantined, moved], ignore_index=True),
    )
    _usable(table, result)
    return result


def _usable(before: ImageTable, after: ImageTable) -> None:
    had, has = (t.counts().get("train", {}) for t in (before, after))
    lost = [name for name, number in had.items() if number and not has.get(name)]
    if before.task is Task.regression:
        lost = ["train"] * (not len(after.split("train")))
    if lost:
        raise DataError(
            f"audit=fix would leave no training image of {', '.join(lost[:10])}: all are copies of "
            "images in val or test, of their groups, or labelled in two ways; mend the data, or "
            "audit=warn takes them as they are"
        )
