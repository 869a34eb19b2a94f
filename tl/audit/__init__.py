"""What is wrong with a data set, found before training does: `audit(table)`."""

from __future__ import annotations

from tl.audit.findings import Finding, Severity
from tl.audit.report import AuditError, AuditReport, Features, audit, fixed
from tl.audit.writing import files, sections, write

__all__ = [
    "AuditError",
    "AuditReport",
    "Features",
    "Finding",
    "Severity",
    "audit",
    "files",
    "fixed",
    "sections",
    "write",
]
