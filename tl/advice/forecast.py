"""What more images would bring: a power law through the quality on half and on all images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tl.decision.evidence import Amount, Evidence, Score

STEP = 1e-4  # of numeric derivatives, in quality
BEST = 1.0 - 1e-6


@dataclass(frozen=True)
class Curve:
    """The error of the probe as a power law of the number of images.

    As in Hestness et al. 2017, "Deep learning scaling is predictable, empirically"
    (arXiv:1712.00409), without an error that no amount of data removes: two points tell no more.

    Args:
        images: Training images now.
        quality: Of the probe on all of them, in [0, 1], 0 is chance.
        more_data: That minus its quality on half of them.
    """

    images: int
    quality: Score
    more_data: Score

    def at(self, images: float) -> Score:
        """Quality expected with so many images."""
        gain = self._gain(images / self.images)
        value = self.quality.value + gain(self.quality.value, self.more_data.value)
        error = math.hypot(self.quality.error, self.gain(images).error)
        return Score(value, error if images > self.images else self.quality.error)

    def gain(self, images: float) -> Score:
        """Quality that so many images add; the errors of both figures are carried through."""
        gain = self._gain(images / self.images)
        q, d = self.quality, self.more_data
        value = gain(q.value, d.value)
        by_quality = (gain(q.value + STEP, d.value) - gain(q.value - STEP, d.value)) / (2 * STEP)
        by_more = (gain(q.value, d.value + STEP) - gain(q.value, d.value - STEP)) / (2 * STEP)
        return Score(value, math.hypot(by_quality * q.error, by_more * d.error))

    def _gain(self, ratio: float) -> Callable[[float, float], float]:
        def gain(quality: float, more_data: float) -> float:
            # error(n) = error(1) * n^-b, and b follows from the error on half of the images.
            error = max(1.0 - quality, 1.0 - BEST)
            power = math.log2(max(error + more_data, 1.0 - BEST) / error)
            return error * (1.0 - math.pow(ratio, -power))

        return gain


def curve(evidence: Evidence) -> Curve | None:
    """The learning curve; None where it was not measured."""
    found, more = evidence.similarity, evidence.amount.more_data
    if found is None or more is None:
        return None
    return Curve(evidence.amount.images, found.quality, more)


def sentence(evidence: Evidence) -> str:
    """What more images would bring, as far as it can be told."""
    amount, line = evidence.amount, curve(evidence)
    if line is None:
        return "More images: what they would bring cannot be told; half of these is too few to try."
    whole = 100 * (1 - 1 / max(amount.classes, 2))  # points of balanced accuracy
    more = step_of(amount.images)
    gain = line.gain(amount.images + more)
    low, high = (whole * end for end in gain.interval())
    most = whole * (1 - line.quality.value)
    high = min(high, most)
    if line.more_data.interval()[0] > 0:
        return (
            f"{more:,} more images: about {whole * gain.value:+.1f} points of accuracy for a "
            f"linear classifier ({max(low, 0):.1f} to {high:.1f}), if it goes on as from half of "
            f"the images to all of them ({_measured(amount, whole)})."
        )
    if high < 1.0:
        return (
            f"More images: {more:,} more would add at most {max(high, 0):.1f} points for a linear "
            f"classifier; from half of the images to all of them it gained "
            f"{_measured(amount, whole)}."
        )
    return (
        f"More images: how much they would add cannot be told; from half of the images to all of "
        f"them a linear classifier gained {_measured(amount, whole)}, which may be chance."
    )


def step_of(images: int) -> int:
    """A round number of images to add, between a fifth and a half of what there is.

    Example:
        >>> [step_of(n) for n in (20, 244, 1600, 30000)]
        [10, 100, 500, 10000]
    """
    scale = 10 ** int(math.log10(max(images, 1)))
    half = images / 2
    return max((scale * s // 10 for s in (1, 2, 5, 10) if scale * s / 10 <= half), default=1)


def _measured(amount: Amount, whole: float) -> str:
    assert amount.more_data is not None
    low, high = (whole * end for end in amount.more_data.interval())
    return f"{whole * amount.more_data.value:+.1f} points, {low:+.1f} to {high:+.1f}"
