"""What was measured and decided, in plain words: the one source of screen, page and text file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tl.decision import Decision, table_rows
from tl.decision.evidence import Evidence, Score, Similarity
from tl.sections import Section

# What a person calls the methods of a decision.
METHODS = {
    "linear_probe": "linear classifier on the last features",
    "stage_probe": "linear classifier on features of all stages",
    "norm_affine": "scales of the normalisation layers, and the head",
    "lora": "low-rank adapters of the attention layers, and the head",
    "lp_partial": "linear probe, then the last stages",
    "wise_ft": "linear probe, then all stages gently, the mean of both",
    "lp_ft": "linear probe, then all stages",
    "full": "all stages at once",
}
COLUMNS = ("similar", "different")


def brief(evidence: Evidence, decision: Decision) -> tuple[Section, ...]:
    """The decision with its reasons: what every run with `finetune=auto` shows before it trains.

    Args:
        evidence: What was measured.
        decision: What follows from it.
    """
    chosen = METHODS.get(decision.method, decision.method)
    odd = dict.fromkeys([*evidence.warnings, *decision.warnings])
    would = (*decision.would_change, f"next best guess: {_named(decision.neighbour)}")
    parts = (
        grid(decision),
        Section("look at this first", "list", _lines(odd)),
        bars(evidence),
        Section(f"chosen: {decision.method} ({chosen})", "list", _lines(decision.reasons)),
        Section("what would change it", "list", _lines(would)),
    )
    return tuple(part for part in parts if part.rows)


def grid(decision: Decision) -> Section:
    """The table of amount and similarity with the cell of the decision marked."""
    rows = []
    for row in table_rows():
        here = row["tier"] == decision.amount
        rows.append(
            {
                "amount": f"{row['tier']}: {row['amount']}",
                **{column: row[column] for column in COLUMNS},
                "marked": _marked(row, decision) if here else "",
            }
        )
    note = decision.rule
    if forced := {k: v for k, v in decision.forced.items() if k in ("amount", "similarity")}:
        said = ", ".join(f"{k}={v} (measured: {decision.measured[k]})" for k, v in forced.items())
        note = f"You set {said}. {note}"
    return Section("how to transfer", "grid", tuple(rows), note)


def _marked(row: Mapping[str, str], decision: Decision) -> str:
    if decision.similarity in COLUMNS:
        return decision.similarity
    return next((c for c in COLUMNS if row[c] == decision.method), "")


def bars(evidence: Evidence) -> Section:
    """How well each stage tells the classes apart."""
    found = evidence.similarity
    if found is None:
        return Section("similarity to the pretraining", "text", _lines([evidence.unmeasured]))
    rows = [_bar(stage_name(s.stage, found), s.probe) for s in found.stages]
    rows.append(_bar("all stages together", found.concat))
    note = (
        "Quality of a linear classifier, cross-validated on the training images: 0 is guessing, "
        "100 is perfect; in brackets 95 % intervals. "
        f"Nearest neighbours on the last features: {percent(found.stages[-1].knn)}."
    )
    return Section("how well each stage tells the classes apart", "bars", tuple(rows), note)


def stage_name(name: str, similarity: Similarity) -> str:
    """`stage2`, or what the head reads in words."""
    return "last features" if name == similarity.stages[-1].stage else name


def percent(score: Score) -> str:
    """A figure in [0, 1] with its interval, in hundredths.

    Example:
        >>> percent(Score(0.62, 0.03))
        '62 (56 to 68)'
    """
    low, high = clipped(score)
    return f"{round(100 * score.value)} ({round(100 * low)} to {round(100 * high)})"


def clipped(score: Score) -> tuple[float, float]:
    """The interval of a quality; no classifier is better than perfect."""
    low, high = score.interval()
    return low, min(high, 1.0)


def points(score: Score) -> str:
    """A difference of qualities with its interval, in hundredths.

    Example:
        >>> points(Score(-0.021, 0.01))
        '-2.1 (-4.1 to -0.1)'
    """
    low, high = score.interval()
    return f"{100 * score.value:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _bar(name: str, score: Score) -> dict[str, Any]:
    low, high = clipped(score)
    return {"name": name, "value": score.value, "low": low, "high": high, "text": percent(score)}


def _lines(texts: Iterable[str]) -> tuple[Mapping[str, Any], ...]:
    return tuple({"text": text} for text in texts if text)


def _named(method: str) -> str:
    return f"{method} ({METHODS[method]})" if method in METHODS else method
