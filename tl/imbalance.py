"""Classes of very different sizes: what to do about them in training, chosen by the counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tl.config import ConfigError, Imbalance, Task

GAMMA = 2.0  # of the focal loss: Lin et al. 2017 (arXiv:1708.02002), section 5.1
# How many times as many images the largest class must have for `auto` to do something. By
# measurement (docs/tasks.md): at 2 nothing is gained, from 5 on 6 to 17 points on even classes.
RATIO = 5.0

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Balance:
    """How training treats classes of different sizes.

    Args:
        method: What is done; never `auto`.
        why: One sentence with the counts.
        positive: Weight of an image in the loss where it has the class (classes,); one class an
            image: their mean over the training images is 1.
        negative: Several labels: weight where it lacks the class (classes,).
        shift: Added to the logits in training only (classes,).
        gamma: Exponent of the focal loss; 0: none.
        draws: Weight by which each training image is drawn in an epoch, (images,).
    """

    method: Imbalance = Imbalance.none
    why: str = ""
    positive: Array | None = None
    negative: Array | None = None
    shift: Array | None = None
    gamma: float = 0.0
    draws: Array | None = None


def choose_balance(
    asked: Imbalance, task: Task, targets: NDArray[np.generic], classes: Sequence[str]
) -> Balance:
    """Resolve `imbalance=...` for the training images.

    `weights`: all classes weigh the same in the loss (each label: images with it as much as images
    without). `sampler`: an epoch draws as many images of each class. `focal`: images that are told
    well count less. `logit_adjustment`: log of the share of each class is added to the logits in
    training, so that the network without it tells classes as if they were equally frequent (Menon
    et al. 2021, arXiv:2007.07314).

    Args:
        asked: Setting. `auto`: logit adjustment where the largest class has at least `RATIO` times
            as many images as the smallest; with several labels nothing, as each has a threshold of
            its own.
        task: What is predicted.
        targets: Of train, as `ImageTable.targets` gives them.
        classes: Names.

    Raises:
        ConfigError: A number is predicted, which has no classes.
    """
    if task is Task.regression:
        if asked in {Imbalance.auto, Imbalance.none}:
            return Balance(why="a number has no classes")
        msg = (
            f"imbalance={asked.value} is about classes, and this task predicts a number "
            "(data.task=regression); leave imbalance=auto"
        )
        raise ConfigError(msg)
    if task is Task.multi:
        return _of_labels(asked, np.asarray(targets) > 0)
    labels = np.asarray(targets, np.int64)
    counts = np.bincount(labels, minlength=len(classes)).astype(np.float64)
    method, why = asked, _sizes(counts, classes)
    if asked is Imbalance.auto:
        present = counts[counts > 0]
        uneven = len(present) > 1 and present.max() >= RATIO * present.min()
        method = Imbalance.logit_adjustment if uneven else Imbalance.none
        why += f"; at {RATIO:g} times and above imbalance=auto adjusts the logits"
    each = np.where(counts > 0, len(labels) / (counts > 0).sum() / np.maximum(counts, 1), 0.0)
    return Balance(
        method,
        why,
        positive=each if method is Imbalance.weights else None,
        shift=np.log(np.maximum(counts, 1) / len(labels))
        if method is Imbalance.logit_adjustment
        else None,
        gamma=GAMMA if method is Imbalance.focal else 0.0,
        draws=each[labels] if method is Imbalance.sampler else None,
    )


def _sizes(counts: Array, classes: Sequence[str]) -> str:
    present = np.flatnonzero(counts)
    if len(present) < 2:
        return "there is one class only"
    largest, smallest = (int(present[f(counts[present])]) for f in (np.argmax, np.argmin))
    return (
        f"the largest class, {classes[largest]}, has {counts[largest] / counts[smallest]:.1f} "
        f"times as many training images as the smallest, {classes[smallest]} "
        f"({counts[largest]:,.0f} and {counts[smallest]:,.0f})"
    )


def _of_labels(asked: Imbalance, marks: NDArray[np.bool_]) -> Balance:
    """Several labels: each is a task of two classes, with and without."""
    images = len(marks)
    having = marks.sum(axis=0).astype(np.float64)
    method = Imbalance.none if asked is Imbalance.auto else asked
    why = (
        f"a label is on {having.min() / images:.1%} to {having.max() / images:.1%} of the training "
        "images"
    )
    if asked is Imbalance.auto:
        why += "; each has a threshold of its own, so imbalance=auto changes nothing"
    share = np.clip(having, 1, images - 1) / images if images > 1 else np.full_like(having, 0.5)
    weighted = method is Imbalance.weights
    draws = None
    if method is Imbalance.sampler:
        # By the rarest label of an image; those without a label are one more class.
        rarity = np.where(marks, 1 / np.maximum(having, 1), 0.0).max(axis=1)
        bare = ~marks.any(axis=1)
        draws = np.where(bare, 1 / max(int(bare.sum()), 1), rarity)
    return Balance(
        method,
        why,
        positive=0.5 / share if weighted else None,
        negative=0.5 / (1 - share) if weighted else None,
        shift=np.log(share / (1 - share)) if method is Imbalance.logit_adjustment else None,
        gamma=GAMMA if method is Imbalance.focal else 0.0,
        draws=draws,
    )
