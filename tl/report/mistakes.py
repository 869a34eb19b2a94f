"""Images that deserve a look: labels that seem wrong, and where the model is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score

from tl.config import Task
from tl.pages import thumbnails
from tl.report.files import PREDICTIONS, Judged, RunFiles
from tl.report.parts import WORDS, Block, Part, first_up, images

MOST_SUSPECTS = 12
MOST_MISTAKES = 24
AGREES = 0.9  # share of the labels of which it is as sure that a model must agree with
NEIGHBOURS = 40  # images of which it is about as sure
KNOWN = 0.8  # average precision of a label from which the model knows it well enough to be asked
OUTLYING = 5.0  # robust standard deviations of the errors beyond which a number looks wrong
TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Suspect:
    """An image whose label the model contradicts.

    Args:
        judged: Of its split.
        row: In `judged.rows`.
        words: What it is labelled, and what the model says.
        margin: How sure the model is of its own answer more than of the label; the more, the more
            suspect.
    """

    judged: Judged
    row: int
    words: tuple[str, str]
    margin: float


def suspects(run: RunFiles) -> list[Suspect]:
    """Labels of val and test that look wrong, the surest first.

    Where the model, which was not trained on these images, is sure of another answer: so sure that
    it agrees with `AGREES` of the labels of which it is about as sure. A weak model is so asked
    about little. Several labels: the same for each label that it knows (`KNOWN`). Numbers: errors
    far beyond the others'.

    Of 1,150 digits with 28 wrong labels a network that is right on 75 % names 21, 7 of them wrong.
    Confident learning alone (Northcutt, Jiang, Chuang, JAIR 70, 2021), which compares with the mean
    of each class, names 96, 15 of them wrong; and of a model that is about as sure of all images
    of a class it misses half, as half of them are below its mean.
    """
    find = {Task.single: _of_classes, Task.multi: _of_labels, Task.regression: _of_numbers}
    found = [s for judged in run.judged.values() for s in find[run.task](judged)]
    return sorted(found, key=lambda s: -s.margin)


def _of_classes(judged: Judged) -> list[Suspect]:
    p, y, names = judged.outputs, judged.truth, judged.classes
    said, sure = p.argmax(axis=1), p.max(axis=1)
    return [
        Suspect(
            judged,
            i,
            (f"labelled {names[y[i]]}", f"model: {names[said[i]]}, {sure[i]:.0%} sure"),
            float(sure[i] - p[i, y[i]]),
        )
        for i in contradicted(sure, said == y)
    ]


def contradicted(sure: NDArray[np.float64], agrees: NDArray[np.bool_]) -> list[int]:
    """Places where a model does not agree, but does with `AGREES` of what it is about as sure of.

    Args:
        sure: Probability of what it says, (N,).
        agrees: Whether that is the label, (N,).
    """
    if agrees.all():
        return []
    order = np.argsort(sure, kind="stable")
    ranked = agrees[order].astype(np.float64)
    size = min(NEIGHBOURS, len(ranked))
    shares = np.convolve(ranked, np.full(size, 1 / size), "valid")  # of each run of so many
    middle = np.clip(np.arange(len(ranked)) - size // 2, 0, len(shares) - 1)
    found: list[int] = np.sort(order[(ranked == 0) & (shares[middle] >= AGREES - 1e-9)]).tolist()
    return found


def _of_labels(judged: Judged) -> list[Suspect]:
    best: dict[int, Suspect] = {}  # an image is shown once
    for k, name in enumerate(judged.classes):
        own, p = judged.truth[:, k], judged.outputs[:, k]
        if not own.any() or average_precision_score(own, p) < KNOWN:
            continue
        sure = np.maximum(p, 1 - p)
        for i in contradicted(sure, (p >= 0.5) == own):
            is_, seems = ("labelled", "is not there") if own[i] else ("not labelled", "is there")
            words = (f"{is_} {name}", f"model: {name} {seems}, {sure[i]:.0%} sure")
            suspect = Suspect(judged, i, words, float(2 * sure[i] - 1))
            if i not in best or best[i].margin < suspect.margin:
                best[i] = suspect
    return [*best.values()]


def _of_numbers(judged: Judged) -> list[Suspect]:
    error = judged.outputs - judged.truth
    middle = float(np.median(error))
    spread = 1.4826 * float(np.median(np.abs(error - middle)))
    if spread <= 0:
        return []
    far = np.abs(error - middle) / spread

    def words(i: int) -> tuple[str, str]:
        return f"labelled {judged.truth[i]:.4g}", f"model: {judged.outputs[i]:.4g}"

    places = np.flatnonzero(far > OUTLYING).tolist()
    return [Suspect(judged, i, words(i), float(far[i])) for i in places]


def losses(judged: Judged) -> NDArray[np.float64]:
    """How wrong the model is on each image: -log p in nats, their sum over labels, or |error|."""
    p, y = judged.outputs, judged.truth
    found: NDArray[np.float64]
    if judged.task is Task.regression:
        found = np.abs(p - y)
    elif judged.task is Task.single:
        found = -np.log(np.maximum(p[np.arange(len(y)), y], TINY))
    else:
        found = -np.log(np.maximum(np.where(y, p, 1 - p), TINY)).sum(axis=1)
    return found


def mistakes(run: RunFiles, shown: Sequence[Suspect]) -> list[tuple[Judged, int]]:
    """Images on which the model is wrong, the most wrong first; without those shown as suspects."""
    known = {(s.judged.split, s.row) for s in shown}
    found = []
    for judged in run.judged.values():
        loss = losses(judged)
        wrong = np.ones(len(judged), bool)
        if judged.task is not Task.regression:
            wrong = ~judged.rows["correct"].to_numpy(bool)
        places = np.flatnonzero(wrong)
        top = places[np.argsort(-loss[places], kind="stable")][: MOST_MISTAKES + len(shown)]
        found += [
            (float(loss[i]), judged, int(i)) for i in top if (judged.split, int(i)) not in known
        ]
    ranked = sorted(found, key=lambda each: -each[0])
    return [(judged, row) for _, judged, row in ranked[:MOST_MISTAKES]]


def part(run: RunFiles) -> Part:
    """Both, with small pictures where the images are at hand."""
    doubtful = suspects(run)
    shown = doubtful[:MOST_SUSPECTS]
    wrong = mistakes(run, shown)
    pictures = _pictures(run, [(s.judged, s.row) for s in shown] + wrong)
    blocks = []
    if shown:
        cards = [_card(s.judged, s.row, s.words, pictures) | {"label": s.words[0]} for s in shown]
        left = len(doubtful) - len(shown)
        note = f"And {images(left)} more." if left else ""
        blocks.append(Block("cards", cards, "labels that may be wrong", note))
    if wrong:
        cards = [_card(j, i, _words(j, i), pictures) for j, i in wrong]
        title = f"{'other ' if shown else ''}mistakes, the worst first"
        if run.task is Task.regression:
            title = "largest errors"
        blocks.append(Block("cards", cards, title))
    texts = [_summary(run)]
    if shown:
        texts.append(_why(run))
    if run.table is None:
        texts.append("The images are not at hand, so no small pictures: names only.")
    if "test" in run.judged:
        texts.append(
            "Correct test labels where they are wrong, but choose no settings by these images."
        )
    return Part("images", "images to look at", texts, blocks, [PREDICTIONS])


def _why(run: RunFiles) -> str:
    if run.task is Task.regression:
        return "A number may be wrong where the model's error is far beyond its others: look."
    return (
        "A label may be wrong where the model, which was not trained on these images, is sure of "
        f"another answer: so sure that it agrees with {AGREES:.0%} of the labels of which it is "
        "about as sure. Either the label is wrong, or the model: look."
    )


def _summary(run: RunFiles) -> str:
    said = []
    for judged in reversed([*run.judged.values()]):
        of = WORDS[judged.split]
        if judged.task is Task.regression:
            error = np.abs(judged.outputs - judged.truth)
            half, most = np.quantile(error, [0.5, 0.9])
            said.append(
                f"half of the {images(len(judged), of)} are off by less than {half:.3g}, nine of "
                f"ten by less than {most:.3g}"
            )
        else:
            wrong = int((~judged.rows["correct"].to_numpy(bool)).sum())
            what = "have a wrong or missing label" if judged.task is Task.multi else "are wrong"
            said.append(f"{wrong:,} of {images(len(judged), of)} {what}")
    return first_up("; ".join(said)) + "."


def _words(judged: Judged, row: int) -> tuple[str, ...]:
    said = judged.rows.iloc[row]
    if judged.task is Task.regression:
        return (f"true {said['target']:.4g}", f"model: {said['predicted']:.4g}",
                f"off by {said['error']:+.4g}")  # fmt: skip
    if judged.task is Task.single:
        own = judged.outputs[row, judged.truth[row]]
        return (str(said["label"]), f"model: {said['predicted']}, {said['score']:.0%} sure",
                f"gives {said['label']} {own:.0%}")  # fmt: skip
    labels, answer = {*said["labels"]}, {*said["predicted"]}
    place = {name: index for index, name in enumerate(judged.classes)}

    def named(found: set[str]) -> str:
        return ", ".join(f"{n} {judged.outputs[row, place[n]]:.0%}" for n in sorted(found))

    missing, more = named(labels - answer), named(answer - labels)
    truth = ", ".join(sorted(labels)) or "no label"
    return truth, missing and f"not found: {missing}", more and f"too many: {more}"


def _card(
    judged: Judged, row: int, words: Sequence[str], pictures: dict[tuple[str, int], str]
) -> dict[str, Any]:
    return {
        "label": words[0],
        "lines": [*words[1:], WORDS[judged.split]],
        "picture": pictures.get((judged.split, row), ""),
        "begins": False,
        "out": "",
        "path": str(judged.rows["path"].iloc[row]),
    }


def _pictures(run: RunFiles, wanted: Sequence[tuple[Judged, int]]) -> dict[tuple[str, int], str]:
    """Small pictures of the images whose contents are still those that were judged."""
    if run.table is None or not wanted:
        return {}
    rows = run.table.rows
    asked = pd.DataFrame(
        {
            "path": [str(judged.rows["path"].iloc[row]) for judged, row in wanted],
            "sha256": [str(judged.rows.get("sha256", pd.Series([""] * len(judged))).iloc[row])
                       for judged, row in wanted],
        }
    )  # fmt: skip
    index = pd.Index(rows["path"].astype(str)).get_indexer(pd.Index(asked["path"]))
    found: dict[tuple[str, int], str] = {}
    there = [
        n
        for n, i in enumerate(index)
        if i >= 0 and asked["sha256"][n] in ("", rows["sha256"].iloc[i])
    ]
    made = thumbnails(run.table.images(rows.iloc[index[there]]))
    for n, picture in zip(there, made, strict=True):
        judged, row = wanted[n]
        found[judged.split, row] = picture
    return found
