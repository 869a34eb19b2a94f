"""What is wrong with a data set, found before training does: `audit(table)`."""

from __future__ import annotations

from tl.audit.findings import Finding, Severity
from tl.audit.report import AuditReport, Features, audit, fixed


__all__ = ["AuditReport", "Features", "Finding", "Severity", "audit", "fixed"]
