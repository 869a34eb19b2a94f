"""The whole advice: all sections in the order in which one reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tl.advice.details import (
    cost_facts,
    data_facts,
    learning_curve,
    more_images,
    next_steps,
    plan_table,
)
from tl.advice.ranking import Candidate, best, ranking
from tl.advice.sections import brief
from tl.config import AdviseConfig
from tl.sections import Section, duration


def heading(
    data: str, counts: Mapping[str, Mapping[str, int]], chosen: Candidate
) -> tuple[str, str]:
    """Title of the pages, and the line below it.

    Args:
        data: Name of the data folder.
        counts: Split -> class -> images.
        chosen: The backbone that is advised.
    """
    images = ", ".join(f"{sum(c.values()):,} {split}" for split, c in counts.items())
    classes = chosen.evidence.amount.classes
    decision = chosen.decision
    return (
        f"How to transfer to {data}",
        f"{images} images in {classes:,} classes. Advice: {decision.method} with {chosen.name}, "
        f"about {duration(chosen.cost.seconds)} of training at most on this machine (estimate).",
    )


def sections(
    config: AdviseConfig,
    candidates: Sequence[Candidate],
    failed: Mapping[str, Exception],
    folder: Path,
) -> tuple[Section, ...]:
    """What screen and pages show.

    Args:
        config: What was asked.
        candidates: Backbones that were measured.
        failed: Name -> why a backbone could not be loaded.
        folder: Where the advice is written.
    """
    chosen, _ = best(candidates)
    evidence, decision = chosen.evidence, chosen.decision
    absent = [{"text": f"{name}: {error}"} for name, error in failed.items()]
    parts = [
        *([ranking(candidates)] if len(candidates) + len(failed) > 1 else []),
        Section("backbones that could not be loaded", "list", tuple(absent)),
        *brief(evidence, decision),
        plan_table(decision, evidence.backbone.stages),
        cost_facts(chosen.cost, evidence),
        more_images(evidence),
        learning_curve(evidence),
        data_facts(chosen),
        next_steps(config, chosen, folder),
    ]
    return tuple(part for part in parts if part.rows)
