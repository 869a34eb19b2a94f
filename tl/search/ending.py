"""From the first word of a search to its last: what it says, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl import display
from tl.config import Interrupted, SearchConfig, TrainConfig
from tl.runs import RunFolder, TrainResult
from tl.search import crew, results, trying
from tl.search.errors import TrialsError
from tl.search.found import SearchResult
from tl.search.judging import Judged, judge
from tl.search.page import page
from tl.search.setup import FEW_VAL, Workplace
from tl.search.shown import Lines, ranked_rows
from tl.search.team import CONFIG, Team, write_config

MOST_ROWS = 10  # of the table on the screen
PAGE, TRIALS, SUMMARY = "search.html", "trials.csv", "search.json"


@contextmanager
def continued(asked: SearchConfig) -> Iterator[None]:
    """Say how to go on after Ctrl-C or SIGTERM."""
    try:
        yield
    except Interrupted as stop:
        text = f"the same command with output_dir={asked.output_dir} goes on"
        raise Interrupted(text) from stop


def facts(team: Team, place: Workplace, *, begins: bool = True) -> dict[str, str]:
    """What a person should know before the first trial, or in the end."""
    asked, bench = team.asked.search, place.bench
    done = len(place.trials.done()) if begins else 0
    val = len(bench.table.split("val"))
    if bench.folds:
        part = "asked for" if asked.folds else f"val has {val} images, fewer than {FEW_VAL}"
        judged = f"mean of {bench.folds} folds ({part}; search.folds=0: val alone)"
    else:
        judged = f"{val:,} images of val"
    space = {d.key: d.words for d in place.space}
    return {
        "trials": f"{asked.trials}" + (f", {done} of them done before" if done else ""),
        "how": f"{asked.sampler.name}, pruner {asked.pruner.name}",
        "job": f"{place.base.model.name}, {place.base.finetune.method}",
        "judged by": f"{bench.monitor}, {judged}; test is not looked at",
        **space,
        "folder": str(team.folder.path),
    }


def lines(team: Team, place: Workplace) -> Lines:
    """Who prints what comes to an end from now on."""
    return Lines(
        place.space,
        place.bench.monitor,
        team.asked.search.trials,
        highest=place.bench.highest,
        known=place.trials.done(),
    )


def work(team: Team, place: Workplace, shown: Lines) -> None:
    """Try settings here, or in further processes."""
    if place.trials.enough():
        return
    if team.asked.search.workers > 1:
        if not (team.folder.path / CONFIG).is_file():  # others began it, in a folder of theirs
            write_config(team.folder, team.asked)
        crew.work(team, place, shown)
    else:
        trying.try_settings(team, place, shown)


def joined(team: Team, place: Workplace) -> SearchResult:
    """The end of a process that others' search outlives."""
    done = place.trials.done()
    display.say("all trials are given out: the search ends where it began")
    return SearchResult(team.folder.path, {}, float("nan"), len(done), None)


def params(team: Team, place: Workplace) -> dict[str, Any]:
    """Parameters of the MLflow run of the search."""
    asked = team.asked.search
    return {
        "search.trials": asked.trials,
        "search.sampler": asked.sampler.name,
        "search.pruner": asked.pruner.name,
        "search.folds": place.bench.folds,
        "search.metric": place.bench.monitor,
        **{f"space.{d.key}": d.words for d in place.space},
        "model.name": place.base.model.name,
        "finetune.method": place.base.finetune.method,
        "seed": place.base.seed,
    }


def judged(team: Team, place: Workplace) -> Judged:
    """What the trials amount to.

    Raises:
        TrialsError: None came to an end.
    """
    done = place.trials.done()
    found = judge(
        place.trials.study,
        done,
        place.space,
        metric=place.bench.monitor,
        task=place.bench.task,
        lost=len(place.trials.lost()),
    )
    if found is None:
        first = next(iter(trying.failed_lines(done)), "they were all given up")
        raise TrialsError(f"none of {len(done)} trials came to an end: {first}")
    _write(team, place, found, None)  # before hours of training
    return found


def winner(team: Team, place: Workplace, found: Judged) -> TrainConfig:
    """The job of the winner: a run of its own, `best/`, begun now or gone on with."""
    config = place.config_of(dict(found.best.params))
    folder, begun = results.make_room(team.folder, config)
    display.say(f"\ntraining the winner, trial {found.best.number}: {folder}\n")
    return replace(config, output_dir=str(folder), resume=str(folder) if begun else None)


def write(team: Team, place: Workplace, found: Judged, best: TrainResult | None) -> SearchResult:
    """Write the results, with those of the winner's run."""
    _write(team, place, found, best)
    return SearchResult(
        team.folder.path,
        dict(found.best.params),
        float(found.best.value or 0.0),
        len(place.trials.done()),
        best,
        found.warnings,
    )


def _write(team: Team, place: Workplace, found: Judged, best: TrainResult | None) -> None:
    folder, trials = team.folder, place.trials.study.get_trials(deepcopy=False)
    config = place.config_of(dict(found.best.params))
    metrics = best.metrics if best else None
    command = results.train_command(folder.path, place.base)
    title = f"{place.base.model.name.split('.')[0]} on {Path(place.base.data.root).name}: search"
    results.write(
        folder,
        {
            results.BEST: results.best_yaml(config, place.base, found, folder.path),
            TRIALS: results.trials_csv([t for t in trials if t.state.is_finished()], place.space),
            SUMMARY: results.as_json(results.summary(found, team.asked, place.setup, metrics)),
            PAGE: page(
                title,
                found,
                place.trials.done(),
                facts(team, place, begins=False),
                command,
                metrics,
            ),
        },
    )


def metrics(found: Judged, best: TrainResult | None) -> dict[str, float]:
    """Metrics of the MLflow run of the search."""
    values = {f"search/{k.replace(' ', '_')}": float(v) for k, v in found.counts.items()}
    values[f"search/best_{found.metric.replace('/', '_')}"] = float(found.best.value or 0.0)
    values |= {f"search/importance/{key}": share for key, share in found.importance.items()}
    if found.corrected is not None:
        values["search/corrected"] = found.corrected
    return values | (best.metrics if best else {})


def pages(folder: RunFolder) -> list[Path]:
    """Files for MLflow beside tables."""
    return [folder.path / name for name in (PAGE, SUMMARY, results.BEST)]


def show(team: Team, place: Workplace, found: Judged, best: TrainResult | None) -> None:
    """Say what came out."""
    counts = ", ".join(f"{n} {what}" for what, n in found.counts.items() if n)
    rows = ranked_rows(found.ranked[:MOST_ROWS], found.space, found.metric, found.tied)
    display.results_table(f"trials, the best first ({counts})", rows)
    if found.importance:
        shares = {k: f"{100 * share:.0f} %" for k, share in _sorted(found.importance)}
        display.facts("what made the difference", shares)
    for line in trying.failed_lines(place.trials.done()):
        display.say(line)
    for warning in found.warnings:
        display.say(f"- {warning}")
    display.facts("the search", places(team, place, best))


def places(team: Team, place: Workplace, best: TrainResult | None) -> dict[str, str]:
    """Where everything is, and what comes next."""
    folder = team.folder.path
    values = {
        "page": str(folder / PAGE),
        "all trials": f"{folder}/{TRIALS}, {SUMMARY}",
        "the best again": results.train_command(folder, place.base),
    }
    if best is not None:
        values["run of the best"] = str(best.output_dir)
    more = 2 * team.asked.search.trials
    values["more trials"] = f"the same command with output_dir={folder} search.trials={more}"
    return values


def _sorted(importance: dict[str, float]) -> list[tuple[str, float]]:
    return sorted(importance.items(), key=lambda item: -item[1])
