"""Tries settings one after the other, each a child run in MLflow and a line on the screen."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from tl import display, tracking
from tl.config import ConfigError, Interrupted
from tl.runs import data_name
from tl.search.bench import FAILURES, Outcome
from tl.search.errors import TrialsError
from tl.search.packing import pack
from tl.search.samplers import COARSE, suggest
from tl.search.setup import Workplace
from tl.search.shown import Lines
from tl.search.team import Team
from tl.training import TrainingError

RUN = "mlflow"  # attribute of the study: id of the run above the trials
HOPELESS = 3  # trials that fail, before any comes to an end
MOST_SCORES = 20_000  # images whose scores are kept with a trial


def try_settings(
    team: Team,
    place: Workplace,
    lines: Lines | None = None,
    ends: Callable[[], bool] = lambda: False,
) -> None:
    """Take trials until all are given out.

    Args:
        team: Of the search.
        place: Bench and trials.
        lines: Prints what came to an end, here and elsewhere.
        ends: Asked before each trial whether to end here.

    Raises:
        TrialsError: None of the first trials came to an end.
        Interrupted: Ctrl-C or SIGTERM; the trial is tried again when the search goes on.
    """
    while not ends() and (trial := place.trials.next()) is not None:
        _try(team, place, trial)
        if lines is not None:
            lines.news(place.trials.done())
        check(place.trials.done())


def wait_for_others(place: Workplace, team: Team, lines: Lines) -> bool:
    """Wait until the last trial of any worker came to an end.

    Returns:
        False where one was lost meanwhile: there is a trial left to try.
    """
    said = False
    while place.trials.running():
        lost = place.trials.reap()
        if len(place.trials.all()) < team.asked.search.trials:
            return False
        if not said and not lost:
            display.say(f"waiting for {len(place.trials.running())} trials of other workers")
            said = True
        time.sleep(0.5)
        lines.news(place.trials.done())
    return len(place.trials.all()) >= team.asked.search.trials


def check(done: list[FrozenTrial]) -> None:
    """Stop a search whose every trial fails.

    Raises:
        TrialsError: With the first error.
    """
    failed = [t for t in done if t.state == TrialState.FAIL]
    if len(failed) >= HOPELESS and len(failed) == len(done):
        msg = f"all of the first {len(failed)} trials failed; the first: "
        raise TrialsError(f"{msg}{failed[0].user_attrs.get('error', 'unknown')}")


@dataclass
class _Ended:
    """How a trial ended."""

    state: TrialState
    outcome: Outcome | None = None
    error: str = ""


def _try(team: Team, place: Workplace, trial: optuna.Trial) -> None:
    values = suggest(trial, place.space)
    kind = trial.user_attrs["kind"]
    share = float(trial.user_attrs.get("share", place.setup["share"] if kind == COARSE else 1.0))
    folder = team.folder.path / "trials" / f"{trial.number:04d}"
    began = time.perf_counter()
    ended = _Ended(TrialState.FAIL, error="it was interrupted")
    try:
        with place.trials.beating(trial), _recorded(team, place, trial, values, folder) as tracked:
            ended = _train(place, trial, values, folder, share)
            if ended.outcome is not None:
                _log(tracked, ended.outcome, place)
            tracked.log_tags({"tl.trial.state": ended.state.name.lower()})
            if ended.error:
                tracked.log_tags({"error": ended.error})
    except (Interrupted, KeyboardInterrupt):
        place.trials.give_up(trial, "it was interrupted", attempt=0)
        raise
    except BaseException as error:
        place.trials.give_up(trial, str(error).split("\n")[0], attempt=0)
        raise
    attrs = _attributes(ended, share, time.perf_counter() - began)
    value = ended.outcome.value if ended.outcome else None
    if not place.trials.tell(trial, attrs, value, ended.state):
        display.say(f"trial {trial.number} was taken for lost meanwhile: its result is not used")
    if not any(folder.iterdir() if folder.is_dir() else ()):
        shutil.rmtree(folder, ignore_errors=True)


def _train(
    place: Workplace, trial: optuna.Trial, values: Mapping[str, Any], folder: Path, share: float
) -> _Ended:
    kind = trial.user_attrs["kind"]
    # The settings as given are what all others are compared with: they always come to an end.
    prune = kind != "given"
    try:
        config = place.config_of(dict(values))
        outcome = place.bench.train(config, trial, folder, share=share, prune=prune)
    except optuna.TrialPruned:
        return _Ended(TrialState.PRUNED, error="")
    except TrainingError as error:
        # Diverged, or the disk is full: only the first is about the settings.
        if isinstance(error.__cause__, OSError):
            raise
        return _Ended(TrialState.PRUNED, error=str(error).split("\n")[0])
    except FAILURES as error:
        return _Ended(TrialState.FAIL, error=f"{type(error).__name__}: {_first_line(error)}")
    return _Ended(TrialState.COMPLETE, outcome)


def _first_line(error: BaseException) -> str:
    if isinstance(error, ConfigError):
        return "; ".join(error.problems)
    return (str(error).strip() or "no reason given").split("\n")[0]


def _attributes(ended: _Ended, share: float, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {"seconds": round(seconds, 3), "share": share}
    if ended.error:
        found["error"] = ended.error
    if (outcome := ended.outcome) is not None:
        found |= {
            "score": outcome.score,
            "loss": outcome.loss,
            "epochs": outcome.epochs,
            "trained": outcome.trained,
            "curve": {str(k): round(v, 6) for k, v in outcome.curve.items()},
        }
        if len(outcome.scores) <= MOST_SCORES:
            found["scores"] = pack(outcome.scores)
    return found


# --- MLflow ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _recorded(
    team: Team, place: Workplace, trial: optuna.Trial, values: Mapping[str, Any], folder: Path
) -> Iterator[tracking.TrackedRun]:
    """The MLflow run of a trial, below that of the search."""
    settings = replace(team.asked.tracking, system_metrics=False, run_name=None)
    with tracking.start_run(
        settings,
        experiment=data_name(team.asked),
        run_name=f"trial {trial.number}",
        output_dir=folder,
        resume=False,
        kind="trial",
        parent=place.trials.study.user_attrs.get(RUN),
    ) as tracked:
        tracked.log_params({**values, "trial": trial.number, "kind": trial.user_attrs["kind"]})
        yield tracked


def _log(tracked: tracking.TrackedRun, outcome: Outcome, place: Workplace) -> None:
    for step, value in outcome.curve.items():
        tracked.log_metrics({place.bench.monitor: value}, step=step)
    last = max(outcome.curve, default=0)
    found = {f"val/{place.bench.headline}": outcome.score, "val/loss": outcome.loss}
    tracked.log_metrics({**found, "epochs": outcome.epochs}, step=last)


def put_below(place: Workplace, run_id: str | None) -> None:
    """Let the trials of all workers be children of the run of the search."""
    if run_id and place.trials.study.user_attrs.get(RUN) != run_id:
        place.trials.study.set_user_attr(RUN, run_id)


def failed_lines(done: list[FrozenTrial]) -> list[str]:
    """A line for each failed trial."""
    return [
        f"trial {t.number} failed: {t.user_attrs.get('error', 'unknown')}"
        for t in done
        if t.state == TrialState.FAIL
    ]
