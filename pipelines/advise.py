"""Advise: measure the images with one or several backbones and say how to transfer; no training."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from tl.config import AdviseConfig
from tl.pipelines import loading, run

if TYPE_CHECKING:
    from tl.advice import Candidate


def advise(config: AdviseConfig) -> Candidate:
    """Measure, decide and rank; write the advice and a config that `tl train` takes as it is.

    Args:
        config: Images, backbones, and what the plan must keep.

    Returns:
        The backbone that is advised, with its evidence, decision and estimated cost.

    Raises:
        RequestError: The request was wrong (`ConfigError`, `DataError`, `WeightsError`).
    """
    with loading():
        from tl import advice, data, display, models, runs

    asked = advice.models(config)
    for model in asked:
        models.check_name(model.name)
    stamp, data_name = time.strftime("%Y-%m-%d_%H-%M-%S"), Path(config.data.root).resolve().name
    folder = Path(config.output_dir or f"runs/{stamp}_advise_{data_name}").absolute()
    # A table of (image, label, split), every image looked at once
    with display.bar("checking images") as progress:
        table = data.read_table(
            config.data, seed=config.seed, cache_dir=config.cache.path(), progress=progress
        )
    candidates, failed = [], {}
    for model in asked:
        try:
            candidates.append(runs.look(config, model, table))
        except models.WeightsError as error:  # the others are still worth a comparison
            failed[model.name] = error
    if not candidates:
        raise next(iter(failed.values()))
    chosen, _ = advice.best(candidates)
    heading = advice.heading(table.root.name, table.counts(), chosen)
    sections = advice.sections(config, candidates, failed, folder)
    advice.write(folder, config, chosen, sections, heading)
    display.say("\n".join(("", *heading, "")))
    display.sections(sections)
    return chosen


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl advise` and of `python pipelines/advise.py`."""
    run("advise", advise, argv)


if __name__ == "__main__":
    main()
