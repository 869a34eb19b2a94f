"""What an audit found: kinds of trouble, each with its severity, its files and a remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Rows = NDArray[np.int64]
NO_ROWS: Rows = np.empty(0, np.int64)


class Severity(Enum):
    """How much a finding matters.

    error: figures would be wrong, or images are lost; `audit=fail` stops at these. warning: the
    model is likely to suffer. note: good to know.
    """

    error = "error"
    warning = "warning"
    note = "note"


ORDER = [*Severity]


@dataclass(frozen=True)
class Finding:
    """One kind of trouble.

    Args:
        kind: Short name, the same in every audit: `copies_across_splits`.
        severity: How much it matters.
        text: One sentence, with numbers, for a person.
        remedy: What to do.
        rows: Images, as positions in the table's rows; those that belong together follow each
            other.
        notes: A remark on each image; empty for none.
        sets: Number of the set of each image where they belong together, as copies do.
        fix: Rows that `audit=fix` takes out.
        names: What it is about where it is no image of the table: unreadable files, classes.
    """

    kind: str
    severity: Severity
    text: str
    remedy: str
    rows: Rows = field(default_factory=lambda: NO_ROWS)
    notes: Sequence[str] = ()
    sets: Rows = field(default_factory=lambda: NO_ROWS)
    fix: Rows = field(default_factory=lambda: NO_ROWS)
    names: Sequence[str] = ()

    @property
    def count(self) -> int:
        """Images, or files or classes where it is about those."""
        return len(self.names) or len(self.rows)

    def to_dict(self, paths: pd.Series[str]) -> dict[str, Any]:
        """As it stands in `audit.json`.

        Args:
            paths: Of the table's rows.
        """
        listed = list(self.names) or paths.iloc[self.rows].tolist()
        notes = self.notes or [""] * len(listed)
        sets: Iterable[int | None] = self.sets.tolist() if len(self.sets) else [None] * len(listed)
        taken = set(paths.iloc[self.fix].tolist())
        files = [
            {"name": name}
            | ({"note": note} if note else {})
            | ({} if number is None else {"set": number})
            | ({"fix": "take out"} if name in taken else {})
            for name, note, number in zip(listed, notes, sets, strict=True)
        ]
        return {
            "kind": self.kind,
            "severity": self.severity.value,
            "count": self.count,
            "text": self.text,
            "remedy": self.remedy,
            "files": files,
        }


def images(number: int) -> str:
    """`1 image`, `2,000 images`."""
    return f"{number:,} image{'' if number == 1 else 's'}"


def stand(number: int) -> str:
    """`1 image stands`, `2 images stand`."""
    return f"{images(number)} stand{'s' if number == 1 else ''}"


def named(names: Iterable[str], most: int = 5) -> str:
    """`12 RGB, 3 L`, the most frequent first."""
    counts = Counter(names)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = len(ranked) - most
    text = ", ".join(f"{number:,} {name}" for name, number in ranked[:most])
    return text + (f" and {rest:,} more" if rest > 0 else "")


def by_severity(findings: Iterable[Finding]) -> list[Finding]:
    """The most severe first; else in the order of the checks."""
    return sorted(findings, key=lambda finding: ORDER.index(finding.severity))
