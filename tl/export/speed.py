"""How long a bundle takes for one image, as whoever serves it will see."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from tl import ranks
from tl.bundle import Bundle
from tl.config import ExportConfig
from tl.cores import usable_cores
from tl.export.from_run import export_run
from tl.runs import RunFolder

SECONDS = 0.2  # of measuring; a job of a minute does not feel them
FEWEST, MOST = 3, 50  # images that are timed
KEY = "ms_an_image"


@ranks.on_first
def exported(folder: RunFolder, config: ExportConfig) -> tuple[Path | None, dict[str, float]]:
    """Export a run where that is asked for, and time the bundle.

    Args:
        folder: A run whose training is finished.
        config: As for `export_run`; with `enabled=false` nothing is exported.

    Returns:
        The bundle, and `ms_an_image`, which `metrics.json` has afterwards, too; None and nothing
        where there is no bundle.

    Raises:
        ExportError: As `export_run`.
    """
    if not config.enabled:
        return None, {}
    bundle = export_run(folder, config).folder
    speed = {KEY: round(milliseconds(bundle), 3)}
    folder.write_json("metrics.json", {**folder.read_metrics(), **speed})
    return bundle, speed


def milliseconds(bundle: Path) -> float:
    """Median time for one image by itself, from file to answer, with ONNX Runtime on this machine.

    Args:
        bundle: Its folder; the golden images are what is timed.
    """
    reader = Bundle.load(bundle, threads=usable_cores())
    images = sorted(p for p in (bundle / "golden").iterdir() if p.name != "expected.json")
    reader.answers(images[:1], 1)  # the first call makes room
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < FEWEST or (time.perf_counter() - began < SECONDS and len(found) < MOST):
        start = time.perf_counter()
        reader.answers([images[len(found) % len(images)]], 1)
        found.append(1000 * (time.perf_counter() - start))
    return statistics.median(found)
