"""A comparison as one HTML page: its table, plots and pictures inside, nothing from outside.

The table is written here, so that it stands without scripts; `page.js` sorts and filters it, and
`plots.js` draws with Bokeh, whose own script lies in its package and goes into the page. The policy
of the page names these scripts by their hashes and forbids every other and every connection.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

from tl.comparison.shown import (
    axes,
    class_places,
    columns,
    metric_text,
    named,
    percent,
    positions,
    reference,
    verdicts,
)
from tl.pages import render

TEMPLATE = "page.html"
OURS = ("page.js", "plots.js", "charts.js")
# BokehJS without widgets and tables, and its plotting interface: 1.4 MB. plotly.min.js has 4.8 MB.
BOKEH = ("bokeh.min.js", "bokeh-api.min.js")
COSTS = {
    "fit_seconds": "seconds of training",
    "total_seconds": "seconds of the whole job",
    "ms_an_image": "milliseconds an image",
    "parameters": "parameters",
    "trainable_parameters": "trained parameters",
    "bytes": "bytes of the weights",
}
OPTIONAL: Mapping[str, Any] = {
    "baseline": None,
    "reference": None,
    "pair": None,
    "family_pairs": [],
}
MOST_PAIRS = 200  # rows of the table of pairs; compare.json has all


def page(values: Mapping[str, Any]) -> str:
    """HTML text of a whole page.

    Args:
        values: The content of `compare.json`: plain values, null where nothing is known.
    """
    from markupsafe import Markup

    values = {**OPTIONAL, **values}
    runs = _ordered(values)
    names = {run["id"]: run["name"] for run in runs}
    table = columns(values, runs)
    scripts = [*_library(), *(_own(name) for name in OURS)]
    parts = _parts(values, runs)
    return render(
        "tl.comparison",
        TEMPLATE,
        **{"title": values["title"], "values": values, "runs": runs, "names": names},
        **{"columns": table, "label": named(values["metric"]), "contents": parts},
        parts={part["id"] for part in parts},
        places=positions(runs),
        class_places=class_places(values["classes"]),
        families=_families(values, runs),
        pairs=_pairs(values),
        rivals=_rivals(values, names),
        said=lambda value: metric_text(values["metric"], value),
        points=lambda value: metric_text(values["metric"], value, difference=True),
        percent=percent,
        colours=[column["label"] for column in table if column["varied"]],
        policy="; script-src " + " ".join(f"'{_hash(text)}'" for text in scripts),
        data=Markup(_json(_data(values, runs, table))),
        scripts=[Markup(text) for text in scripts],
    )


def _data(
    values: Mapping[str, Any], runs: Sequence[Mapping[str, Any]], table: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the scripts need."""
    keys = ("id", "name", "group", "value", "low", "high", "curve", "reliability", "ece")
    axis = axes(values, runs)
    pairs = {
        f"{pair['a']} {pair['b']}": pair["words"] for pair in values["pairs"] if pair.get("words")
    }
    costs = {key: [run["cost"].get(key) for run in runs] for key in COSTS}
    return {
        "label": named(values["metric"]),
        "percent": metric_text(values["metric"], 0.5).endswith("%"),
        "lower": values["lower_is_better"],
        "best": _index(runs, values["best"]),
        "baseline": _index(runs, values["baseline"]),
        "runs": [{key: run[key] for key in keys} for run in runs],
        "columns": table,
        "costs": [
            {"key": key, "label": COSTS[key], "values": found}
            for key, found in costs.items()
            if any(value is not None for value in found)
        ],
        "axes": axis,
        "pairs": pairs,
    }


def _ordered(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Comparable runs, those of the best's group first and in it the best; then the others.

    Their names are without what all have in common, where the comparison knows such names.
    """
    groups = values["groups"]
    home = next((i for i, group in enumerate(groups) if values["best"] in group["runs"]), None)
    sign = 1 if values["lower_is_better"] else -1

    def key(run: Mapping[str, Any]) -> tuple[float, ...]:
        group, value = run["group"], run["value"]
        if group is None:
            return (2,)
        size = len(groups[group]["runs"])
        place = math.inf if value is None else sign * value
        return (group != home, -size, group, place, run["id"] != values["best"])

    said = verdicts(values)
    return [
        {
            **run,
            "verdict": said[run["id"]],
            "full": run["name"],
            "name": run.get("short") or run["name"],
        }
        for run in sorted(values["runs"], key=key)
    ]


def _parts(values: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The sections that have something to show, for the table of contents."""
    judged = [run for run in runs if run["value"] is not None]
    costs = any(run["cost"].get(key) is not None for run in judged for key in COSTS)
    parts = {
        "verdict": ("what can be said", True),
        "runs": ("runs", True),
        "cost": ("quality against cost", costs),
        "curves": ("learning curves", any(run["curve"] for run in runs)),
        "varied": ("what was varied", len(judged) > 1 and bool(values["varied"])),
        "seeds": ("seeds", any(len(f["runs"]) > 1 for f in values["families"])),
        "pairs": ("pair by pair", bool(values["pairs"])),
        "calibration": ("calibration", any(run["reliability"] for run in runs)),
        "classes": ("classes that changed", bool(values["classes"])),
        "flips": ("images that flipped", bool(values["flips"])),
        "groups": ("what was compared with what", True),
    }
    return [{"id": key, "title": title} for key, (title, there) in parts.items() if there]


def _families(values: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Families with a mean, the best first, with the places of their intervals."""
    said = {pair["b"]: pair for pair in values["family_pairs"]}
    found = [
        {**family, "value": family["mean"], "pair": said.get(i)}
        for i, family in enumerate(values["families"])
        if family["mean"] is not None
    ]
    found.sort(key=lambda f: f["mean"], reverse=not values["lower_is_better"])
    return [{**f, "place": at} for f, at in zip(found, positions(found, runs), strict=True)]


def _pairs(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Pairs that can be compared, with their places around zero.

    Those of the reference come first, and the closest of them: the others need no second look.
    """
    first = reference(values)
    shown = [p for p in values["pairs"] if p["difference"] is not None]
    shown.sort(key=lambda p: (first not in (p["a"], p["b"]), abs(p["difference"])))
    shown = shown[:MOST_PAIRS]
    ends = [abs(p[key]) for p in shown for key in ("low", "high", "difference") if p[key]]
    most = max(ends, default=1.0)
    places = [
        {
            key: 50 + 50 * (pair[name] if pair[name] is not None else pair["difference"]) / most
            for key, name in (("low", "low"), ("value", "difference"), ("high", "high"))
        }
        for pair in shown
    ]
    return [dict(p) | {"place": place} for p, place in zip(shown, places, strict=True)]


def _rivals(values: Mapping[str, Any], names: Mapping[str, str]) -> list[str] | None:
    """Names of the two runs that the changed classes and images are about."""
    pair = values["pair"]
    if not pair and values["flips"]:
        pair = [values["flips"][0][side]["run"] for side in ("a", "b")]
    return [names.get(run, run) for run in pair] if pair else None


def _index(runs: Sequence[Mapping[str, Any]], run: str | None) -> int | None:
    return next((i for i, other in enumerate(runs) if other["id"] == run), None)


def _json(data: Any) -> str:
    """JSON that may stand in a script element: no `<` of a name can end it."""
    from jinja2.utils import htmlsafe_json_dumps

    return htmlsafe_json_dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False)


@cache
def _library() -> list[str]:
    """The scripts of Bokeh, as its package has them."""
    folder = files("bokeh") / "server" / "static" / "js"
    return [(folder / name).read_text(encoding="utf-8") for name in BOKEH]


@cache
def _own(name: str) -> str:
    return (files("tl.comparison") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """The hash by which a content security policy names a script (CSP level 2)."""
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return "sha256-" + base64.b64encode(digest).decode("ascii")
