"""From pooled features and labels to evidence."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp
from threadpoolctl import threadpool_limits

from tl.cores import usable_cores
from tl.decision.evidence import Amount, Backbone, Evidence, Flips, Score, Similarity, StageScore
from tl.evidence.probing import LEAST_ROWS, Judged, Prober
from tl.evidence.ridge import Indices
from tl.evidence.scores import effective_rank, leep, rank_scores

FEATURES = "features"  # what the head reads
SAMPLE = 2_000  # images that are measured
LEAST_OF_CLASS = 5  # rather fewer classes than fewer images of each
TELLING = 5  # images of each class that must show some signal, if there is any
FLIPPED = 256

Rows = NDArray[np.floating]


class Drift(NamedTuple):
    """Distance between the channel statistics of images and those of the pretraining.

    Args:
        value: As in `tl.decision.evidence.Similarity`, like its error and what chance gives.
        error: Standard error.
        floor: What so many images of the pretraining would have.
    """

    value: float
    error: float
    floor: float


@dataclass(frozen=True)
class StageFeatures:
    """What one pass over a sample of train gave; rows of all arrays belong together.

    Args:
        labels: (N,), class indices.
        stages: Name of the stage -> pooled features (N, channels), from the stem upwards.
        features: What the head reads, (N, D).
        flipped: `horizontal` and `vertical` -> features of the first rows, flipped.
        logits: Of the pretraining's own head (N, classes of the pretraining), where it is at hand.
        drift: Of the statistics of BatchNorm.
    """

    labels: Indices
    stages: Mapping[str, Rows]
    features: Rows
    flipped: Mapping[str, Rows] = field(default_factory=dict)
    logits: Rows | None = None
    drift: Drift | None = None


def sample(labels: Indices, seed: int, most: int = SAMPLE) -> Indices:
    """Rows to measure, in a random order: all of small classes, and as many of each large one.

    Where that left fewer than `LEAST_OF_CLASS` images a class, some classes are left out instead:
    two images of each of a thousand classes would say little about any.

    Args:
        labels: (N,), class indices.
        seed: Of the choice.
        most: Rows.
    """
    rng = np.random.default_rng([seed, len(labels)])
    counts = np.bincount(labels)
    classes = rng.permutation(np.flatnonzero(counts))
    needs = np.cumsum(np.minimum(counts[classes], LEAST_OF_CLASS))
    classes = classes[: max(int((needs <= most).sum()), 2)]
    each = most
    while np.minimum(counts[classes], each).sum() > most and each > 1:
        each -= max(1, int((np.minimum(counts[classes], each).sum() - most) / len(classes) / 2))
    rows = [rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes]
    return rng.permutation(np.concatenate(rows))


def measure(
    found: StageFeatures, amount: Amount, backbone: Backbone, *, seed: int, native_side: float = 0.0
) -> Evidence:
    """Evidence from features: probes, differences, scores, and what is odd with the data.

    Args:
        found: Features of a sample of train.
        amount: Sizes; what only features tell is filled in.
        backbone: The network.
        seed: Of folds and permutations.
        native_side: Median side of the images in pixels.
    """
    clock, warnings = _Clock(), []
    kept = np.bincount(found.labels)[found.labels] >= LEAST_ROWS
    alone = len(np.unique(found.labels[~kept]))
    evidence = Evidence(amount, backbone, native_side=native_side)
    if alone:
        warnings.append(
            f"{alone} of {len(np.unique(found.labels))} classes have one image only: nothing can "
            "be measured of them"
        )
    if len(np.unique(found.labels[kept])) < 2:
        reason = "fewer than two classes have two different images"
        return replace(evidence, unmeasured=reason, warnings=tuple(warnings))
    _, labels = np.unique(found.labels[kept], return_inverse=True)
    groups = {name: rows[kept] for name, rows in {**found.stages, FEATURES: found.features}.items()}
    if not all(np.isfinite(rows).all() for rows in groups.values()):
        reason = "the backbone's features of these images are not finite"
        return replace(evidence, unmeasured=reason, warnings=tuple(warnings))
    if not np.ptp(groups[FEATURES], axis=0).any():
        reason = "the backbone sees no difference between any two images"
        return replace(evidence, unmeasured=reason, warnings=tuple(warnings))

    with _cores() as pool:
        prober = Prober(groups, labels, seed, pool.map)
        with clock("probes"):
            scores = pool.submit(_scores, groups[FEATURES], found.logits, kept, labels)
            similarity, judged = _similarity(prober, found, pool)
            known = scores.result()
        with clock("more data and flips"):
            flips = pool.submit(_flips, prober, found, judged, np.flatnonzero(kept))
            rank = pool.submit(lambda: effective_rank(prober.smoothers[FEATURES].eigenvalues))
            more, before = prober.more_data(FEATURES, judged)
    if similarity.chance > 0.05 and len(labels) >= TELLING * (labels.max() + 1):
        warnings.append(
            f"no signal: {similarity.chance:.0%} of random labels fit these images as well as the "
            "true ones: check the labels"
        )
    return replace(
        evidence,
        amount=replace(amount, more_data=more, half_data=before, effective_rank=rank.result()),
        similarity=similarity,
        flips=flips.result(),
        scores=known,
        seconds=clock.seconds,
        sampled=len(labels),
        warnings=tuple(warnings),
    )


@contextmanager
def _cores() -> Iterator[ThreadPoolExecutor]:
    """A thread for each core, on which numpy and scipy work alone.

    Each of the two brings a library for its algebra along, and the threads of the one, which wait
    awake for more work, would slow down those of the other.
    """
    with threadpool_limits(1), ThreadPoolExecutor(usable_cores()) as pool:
        yield pool


def _scores(
    features: Rows, logits: Rows | None, kept: NDArray[np.bool_], labels: Indices
) -> dict[str, float]:
    scores = rank_scores(features, labels)
    return scores if logits is None else {**scores, "leep": leep(logits[kept], labels)}


def _similarity(
    prober: Prober, found: StageFeatures, pool: ThreadPoolExecutor
) -> tuple[Similarity, Judged]:
    names = [*prober.groups]
    # What takes longest comes first: all stages together, then the last of them.
    together = pool.submit(prober.ridge, names) if found.stages else None
    alone = {name: pool.submit(prober.ridge, [name]) for name in reversed(names)}
    near = {name: pool.submit(prober.neighbours, name) for name in names}
    chance = pool.submit(prober.chance, names).result()
    judged = {name: alone[name].result() for name in names}
    concat = together.result() if together else judged[FEATURES]
    last, none = judged[FEATURES], Score(0.0, 0.0)
    energy = None
    if found.logits is not None:
        energies = logsumexp(found.logits.astype(np.float64), axis=1)
        error = energies.std(ddof=1) / np.sqrt(len(energies))
        energy = Score(float(energies.mean()), float(error))
    drift, drift_error, drift_floor = found.drift or (None, None, None)
    similarity = Similarity(
        stages=tuple(
            StageScore(name, rows.shape[1], judged[name].quality, near[name].result().quality)
            for name, rows in prober.groups.items()
        ),
        concat=concat.quality,
        depth_gap=prober.depth_gap(judged, FEATURES) if found.stages else none,
        concat_gain=concat.minus(last) if found.stages else none,
        drift=drift,
        drift_error=drift_error,
        drift_floor=drift_floor,
        source_energy=energy,
        chance=chance,
    )
    return similarity, last


def _flips(prober: Prober, found: StageFeatures, judged: Judged, kept: Indices) -> Flips:
    """Rows of the sample that were flipped and are judged, by their place among those judged."""
    number = min((len(rows) for rows in found.flipped.values()), default=0)
    rows = np.flatnonzero(kept < number)
    if not found.flipped or len(np.unique(prober.labels[rows])) < 2:
        return Flips()
    features = [values[kept[rows]] for values in found.flipped.values()]
    scores = prober.flips(FEATURES, judged.penalties, rows, features)
    return Flips(**dict(zip(found.flipped, scores, strict=True)))


class _Clock:
    """Seconds of named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[part] = round(time.perf_counter() - began, 3)
