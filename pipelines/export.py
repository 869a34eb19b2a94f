"""Export: write and seal the bundle of a finished run again."""

from __future__ import annotations

from pathlib import Path

from tl.config import ExportRunConfig
from tl.pipelines import loading, run


def export(config: ExportRunConfig) -> Path:
    """Write the bundle of a run.

    Args:
        config: The run, the tolerance of the seal, and where the bundle goes.

    Returns:
        Folder of the bundle.

    Raises:
        RunError: `config.run` is no run.
        ExportError: Training is not finished, or the seal breaks.
    """
    with loading():
        from tl import display
        from tl.export import export_run
        from tl.runs import RunFolder

    target = Path(config.output_dir).absolute() if config.output_dir else None
    bundle, seal = export_run(RunFolder(Path(config.run).absolute()), config.export, target)
    display.say(
        f"sealed: {seal.images} images, largest difference of {seal.what} "
        f"{seal.largest_difference:.1e} (tolerance {seal.tolerance:g})"
    )
    display.say(f"bundle: {bundle}")
    return bundle


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl export` and of `python pipelines/export.py`."""
    run("export", export, argv)


if __name__ == "__main__":
    main()
