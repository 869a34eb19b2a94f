"""What a person sees of a search: a line when a trial ends, and at the end a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tl import display
from tl.search.space import Dimension, shown

ENDS = {TrialState.COMPLETE: "", TrialState.PRUNED: "given up", TrialState.FAIL: "failed"}


class Lines:
    """Prints each trial once, when it came to an end, whoever tried it.

    Args:
        space: What is varied.
        metric: Name of what decides, such as `val/acc`.
        total: Trials that are asked for.
        highest: Whether more of the metric is better.
        known: Trials that came to an end before.
    """

    def __init__(
        self,
        space: Sequence[Dimension],
        metric: str,
        total: int,
        *,
        highest: bool,
        known: Sequence[FrozenTrial] = (),
    ) -> None:
        self.space, self.metric, self.total, self.highest = space, metric, total, highest
        self.best: float | None = None
        self.seen: set[int] = set()
        self.number = 0
        for trial in known:
            self._note(trial)

    def _note(self, trial: FrozenTrial) -> bool:
        """Whether it is the best so far."""
        self.seen.add(trial.number)
        self.number += 1
        if trial.state != TrialState.COMPLETE or trial.value is None:
            return False
        if self.best is not None and (trial.value > self.best) != self.highest:
            return False
        if trial.value == self.best:
            return False
        self.best = trial.value
        return True

    def news(self, done: Sequence[FrozenTrial]) -> None:
        """Print what is new."""
        for trial in sorted(done, key=lambda t: (t.datetime_complete is None, t.datetime_complete)):
            if trial.number not in self.seen:
                best = self._note(trial)
                display.say(self._line(trial, best))

    def _line(self, trial: FrozenTrial, best: bool) -> str:
        width = len(str(self.total))
        kind = str(trial.user_attrs.get("kind", "")).replace("coarse_to_fine", "")
        value = f"{trial.value:.4f}" if trial.value is not None else "–"
        name = self.metric.replace("/", " ")
        values = "  ".join(
            f"{d.short} {shown(trial.params[d.key])}" for d in self.space if d.key in trial.params
        )
        seconds = trial.user_attrs.get("seconds", 0.0)
        end = ENDS.get(trial.state, "")
        if error := trial.user_attrs.get("error"):
            end += f": {error}"
        mark = "  best so far" if best else f"  {end}" if end else ""
        return (
            f"{self.number:>{width}}/{self.total}  trial {trial.number:<{width}}  {kind:<6}  "
            f"{name} {value:<6}  {values}  "
            f"{seconds:.1f} s{mark}"
        )


def ranked_rows(
    ranked: Sequence[FrozenTrial], space: Sequence[Dimension], metric: str, tied: Mapping[int, bool]
) -> list[dict[str, Any]]:
    """Rows of the table at the end, the best first."""
    return [
        {
            "trial": str(t.number),
            "kind": t.user_attrs.get("kind", ""),
            metric: t.value,
            "val/loss": t.user_attrs.get("loss"),
            **{d.short: shown(t.params.get(d.key)) for d in space},
            "epochs": t.user_attrs.get("epochs"),
            "clearly worse": "–" if i == 0 else "no" if tied.get(t.number) else "yes",
        }
        for i, t in enumerate(ranked)
    ]
