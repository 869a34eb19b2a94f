"""The two axes of the table, read from the evidence: how much data, how similar the images."""

from __future__ import annotations

from dataclasses import dataclass

from tl.decision.evidence import Amount, Evidence, Score, Similarity
from tl.decision.thresholds import DIFFERENT, SIMILAR, TIERS, UNKNOWN, Thresholds


@dataclass(frozen=True)
class Axes:
    """Place of a data set in the table.

    Args:
        amount: Tier.
        similarity: `similar`, `different` or `unknown`.
        signal: Whether the labels say anything about the images that the probe can find; True
            where that cannot be told.
        enough: Next to nothing is left to gain.
        mixed: Different by the statistics of the pixels alone; the probe sees nothing odd.
        fired: What made it different: `quality`, `depth_gap`, `concat_gain`, `drift`.
        why: Sentences with the numbers behind `similarity`.
    """

    amount: str
    similarity: str
    signal: bool = True
    enough: bool = False
    mixed: bool = False
    fired: tuple[str, ...] = ()
    why: tuple[str, ...] = ()


def read(evidence: Evidence, thresholds: Thresholds, *, amount: str | None = None) -> Axes:
    """Both axes as measured.

    Args:
        evidence: What was measured.
        thresholds: Boundaries.
        amount: Tier that the user forced; some rules ask for it.
    """
    tier = amount or tier_of(evidence.amount, thresholds)
    found = evidence.similarity
    if found is None or not evidence.backbone.pretrained:
        why = evidence.unmeasured or "the network has random weights"
        return Axes(tier, UNKNOWN, why=(f"similarity was not measured: {why.rstrip('.')}",))
    signal = found.chance <= thresholds.chance or evidence.amount.images < thresholds.chance_images
    similarity, fired, why_ = _similarity(found, evidence.amount.images, tier, thresholds)
    return Axes(
        tier,
        similarity,
        signal=signal,
        enough=_enough(found.quality, thresholds),
        mixed=fired == ("drift",),
        fired=fired,
        why=why_,
    )


def tier_of(amount: Amount, thresholds: Thresholds) -> str:
    """Tier of an amount: by the median of the images a class, and by all images where few."""
    by_class = sum(amount.per_class >= bound for bound in thresholds.bounds())
    by_all = [amount.images >= least for least in thresholds.images()]
    return TIERS[min(by_class, [*by_all, False].index(False))]


def foreign(found: Similarity, threshold: float, errors: float, images: int) -> bool:
    """Whether the channel statistics are far from the pretraining's, beyond chance and errors.

    The error itself is known badly where a few images tell it, so their number widens it as in
    Student's distribution, by the first term of its expansion (Fisher 1925, Metron 5(3)).
    """
    if found.drift is None:
        return False
    wider = 1 + (errors**2 + 1) / (4 * max(images - 1, 1))
    by_luck = (found.drift_floor or 0.0) + errors * wider * (found.drift_error or 0.0)
    return found.drift - by_luck > threshold


def _similarity(
    found: Similarity, images: int, tier: str, t: Thresholds
) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Whether the images differ from the pretraining's, which rules said so, and all numbers.

    Low quality alone says nothing at fewer than five images a class: so few keep it low anyway.
    """
    tiny = tier == TIERS[0]
    errors = t.errors if images >= t.few_images else t.errors_few
    q, gap, gain = found.quality, found.depth_gap, found.concat_gain
    rules = {
        "quality": not tiny and q.value + errors * q.error < t.quality,
        "depth_gap": beyond(gap, t.depth_gap, errors),
        "concat_gain": beyond(gain, t.concat_gain, errors),
    }
    rules["drift"] = foreign(found, t.drift, errors, images)
    fired = tuple(name for name, fires in rules.items() if fires)
    why = _said(found, rules, errors, t)
    if tiny and not fired and q.value < t.quality:
        why = (*why, "with so few images low quality decides nothing")
    return (DIFFERENT if fired else SIMILAR), fired, why


def beyond(score: Score, threshold: float, errors: float) -> bool:
    """Whether a difference is above its threshold and above so many of its own errors."""
    return score.value > max(threshold, errors * score.error)


def _said(
    found: Similarity, rules: dict[str, bool], errors: float, t: Thresholds
) -> tuple[str, ...]:
    q, gap, gain = found.quality, found.depth_gap, found.concat_gain
    times = "its error" if errors == 1 else f"{errors:g} times its error"
    said = [
        f"the last features tell the classes apart with quality {plain(q)} "
        f"({'below' if rules['quality'] else 'different would be below'} {t.quality:.2f}; "
        "0 is guessing, 1 perfect)",
        f"best earlier stage less the last features: {signed(gap)} "
        f"({'above' if rules['depth_gap'] else 'different would be above'} {t.depth_gap:+.2f} "
        f"and {times})",
        f"all stages together less the last features: {signed(gain)} "
        f"({'above' if rules['concat_gain'] else 'different would be above'} "
        f"{t.concat_gain:+.2f} and {times})",
    ]
    if found.drift is not None:
        error = f" ± {found.drift_error:.3f}" if found.drift_error is not None else ""
        chance = f" ({found.drift_floor:.3f} by chance)" if found.drift_floor is not None else ""
        said.append(
            f"the channel statistics are {found.drift:.3f}{error} away from the pretraining's"
            f"{chance}: {'foreign' if rules['drift'] else 'familiar'}, the bound is {t.drift:.2f} "
            f"beyond chance and {times}"
        )
    if t.quality <= q.value < 0.8 and not any(rules.values()):
        said.append(
            f"quality {q.value:.2f} without any sign of strange images: a hard task, or some "
            "labels are wrong"
        )
    return tuple(said)


def signed(score: Score) -> str:
    """Change and standard error.

    Example:
        >>> signed(Score(-0.0312, 0.01))
        '-0.031 ± 0.010'
    """
    return f"{score.value:+.3f} ± {score.error:.3f}"


def plain(score: Score) -> str:
    """Value and standard error.

    Example:
        >>> plain(Score(0.5, 0.031))
        '0.50 ± 0.03'
    """
    return f"{score.value:.2f} ± {score.error:.2f}"


def _enough(quality: Score, t: Thresholds) -> bool:
    return t.enough is not None and quality.value - t.errors * quality.error > t.enough
