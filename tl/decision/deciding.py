"""From evidence to a decision: the cell of the table, its plan, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from omegaconf import OmegaConf

from tl.config import Budget, FinetuneConfig, HeadKind, ModelConfig, PhaseConfig, validate
from tl.decision.axes import Axes, read
from tl.decision.evidence import Evidence
from tl.decision.recipes import augmentation_preset, fill, forced
from tl.decision.table import ALL, STAGES, Choice, choose
from tl.decision.thresholds import Thresholds
from tl.decision.wording import Case, reasons, rule, warnings, would_change


@dataclass(frozen=True)
class Decision:
    """How to transfer, and why.

    Args:
        amount: Tier that was used: tiny, small, medium or large.
        similarity: `similar`, `different` or `unknown`, as it was used.
        measured: What the evidence says of both, `{"amount": …, "similarity": …}`.
        forced: What the user fixed: `amount`, `similarity`, `finetune.*`.
        method: Transfer method, as `finetune=NAME`.
        neighbour: Method that comes next.
        finetune: Its settings, complete.
        neighbour_finetune: Those of the neighbour.
        augment: Preset of the random changes of the training images.
        hflip: Whether left-right flips are safe.
        vflip: Whether up-down flips are.
        image_size: Side of the input that is advised, pixels; None: that of the weights.
        rule: The rule that fired, one sentence with its numbers.
        reasons: Why, in plain words, each with its numbers.
        would_change: What would flip the decision.
        warnings: What a person should look at.
    """

    amount: str
    similarity: str
    measured: dict[str, str]
    forced: dict[str, Any]
    method: str
    neighbour: str
    finetune: FinetuneConfig
    neighbour_finetune: FinetuneConfig
    augment: str
    hflip: bool
    vflip: bool
    image_size: int | None
    rule: str
    reasons: tuple[str, ...]
    would_change: tuple[str, ...]
    warnings: tuple[str, ...]

    def model(self, asked: ModelConfig) -> ModelConfig:
        """The model at the size that was decided, unless the user fixed one."""
        return replace(asked, image_size=asked.image_size or self.image_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `decision.json` keeps them."""
        values = {**asdict(self)}
        for name in ("finetune", "neighbour_finetune"):
            values[name] = plain_config(getattr(self, name))
        for name in ("reasons", "would_change", "warnings"):
            values[name] = list(values[name])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Decision:
        """Inverse of `to_dict`."""
        given = dict(values)
        for name in ("finetune", "neighbour_finetune"):
            given[name] = validate(OmegaConf.create(given[name]), FinetuneConfig)
        for name in ("reasons", "would_change", "warnings"):
            given[name] = tuple(given[name])
        return cls(**given)


def plain_config(config: FinetuneConfig | PhaseConfig) -> dict[str, Any]:
    """Plain values of settings, enumerations by name."""
    values = OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True)
    return {str(key): value for key, value in dict(values).items()}  # type: ignore[arg-type]


def decide(
    evidence: Evidence,
    budget: Budget = Budget.normal,
    *,
    batch_size: int = 32,
    amount: str | None = None,
    similarity: str | None = None,
    given: FinetuneConfig | None = None,
    image_size: int | None = None,
    thresholds: Thresholds | None = None,
) -> Decision:
    """Choose a transfer method and all of its settings.

    Args:
        evidence: What was measured of the training images with the backbone.
        budget: How many epochs.
        batch_size: Images per step.
        amount: Tier instead of the one that is counted.
        similarity: `similar` or `different` instead of what is measured.
        given: Settings that the user fixed; null ones are decided. `head=stages` fixes the method.
        image_size: Side of the input that the user fixed, pixels.
        thresholds: Boundaries of the table; default: ours.
    """
    t = thresholds or Thresholds()
    settings = partial(fill, evidence=evidence, budget=budget, batch_size=batch_size, thresholds=t)
    measured = read(evidence, t)
    used = read(evidence, t, amount=amount) if amount else measured
    if similarity:
        used = replace(used, similarity=similarity, signal=True, mixed=False, enough=False)
    choice, neighbour = choose(used, evidence.backbone)
    if given is not None and given.head is HeadKind.stages and choice != STAGES:
        choice, neighbour = STAGES, choice
    finetune, other = (
        settings(c, similarity=used.similarity, given=given) for c in (choice, neighbour)
    )
    fixed = {k: v for k, v in (("amount", amount), ("similarity", similarity)) if v is not None}
    hflip, vflip = flips(evidence, t)
    case = Case(evidence, measured, used, choice, neighbour, finetune, batch_size, t, fixed)
    augment = augmentation_preset(used.amount, evidence.amount.images, t)
    size = None if image_size else smaller_input(evidence, choice, t)
    return Decision(
        amount=used.amount,
        similarity=used.similarity,
        measured={"amount": measured.amount, "similarity": measured.similarity},
        forced={**fixed, **forced(given)},
        method=choice.method,
        neighbour=neighbour.method,
        finetune=finetune,
        neighbour_finetune=other,
        augment=augment,
        hflip=hflip,
        vflip=vflip,
        image_size=size,
        rule=rule(case),
        reasons=reasons(case, augment, size, hflip=hflip, vflip=vflip),
        would_change=would_change(case),
        warnings=warnings(case),
    )


def smaller_input(evidence: Evidence, choice: Choice, t: Thresholds) -> int | None:
    """Side of the input that is enough for small images, pixels; None: that of the weights.

    A large input cannot show more than a small image has. Only features that stay as they were
    trained need their objects in the size that they know.
    """
    backbone = evidence.backbone
    small = 0 < evidence.native_side <= t.small_side and t.small_input < backbone.input_size
    learns = choice.stages == ALL and backbone.pretrained
    flexible = backbone.batch_norm and not backbone.attention
    return t.small_input if small and learns and flexible else None


def flips(evidence: Evidence, t: Thresholds) -> tuple[bool, bool]:
    """Whether left-right and up-down flips are safe.

    Left-right is on unless it was measured to cost more than the threshold and its error; up-down
    is off unless it was measured to cost next to nothing.
    """
    across, upright = evidence.flips.horizontal, evidence.flips.vertical
    hflip = across is None or -across.value <= max(t.flip_drop, t.errors * across.error)
    vflip = (
        upright is not None
        and -upright.value < t.vflip_drop
        and t.errors * upright.error <= t.flip_drop
    )
    return hflip, vflip


__all__ = ["Axes", "Decision", "decide", "flips", "plain_config"]
