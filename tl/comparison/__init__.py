"""Which run is better, and how sure that is: runs compared on the images that they all judged.

Runs come from MLflow or from their folders. Those that judged other images, other labels or other
classes are never laid beside each other. Nothing here imports torch; MLflow is imported where a
store is read.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl.comparison.errors import CompareError
from tl.comparison.records import Record, from_folders
from tl.comparison.writing import files, sections, write

if TYPE_CHECKING:
    from tl.config import CompareConfig

__all__ = ["CompareError", "Comparison", "compare", "files", "output_folder", "sections", "write"]


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Args:
        values: The content of `compare.json`.
        experiment: MLflow experiment of the runs, for the record of the comparison; None where
            they are folders that no store knows, or of several experiments.
    """

    values: dict[str, Any]
    experiment: str | None


def compare(
    config: CompareConfig, note: Callable[[int, int], None] = lambda *_: None
) -> Comparison:
    """Collect runs, and judge them image by image.

    Args:
        config: Which runs, which images.
        note: Called with the number of runs that were read, and of all.

    Raises:
        CompareError: There are no such runs, or nothing that could be compared.
        StoreError: The MLflow store does not answer.
        TrackingError: It has no such run.
    """
    from tl.comparison.reading import read
    from tl.comparison.values import Request, values_of

    with _without_collector(), ExitStack() as stack:
        records, baseline, experiment, store = _collect(config, stack)
        runs = read(records, note)
        _refuse_nothing(config, runs, baseline)
        asked = Request(
            title=_title(config, experiment, len(records)),
            experiment=experiment,
            condition=config.filter,
            store=store,
            split=config.split,
            baseline=baseline,
            confidence=config.confidence,
            pictures=config.thumbnails,
        )
        return Comparison(values_of(runs, asked), experiment)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Let the garbage collector rest.

    A thousand runs are half a million small objects, none of them in a cycle; to look through them
    again and again takes as long as reading them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def output_folder(config: CompareConfig) -> Path:
    """Where the comparison is written."""
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in _subject(config))
    return Path(config.output_dir or f"runs/{stamp}_compare_{name}").expanduser().absolute()


def _subject(config: CompareConfig) -> str:
    return config.tracking.experiment or f"{len(config.runs)}_runs"


def _title(config: CompareConfig, experiment: str | None, count: int) -> str:
    of = f" of {experiment}" if experiment else ""
    where = f" where {config.filter}" if config.filter else ""
    return f"Comparison of {count:,} runs{of}{where}"


def _collect(
    config: CompareConfig, stack: ExitStack
) -> tuple[list[Record], str | None, str | None, str | None]:
    """The runs, the id of the baseline, the experiment, and the address of the store."""
    places = [name for name in config.runs if Path(name).expanduser().is_dir()]
    names = [name for name in config.runs if name not in places]
    base = config.baseline
    outside = base if base and not Path(base).expanduser().is_dir() else None
    records = [r for place in places for r in from_folders(Path(place).expanduser())]
    experiment = config.tracking.experiment
    store = None
    if names or not config.runs or (outside and not _among(records, outside)):
        from tl.comparison.stored import opened
        from tl.tracking import default_uri
        from tl.tracking.store import redacted

        uri = default_uri(config.tracking)
        store = stack.enter_context(opened(uri))
        if config.runs:
            records += store.named(names, experiment)
        elif experiment:
            records += store.experiment(experiment, config.filter)
        if outside and not _among(records, outside):
            records += store.named([outside], experiment)
        ids = [record.id for record in records]
        experiment = experiment or (store.experiment_of(ids[0]) if names else None)
        address = redacted(uri)
    elif base and not outside:
        records += from_folders(Path(base).expanduser())
    records = [*{record.id: record for record in records}.values()]
    return records, _baseline(base, records), experiment, address if store else None


def _among(records: list[Record], name: str) -> list[Record]:
    return [record for record in records if name in (record.id, record.name)]


def _baseline(name: str | None, records: list[Record]) -> str | None:
    """Id of the baseline."""
    if name is None:
        return None
    place = Path(name).expanduser()
    if place.is_dir():
        found = [r for r in records if r.folder and r.folder == place.absolute()]
        found = found or from_folders(place)
    else:
        found = _among(records, name)
    if len(found) != 1:
        raise CompareError(f"baseline: {name} stands for {len(found)} runs; name one by its id")
    return found[0].id


def _refuse_nothing(config: CompareConfig, runs: list[Any], baseline: str | None) -> None:
    """Refuse where no verdict could follow.

    Raises:
        CompareError: Says why for each run.
    """
    if len(runs) < 2:
        raise CompareError(
            f"there is one run alone ({runs[0].record.name}): a comparison takes two"
        )
    splits = [config.split] if config.split else ["test", "val"]
    usable = [run for run in runs if any(split in run.sheets for split in splits)]
    if config.split and not usable and any(run.sheets for run in runs):
        have = sorted({split for run in runs for split in run.sheets})
        raise CompareError(f"no run has {config.split} images; there are {', '.join(have)}")
    bad = [run for run in runs if run.why_not]
    if not usable:
        lines = [f"{run.record.name}: {run.why_not}" for run in bad[:10]]
        more = [f"… and {len(bad) - 10:,} more"] if len(bad) > 10 else []
        raise CompareError("\n".join(["no run can be compared", *lines, *more]))
    for run in bad:
        if run.record.id == baseline:
            raise CompareError(f"baseline: {run.record.name} cannot be compared: {run.why_not}")
