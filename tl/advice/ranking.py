"""Backbones side by side before any training: how well their features serve, and what they cost."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tl.advice.sections import percent
from tl.decision import Cost, Decision
from tl.decision.evidence import Evidence, Score
from tl.sections import Section

ADVISED, TIE = "→ ", "= "  # marks before a name


@dataclass(frozen=True)
class Candidate:
    """A backbone with what was measured, decided and estimated.

    Args:
        evidence: What was measured with it.
        decision: How it would be transferred.
        cost: What that takes.
        weights: Where the weights come from: a timm tag or a file.
        licence: Of the weights, as their source states it.
        offline: Whether they can be had without a network, in words.
    """

    evidence: Evidence
    decision: Decision
    cost: Cost
    weights: str
    licence: str
    offline: str

    @property
    def name(self) -> str:
        """The timm name."""
        return self.evidence.backbone.name

    @property
    def quality(self) -> Score | None:
        """Quality of the probe on the last features; None where nothing was measured."""
        found = self.evidence.similarity
        return None if found is None else found.quality


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best probe first; what could not be measured comes last."""
    return sorted(candidates, key=lambda c: math.inf if c.quality is None else -c.quality.value)


def ties(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that are not worse than the best by more than the error of the difference.

    The probes see the same images, so that error is rather smaller than the sum of both that is
    taken here.
    """
    order = ranked(candidates)
    top = order[0].quality
    if top is None:
        return order
    return [
        c
        for c in order
        if c.quality and top.value - c.quality.value <= math.hypot(top.error, c.quality.error)
    ]


def best(candidates: Sequence[Candidate]) -> tuple[Candidate, str]:
    """The backbone to take, and why: among equals the fastest.

    Returns:
        It, and a sentence with the numbers.
    """
    equal = ties(candidates)
    fastest = max(equal, key=lambda c: c.cost.images_per_second)
    speed = f"{fastest.cost.images_per_second:,.0f} images/s"
    if fastest.quality is None:
        why = "no backbone could be measured; it is the fastest"
        return fastest, f"Take {fastest.name}: {why} ({speed})."
    quality = percent(fastest.quality)
    others = [c.name for c in equal if c is not fastest]
    if others:
        why = (
            f"as good as {', '.join(others)} within the error, and the fastest of them ({speed}); "
            f"quality {quality}"
        )
        return fastest, f"Take {fastest.name}: {why}."
    if len(candidates) == 1:
        return fastest, f"{fastest.name}: quality {quality}, {speed}."
    second = ranked(candidates)[1]
    rest = percent(second.quality) if second.quality else "not measured"
    return fastest, (
        f"Take {fastest.name}: its features serve best, quality {quality}; the next is "
        f"{second.name} with {rest}."
    )


def ranking(candidates: Sequence[Candidate]) -> Section:
    """Table of the backbones that could be loaded, the best first."""
    equal, (chosen, why) = ties(candidates), best(candidates)
    order = ranked(candidates)
    short = [c.name.partition(".")[0] for c in order]
    rows = []
    for c, name in zip(order, short, strict=True):
        mark = ADVISED if c is chosen else TIE if c in equal and len(equal) > 1 else ""
        rows.append(_row(c, f"{mark}{name if short.count(name) == 1 else c.name}"))
    note = (
        f"{why} {ADVISED}advised, {TIE}as good within the error. Quality: 0 is guessing, 100 is "
        "perfect, with its 95 % interval; LogME grows with the number of classes and compares "
        "backbones on the same images only."
    )
    return Section("backbones, the best first", "table", tuple(rows), note)


def _row(c: Candidate, name: str) -> dict[str, Any]:
    logme = c.evidence.scores.get("logme")
    return {
        "backbone": name,
        "quality": percent(c.quality) if c.quality else "not measured",
        "LogME": "" if logme is None else f"{logme:.2f}",
        "weights": f"{c.evidence.backbone.parameters / 1e6:.1f} M",
        "images/s": f"{c.cost.images_per_second:,.0f}",
        "licence": short_licence(c.licence),
        "offline": c.offline,
    }


def short_licence(text: str) -> str:
    """The name of a licence without the remarks that a source adds to it.

    Example:
        >>> short_licence("MIT for the repository (LICENSE.txt); other weights")
        'MIT'
    """
    return re.split(r" for |[(;,]", text, maxsplit=1)[0].strip() or text
