"""A comparison for people and programs: the screen, `compare.json`, `compare.csv`, one page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from tl.comparison.errors import CompareError
from tl.comparison.words import NAMES, SEPARATOR, value_words
from tl.files import write_texts
from tl.sections import Section

JSON, TABLE, PAGE = "compare.json", "compare.csv", "compare.html"
MOST_ROWS = 30  # of a table on the screen
MOST_WORDS = 12  # pairs in words on the screen
MOST_SETTINGS = 4  # columns of what was varied


def files(folder: Path) -> list[Path]:
    """What `write` has written there."""
    return [folder / name for name in (PAGE, JSON, TABLE) if (folder / name).is_file()]


def write(values: Mapping[str, Any], folder: Path) -> None:
    """Write `compare.json`, `compare.csv` and `compare.html`.

    Raises:
        CompareError: The folder cannot be written.
    """
    from tl.comparison.page import page

    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"
    texts = {JSON: text, TABLE: table_text(values), PAGE: page(values)}
    write_texts(folder, texts, CompareError)


def table_text(values: Mapping[str, Any]) -> str:
    """One row a run: figures, verdict against the reference, costs, what was varied."""
    verdicts = _verdicts(values)
    rows = [_row(run, values, verdicts) for run in values["runs"]]
    metrics = sorted({key for run in values["runs"] for key in run["metrics"]})
    for row, run in zip(rows, values["runs"], strict=True):
        row |= {f"metrics.{key}": run["metrics"].get(key) for key in metrics}
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _row(
    run: Mapping[str, Any], values: Mapping[str, Any], verdicts: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    pair = verdicts.get(run["id"], {})
    return {
        "run": run["id"],
        "name": run["name"],
        "status": run["status"],
        "group": run["group"],
        "split": values["split"],
        values["metric"] or "value": run["value"],
        "low": run["low"],
        "high": run["high"],
        "verdict": pair.get("word", ""),
        "difference": pair.get("difference"),
        "p": pair.get("p"),
        "p_adjusted": pair.get("p_adjusted"),
        "pareto": run["pareto"],
        "ece": run["ece"],
        **run["cost"],
        **run["params"],
        "why_not": run["why_not"] or "",
        "url": run["url"] or run["folder"] or "",
    }


def _verdicts(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Run -> what the pair with the reference says of it; `difference` is reference - run."""
    reference = values["reference"]
    found: dict[str, dict[str, Any]] = {}
    if reference is not None:
        found[reference] = {"word": "reference"}
    for pair in values["pairs"]:
        if reference not in (pair["a"], pair["b"]):
            continue
        turned = pair["b"] == reference
        other = pair["a"] if turned else pair["b"]
        wins = {"a": pair["a"], "b": pair["b"]}.get(pair["verdict"])
        word = "no difference shown" if wins is None else "better" if wins == other else "worse"
        if pair["verdict"] == "incomparable":
            word = "not comparable"
        sign = -1 if turned and pair["difference"] is not None else 1
        difference = None if pair["difference"] is None else sign * pair["difference"]
        p = {key: pair[key] for key in ("p", "p_adjusted")}
        found[other] = {"word": word, "difference": difference, **p}
    return found


def sections(values: Mapping[str, Any]) -> list[Section]:
    """What stands on the screen: the verdict first, then the runs, the pairs, the seeds."""
    parts = [
        Section(values["title"], "list", [{"text": text} for text in values["summary"]]),
        _runs(values),
        _pairs(values),
        _seeds(values),
        _left(values),
    ]
    return [part for part in parts if part.rows]


def _runs(values: Mapping[str, Any]) -> Section:
    verdicts, name = _verdicts(values), NAMES.get(values["metric"], "value")
    compared = [run for run in values["runs"] if run["group"] is not None]
    several = len(values["groups"]) > 1
    keys = _telling(values["varied"], compared)[:MOST_SETTINGS]
    rows = [
        {
            **({"group": run["group"] + 1} if several else {}),
            "run": run["short"],
            f"{name} (interval)": _with_interval(run, values["metric"]),
            "verdict": verdicts.get(run["id"], {}).get("word", "").replace(" shown", ""),
            "seconds": run["cost"]["fit_seconds"],
            **{key.removeprefix("params."): _file_name(run["params"].get(key)) for key in keys},
        }
        for run in compared[:MOST_ROWS]
    ]
    more = len(compared) - len(rows)
    note = f"{more:,} more runs are in {TABLE}." if more > 0 else ""
    return Section(f"runs by {name} on {values['split']}", "table", rows, note)


def _with_interval(run: Mapping[str, Any], metric: str) -> str:
    low = value_words(run["low"], metric).removesuffix(" %")
    return f"{value_words(run['value'], metric)} ({low} to {value_words(run['high'], metric)})"


def _telling(keys: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings that say what neither the names of the runs nor other settings before them say."""
    found: dict[tuple[int, ...], str] = {}
    for key in keys:
        values = [str(run["params"].get(key)).partition(".")[0] for run in runs]
        if all(v in run["short"].split(SEPARATOR) for v, run in zip(values, runs, strict=True)):
            continue
        seen: dict[Any, int] = {}
        places = tuple(seen.setdefault(run["params"].get(key), len(seen)) for run in runs)
        found.setdefault(places, key)
    return [*found.values()]


def _file_name(value: Any) -> Any:
    """Of a path what tells it from others."""
    return PurePath(value).name if isinstance(value, str) and "/" in value else value


def _pairs(values: Mapping[str, Any]) -> Section:
    reference = values["reference"]
    pairs = [
        pair
        for pair in values["pairs"]
        if reference in (pair["a"], pair["b"]) or pair["verdict"] == "incomparable"
    ]
    if len(values["runs"]) == 2 and pairs and pairs[0]["verdict"] != "incomparable":
        return Section("", "list", [])  # the summary says it
    more = len(pairs) - MOST_WORDS
    note = f"{more:,} more pairs are in {JSON}." if more > 0 else ""
    rows = [{"text": pair["words"]} for pair in pairs[:MOST_WORDS]]
    return Section("pair by pair", "list", rows, note)


def _seeds(values: Mapping[str, Any]) -> Section:
    rows = [
        {
            "settings": family["name"],
            "runs": len(family["runs"]),
            "mean": family["mean"],
            "spread": family["std"],
            "low": family["low"],
            "high": family["high"],
        }
        for family in values["families"][:MOST_ROWS]
    ]
    texts = " ".join(f"{pair['words']}." for pair in values["family_pairs"][:MOST_WORDS])
    return Section("the same settings with several seeds", "table", rows, texts)


def _left(values: Mapping[str, Any]) -> Section:
    left = [run for run in values["runs"] if run["group"] is None]
    rows = [{"text": f"{run['short']}: {run['why_not']}"} for run in left[:MOST_WORDS]]
    more = len(left) - len(rows)
    note = f"{more:,} more are in {TABLE}." if more > 0 else ""
    return Section("left out", "list", rows, note)
