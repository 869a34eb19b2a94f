"""How good the model is, for which classes, and how far its own probabilities can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tl.config import Task
from tl.evaluation import accuracy_interval, evaluate
from tl.pages import address
from tl.report.files import (
    CALIBRATION,
    GROUPS,
    METRICS,
    PER_CLASS,
    PREDICTIONS,
    SPLITS,
    Judged,
    RunFiles,
)
from tl.report.parts import WORDS, Block, Part, images, number, share

MOST_CLASSES = 40  # rows of the table of classes
MOST_CONFUSIONS = 12
COUNTS = ("images", "groups")  # last words of the metrics that are counts
BINS = 10  # of the reliability diagram
MOST_GROUPS = 12
METRIC_WORDS = {
    "acc": "accuracy",
    "ap": "average precision, mean of the classes",
    "auc": "area under the ROC curve, mean of the classes",
    "balanced_acc": "balanced accuracy",
    "brier": "Brier score",
    "ece": "calibration error",
    "ece_uncalibrated": "calibration error before the temperature",
    "exact_match": "all labels right",
    "f1_macro": "F1, mean of the classes",
    "f1_micro": "F1 over all decisions",
    "f1_weighted": "F1, mean of the images",
    "hamming": "wrong decisions",
    "log_loss": "log loss",
    "loss": "loss as in training",
    "mae": "mean absolute error",
    "map": "mean average precision",
    "r2": "R²",
    "rmse": "root mean square error",
    "sure_acc": "accuracy where it is sure",
    "sure_share": "share of images where it is sure",
    "top5": "top-5 accuracy",
    "worst_group_acc": "accuracy of the worst group",
    "worst_group_exact_match": "all labels right in the worst group",
    "worst_group_images": "images of the worst group",
    "worst_group_mae": "mean absolute error of the worst group",
}
PICTURES = {
    "confusion": "Confusion matrix: rows are true classes, columns what the model says.",
    "f1": "F1 of the lowest classes.",
    "average_precision": "Average precision of each label.",
    "predicted": "Predicted against true numbers.",
    "ranking": "How well the scores rank: ROC curve, and precision against recall.",
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
    if key.endswith(COUNTS):
        return f"{values[key]:,.0f}"
    around = f" ({number(low)} to {number(high)})" if low is not None and high is not None else ""
    return number(values[key]) + around


def classes(run: RunFiles) -> Part:
    """Each class of the split that speaks for the model, confusions, and the pictures."""
    judged = run.judged[run.split]
    numbers = run.task is Task.regression
    blocks = [_range_table(run) if numbers else _class_table(run), *_confusions(judged)]
    files = [PER_CLASS] if run.has(PER_CLASS) else []
    files.append(PREDICTIONS)
    for path in sorted((run.path / "pictures").glob(f"*_{judged.split}.png")):
        what = path.stem.removesuffix(f"_{judged.split}")
        if what == "calibration":  # drawn in the page
            continue
        text = PICTURES.get(what, f"{what.replace('_', ' ').capitalize()}.")
        picture = {"address": address(path.read_bytes(), "image/png"), "text": text}
        blocks.append(Block("picture", picture))
        files.append(f"pictures/{path.name}")
    title = "where the errors are" if numbers else "classes"
    return Part(
        "classes", title, [f"On {images(len(judged), WORDS[judged.split])}."], blocks, files
    )


def per_class(run: RunFiles) -> pd.DataFrame:
    """Rows of `per_class.csv` for the split that speaks for the model.

    A run of an earlier version has no such file: its predictions are judged anew.
    """
    if run.has(PER_CLASS):
        table = run.csv(PER_CLASS)
        return table[table["split"] == run.split].drop(columns="split").reset_index(drop=True)
    judged = run.judged[run.split]
    thresholds = run.json("thresholds.json")
    return evaluate(
        judged.outputs, judged.truth, judged.classes, judged.split, task=judged.task,
        thresholds=[thresholds[name] for name in judged.classes] if thresholds else None,
    ).per_class  # fmt: skip


def _class_table(run: RunFiles) -> Block:
    score = "ap" if run.task is Task.multi else "f1"
    trained = run.model.get("data", {}).get("counts", {}).get("train", {})
    order = per_class(run).sort_values(["recall", score], kind="stable", na_position="last")
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
    return Block("table", {"columns": columns, "rows": rows}, note=note + more)


def _range_table(run: RunFiles) -> Block:
    """Errors by where the number lies."""
    rows = [
        [f"{r['from']:.4g} to {r['to']:.4g}", f"{r['images']:,.0f}", number(r["mae"]),
         f"{r['bias']:+.3g}"]
        for _, r in per_class(run).iterrows()
    ]  # fmt: skip
    columns = {f"true {run.classes[0]}": False, "images": True, "mean error": True, "bias": True}
    note = "Bias: how much too high (+) or too low (−) the model is on average."
    return Block("table", {"columns": columns, "rows": rows}, note=note)


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
    pairs = zip(counts.index.to_list(), counts, strict=True)
    return [(str(a), str(b), int(n), int(totals[a])) for (a, b), n in pairs]


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
    table = group_table(run)
    if table is None:
        return None
    shown = number if run.task is Task.regression else share
    rows = [
        [r["group"], f"{r['images']:,}" + (" (few)" if r["small"] else ""), shown(r["value"]),
         f"{shown(r['low'])} to {shown(r['high'])}" if np.isfinite(r["low"]) else "–"]
        for _, r in table.head(MOST_GROUPS).iterrows()
    ]  # fmt: skip
    what = {Task.single: "right", Task.multi: "all labels right", Task.regression: "mean error"}
    columns = {"group": False, "images": True, what[run.task]: True, "between": True}
    text = (
        f"The worst first, of {len(table):,}. The intervals hold for all groups together, as the "
        "worst of many is bad by chance, too."
    )
    return Part("groups", "groups", [text], [Block("table", {"columns": columns, "rows": rows})],
                [GROUPS])  # fmt: skip


def group_table(run: RunFiles) -> pd.DataFrame | None:
    """Rows of `groups.csv` for the split that speaks for the model, the worst first; or None."""
    if not run.has(GROUPS):
        return None
    table = run.csv(GROUPS)
    table = table[table["split"] == run.split]
    table = table.assign(small=table["small"].astype(str) == "True")
    rising = run.task is not Task.regression
    table = table.sort_values("value", ascending=rising, kind="stable")
    return table.reset_index(drop=True) if len(table) else None


def bins(run: RunFiles) -> list[dict[str, float]]:
    """How often the model is right by how sure it is: `sure`, `right`, `low`, `high`, `images`.

    From `calibration.json`: those of val with temperatures that were fitted without the image. A
    run of an earlier version has no such file: from its predictions. With several labels each label
    of each image counts: how often it is present.
    """
    known = run.json(CALIBRATION).get("splits", {}).get(run.split)
    found = _binned(run.judged[run.split]) if known is None else known["bins"]
    rows = []
    for each in found:
        count = int(each["images"])
        low, high = accuracy_interval(round(each["accuracy"] * count), count)
        rows.append({"sure": each["confidence"], "right": each["accuracy"], "low": low,
                     "high": high, "images": count})  # fmt: skip
    return rows


def _binned(judged: Judged) -> list[dict[str, float]]:
    sure, right = judged.outputs.max(axis=1), judged.outputs.argmax(axis=1) == judged.truth
    if judged.task is Task.multi:
        sure, right = judged.outputs.ravel(), judged.truth.ravel()
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    table = pd.DataFrame({"place": place, "confidence": sure, "accuracy": right.astype(float)})
    found = table.groupby("place").mean().assign(images=table.groupby("place").size())
    return [{str(k): float(v) for k, v in row.items()} for _, row in found.iterrows()]


def calibration(run: RunFiles) -> Part | None:
    """Whether the probabilities can be taken at their word; None for numbers."""
    if run.task is Task.regression:
        return None
    what = "labels" if run.task is Task.multi else "images"
    unit = "label is present" if run.task is Task.multi else "model is right"
    found = bins(run)
    text = (
        f"Among the {what} of which the model is so sure (from left to right) the {unit} so often "
        "(from bottom to top). On the line both are the same; below it the model is too sure. "
        "The lines are 95 % intervals."
    )
    rows = [
        [share(b["sure"]), f"{share(b['right'])} ({share(b['low'])} to {share(b['high'])})",
         f"{int(b['images']):,}"] for b in found
    ]  # fmt: skip
    right = "present" if run.task is Task.multi else "right"
    columns = {"sure": False, right: True, what: True}
    blocks = [
        Block("reliability", {"bins": found, "most": max(b["images"] for b in found)}),
        Block("table", {"columns": columns, "rows": rows}),
    ]
    texts = [text, *_temperature(run), *_abstaining(run)]
    files = [CALIBRATION] if run.has(CALIBRATION) else [PREDICTIONS]
    return Part("calibration", "how sure, how right", texts, blocks, files)


def _temperature(run: RunFiles) -> Iterator[str]:
    known = run.json(CALIBRATION)
    if known and known["temperature"] == 1:
        yield f"Its probabilities are as the network gives them; a temperature: {known['note']}."
    elif known:
        yield (
            f"Its scores are divided by a temperature of {known['temperature']:.3g} before they "
            f"become probabilities ({known['note']})."
        )


def _abstaining(run: RunFiles) -> Iterator[str]:
    """What it is worth where it is sure, on the split that speaks for it."""
    abstain = run.json(CALIBRATION).get("abstain")
    if not abstain:
        return
    if abstain["threshold"] is None:
        yield f"When it is sure cannot be told: {abstain['note']}."
        return
    m, split = run.metrics, run.split
    yield f"It counts as sure from a score of {abstain['threshold']:.3f} on: {abstain['note']}."
    text = f"Of the {WORDS[split]} images these are {share(m[f'{split}/sure_share'])}"
    if f"{split}/sure_acc" in m:
        low, high = (share(m[f"{split}/sure_acc_{end}"]) for end in ("low", "high"))
        text += f", and of these {share(m[f'{split}/sure_acc'])} are right ({low} to {high})"
    yield text + "."


def sureness(run: RunFiles) -> tuple[str, float, float]:
    """How sure the model is against how right it is.

    Returns:
        In words; the difference of the means, 0 where it is within twice the standard error of the
        share that is right; and the mean of how sure it is.
    """
    found = bins(run)
    count = np.array([b["images"] for b in found], float)
    sure = float((count * [b["sure"] for b in found]).sum() / count.sum())
    right = float((count * [b["right"] for b in found]).sum() / count.sum())
    gap, images_ = sure - right, count.sum()
    error = float(np.sqrt(max(right * (1 - right), 1 / images_) / images_))
    if abs(gap) <= 2 * error:
        return "as sure as it is right", 0.0, sure
    points = f"{100 * abs(gap):.0f} points"
    return (f"too sure, by {points}" if gap > 0 else f"not sure enough, by {points}"), gap, sure


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
