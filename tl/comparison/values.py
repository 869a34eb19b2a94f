"""A comparison as plain values: what `compare.json` holds and the page shows."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tl.comparison.details import by_class, changed_classes, flips, listed, reliability
from tl.comparison.families import Family, family_pairs, family_values
from tl.comparison.judging import Group, groups_of, pair_values
from tl.comparison.reading import Said
from tl.comparison.summary import summary_of
from tl.comparison.varied import families_of, family_name, seed_of, varied
from tl.comparison.words import incomparable_words, short_names
from tl.evaluation import Sheet, calibration_error
from tl.evaluation.sheets import why_not

TAGS = ("data.name", "model.name", "tl.method", "tl.plan", "git.commit", "git.dirty", "device",
        "tl.host", "tl.version", "error")  # fmt: skip
MOST_METRICS = ("val/", "test/")


@dataclass(frozen=True)
class Request:
    """What was asked for.

    Args:
        title: Heading.
        experiment: Name of the experiment; None where runs were named.
        condition: Of the runs; None: all.
        store: Address of the store without passwords; None where none was read.
        split: Images that were asked for; None: test, else val.
        baseline: Id of the run that others are compared with.
        confidence: Of intervals and verdicts.
        pictures: Whether to make small pictures.
    """

    title: str
    experiment: str | None
    condition: str | None
    store: str | None
    split: str | None
    baseline: str | None
    confidence: float
    pictures: bool


def values_of(runs: Sequence[Said], asked: Request) -> dict[str, Any]:
    """Compare runs.

    Args:
        runs: With what they said, in any order; at least one.
        asked: The request.

    Returns:
        Plain values; numbers are None where nothing is known, never NaN.
    """
    split = asked.split or ("test" if any("test" in run.sheets for run in runs) else "val")
    runs = sorted(runs, key=_cheapness)  # of equal figures the cheaper run comes first
    sheets = {run.record.id: run.sheets[split] for run in runs if split in run.sheets}
    groups = groups_of(sheets, asked.baseline, asked.confidence)
    names = short_names({run.record.id: run.record.name for run in runs})
    records = {run.record.id: run.record for run in runs}
    inside = [records[run] for group in groups for run in group.ids]
    settings = varied(inside or [run.record for run in runs])
    families = _families(inside, settings)
    main = groups[0] if groups else None
    pair = _asked_pair(main, asked.baseline)
    found = {
        "title": asked.title,
        "created": time.strftime("%Y-%m-%d %H:%M %Z"),
        "experiment": asked.experiment,
        "filter": asked.condition,
        "store": asked.store,
        "split": split,
        "metric": main.metric if main else None,
        "lower_is_better": bool(main and main.metric == "mae"),
        "task": main.truth.task.value if main else None,
        "confidence": asked.confidence,
        "varied": [f"params.{key}" for key in settings],
        "best": main.ids[0] if main else None,
        "baseline": asked.baseline,
        "reference": main.ids[main.reference] if main else None,
        "pair": [main.ids[place] for place in pair] if main and pair else None,
        "optimism": main.optimism if main else None,
        "groups": [_group_values(group) for group in groups],
        "runs": _runs(runs, groups, sheets, families, settings, split, names),
        "families": [family_values(family, groups, asked.confidence) for family in families],
        "family_pairs": family_pairs(families, main, asked.confidence) if main else [],
        "pairs": [
            *(pair_values(g, p, names, asked.confidence) for g in groups for p in g.pairs),
            *_incomparable(groups, names),
        ],
        **_details(main, pair, sheets, records, asked),
    }
    plain: dict[str, Any] = clean({**found, "summary": summary_of(found)})
    return plain


def _cheapness(run: Said) -> float:
    return run.record.metrics.get("fit_seconds", math.inf)


def _families(records: Sequence[Any], settings: Sequence[str]) -> list[Family]:
    return [
        Family(
            family_name(members[0], settings),
            tuple(record.id for record in members),
            tuple(seed_of(record.params) for record in members),
        )
        for members in families_of(records, settings)
    ]


def _asked_pair(group: Group | None, baseline: str | None) -> tuple[int, int] | None:
    """The best and the baseline; without one, or where that is the best, the best and the next."""
    if group is None or len(group.ids) < 2:
        return None
    other = group.ids.index(baseline) if baseline in group.ids else 0
    return 0, other or 1


def _group_values(group: Group) -> dict[str, Any]:
    return {
        "fingerprint": group.truth.fingerprint,
        "images_sha256": group.truth.images,
        "images": len(group.truth),
        "copies": group.truth.copies,
        "classes": [*group.truth.classes],
        "runs": [*group.ids],
    }


def _details(
    main: Group | None,
    pair: tuple[int, int] | None,
    sheets: Mapping[str, Sheet],
    records: Mapping[str, Any],
    asked: Request,
) -> dict[str, Any]:
    if main is None or pair is None:
        return {"classes": [], "flips": []}
    figures = by_class(main, [sheets[run] for run in main.ids])
    a, b = (main.ids[place] for place in pair)
    sides = (records[a], sheets[a]), (records[b], sheets[b])
    return {
        "classes": changed_classes(main, figures, pair),
        "flips": flips(main, *sides, pictures=asked.pictures),
    }


def _runs(
    runs: Sequence[Said],
    groups: Sequence[Group],
    sheets: Mapping[str, Sheet],
    families: Sequence[Family],
    settings: Sequence[str],
    split: str,
    names: Mapping[str, str],
) -> list[dict[str, Any]]:
    """One entry a run: those that can be compared first, the best of each group first."""
    place = {run: (number, i) for number, g in enumerate(groups) for i, run in enumerate(g.ids)}
    family = {run: number for number, f in enumerate(families) for run in f.ids}
    classes = [listed(g, by_class(g, [sheets[run] for run in g.ids])) for g in groups]
    ordered = sorted(runs, key=lambda run: place.get(run.record.id, (len(groups), 0)))
    found = []
    for run in ordered:
        record = run.record
        number, i = place.get(record.id, (None, 0))
        group = groups[number] if number is not None else None
        sheet = sheets.get(record.id)
        entry = {
            "id": record.id,
            "name": record.name,
            "short": names[record.id],
            "status": record.status,
            "url": record.url,
            "folder": str(record.folder) if record.folder else None,
            "group": number,
            "why_not": run.why_not or (None if group else f"it has no {split} images"),
            "value": group.values[i] if group else None,
            "low": group.lows[i] if group else None,
            "high": group.highs[i] if group else None,
            "metrics": {k: v for k, v in record.metrics.items() if _shown(k)},
            "params": {f"params.{key}": number_or_text(record.params.get(key)) for key in settings},
            "tags": {key: record.tags[key] for key in TAGS if key in record.tags},
            "seed": seed_of(record.params),
            "family": family.get(record.id),
            "cost": _cost(run),
            "curve": run.curve,
            "reliability": reliability(sheet) if sheet and group else None,
            "ece": _calibration(record.metrics.get(f"{split}/ece"), sheet),
            "per_class": classes[number][i] if number is not None else None,
        }
        found.append(entry)
    _mark_front(found, lower=bool(groups and groups[0].metric == "mae"))
    return found


def _shown(key: str) -> bool:
    return key.startswith(MOST_METRICS) or "/" not in key


def _calibration(logged: float | None, sheet: Sheet | None) -> float | None:
    if logged is not None or sheet is None or sheet.score is None:
        return logged
    return calibration_error(sheet.score.astype(float), sheet.said == sheet.truth.truth)


def _cost(run: Said) -> dict[str, Any]:
    metrics, params = run.record.metrics, run.record.params
    parameters = params.get("model.parameters", "")
    return {
        "fit_seconds": metrics.get("fit_seconds"),
        "total_seconds": metrics.get("total_seconds"),
        "parameters": int(parameters) if parameters.isdigit() else metrics.get("parameters"),
        "trainable_parameters": metrics.get("trainable_parameters"),
        "ms_an_image": metrics.get("ms_an_image"),
        "bytes": _bytes(run),
    }


def _bytes(run: Said) -> int | None:
    """Size of the bundle's graph and weights, where the run's folder is here."""
    folder = run.record.folder
    files = [*(folder / "bundle").glob("model.onnx*")] if folder else []
    return sum(file.stat().st_size for file in files) or None


def _mark_front(runs: Sequence[dict[str, Any]], *, lower: bool) -> None:
    """Mark the runs of the first group that no other beats in both quality and seconds of fit."""
    sign = -1 if lower else 1
    known = [r for r in runs if r["group"] == 0 and r["cost"]["fit_seconds"] is not None]
    best = -math.inf
    for run in sorted(known, key=lambda r: (r["cost"]["fit_seconds"], -sign * r["value"])):
        run["pareto"] = sign * run["value"] > best
        best = max(best, sign * run["value"])
    for run in runs:
        run.setdefault("pareto", False)


def _incomparable(groups: Sequence[Group], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """The best of the main group with the best of each other group: why there is no verdict."""
    found = []
    for group in groups[1:]:
        a, b = groups[0].ids[groups[0].reference], group.ids[group.reference]
        why = why_not(groups[0].truth, group.truth) or _other_images(groups[0], group)
        empty = dict.fromkeys(
            ("difference", "low", "high", "p", "p_adjusted", "only_a", "only_b", "images_needed",
             "detectable")
        )  # fmt: skip
        words = incomparable_words(names[a], names[b], why)
        found.append(
            {"a": a, "b": b, "images": 0, **empty, "verdict": "incomparable", "words": words}
        )
    return found


def _other_images(one: Group, other: Group) -> str:
    a, b = set(one.truth.sha256.tolist()), set(other.truth.sha256.tolist())
    return f"other images ({len(a & b):,} in common, {len(a - b):,} and {len(b - a):,} not)"


def number_or_text(text: str | None) -> float | int | str | None:
    """A setting as MLflow keeps it, as what it was: numbers are sorted as numbers.

    Example:
        >>> [number_or_text(t) for t in ("3.0", "10", "1e-3", "lp_ft", "True", "nan", None)]
        [3.0, 10, 0.001, 'lp_ft', 'True', 'nan', None]
    """
    for kind in (int, float):
        try:
            number = kind(text or "")
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    return text


def clean(value: Any) -> Any:
    """Plain values of JSON: NaN and infinity become None, whatever holds them."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
