"""What the trials amount to: a ranking, and how far it can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.importance import FanovaImportanceEvaluator, PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState

from tl.config import Task
from tl.evaluation import PairResult, PairSide, compare_pair, holm
from tl.search.packing import unpack
from tl.search.samplers import GIVEN, rank
from tl.search.space import Dimension, limits, shown

IMAGES_PER_TRIAL = 20  # of val: with fewer, the best of many trials is the luckiest
EDGE = 0.05  # share of a range, at its ends
DRAWS = 1000  # of the bootstrap
FEWEST_TRIALS = 6  # that an importance can be estimated from
PED_FROM = 20  # trials; with fewer, PED-ANOVA has too few good ones to tell from the others


@dataclass(frozen=True)
class Judged:
    """What a search found.

    Args:
        ranked: Trials that came to an end with all their epochs, the best first.
        space: What was varied.
        metric: Name of what decided, such as `val/acc`.
        highest: Whether more of it is better.
        images: That judged each trial.
        tied: Number of a trial -> whether it cannot be told from the best one.
        against_given: The best against the settings as given, where both were judged.
        corrected: The headline of the best, corrected for the choice among so many.
        importance: Key -> share of the differences that it explains.
        warnings: Sentences.
        counts: How many trials ended how.
    """

    ranked: tuple[FrozenTrial, ...]
    space: tuple[Dimension, ...]
    metric: str
    highest: bool
    images: int
    tied: dict[int, bool] = field(default_factory=dict)
    against_given: PairResult | None = None
    corrected: float | None = None
    importance: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def best(self) -> FrozenTrial:
        """The winner."""
        return self.ranked[0]

    @property
    def given(self) -> FrozenTrial | None:
        """The settings as given."""
        found = (t for t in self.ranked if t.user_attrs.get("kind") == GIVEN)
        return next(found, None)


def judge(
    study: optuna.Study,
    done: Sequence[FrozenTrial],
    space: Sequence[Dimension],
    *,
    metric: str,
    task: Task,
    lost: int = 0,
) -> Judged | None:
    """Rank the trials, and say how far that can be trusted.

    Args:
        study: For the importance of the settings.
        done: Trials that came to an end.
        space: What was varied.
        metric: What decided.
        task: What the images are labelled with.
        lost: Trials whose workers died.

    Returns:
        None where no trial had all its epochs.
    """
    highest = study.direction == optuna.study.StudyDirection.MAXIMIZE
    complete = [t for t in done if t.state == TrialState.COMPLETE]
    # A part of the epochs is no fair comparison with all of them.
    whole = [t for t in complete if float(t.user_attrs.get("share", 1.0)) >= 1.0] or complete
    if not whole:
        return None
    ranked = sorted(whole, key=lambda t: rank(t, highest=highest))
    sides = {t.number: unpack(t.user_attrs["scores"]) for t in ranked if "scores" in t.user_attrs}
    images = max((len(s) for s in sides.values()), default=0)
    found: dict[str, Any] = {}
    if ranked[0].number in sides and images > 1:
        compared = _compared(ranked, sides, task)
        found["tied"] = _tied(compared)
        given = next((t for t in ranked if t.user_attrs.get("kind") == GIVEN), None)
        found["against_given"] = compared.get(given.number) if given else None
        if task is Task.single and metric == "val/acc":
            found["corrected"] = corrected([sides[t.number] for t in ranked if t.number in sides])
    counts = {
        "asked": len(done),
        "complete": len(complete),
        "given up": sum(t.state == TrialState.PRUNED for t in done),
        "failed": sum(t.state == TrialState.FAIL for t in done),
        "lost and tried again": lost,
    }
    judged = Judged(
        tuple(ranked), tuple(space), metric, highest, images, counts=counts,
        importance=importance(study, space), **found,
    )  # fmt: skip
    return Judged(**{**judged.__dict__, "warnings": tuple(warnings_of(judged, len(done)))})


def _compared(
    ranked: Sequence[FrozenTrial], sides: dict[int, NDArray[np.float64]], task: Task
) -> dict[int, PairResult]:
    """The best against each other one, on the same images."""
    best = sides[ranked[0].number]
    metric = "acc" if task is Task.single else "mae"

    def side(scores: NDArray[np.float64]) -> PairSide:
        return PairSide(scores if metric == "acc" else -scores)

    return {
        t.number: compare_pair(side(best), side(sides[t.number]), metric=metric)
        for t in ranked[1:]
        if t.number in sides and len(sides[t.number]) == len(best)
    }


def _tied(compared: dict[int, PairResult]) -> dict[int, bool]:
    if not compared:
        return {}
    adjusted = holm([c.p_value for c in compared.values()])
    return {number: bool(p > 0.05) for number, p in zip(compared, adjusted, strict=True)}


def corrected(sides: Sequence[NDArray[np.float64]], seed: int = 0) -> float | None:
    """Accuracy that the choice of the best of several leads to on other images.

    The best of many on the same images looks better than it is. In each of many draws of the images
    the best is chosen on those drawn and judged on those that were not.

    Args:
        sides: Of each trial whether it was right, (N,); the best one first.
        seed: Of the draws.

    Source: I. Tsamardinos, E. Greasidou, G. Borboudakis, "Bootstrapping the out-of-sample
    predictions for efficient and accurate cross-validation", Machine Learning 107 (2018).

    Example:
        >>> luck = np.random.default_rng(0).integers(0, 2, (30, 100)).astype(float)
        >>> best = max(luck, key=np.mean)
        >>> float(best.mean()) > 0.57, abs(corrected([best, *luck]) - 0.5) < 0.05
        (True, True)
    """
    if len({len(s) for s in sides}) != 1 or len(sides) < 2:
        return None
    right = np.stack(sides)
    images = right.shape[1]
    draws = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), DRAWS)
    inside = draws @ right.T
    left = (draws == 0).astype(np.float64)
    counts = left.sum(axis=1)
    chosen = inside.argmax(axis=1)
    outside = (left @ right.T)[np.arange(DRAWS), chosen]
    good = counts > 0
    return float((outside[good] / counts[good]).mean())


def importance(study: optuna.Study, space: Sequence[Dimension]) -> dict[str, float]:
    """Share of the differences that each setting explains, as Optuna estimates it; or nothing."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(trials) < FEWEST_TRIALS or len({t.value for t in trials}) < 3 or len(space) < 2:
        return {}
    evaluator: Any = FanovaImportanceEvaluator(seed=0)
    if len(trials) >= 5 * PED_FROM:
        evaluator = PedAnovaImportanceEvaluator()
    try:
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (ValueError, RuntimeError):
        return {}
    return {d.key: found[d.key] for d in space if d.key in found}


def warnings_of(judged: Judged, trials: int) -> list[str]:
    """What a person should know before believing the ranking."""
    return [*_edges(judged), *_noise(judged), *_luck(judged, trials)]


def _edges(judged: Judged) -> list[str]:
    found = []
    for d in judged.space:
        if d.choices or d.key not in judged.best.params:
            continue
        share = d.share(judged.best.params[d.key])
        if EDGE < share < 1 - EDGE:
            continue
        end, bound = ("lower", d.low) if share <= EDGE else ("upper", d.high)
        value = shown(float(judged.best.params[d.key]))
        if d.log:
            wider = d.low / 10 if end == "lower" else d.high * 10
        else:
            wider = 2 * d.low - d.high if end == "lower" else 2 * d.high - d.low
        least, most = limits(d.key)
        if bound in (least, most):
            continue  # there is nothing beyond
        wider = min(max(wider, least), most)
        low, high = (wider, d.high) if end == "lower" else (d.low, wider)
        found.append(
            f"{d.key}={value} is at the {end} edge of what was searched ({bound:g}): the best may "
            f"lie beyond; search.space.{d.key}={{low:{low:g},high:{high:g}"
            f"{',log:true' if d.log else ''}}} looks there"
        )
    return found


def _noise(judged: Judged) -> list[str]:
    found = []
    tied = sum(judged.tied.values())
    if tied:
        others = len(judged.tied)
        found.append(
            f"{tied} of {others} other trials cannot be told from the best one on these "
            f"{judged.images:,} images: take the ranking among them for chance"
        )
    pair = judged.against_given
    if pair is not None and pair.verdict == "none":
        need = f"; {pair.images_needed:,} images would show it" if pair.images_needed else ""
        found.append(
            "that the best is better than the settings as they were cannot be shown: difference "
            f"{_points(judged, pair.difference)} (95 % interval {_points(judged, pair.low)} to "
            f"{_points(judged, pair.high)}){need}"
        )
    return found


def _points(judged: Judged, value: float) -> str:
    return f"{100 * value:+.1f} points" if judged.metric == "val/acc" else f"{value:+.3g}"


def _luck(judged: Judged, trials: int) -> list[str]:
    most = math.ceil(judged.images / IMAGES_PER_TRIAL)
    if not judged.images or trials <= max(most, 1):
        return []
    text = (
        f"{trials} trials were compared on {judged.images:,} images, one for each "
        f"{judged.images / trials:.0f}: with fewer than {IMAGES_PER_TRIAL} images a trial the best "
        "looks better than it is"
    )
    if judged.corrected is not None and judged.best.value is not None:
        text += f" (here {100 * judged.best.value:.1f} % instead of {100 * judged.corrected:.1f} %)"
    few = "1 trial" if most <= 1 else f"{most} trials"
    return [f"{text}; at most {few} would do, or more images (search.folds judges by all)"]
