"""Compare: say which run is better, image by image, and how sure that is; no training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl.config import CompareConfig
from tl.pipelines import loading, run

if TYPE_CHECKING:
    from tl.comparison import Comparison


def compare(config: CompareConfig) -> Comparison:
    """Collect runs from MLflow or from folders, judge them, and write table, values and page.

    Args:
        config: Which runs, on which images, against which baseline.

    Returns:
        The content of `compare.json`, and the experiment that the comparison was logged to.

    Raises:
        RequestError: There are no such runs, or nothing that could be compared.
    """
    with loading():
        from tl import comparison, display, tracking

    with display.bar("reading", unit="runs") as progress:
        found = comparison.compare(config, progress)
    folder = comparison.output_folder(config)
    comparison.write(found.values, folder)
    display.sections(comparison.sections(found.values))
    display.facts("files", {file.name: str(file) for file in comparison.files(folder)})
    if found.experiment is not None:  # of runs that a store knows, the comparison belongs there too
        name = {"experiment": found.experiment, "run_name": found.values["title"]}
        with tracking.start_run(
            config.tracking, **name, output_dir=folder, resume=False, kind="comparison"
        ) as tracked:
            for file in comparison.files(folder):
                tracked.log_file(file)
    return found


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl compare` and of `python pipelines/compare.py`."""
    run("compare", compare, argv)


if __name__ == "__main__":
    main()
