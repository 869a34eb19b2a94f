"""What more images would bring: a power law through the quality on parts and on all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from tl.decision.evidence import Amount, Evidence, Score

STEP = 1e-4  # of numeric derivatives, in quality
BEST = 1.0 - 1e-6
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
AGREE = 2  # standard errors within which two doublings follow one power


@dataclass(frozen=True)
class Curve:
    """The error of the probe as a power law of the number of images.

    As in Hestness et al. 2017, "Deep learning scaling is predictable, empirically"
    (arXiv:1712.00409), without an error that no amount of data removes: so few points tell no more.
    It goes through all images; its power is that of the last doubling, or, where the doubling
    before agrees with it, a mean of both powers, that with the least error.

    Args:
        images: Training images now.
        quality: Of the probe on all of them, in [0, 1], 0 is chance.
        more_data: That minus its quality on half of them.
        half_data: Its quality on half of them minus that on a quarter, where it was tried.
    """

    images: int
    quality: Score
    more_data: Score
    half_data: Score | None = None

    @property
    def share(self) -> float:
        """Weight of the doubling before the last one in the power; 0 where they disagree."""
        if self.half_data is None:
            return 0.0

        def apart(*figures: float) -> float:
            now, before = _powers(*figures)
            return now - before

        if abs(apart(*self._values)) > AGREE * self._error(apart):
            return 0.0
        return min(SHARES, key=lambda share: self._error(_gain(2.0, share)))

    def at(self, images: float) -> Score:
        """Quality expected with so many images."""
        gain = self.gain(images)
        error = math.hypot(self.quality.error, gain.error)
        value = self.quality.value + gain.value
        return Score(value, error if images > self.images else self.quality.error)

    def gain(self, images: float) -> Score:
        """Quality that so many images add; the errors of all figures are carried through."""
        gain = _gain(images / self.images, self.share)
        return Score(gain(*self._values), self._error(gain))

    @property
    def _figures(self) -> tuple[Score, Score, Score]:
        return self.quality, self.more_data, self.half_data or Score(0.0, 0.0)

    @property
    def _values(self) -> list[float]:
        return [figure.value for figure in self._figures]

    def _error(self, function: Callable[..., float]) -> float:
        """Standard error of a function of the three figures, from its slopes."""
        parts = []
        for place, figure in enumerate(self._figures):
            up, down = self._values, self._values
            up[place] += STEP
            down[place] -= STEP
            parts.append((function(*up) - function(*down)) / (2 * STEP) * figure.error)
        return math.hypot(*parts)


def _powers(quality: float, more_data: float, half_data: float) -> tuple[float, float]:
    """Powers of the last doubling and of the one before: error(2 n) = error(n) * 2^-power."""
    least = 1.0 - BEST
    whole = max(1.0 - quality, least)
    half = max(whole + more_data, least)
    quarter = max(half + half_data, least)
    return math.log2(half / whole), math.log2(quarter / half)


def _gain(ratio: float, share: float) -> Callable[[float, float, float], float]:
    """Quality that so many times the images add, from quality and the gains of two doublings."""

    def gain(quality: float, more_data: float, half_data: float) -> float:
        now, before = _powers(quality, more_data, half_data)
        power = (1 - share) * now + share * before
        return max(1.0 - quality, 1.0 - BEST) * (1.0 - math.pow(ratio, -power))

    return gain


def curve(evidence: Evidence) -> Curve | None:
    """The learning curve; None where it was not measured."""
    found, more = evidence.similarity, evidence.amount.more_data
    if found is None or more is None:
        return None
    return Curve(evidence.amount.images, found.quality, more, evidence.amount.half_data)


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
            f"the images to all of them ({_measured(amount, whole)}){_before(line, whole)}."
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


def _before(line: Curve, whole: float) -> str:
    """What the doubling before the last one brought, and whether the forecast rests on it, too."""
    if line.half_data is None:
        return ""
    gain = f"{whole * line.half_data.value:+.1f}"
    agrees = "which agrees" if line.share else "which does not fit one curve with it: be careful"
    return f"; from a quarter to half it brought {gain}, {agrees}"


def _measured(amount: Amount, whole: float) -> str:
    assert amount.more_data is not None
    low, high = (whole * end for end in amount.more_data.interval())
    return f"{whole * amount.more_data.value:+.1f} points, {low:+.1f} to {high:+.1f}"
