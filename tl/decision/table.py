"""The decision table itself: which transfer method for how much data of which kind."""

from __future__ import annotations

from dataclasses import dataclass

from tl.decision.axes import Axes
from tl.decision.evidence import Backbone
from tl.decision.thresholds import DIFFERENT, SIMILAR, TIERS, UNKNOWN, Thresholds

ALL = -1


@dataclass(frozen=True)
class Choice:
    """A transfer method with what the cell says of it.

    Args:
        method: Name, as `finetune=NAME`.
        stages: Last stages that train beside the head; -1: all.
        lr_ratio: Between the learning rates of neighbouring stages.
        slower: Divisor of the learning rates.
    """

    method: str
    stages: int = 0
    lr_ratio: float = 10.0
    slower: float = 1.0


LINEAR = Choice("linear_probe")
STAGES = Choice("stage_probe")
LAST = Choice("lp_partial", 1)
LAST_TWO = Choice("lp_partial", 2)
CAREFUL = Choice("lp_ft", ALL, lr_ratio=5)
FREE = Choice("lp_ft", ALL, lr_ratio=3)
GENTLE = Choice("lp_ft", ALL, lr_ratio=5, slower=3)
HALF_WAY = Choice("wise_ft", ALL, lr_ratio=5, slower=3)
# LP-init everywhere: Kumar et al. 2022 (arXiv:2202.10054). Stage probes: Head2Toe (Evci et al.
# 2022, arXiv:2201.03529). All stages for different images: on VTAB-1k all 9 tasks whose linear
# quality is below 0.5 gain at least 8.5 points by it. All stages for similar ones, too, where data
# are not few: on 17 of 18 sets with 9.8 images a class or more they are at least as good as a
# linear classifier (VTAB-1k), and better than the last two alone where we measured it
# (docs/decision-table.md). Half-way between a linear classifier and gently trained stages where a
# few images say little about either: Wortsman et al. 2022 (arXiv:2109.01903).
TABLE = {
    ("tiny", SIMILAR): HALF_WAY,
    ("small", SIMILAR): CAREFUL,
    ("medium", SIMILAR): CAREFUL,
    ("large", SIMILAR): CAREFUL,
    ("tiny", DIFFERENT): STAGES,
    ("small", DIFFERENT): CAREFUL,
    ("medium", DIFFERENT): FREE,
    ("large", DIFFERENT): FREE,
    ("tiny", UNKNOWN): LINEAR,
    ("small", UNKNOWN): LAST,
    ("medium", UNKNOWN): CAREFUL,
    ("large", UNKNOWN): CAREFUL,
}
# "few weights": normalisation layers or adapters, by the kind of network.
FEW = Choice("few")
NEIGHBOURS = {
    ("tiny", SIMILAR): LINEAR,
    ("small", SIMILAR): LAST,
    ("medium", SIMILAR): LAST_TWO,
    ("large", SIMILAR): LAST_TWO,
    ("tiny", DIFFERENT): FEW,
    ("small", DIFFERENT): FEW,
    ("medium", DIFFERENT): LAST_TWO,
    ("large", DIFFERENT): Choice("full", ALL, lr_ratio=3),
    ("tiny", UNKNOWN): STAGES,
    ("small", UNKNOWN): CAREFUL,
    ("medium", UNKNOWN): LAST_TWO,
    ("large", UNKNOWN): LAST_TWO,
}
# Frozen random layers know nothing: everything trains, at one rate.
SCRATCH = Choice("full", ALL, lr_ratio=1)


def choose(axes: Axes, backbone: Backbone) -> tuple[Choice, Choice]:
    """Method of a cell, and its neighbour: the next best guess.

    Args:
        axes: Place in the table, as it is to be used.
        backbone: The network.
    """
    if axes.similarity == UNKNOWN and not backbone.pretrained:
        return SCRATCH, LINEAR
    if not axes.signal:
        return LINEAR, LAST
    cell = axes.amount, axes.similarity
    choice, neighbour = TABLE[cell], NEIGHBOURS[cell]
    if axes.similarity == SIMILAR and axes.enough:
        return LINEAR, (neighbour if choice == LINEAR else choice)
    if axes.similarity == DIFFERENT and axes.mixed:
        # Strange pixels, and yet no earlier stage is better: all stages, the early ones gently.
        choice = {STAGES: GENTLE, FREE: CAREFUL}.get(choice, choice)
    return choice, (few(backbone) if neighbour is FEW else neighbour)


def few(backbone: Backbone) -> Choice:
    """Tuning of few weights: adapters of attention layers, scales of BatchNorm, or one stage.

    LoRA: 72 % mean on VTAB-1k against 66 % for all weights (ViT-B/16). Normalisation layers: equal
    to full fine-tuning on 7 medical sets (Kanavati and Tsuneki 2021, arXiv:2102.05543).
    """
    if backbone.attention and not backbone.batch_norm:
        return Choice("lora", ALL, lr_ratio=1)
    if backbone.batch_norm:
        return Choice("norm_affine", ALL, lr_ratio=1)
    return LAST


def action(choice: Choice) -> str:
    """What a choice does, in words."""
    words = {
        "linear_probe": "train only a linear classifier on the last features",
        "stage_probe": "train only a linear classifier on the most useful features of all stages",
        "norm_affine": "train the head, then scale and shift of the normalisation layers too",
        "lora": "train the head, then low-rank adapters of the attention layers too",
        "wise_ft": "train the head, then all stages gently, and take the mean of before and after",
        "full": "train everything at once",
    }
    stages = {ALL: "all stages", 1: "the last stage"}.get(
        choice.stages, f"the last {choice.stages} stages"
    )
    return words.get(choice.method, f"train the head, then {stages} too")


def table_rows(thresholds: Thresholds | None = None) -> tuple[dict[str, str], ...]:
    """The table for people: one row a tier with `tier`, `amount`, `similar` and `different`.

    Args:
        thresholds: Boundaries; default: ours.

    Example:
        >>> table_rows()[1]["amount"], table_rows()[1]["similar"]
        ('5 to 19 images a class', 'lp_ft')
    """
    t = thresholds or Thresholds()
    amounts = (
        f"below {t.tiny:g} images a class",
        f"{t.tiny:g} to {t.small - 1:g} images a class",
        f"{t.small:g} to {t.medium - 1:g} images a class",
        f"{t.medium:g} or more images a class",
    )
    return tuple(
        {
            "tier": tier,
            "amount": amount,
            SIMILAR: TABLE[tier, SIMILAR].method,
            DIFFERENT: TABLE[tier, DIFFERENT].method,
        }
        for tier, amount in zip(TIERS, amounts, strict=True)
    )
