"""From a method to its settings: phases, epochs, learning rates, what validation may choose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tl.config import (
    DECIDED,
    BatchNormMode,
    Budget,
    ConfigError,
    FinetuneConfig,
    HeadKind,
    Optimizer,
    PhaseConfig,
    Select,
    Trains,
)
from tl.decision.axes import read
from tl.decision.evidence import Amount, Backbone, Evidence
from tl.decision.table import ALL, HALF_WAY, SCRATCH, Choice, choose
from tl.decision.thresholds import DIFFERENT, Thresholds

METHODS = (
    "linear_probe",
    "stage_probe",
    "norm_affine",
    "lora",
    "lp_partial",
    "wise_ft",
    "lp_ft",
    "full",
)
BUDGETS = {Budget.quick: 0.25, Budget.normal: 1.0, Budget.thorough: 4.0}
# Images that pass through what trains, for 1,000 training images; grows with their square root.
# Published schedules lie between 64k (VTAB-1k) and 256k (BiT), tuned for large networks on GPUs.
VIEWS = 24_000
EPOCHS = (5, 100)
# Steps of a head on frozen features, which cost next to nothing.
HEAD_STEPS = 600
LEAST_HEAD_STEPS = 300
HEAD_EPOCHS = (10, 100)
FEW_IMAGES, FEW_HEAD_EPOCHS = 320, 300
# Steps of a head that only prepares for stages, where no validation ends it. A head that fits its
# few images whole leaves a loss of nearly zero, and so no gradient for the stages: features that
# should change stay as they are. One that was stopped early is the better start (Ren et al. 2023,
# "How to prepare your task head for finetuning", arXiv:2302.05779; docs/decision-table.md has what
# we measured). It takes as many steps as show it enough images of each class.
START_STEPS, START_VIEWS = 40, 128
# Shares of the planned epochs that may pass without a better val/loss. Where stages train, it is
# noisy until their rate falls, and a fit that stops before has not begun to settle
# (docs/decision-table.md has what that costs).
HEAD_PATIENCE, BODY_PATIENCE, LEAST_PATIENCE = 0.15, 0.5, 5
LARGE_RATIO = 5  # between neighbouring stages
# What the user may have set beside it; the default is no wish.
PASSED = ("gradient_clip", "accumulate", "precision", "pretrained", "confirm")


def recipe(
    method: str,
    evidence: Evidence,
    budget: Budget = Budget.normal,
    *,
    batch_size: int = 32,
    lr_ratio: float | None = None,
    last_stages: int | None = None,
    thresholds: Thresholds | None = None,
) -> FinetuneConfig:
    """Settings of any method for this evidence, as a decision for it would fill them.

    Args:
        method: One of `METHODS`.
        evidence: What was measured.
        budget: How many epochs.
        batch_size: Images per step.
        lr_ratio: Between neighbouring stages; default: 10 where few stages train, 3 where all do
            (5 for little data and for `wise_ft`).
        last_stages: Of `lp_partial`; default: 2, for little data 1.
        thresholds: Boundaries; default: ours.

    Raises:
        ConfigError: There is no such method.
    """
    t = thresholds or Thresholds()
    if method not in METHODS:
        msg = f"no method {method}; there are {', '.join(METHODS)}"
        raise ConfigError(msg)
    axes = read(evidence, t)
    little = axes.amount in ("tiny", "small")
    stages = {
        "linear_probe": 0,
        "stage_probe": 0,
        "lp_partial": last_stages or (1 if little else 2),
    }
    ratios = {"lp_partial": 10, "norm_affine": 1, "lora": 1, "wise_ft": HALF_WAY.lr_ratio}
    ratio = ratios.get(method, 5 if little else 3)
    slower = HALF_WAY.slower if method == HALF_WAY.method else 1.0
    choice = Choice(method, stages.get(method, ALL), lr_ratio=lr_ratio or ratio, slower=slower)
    decided, _ = choose(axes, evidence.backbone)
    if decided.method == method and not lr_ratio and not last_stages:
        choice = decided
    return fill(
        choice, evidence, axes.similarity, budget, batch_size=batch_size, given=None, thresholds=t
    )


def fill(
    choice: Choice,
    evidence: Evidence,
    similarity: str,
    budget: Budget,
    *,
    batch_size: int,
    given: FinetuneConfig | None,
    thresholds: Thresholds,
) -> FinetuneConfig:
    """Settings of a choice, complete; what the user gave stays as it is, in every phase."""
    amount, backbone = evidence.amount, evidence.backbone
    chooses = val_chooses(amount, thresholds)
    head_only = choice.stages == 0
    epochs = (
        head_epochs(amount.images, batch_size, budget)
        if head_only
        else body_epochs(choice, amount.images, budget)
    )
    forced = forced_settings(given)
    rate = head_rate(backbone) / choice.slower
    shared: dict[str, Any] = {
        "epochs": epochs,
        "head_lr": rate,
        "lr_ratio": float(choice.lr_ratio),
        "optimizer": Optimizer.adamw,
        "weight_decay": 0.01 if backbone.batch_norm else 0.05,
        "warmup": 0.1,
        "batch_norm": batch_norm(choice, amount.images, batch_size, backbone, thresholds),
        "patience": patience(
            forced.get("epochs", epochs), chooses, HEAD_PATIENCE if head_only else BODY_PATIENCE
        ),
        "label_smoothing": 0.0,
        "ema": not chooses and not head_only,
        "average": False,
        "select": Select.best if chooses else Select.last,
    }
    phases = _phases(choice, similarity, rate, amount, batch_size, budget, chooses, backbone)
    open_again: dict[str, Any] = dict.fromkeys(forced)
    own = {name: replace(phase, **open_again) for name, phase in phases.items()}
    if given is not None:
        shared |= {key: getattr(given, key) for key in PASSED}
    return FinetuneConfig(
        method=choice.method,
        phases=own,
        head=HeadKind.stages if choice.method == "stage_probe" else HeadKind.linear,
        budget=budget,
        **{**shared, **forced},
    )


def _phases(
    choice: Choice,
    similarity: str,
    rate: float,
    amount: Amount,
    batch_size: int,
    budget: Budget,
    chooses: bool,
    backbone: Backbone,
) -> dict[str, PhaseConfig]:
    """Phases of a method, with what differs from the shared settings."""
    if choice.stages == 0:
        return {"head": PhaseConfig(train_stages=0)}
    if choice.method == "full":
        share = second_share(choice, similarity, backbone)
        return {"all": PhaseConfig(train_stages=ALL, head_lr=rate * share if share > 1 else None)}
    epochs = (
        head_epochs(amount.images, batch_size, budget)
        if chooses
        else start_epochs(amount, batch_size, budget)
    )
    head = PhaseConfig(
        train_stages=0,
        epochs=epochs,
        # A choice of gentle steps is about what was pretrained; the head is new in any case.
        head_lr=head_rate(backbone) if choice.slower != 1 else None,
        patience=patience(epochs, chooses, HEAD_PATIENCE),
        # A moving average helps what is noisy; a linear head with a falling rate is not.
        ema=False,
    )
    body = PhaseConfig(
        train_stages=choice.stages,
        head_lr=rate * second_share(choice, similarity, backbone),
        average=chooses or choice.method == HALF_WAY.method,
    )
    if choice.method == "norm_affine":
        return {"head": head, "norm": replace(body, trains=Trains.norm)}
    if choice.method == "lora":
        return {"head": head, "lora": replace(body, trains=Trains.lora)}
    return {"head": head, ("last" if choice.stages > 0 else "all"): body}


def forced_settings(given: FinetuneConfig | None) -> dict[str, Any]:
    """What the user fixed of the settings that `finetune=auto` would decide."""
    values = {key: getattr(given, key) for key in DECIDED} if given else {}
    return {key: value for key, value in values.items() if value is not None}


def forced(given: FinetuneConfig | None) -> Mapping[str, Any]:
    """All that the user fixed, by the names of the settings; plain values."""
    found = forced_settings(given)
    if given is not None:
        usual = FinetuneConfig()
        others = {key: getattr(given, key) for key in PASSED}
        found |= {k: v for k, v in others.items() if v != getattr(usual, k) and k != "confirm"}
        if given.head is HeadKind.stages:
            found["head"] = given.head
    return {f"finetune.{k}": getattr(v, "value", v) for k, v in found.items()}


# --- single settings ----------------------------------------------------------------------------


def body_epochs(choice: Choice, images: int, budget: Budget) -> int:
    """Epochs of a phase that trains stages: a number of image views that grows as sqrt(images).

    All stages take twice as many as the last ones, random weights eight times.
    """
    views = VIEWS * math.sqrt(images / 1_000) * BUDGETS[budget]
    views *= (8 if choice == SCRATCH else 2) if choice.stages == ALL else 1
    return _clip(views / max(images, 1), *EPOCHS)


def head_epochs(images: int, batch_size: int, budget: Budget) -> int:
    """Epochs of a head alone: a number of optimizer steps, for it costs next to nothing."""
    steps = max(HEAD_STEPS * BUDGETS[budget], LEAST_HEAD_STEPS)
    most = FEW_HEAD_EPOCHS if images <= FEW_IMAGES else HEAD_EPOCHS[1]
    return _clip(steps / max(math.ceil(images / batch_size), 1), HEAD_EPOCHS[0], most)


def start_epochs(amount: Amount, batch_size: int, budget: Budget) -> int:
    """Epochs of a head that prepares for stages, where validation is too small to end it."""
    steps = max(START_STEPS, START_VIEWS * amount.classes / batch_size)
    epochs = math.ceil(steps / max(math.ceil(amount.images / batch_size), 1))
    return min(epochs, head_epochs(amount.images, batch_size, budget))


def _clip(value: float, low: int, high: int) -> int:
    return min(max(math.ceil(value), low), high)


def patience(epochs: int, chooses: bool, share: float) -> int:
    """Epochs without a better val/loss; 0 where validation is too small to say."""
    return max(LEAST_PATIENCE, round(share * epochs)) if chooses else 0


def val_chooses(amount: Amount, t: Thresholds) -> bool:
    """Whether validation is large enough to choose an epoch by it.

    On fewer images the choice follows luck: "validation set illusion" (FEWTRANS, arXiv:2603.00478).
    """
    return amount.val_images >= t.val_images and amount.val_least >= t.val_least


def head_rate(backbone: Backbone) -> float:
    """Peak rate of the head with AdamW: lower for attention and LayerNorm networks."""
    return 1e-3 if backbone.batch_norm and not backbone.attention else 5e-4


def second_share(choice: Choice, similarity: str, backbone: Backbone) -> float:
    """Rate of the head where stages train, as a share of that of a probe.

    Images unlike the pretraining's need larger steps (Li et al. 2020, arXiv:2002.11770;
    docs/decision-table.md has what we measured); layers of attention bear less. Elsewhere the probe
    found a head already, which a high rate would lose.
    """
    robust = backbone.batch_norm and not backbone.attention
    # Where the early stages learn nearly as fast as the last ones, the steps are large as it is.
    even = choice.method in ("lp_ft", "full") and choice.lr_ratio < LARGE_RATIO
    if similarity == DIFFERENT and robust and choice.method != "lora":
        return 1.0 if even else 3.0
    if choice.method in ("norm_affine", "lora", "full"):
        return 1.0
    return 0.4 if similarity == DIFFERENT else 0.3


def batch_norm(
    choice: Choice, images: int, batch_size: int, backbone: Backbone, t: Thresholds
) -> BatchNormMode:
    """Whether BatchNorm keeps the pretraining's statistics.

    It does wherever little trains, and where few images or small batches would estimate them badly.
    """
    if not backbone.pretrained:
        return BatchNormMode.train
    small = images < t.batch_norm_images or batch_size < t.batch_norm_batch
    deep = choice.method in ("wise_ft", "lp_ft", "full")
    return BatchNormMode.train if deep and not small else BatchNormMode.frozen


def augmentation_preset(tier: str, images: int, t: Thresholds) -> str:
    """Preset of the random changes: more data bears more of them."""
    if images >= t.strong:
        return "strong"
    return "light" if tier in ("tiny", "small") else "medium"
