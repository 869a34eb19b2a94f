"""Why a decision was taken and what would flip it, in plain words with the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from tl.config import BatchNormMode, FinetuneConfig
from tl.decision.axes import Axes, plain, signed
from tl.decision.evidence import Evidence, Score
from tl.decision.recipes import second_share, val_chooses
from tl.decision.table import ALL, STAGES, Choice, action, choose
from tl.decision.thresholds import DIFFERENT, SIMILAR, TIERS, UNKNOWN, Thresholds


@dataclass(frozen=True)
class Case:
    """All that the sentences speak of."""

    evidence: Evidence
    measured: Axes
    used: Axes
    choice: Choice
    neighbour: Choice
    finetune: FinetuneConfig
    batch_size: int
    thresholds: Thresholds
    fixed: Mapping[str, str]

    @property
    def scratch(self) -> bool:
        """Whether nothing can be transferred, and the user did not say otherwise."""
        return not self.evidence.backbone.pretrained and self.used.similarity == UNKNOWN

    @property
    def asked(self) -> bool:
        """Whether the user fixed the method through the head."""
        own = self.used.amount == TIERS[0] and self.used.similarity == DIFFERENT
        return self.choice == STAGES and (self.used.mixed or not own)


def rule(case: Case) -> str:
    """The rule that fired, one sentence with its numbers."""
    amount, act = case.evidence.amount, action(case.choice)
    if case.asked:
        return f"finetune.head=stages was asked for: {act}."
    if case.scratch:
        return f"The weights are random, so there is nothing to keep: {act}."
    if not case.used.signal and case.evidence.similarity is not None:
        return (
            f"No signal: {case.evidence.similarity.chance:.0%} of random labels fit as well as the "
            f"true ones; check the labels. Until then the cheapest method: {act}."
        )
    number = f"{count(amount.per_class)} images a class"
    if "amount" not in case.fixed and _needs(case):
        number = f"{amount.images} images in all"
    much = f"{case.used.amount} data ({number})"
    kind = {
        SIMILAR: "images like the pretraining's",
        DIFFERENT: "images unlike the pretraining's",
        UNKNOWN: "unknown similarity, so by amount alone",
    }[case.used.similarity]
    return f"{much}, {kind}{_because(case)}: {act}."


def _because(case: Case) -> str:
    found, t = case.evidence.similarity, case.thresholds
    if "similarity" in case.fixed:
        return " (as you set it)"
    if found is None or case.used.similarity == UNKNOWN:
        return ""
    if case.used.similarity == SIMILAR:
        enough = ": next to nothing is left to gain" if case.used.enough else ""
        return f" (quality {plain(found.quality)} on the last features{enough})"
    words = {
        "quality": f"quality {plain(found.quality)} is below {t.quality:.2f}",
        "depth_gap": f"an earlier stage is better by {plain(found.depth_gap)}",
        "concat_gain": f"all stages together are better by {plain(found.concat_gain)}",
        "drift": f"channel statistics are {found.drift or 0:.2f} away, the bound is {t.drift:.2f}",
    }
    return f" ({'; '.join(words[name] for name in case.used.fired)})"


def reasons(
    case: Case, augment: str, size: int | None, *, hflip: bool, vflip: bool
) -> tuple[str, ...]:
    """Why this method and these settings."""
    a, t = case.evidence.amount, case.thresholds
    least = f"; the smallest class has {a.least}" if a.least < a.per_class else ""
    said = [
        f"{a.images:,} training images in {a.classes:,} classes, {count(a.per_class)} in the "
        f"median class{least}: {case.measured.amount} ({_boundaries(t)})"
    ]
    if needed := _needs(case):
        said.append(
            f"fewer than {needed} images in all are {case.measured.amount}, however few the classes"
        )
    if case.used.enough and case.used.similarity == SIMILAR and case.evidence.similarity:
        quality = plain(case.evidence.similarity.quality)
        said.append(f"with quality {quality} next to nothing is left to gain")
    said += case.measured.why
    said += [f"you set {name}={value}" for name, value in case.fixed.items()]
    if case.used.mixed:
        said.append(
            "only the pixels are foreign, and no earlier stage tells the classes better: all "
            "stages train, the early ones gently"
        )
        if case.used.enough:
            # VTAB-1k with ViT-B/16, computed from the tables of V-PETL Bench.
            said.append(
                "good features are no reason to stop at them where pixels are foreign: of two "
                "satellite sets, EuroSAT and RESISC45, all stages took two thirds and half of the "
                "errors of a linear classifier away"
            )
    said += _schedule(case)
    flipped = f"left-right flips {'on' if hflip else 'off'}{_drop(case.evidence.flips.horizontal)}"
    upright = f"up-down flips {'on' if vflip else 'off'}{_drop(case.evidence.flips.vertical)}"
    said.append(f"augmentation {augment}: {flipped}, {upright}")
    if size:
        usual, side = case.evidence.backbone.input_size, case.evidence.native_side
        said.append(
            f"input of {size} instead of {usual} pixels: the images have {side:.0f} (median side; "
            f"up to {t.small_side}), and where all stages train that is as good, in less time"
        )
    return tuple(said)


def _boundaries(t: Thresholds) -> str:
    return f"small from {t.tiny:g} a class, medium from {t.small:g}, large from {t.medium:g}"


def _schedule(case: Case) -> Iterator[str]:
    config, a, t = case.finetune, case.evidence.amount, case.thresholds
    if case.choice.stages == ALL and case.evidence.backbone.batch_norm:
        frozen = config.batch_norm is BatchNormMode.frozen
        yield (
            f"BatchNorm {'keeps' if frozen else 'relearns'} its statistics: {a.images:,} images in "
            f"batches of {case.batch_size} (it relearns them from {t.batch_norm_images:,} and "
            f"{t.batch_norm_batch}, where all weights train)"
        )
    if val_chooses(a, t):
        yield f"{a.val_images:,} validation images choose the best epoch"
    else:
        yield (
            f"{a.val_images:,} validation images ({a.val_least} of the smallest class) are too few "
            f"to choose an epoch (that takes {t.val_images} and {t.val_least}): fixed schedule, "
            "last weights"
        )
        first, *later = config.phases.values()
        if later and first.epochs is not None:
            yield (
                f"the head that prepares for the stages trains for {count(first.epochs)} epochs "
                "only: one that fits so few images whole leaves the stages nothing to learn from"
            )
        if any(phase.average for phase in later):
            yield (
                "what is kept is the mean of the weights before and after the stages trained: so "
                "few images say little about which of both is better"
            )


def _drop(score: Score | None) -> str:
    return " (not measured)" if score is None else f" (quality {signed(score)})"


def count(number: float) -> str:
    """A median without needless decimals."""
    return f"{number:,.1f}".removesuffix(".0")


def would_change(case: Case) -> tuple[str, ...]:
    """What would flip the decision."""
    if case.asked:
        return ("without finetune.head=stages the table would choose",)
    if case.scratch:
        return ("with pretrained weights (model.weights=hub or a file) the table would choose",)
    if not case.used.signal:
        return ("labels that fit the images: the table would choose by amount and similarity",)
    return (*_by_amount(case), *_by_similarity(case))


def _by_amount(case: Case) -> Iterator[str]:
    """The nearest tiers where something else would train."""
    here = TIERS.index(case.used.amount)
    for tiers in (range(here + 1, len(TIERS)), reversed(range(here))):
        for index in tiers:
            axes = replace(case.used, amount=TIERS[index])
            other, _ = choose(axes, case.evidence.backbone)
            if other != case.choice:
                step = "larger" if index > here else "smaller"
                same = f", in {step} steps" if action(other) == action(case.choice) else ""
                yield f"{_until(case, index)}: {action(other)}{same}"
                break


def _needs(case: Case) -> int:
    """Images in all that the next tier needs, where these and not those a class are too few."""
    a, t = case.evidence.amount, case.thresholds
    here = TIERS.index(case.measured.amount)
    held = here < len(t.bounds()) and t.bounds()[here] <= a.per_class
    return t.images()[here] if held else 0


def _until(case: Case, index: int) -> str:
    """What would have to be for another tier."""
    a, t = case.evidence.amount, case.thresholds
    here = TIERS.index(case.used.amount)
    now = f"images a class (now {count(a.per_class)})"
    if index < here:
        return f"with fewer than {t.bounds()[index]:g} {now}"
    if a.per_class >= t.bounds()[index - 1] and "amount" not in case.fixed:
        return f"with at least {t.images()[index - 1]} images in all (now {a.images})"
    return f"with at least {t.bounds()[index - 1]:g} {now}"


def _by_similarity(case: Case) -> Iterator[str]:
    found, t, backbone = case.evidence.similarity, case.thresholds, case.evidence.backbone
    share = second_share(case.choice, case.used.similarity, backbone)
    for kind in (SIMILAR, DIFFERENT):
        other, _ = choose(replace(case.used, similarity=kind, mixed=False), backbone)
        change = second_share(other, kind, backbone) / share
        if kind == case.used.similarity or (other == case.choice and change == 1):
            continue
        how = f"similarity={kind}"
        if found is not None and kind == DIFFERENT and "similarity" not in case.fixed:
            low = "" if case.used.amount == TIERS[0] else f"quality below {t.quality:.2f} (now "
            low += f"{found.quality.value:.2f}), " if low else ""
            how = (
                f"{low}an earlier stage better by {t.depth_gap:.2f} (now "
                f"{found.depth_gap.value:+.3f}) or all stages together by {t.concat_gain:.2f} (now "
                f"{found.concat_gain.value:+.3f}), beyond their errors"
            )
        steps = f", in {'larger' if change > 1 else 'smaller'} steps"
        same = action(other) == action(case.choice) and change != 1
        yield f"{how}: {action(other)}{steps if same else ''}"


def warnings(case: Case) -> tuple[str, ...]:
    """What a person should look at."""
    a, t, found = case.evidence.amount, case.thresholds, case.evidence.similarity
    said = []
    # Where the evidence said it already, once is enough.
    heard = any(text.startswith("no signal") for text in case.evidence.warnings)
    if found is not None and found.chance > t.chance and not heard:
        share = f"{found.chance:.0%} of random labels fit the images as well as the true ones"
        if a.images >= t.chance_images:
            said.append(f"no signal: check the labels ({share})")
        else:
            said.append(f"{a.images} images are too few to tell signal from chance ({share})")
    if found is None:
        why = (case.evidence.unmeasured or "the weights are random").rstrip(".")
        said.append(f"similarity is unknown ({why}): decided by the amount of data alone")
    if a.least < t.tiny <= a.per_class:
        said.append(
            f"the smallest class has {a.least} training images, the median "
            f"{count(a.per_class)}: expect little of it, and judge by the macro average"
        )
    return tuple(said)
