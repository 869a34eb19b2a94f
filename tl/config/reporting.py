"""Schema of `tl report`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from tl.config.settings import Request, setting


@dataclass
class ReportConfig(Request):
    """Config of `tl report`."""

    run: str = setting(MISSING, "folder of a finished run, or of a cross-validation", common=True)
