"""Who proposes settings, and who gives trials up: the recipe of the lectures, and Optuna's own."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState

from tl.config import Pruner, Sampler, SearchSettings
from tl.search.space import Dimension

GIVEN, COARSE, FINE = "given", "coarse", "fine"  # kinds of trials
FOLLOWED = 0.25  # of the coarse trials: the box holds the best ones of them
FEWEST = 2
MARGIN = 0.1  # of the whole range, at both sides of them
WIDEST = 0.5  # of the whole range
WARM = 0.2  # of the epochs, before which the median says little


class RandomSampler(BaseSampler):
    """Random in the space, or in a narrower box around the best coarse trials.

    What a trial draws depends on the seed, its number and the dimension alone, so that workers in
    any number try the same settings.

    Args:
        space: The dimensions.
        seed: Of all trials.
    """

    def __init__(self, space: Sequence[Dimension], seed: int) -> None:
        self.space = {d.key: d for d in space}
        self.seed = seed

    def infer_relative_search_space(
        self,
        study: optuna.Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
    ) -> dict[str, BaseDistribution]:
        """Nothing: each dimension is drawn by itself."""
        return {}

    def sample_relative(
        self,
        study: optuna.Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
        search_space: dict[str, BaseDistribution],  # noqa: ARG002
    ) -> dict[str, Any]:
        """Nothing."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,  # noqa: ARG002
    ) -> Any:
        """A value of one dimension."""
        dimension = self.space[param_name]
        key = [self.seed, trial.number, zlib.crc32(param_name.encode())]
        share = float(np.random.default_rng(key).random())
        fine = trial.user_attrs.get("kind") == FINE
        if dimension.choices:
            choices = list(dimension.choices)
            if fine:
                best = best_values(study, param_name)
                choices = [c for c in choices if c in best] or choices
            return choices[int(share * len(choices))]
        low, high = box(dimension, best_values(study, param_name)) if fine else (0.0, 1.0)
        return dimension.at(low + share * (high - low))


def best_values(study: optuna.Study, key: str) -> list[Any]:
    """Values of the best coarse trials, the best first."""
    trials = [
        t
        for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if t.user_attrs.get("kind") == COARSE and key in t.params
    ]
    highest = study.direction == optuna.study.StudyDirection.MAXIMIZE
    trials.sort(key=lambda t: rank(t, highest=highest))
    number = max(FEWEST, round(FOLLOWED * len(trials)))
    return [t.params[key] for t in trials[:number]]


def rank(trial: FrozenTrial, *, highest: bool) -> tuple[float, float, int]:
    """Sorts trials, the best first: by value, then by val/loss, then by number."""
    value = trial.value if trial.value is not None else (-np.inf if highest else np.inf)
    loss = float(trial.user_attrs.get("loss", np.inf))
    return (-value if highest else value, loss, trial.number)


def box(dimension: Dimension, values: Sequence[Any]) -> tuple[float, float]:
    """Where the fine trials draw from, as shares of a range.

    It holds the best coarse values and a margin, within the range; where they are far apart, it is
    half of the range, around the very best.

    Example:
        >>> rate = Dimension("finetune.head_lr", (), 1e-4, 1.0, log=True)
        >>> [round(share, 3) for share in box(rate, [1e-2, 1e-1])]
        [0.4, 0.85]
    """
    if not values:
        return 0.0, 1.0
    shares = [dimension.share(value) for value in values]
    low, high = min(shares) - MARGIN, max(shares) + MARGIN
    if high - low > WIDEST:
        low, high = shares[0] - WIDEST / 2, shares[0] + WIDEST / 2
    return max(low, 0.0), min(high, 1.0)


def make_sampler(settings: SearchSettings, space: Sequence[Dimension], seed: int) -> BaseSampler:
    """The sampler of a study."""
    if settings.sampler is Sampler.tpe:
        start = max(5, min(10, settings.trials // 3))
        # Workers with one seed would begin with the same settings.
        own = seed if settings.workers == 1 else None
        return TPESampler(
            n_startup_trials=start, multivariate=True, group=True, constant_liar=True, seed=own
        )
    return RandomSampler(space, seed)


def make_pruner(pruner: Pruner, epochs: int, *, folds: bool) -> optuna.pruners.BasePruner:
    """The pruner of a study.

    Args:
        pruner: Its kind.
        epochs: Of all phases of the settings as given.
        folds: Whether a step is a fold, not an epoch.
    """
    if pruner is Pruner.none:
        return optuna.pruners.NopPruner()
    if pruner is Pruner.median:
        return optuna.pruners.MedianPruner(
            n_startup_trials=4, n_warmup_steps=0 if folds else max(2, round(WARM * epochs))
        )
    least = 1 if folds else max(1, round(epochs / 9))
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=3)


def grid_cells(space: Sequence[Dimension], points: int, seed: int) -> list[dict[str, Any]]:
    """All cells of a grid in a random order, so that a part of them is spread over the space."""
    values = [d.points(points) for d in space]
    cells = [
        dict(zip((d.key for d in space), cell, strict=True)) for cell in itertools.product(*values)
    ]
    order = np.random.default_rng(seed).permutation(len(cells))
    return [cells[i] for i in order]


def suggest(trial: optuna.Trial, space: Sequence[Dimension]) -> Mapping[str, Any]:
    """The settings of a trial: key -> value."""
    found: dict[str, Any] = {}
    for d in space:
        if d.choices:
            found[d.key] = trial.suggest_categorical(d.key, d.choices)
        elif d.whole:
            found[d.key] = trial.suggest_int(d.key, int(d.low), int(d.high), log=d.log)
        else:
            found[d.key] = trial.suggest_float(d.key, d.low, d.high, log=d.log)
    return found
