"""A search as one HTML page: styles and plots inside, nothing from outside, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from tl.pages import render
from tl.search import charts
from tl.search.judging import Judged
from tl.search.space import shown

MOST_ROWS = 100
HEADLINES = {"acc": "accuracy", "map": "mAP", "mae": "mean absolute error"}
WORDS = {
    TrialState.PRUNED: "given up",
    TrialState.FAIL: "failed",
}


def page(
    title: str,
    found: Judged,
    done: Sequence[FrozenTrial],
    facts: Mapping[str, str],
    command: str,
    metrics: Mapping[str, float] | None,
) -> str:
    """HTML text of a search.

    Args:
        title: Of the page.
        found: What the trials amount to.
        done: All trials that came to an end.
        facts: What was asked for.
        command: That trains with the settings of the winner.
        metrics: Of the winner's run; None before it ended.
    """
    best = found.best
    return render(
        "tl.search",
        "page.html",
        title=title,
        facts=facts,
        numbers=_numbers(found, metrics),
        settings=[(d.key, shown(best.params.get(d.key)), d.words) for d in found.space],
        warnings=found.warnings,
        command=command,
        history=charts.history(done, highest=found.highest),
        slices=charts.slices(done, found.space, best, highest=found.highest),
        parallel=charts.parallel(found.ranked, found.space, found.metric, highest=found.highest),
        importance=sorted(found.importance.items(), key=lambda item: -item[1]),
        head=[d.short for d in found.space],
        rows=_rows(found, done),
        more=max(0, len(done) - MOST_ROWS),
        metric=found.metric,
    )


def _numbers(found: Judged, metrics: Mapping[str, float] | None) -> list[tuple[str, str, str]]:
    def said(value: float | None) -> str:
        if value is None:
            return "–"
        return f"{100 * value:.1f} %" if found.metric == "val/acc" else f"{value:.4g}"

    numbers = [(f"best {found.metric}", said(found.best.value), f"trial {found.best.number}")]
    if found.corrected is not None:
        note = "expected on other images after a choice among so many"
        numbers.append(("corrected for the choice", said(found.corrected), note))
    if found.given is not None:
        numbers.append(("settings as they were", said(found.given.value), "trial 0"))
    for split in ("val", "test"):
        for name, words in HEADLINES.items():
            key = f"{split}/{name}"
            if metrics and key in metrics:
                text = f"{100 * metrics[key]:.1f} %" if name == "acc" else f"{metrics[key]:.4g}"
                limits = [metrics.get(f"{key}_{end}") for end in ("low", "high")]
                scale, unit = (100, " %") if name == "acc" else (1, "")
                note = "the winner's own run"
                if None not in limits:
                    low, high = (scale * float(x or 0) for x in limits)
                    note += f"; 95 % interval {low:.3g}{unit} to {high:.3g}{unit}"
                numbers.append((f"{words} on {split}", text, note))
    return numbers


def _rows(found: Judged, done: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """The best first, then what did not come to its end."""
    others = [t for t in done if t not in found.ranked]
    rows = []
    for place, t in enumerate([*found.ranked, *others][:MOST_ROWS]):
        whole = place < len(found.ranked)
        tied = found.tied.get(t.number)
        told = "the best" if place == 0 else "–" if tied is None else "no" if tied else "yes"
        rows.append(
            {
                "trial": t.number,
                "kind": t.user_attrs.get("kind", ""),
                "value": f"{t.value:.4f}" if t.value is not None else "–",
                "settings": [
                    shown(t.params[d.key]) if d.key in t.params else "–" for d in found.space
                ],
                "seconds": f"{t.user_attrs.get('seconds', 0):.1f}",
                "end": told if whole else _end(t),
            }
        )
    return rows


def _end(trial: FrozenTrial) -> str:
    error = trial.user_attrs.get("error")
    if trial.state == TrialState.COMPLETE:
        return f"{100 * float(trial.user_attrs.get('share', 1)):.0f} % of the epochs"
    return WORDS.get(trial.state, "") + (f": {error}" if error else "")
