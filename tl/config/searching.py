"""Schema of `tl search`, and how people write a space on its command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tl.config.settings import Checked, setting

SPACE = "search.space"
JOURNAL = "journal"
STORAGES = ("postgresql+psycopg://", "sqlite:///")


class Sampler(Enum):
    """Who proposes the settings of a trial.

    `coarse_to_fine`: half of the trials anywhere in the space, the others around the best of them;
    `random`: anywhere; `tpe`: Optuna's tree-structured Parzen estimator; `grid`: every cell of a
    grid, in a random order.
    """

    coarse_to_fine = "coarse_to_fine"
    random = "random"
    tpe = "tpe"
    grid = "grid"


class Pruner(Enum):
    """When a trial is given up before its end.

    `median`: it is worse than half of the others were at that epoch; `asha`: it is not among the
    best third at 1/9 and at 1/3 of the epochs; `none`: never.
    """

    median = "median"
    asha = "asha"
    none = "none"


class Metric(Enum):
    """What of val decides: the headline (val/acc, val/map, val/mae), or val/loss."""

    score = "score"
    loss = "loss"


@dataclass
class SearchSettings(Checked):
    """How to search."""

    name: str = setting("default", "name of the preset, for the log")
    trials: int = setting(
        20,
        "so many settings are tried, the ones that you gave first; the same command goes on until "
        "they are there",
        low=1,
        high=100_000,
        common=True,
    )
    space: dict[str, Any] = setting(
        factory=dict,
        help="key -> {low, high, log} or [choices]; on the command line several values do, too: "
        "augment=light,medium 'finetune.head_lr=interval(1e-4,1e-1)'. Default: learning rates, "
        "weight decay, label smoothing",
        common=True,
    )
    sampler: Sampler = setting(
        Sampler.coarse_to_fine,
        "coarse_to_fine: random in the whole space, then around the best; random; tpe; grid",
        common=True,
    )
    pruner: Pruner = setting(
        Pruner.median,
        "gives hopeless trials up, by val: median, asha (successive halving), none",
        common=True,
    )
    metric: Metric = setting(
        Metric.score, "what of val decides: score (accuracy, mAP, mean absolute error) or loss"
    )
    folds: int | None = setting(
        None,
        "judge each trial by cross-validation over so many folds; 0: by val; default: 3 where val "
        "has fewer than 200 images",
        low=0,
        high=100,
        common=True,
    )
    coarse_epochs: float | None = setting(
        None,
        "coarse_to_fine: share of the epochs that a coarse trial gets; default: 1 where only the "
        "head trains, else 0.5",
        above=0,
        high=1,
    )
    grid_points: int = setting(4, "grid: points of each range", low=2, high=100)
    storage: str = setting(
        JOURNAL,
        "journal: a file in the output folder; postgresql+psycopg://user@host/database for workers "
        "on several hosts; sqlite:///file",
        common=True,
    )
    study: str | None = setting(
        None, "name of the study in a database; default: name of the output folder"
    )
    workers: int = setting(
        1,
        "processes on this machine that try settings; more join by the same command, here or "
        "elsewhere",
        low=1,
        high=256,
        common=True,
    )
    finish: bool = setting(
        True,
        "train the winner as a run of its own, best/, and judge it on test; false: only name it",
    )

    def problems(self) -> list[str]:
        """Folds are none or several; the storage is one that we know."""
        found = []
        if self.folds == 1:
            found.append("folds must be 0 (none) or at least 2, got 1")
        if self.storage != JOURNAL and not self.storage.startswith(STORAGES):
            known = " or ".join((JOURNAL, *STORAGES))
            found.append(f"storage must be {known}…, got {self.storage}")
        return found


def spelled_space(args: Sequence[str]) -> list[str]:
    """Arguments of `tl search` with all that is about the space as Hydra adds it to a preset's.

    A setting with several values is a part of the space, too. Done twice it does nothing more.

    Example:
        >>> spelled_space(["augment=light,medium", "search.space.seed=null", "seed=1"])
        ['++search.space={augment:[light,medium]}', '++search.space={seed:null}', 'seed=1']
    """
    return [_spelled(arg) for arg in args]


def _spelled(arg: str) -> str:
    key, equals, value = arg.partition("=")
    if not equals or arg.startswith(("-", "+", "~")):
        return arg
    if key == SPACE:
        return f"++{arg}"
    if key.startswith(f"{SPACE}."):
        return f"++{SPACE}={{{key.removeprefix(f'{SPACE}.')}:{value}}}"
    found = _dimension(arg) if not key.startswith(("search.", "hydra.")) else None
    return arg if found is None else f"++{SPACE}={{{key}:{found}}}"


def _dimension(arg: str) -> str | None:
    """What several values of a setting mean as a part of the space; None for a single one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(arg)
    except HydraException:
        return None  # told where all are checked
    value = override.value()
    if isinstance(value, IntervalSweep):
        log = ",log:true" if "log" in value.tags else ""
        return f"{{low:{value.start!r},high:{value.end!r}{log}}}"
    if isinstance(value, ChoiceSweep | RangeSweep):
        return f"[{','.join(override.sweep_string_iterator())}]"
    return None
