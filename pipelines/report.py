"""Report: write the page of a finished run again: what came out, and what to do next; no torch."""

from __future__ import annotations

from pathlib import Path

from tl.config import ReportConfig
from tl.pipelines import loading, run


def report(config: ReportConfig) -> Path:
    """Write `report.html` from the files of a run.

    Args:
        config: The run.

    Returns:
        The page.

    Raises:
        RunError: `config.run` is no run, or none that is finished; or it cannot be written.
    """
    with loading():
        from tl import display
        from tl import report as reporting

    folder = Path(config.run).absolute()
    with display.bar("checking images") as progress:
        table = reporting.table_of(folder, progress)
    page = reporting.write(folder, table)
    display.say(f"page: {page}")
    return page


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl report` and of `python pipelines/report.py`."""
    run("report", report, argv)


if __name__ == "__main__":
    main()
