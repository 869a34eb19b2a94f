"""All parts of the page of a run, and how it is written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from tl import ranks
from tl.advice.sections import METHODS
from tl.config import BadImages, TlError
from tl.data import ImageTable, read_table
from tl.pages import render
from tl.report import first, judging, mistakes, training
from tl.report.files import RunFiles
from tl.report.folds import FoldsFiles, parts_of_folds
from tl.report.parts import Part, first_up
from tl.runs import RunFolder

NAME = "report.html"
TEMPLATE = "page.html"
log = logging.getLogger(__name__)

Build = Callable[[RunFiles], Part | None]
PARTS: dict[str, Build] = {
    "result": first.overview,
    "what to do next": first.next_steps,
    "images to look at": mistakes.part,
    "metrics": judging.metrics,
    "classes": judging.classes,
    "how sure, how right": judging.calibration,
    "groups": judging.groups,
    "training": training.phases,
    "how it was transferred": training.decision,
    "the data": training.data,
    "settings and places": training.settings,
}


def write(path: Path, table: ImageTable | None = None) -> Path:
    """Write `report.html` into the folder of a finished run, or of a cross-validation.

    Args:
        path: Folder.
        table: The images of the job, where they are at hand, for small pictures.

    Returns:
        The page.

    Raises:
        RunError: It is no run, none that is finished, or the page cannot be written.
    """
    return RunFolder(path).write_text(NAME, page(path, table))


@ranks.on_first
def attach(path: Path, table: ImageTable | None = None) -> list[Path]:
    """As `write`, at the end of a job: it never fails one that is done, and is a warning instead.

    Returns:
        The page; empty where there is none.
    """
    try:
        return [write(path, table)]
    except Exception as error:  # a full disk, or a bug of ours: the run itself is whole
        log.warning("no %s: %s: %s", NAME, type(error).__name__, error)
        return []


def page(path: Path, table: ImageTable | None = None) -> str:
    """HTML text of the page; see `write`."""
    run = FoldsFiles(path) if FoldsFiles.here(path) else RunFiles(path, table)
    if isinstance(run, FoldsFiles):
        parts = parts_of_folds(run)
    else:
        parts = [part for title, build in PARTS.items() if (part := _built(title, build, run))]
    contents = [{"id": part.id, "title": first_up(part.title)} for part in parts]
    return render(
        "tl.report",
        TEMPLATE,
        title=run.name,
        made=str(run.model.get("created", "")),
        parts=parts,
        contents=contents,
        words=METHODS,
        footer=f"Written by tl {version('tl')} from the files of {path}.",
    )


def _built(title: str, build: Build, run: RunFiles) -> Part | None:
    """A part, or why there is none: a file that is missing or damaged must not hide the others."""
    try:
        return build(run)
    except Exception as error:  # the job is done: the page must not fail it, and says what failed
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        log.warning("%s of %s cannot be shown (%s)", title, run.path, reason)
        name = title.replace(" ", "-").replace(",", "")
        return Part(name, title, [f"This part cannot be shown: {reason}."])


def table_of(path: Path, progress: Callable[[int, int], None]) -> ImageTable | None:
    """The images of a finished run, read again; None where they are gone, or cannot be read.

    Args:
        path: Folder of the run.
        progress: Called with (done, total) while images are checked.

    Raises:
        RunError: It is no run, or none that is finished.
    """
    if FoldsFiles.here(path):
        return None
    config = RunFiles(path).config
    data = replace(config.data, bad_images=BadImages.skip)  # the others can still be shown
    try:
        return read_table(data, seed=config.seed, cache_dir=config.cache.path(), progress=progress)
    except TlError as error:
        log.info("no small pictures: %s", error)
        return None
