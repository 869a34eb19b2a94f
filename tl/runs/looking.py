"""What a backbone shows of some images, and what to do with it: `tl advise` asks it of several."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl.advice import Candidate
from tl.config import AdviseConfig, CacheMode, ModelConfig
from tl.runs.deciding import fitted, measured

if TYPE_CHECKING:  # so that `tl advise --help` loads no torch
    from tl.data import ImageTable

# Where weights come from -> where they are without a network; anything else is a file.
PLACES = {"hub": "hub cache", "none": "needs none"}


def look(config: AdviseConfig, model: ModelConfig, table: ImageTable) -> Candidate:
    """Measure images with a backbone, decide, and estimate what training would cost.

    Args:
        config: What was asked.
        model: One of the backbones.
        table: Checked images.

    Raises:
        ConfigError: There is no such model, or a setting that it does not have.
        WeightsError: Its weights cannot be had.
    """
    from tl.data import ImageDataModule
    from tl.finetuning import build_plan
    from tl.models import build_model
    from tl.training import estimate

    built = build_model(model, table.classes)
    advice, built = fitted(measured(config, table, built), config, model, table, built)
    decision = advice.decision
    plan = build_plan(
        decision.finetune,
        built,
        train_images=len(table.split("train")),
        batch_size=config.data.batch_size,
    )
    images = ImageDataModule.from_config(table, built.preprocessing, config)
    cost = estimate(plan, built, images, cached=config.cache.mode is not CacheMode.off)
    return Candidate(
        evidence=advice.evidence,
        decision=decision,
        cost=cost,
        weights=built.weights.source,
        licence=built.weights.licence,
        offline=PLACES.get(model.weights, "file"),
    )
