"""How good the model is, for which classes, and how far its own probabilities can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tl.config import Task
from tl.evaluation import accuracy_interval, evaluate
from tl.pages import address
from tl.report.files import METRICS, PREDICTIONS, SPLITS, Judged, RunFiles
from tl.report.parts import WORDS, Block, Part, facts, images, number, share

MOST_CLASSES = 40  # rows of the table of classes
MOST_CONFUSIONS = 12
MOST_VALUES = 20_000_000  # images x classes up to which classes are judged anew from predictions
BINS = 10  # of the reliability diagram
LEAST_GROUP = 5  # images of a group that is shown
MOST_GROUPS = 12
METRIC_WORDS = {
    "acc": "accuracy",
    "map": "mean average precision",
    "mae": "mean absolute error",
    "rmse": "root mean square error",
    "r2": "R²",
    "f1_macro": "macro F1",
    "f1_micro": "micro F1",
    "f1_weighted": "weighted F1",
    "balanced_acc": "balanced accuracy",
    "top5": "top-5 accuracy",
    "loss": "loss",
    "ece": "calibration error",
    "brier": "Brier score",
    "auc": "area under the ROC curve",
    "roc_auc": "area under the ROC curve",
    "pr_auc": "area under the precision-recall curve",
    "exact_match": "all labels right",
    "hamming": "wrong decisions",
    "images": "images",
}
PICTURES = {
    "confusion": "Confusion matrix: rows are true classes, columns what the model says.",
    "f1": "F1 of the lowest classes.",
    "average_precision": "Average precision of each label.",
    "predicted": "Predicted against true numbers.",
    "reliability": "Reliability: how often the model is right where it is so sure.",
    "roc": "ROC curves.",
    "pr": "Precision and recall.",
}


def metrics(run: RunFiles) -> Part:
    """All metrics of val and test with their intervals."""
    splits = [s for s in reversed(SPLITS) if f"{s}/images" in run.metrics]
    names = dict.fromkeys(
        key.split("/", 1)[1] for key in run.metrics if key.split("/", 1)[0] in splits
    )
    ends = {f"{name}_{end}" for name in names for end in ("low", "high")}
    rows = [
        [METRIC_WORDS.get(name, name.replace("_", " ")), name]
        + [_with_interval(run.metrics, f"{split}/{name}") for split in splits]
        for name in names
        if name not in ends
    ]
    columns = {"metric": False, "key": False} | dict.fromkeys(splits, True)
    text = (
        "In brackets 95 % intervals: where the figure would lie on other images of the same kind."
    )
    return Part("metrics", "metrics", [text], [Block("table", {"columns": columns, "rows": rows})],
                [METRICS])  # fmt: skip


def _with_interval(values: dict[str, float], key: str) -> str:
    if key not in values:
        return "–"
    low, high = values.get(f"{key}_low"), values.get(f"{key}_high")
    around = f" ({number(low)} to {number(high)})" if low is not None and high is not None else ""
    return number(values[key]) + around


def classes(run: RunFiles) -> Part:
    """Each class of the split that speaks for the model, confusions, and the pictures."""
    judged = run.judged[run.split]
    blocks: list[Block] = []
    if judged.outputs.size <= MOST_VALUES:
        blocks += _class_table(run, judged)
        blocks += _confusions(judged)
    files = [PREDICTIONS]
    for path in sorted((run.path / "pictures").glob(f"*_{judged.split}.png")):
        what = path.stem.removesuffix(f"_{judged.split}")
        text = PICTURES.get(what, f"{what.replace('_', ' ').capitalize()}.")
        picture = {"address": address(path.read_bytes(), "image/png"), "text": text}
        blocks.append(Block("picture", picture))
        files.append(f"pictures/{path.name}")
    title = "where the errors are" if run.task is Task.regression else "classes"
    return Part(
        "classes", title, [f"On {images(len(judged), WORDS[judged.split])}."], blocks, files
    )


def per_class(judged: Judged) -> pd.DataFrame:
    """Table of `tl.evaluation.evaluate`; recall has an interval where it is of counts."""
    thresholds = None
    if judged.task is Task.multi:
        thresholds = _used_thresholds(judged)
    report = evaluate(
        judged.outputs, judged.truth, judged.classes, judged.split,
        task=judged.task, thresholds=thresholds,
    )  # fmt: skip
    table = report.per_class
    if judged.task is Task.regression or "recall_low" in table:
        return table
    right = (table["recall"].fillna(0) * table["images"]).round().astype(int)
    pairs = zip(right, table["images"], strict=True)
    ends = [accuracy_interval(int(k), int(n)) if n else (np.nan, np.nan) for k, n in pairs]
    return table.assign(recall_low=[low for low, _ in ends], recall_high=[h for _, h in ends])


def _used_thresholds(judged: Judged) -> list[float]:
    """Probabilities that part what the run called present from what it did not."""
    place = {name: index for index, name in enumerate(judged.classes)}
    said = np.zeros(judged.outputs.shape, bool)
    for row, names in enumerate(judged.rows["predicted"]):
        said[row, [place[name] for name in names]] = True
    lowest = np.where(said, judged.outputs, np.inf).min(axis=0)
    highest = np.where(said, -np.inf, judged.outputs).max(axis=0)
    between = (lowest + highest) / 2
    return [
        float(m if np.isfinite(m) else 0.0 if np.isfinite(lo) else 2.0)
        for m, lo in zip(between, lowest, strict=True)
    ]


def _class_table(run: RunFiles, judged: Judged) -> Iterator[Block]:
    table = per_class(judged)
    if judged.task is Task.regression:
        rows = [
            [f"{r['from']:.4g} to {r['to']:.4g}", f"{r['images']:,}", number(r["mae"]),
             f"{r['bias']:+.3g}"]
            for _, r in table.iterrows()
        ]  # fmt: skip
        columns = {judged.classes[0]: False, "images": True, "mean error": True, "bias": True}
        note = "Bias: how much too high (+) or too low (−) the model is on average."
        yield Block("table", {"columns": columns, "rows": rows}, note=note)
        return
    score = "ap" if judged.task is Task.multi else "f1"
    trained = run.model.get("data", {}).get("counts", {}).get("train", {})
    order = table.sort_values(["recall", score], kind="stable", na_position="last")
    rows = [
        [r["class"], f"{trained.get(r['class'], 0):,}", f"{r['images']:,}", _recall_bar(r),
         _recall_words(r), number(r["precision"]), number(r[score])]
        for _, r in order.head(MOST_CLASSES).iterrows()
    ]  # fmt: skip
    columns = {"class": False, "in train": True, "images": True, "": "bar", "found": False}
    columns |= {"precision": True, "average precision" if score == "ap" else "F1": True}
    left = len(order) - MOST_CLASSES
    note = "Found: share of the images of a class that the model finds (recall), with its interval."
    more = f" The other {left:,} classes are found more often." if left > 0 else ""
    yield Block("table", {"columns": columns, "rows": rows}, note=note + more)


def _recall_bar(row: Any) -> dict[str, float]:
    values = {"value": row["recall"], "low": row["recall_low"], "high": row["recall_high"]}
    return {name: float(v) if np.isfinite(v) else 0.0 for name, v in values.items()}


def _recall_words(row: Any) -> str:
    if not np.isfinite(row["recall"]):
        return "no image"
    low, high = 100 * row["recall_low"], 100 * row["recall_high"]
    return f"{100 * row['recall']:.0f} % ({low:.0f} to {high:.0f})"


def confused(judged: Judged) -> list[tuple[str, str, int, int]]:
    """True class, what was said, how often, and how many images the class has; the most first."""
    if judged.task is not Task.single:
        return []
    wrong = judged.rows[~judged.rows["correct"].to_numpy(bool)]
    counts = (
        wrong.groupby(["label", "predicted"]).size().sort_values(ascending=False, kind="stable")
    )
    totals = judged.rows["label"].value_counts()
    return [(str(a), str(b), int(n), int(totals[a])) for (a, b), n in counts.items()]


def _confusions(judged: Judged) -> Iterator[Block]:
    found = confused(judged)
    if found:
        rows = [[a, b, f"{n:,} of {total:,}"] for a, b, n, total in found[:MOST_CONFUSIONS]]
        left = len(found) - len(rows)
        yield Block(
            "table",
            {
                "columns": {"true class": False, "the model says": False, "images": True},
                "rows": rows,
            },
            title="what is taken for what",
            note=f"And {left:,} other confusions, each rarer." if left > 0 else "",
        )


def groups(run: RunFiles) -> Part | None:
    """How the model does for each group of the split that speaks for it; None without groups."""
    judged = run.judged[run.split]
    table = group_table(judged)
    if table is None:
        return None
    numbers = judged.task is Task.regression
    shown = table.head(MOST_GROUPS)
    rows = [
        [r["group"], f"{r['images']:,}", number(r["value"]) if numbers else
         f"{share(r['value'])} ({share(r['low'])} to {share(r['high'])})"]
        for _, r in shown.iterrows()
    ]  # fmt: skip
    what = {Task.single: "right", Task.multi: "all labels right", Task.regression: "mean error"}
    text = f"The worst first, of {len(table):,} groups with at least {LEAST_GROUP} images."
    block = Block("table", {"columns": {"group": False, "images": True, what[judged.task]: True},
                            "rows": rows})  # fmt: skip
    return Part("groups", "groups", [text], [block], [PREDICTIONS])


def group_table(judged: Judged) -> pd.DataFrame | None:
    """Columns group, images, value, low and high; the worst first. None without groups.

    `value` is the share of images that are right, low and high its Wilson interval; for regression
    the mean absolute error, without an interval.
    """
    if "group" not in judged.rows or judged.rows["group"].isna().all():
        return None
    numbers = judged.task is Task.regression
    of = judged.rows["error"].abs() if numbers else judged.rows["correct"].astype(float)
    table = of.groupby(judged.rows["group"].astype(str)).agg(["size", "mean"]).reset_index()
    table.columns = pd.Index(["group", "images", "value"])
    table = table[table["images"] >= LEAST_GROUP]
    if not numbers:
        pairs = zip((table["value"] * table["images"]).round(), table["images"], strict=True)
        ends = [accuracy_interval(int(k), int(n)) for k, n in pairs]
        table = table.assign(low=[low for low, _ in ends], high=[high for _, high in ends])
    return table.sort_values("value", ascending=not numbers, kind="stable").reset_index(drop=True)


def bins(judged: Judged) -> list[dict[str, float]]:
    """How often the model is right by how sure it is: `sure`, `right`, `low`, `high`, `images`.

    For several labels each label of each image counts: how often it is present.
    """
    sure, right = surety(judged)
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    found = []
    for number_ in range(BINS):
        here = place == number_
        if not here.any():
            continue
        low, high = accuracy_interval(int(right[here].sum()), int(here.sum()))
        found.append(
            {"sure": float(sure[here].mean()), "right": float(right[here].mean()),
             "low": low, "high": high, "images": int(here.sum())}
        )  # fmt: skip
    return found


def surety(judged: Judged) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Probability of what was said, and whether it is right.

    With several labels an image: the probability of each label, and whether it is present.
    """
    if judged.task is Task.multi:
        return judged.outputs.ravel(), judged.truth.ravel()
    best = judged.outputs.argmax(axis=1)
    return judged.outputs.max(axis=1), best == judged.truth


def calibration(run: RunFiles) -> Part | None:
    """Whether the probabilities can be taken at their word; None for numbers."""
    if run.task is Task.regression:
        return None
    judged = run.judged[run.split]
    what = "labels" if run.task is Task.multi else "images"
    unit = "label is present" if run.task is Task.multi else "model is right"
    found = bins(judged)
    text = (
        f"Among the {what} of which the model is so sure (from left to right) the {unit} so often "
        "(from bottom to top). On the line both are the same; below it the model is too sure. "
        "The lines are 95 % intervals."
    )
    rows = [
        [share(b["sure"]), f"{share(b['right'])} ({share(b['low'])} to {share(b['high'])})",
         f"{int(b['images']):,}"] for b in found
    ]  # fmt: skip
    columns = {"sure": True, "right": True, what: True}
    blocks = [
        Block("reliability", {"bins": found, "most": max(b["images"] for b in found)}),
        Block("table", {"columns": columns, "rows": rows}),
    ]
    scaling = run.json("calibration.json")
    files = [PREDICTIONS]
    if scaling:
        rows_ = {k.replace("_", " "): _plain(v) for k, v in scaling.items()}
        blocks.append(facts(rows_, "temperature"))
        files.append("calibration.json")
    return Part("calibration", "how sure, how right", [text], blocks, files)


def _plain(value: Any) -> str:
    if isinstance(value, float | int) and not isinstance(value, bool):
        return number(value)
    return "" if isinstance(value, dict | list) else str(value)


def sureness(judged: Judged) -> tuple[str, float]:
    """In words how sure the model is against how right it is, and the difference of the means.

    The difference counts where it is beyond twice the standard error of the share that is right.
    """
    sure, right = surety(judged)
    gap = float(sure.mean() - right.mean())
    error = float(np.sqrt(max(right.mean() * (1 - right.mean()), 1 / len(right)) / len(right)))
    if abs(gap) <= 2 * error:
        return "as sure as it is right", 0.0
    points = f"{100 * abs(gap):.0f} points"
    return (f"too sure, by {points}" if gap > 0 else f"not sure enough, by {points}"), gap


def guessed(judged: Judged, run: RunFiles) -> float:
    """The headline figure of one who has not looked at any image.

    Always the most frequent class; for labels their mean frequency; for numbers always the mean of
    train.
    """
    if judged.task is Task.single:
        return float(np.bincount(judged.truth, minlength=len(judged.classes)).max() / len(judged))
    if judged.task is Task.multi:
        there = judged.truth.any(axis=0)
        return float(judged.truth[:, there].mean()) if there.any() else 0.0
    mean = run.model.get("target", {}).get("mean", float(judged.truth.mean()))
    return float(np.abs(judged.truth - mean).mean())


def names_below(table: pd.DataFrame, whole: float, classes: Sequence[str]) -> list[Any]:
    """Rows of classes that are found less often than all, beyond chance over all classes."""
    rows = []
    for _, row in table.iterrows():
        if not row["images"] or not np.isfinite(row["recall"]):
            continue
        right = round(row["recall"] * row["images"])
        level = 1 - 0.05 / max(len(classes), 1)  # Bonferroni: one false alarm in twenty runs
        if accuracy_interval(right, int(row["images"]), level)[1] < whole:
            rows.append(row)
    return sorted(rows, key=lambda r: (r["recall"], r["class"]))
