"""A batch of jobs (`tl train -m …`): all of them below one MLflow run, with a table at its end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob
from hydra.errors import HydraException

from tl.config import RequestError, TrainConfig, compose
from tl.pipelines.commandline import BATCH_FLAGS, split_flags

FOLDER = "hydra.sweep.dir="
LEFT_OUT = ("test/acc_", "test/map_", "test/mae_")  # of the table on the screen
MOST_NAMED = 12  # folders in a command that a person copies


@contextmanager
def batch(name: str, args: list[str]) -> Iterator[None]:
    """Put the jobs of `tl train -m` below one run; anything else stays as it is.

    Args:
        name: Pipeline.
        args: Of its command line, with the folder of the batch.
    """
    flags, overrides = split_flags(args)
    if name != "train" or not set(flags) & BATCH_FLAGS:
        yield
        return
    folder = Path(next(a for a in reversed(overrides) if a.startswith(FOLDER))[len(FOLDER) :])
    config, swept = _first(overrides)
    if config is None or not config.tracking.enabled:
        yield
        _show(folder)
        return
    from tl import runs, tracking

    settings = replace(config.tracking, system_metrics=False, run_name=None)
    title = f"{runs.data_name(config)} · batch over {', '.join(swept) or 'nothing'}"
    labels = {"experiment": runs.data_name(config), "run_name": title, "kind": "batch"}
    place = folder.absolute()
    with (
        tracking.start_run(settings, **labels, output_dir=place, resume=False) as tracked,
        tracking.above(place),
    ):
        try:
            yield
        finally:
            for key, value in _show(folder).items():
                tracked.log_metrics({key: value})
            if (place / runs.TABLE).is_file():
                tracked.log_file(place / runs.TABLE)


def _first(overrides: list[str]) -> tuple[TrainConfig | None, list[str]]:
    """Config of one job of the batch, None where that cannot be said, and what is swept over."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    plain, swept = [], []
    for text, override in zip(overrides, parsed, strict=True):
        if text.startswith("hydra."):
            continue
        if not override.is_sweep_override():
            plain.append(text)
            continue
        swept.append(override.get_key_element().lstrip("+"))
        if override.is_discrete_sweep() and not isinstance(override.value(), Glob):
            value = next(iter(override.sweep_string_iterator()), None)
            plain += [f"{override.get_key_element()}={value}"] if value is not None else []
    try:
        return compose("train", plain), swept
    except (RequestError, HydraException):  # each job says what is wrong with it
        return None, swept


def _show(folder: Path) -> dict[str, float]:
    """Show the table of a batch; returns its metrics."""
    from tl import display, runs

    if not folder.is_dir():
        return {}
    found = runs.sum_up_batch(runs.RunFolder(folder.absolute()))
    if found.rows:
        shown = [{k: v for k, v in row.items() if not k.startswith(LEFT_OUT)} for row in found.rows]
        display.results_table(f"batch of {len(shown)} jobs", shown)
        done = [str(folder / str(row["job"])) for row in found.rows if row["ended"] == "done"]
        places = {"table": str(folder / runs.TABLE)}
        if 1 < len(done) <= MOST_NAMED:
            places["which is better"] = f"tl compare runs={','.join(done)}"
        display.facts("next", places)
    return found.metrics
