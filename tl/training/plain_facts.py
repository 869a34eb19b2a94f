"""What the evidence knows of images and backbone without a pass over them."""

from __future__ import annotations

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tl.data.table import ImageTable
from tl.decision.evidence import Amount, Backbone
from tl.models import RANDOM, BuiltModel
from tl.training.standins import class_counts

# Layers by which attention mixes tokens, as timm's families name them.
ATTENTION = {"qkv", "q", "q_proj", "query", "in_proj", "wqkv"}


def amount(table: ImageTable) -> Amount:
    """Sizes; exact copies within a split are counted once."""
    rows = {name: table.split(name).drop_duplicates("sha256") for name in ("train", "val")}
    train, val = (class_counts(table, own) for own in rows.values())
    return Amount(
        images=len(rows["train"]),
        classes=len(train),
        per_class=float(np.median(train)),
        least=int(train.min()),
        most=int(train.max()),
        val_images=len(rows["val"]),
        val_least=int(val.min()),
    )


def backbone(built: BuiltModel) -> Backbone:
    """What kind of network it is."""
    modules = [*built.model.named_modules()]
    return Backbone(
        name=built.name,
        parameters=sum(p.numel() for p in built.model.parameters()),
        stages=tuple(stage.name for stage in built.stages),
        batch_norm=any(isinstance(m, _BatchNorm) for _, m in modules),
        attention=any(
            name.rpartition(".")[2] in ATTENTION and isinstance(m, nn.Linear) for name, m in modules
        ),
        pretrained=built.weights.source != RANDOM,
        input_size=int(built.preprocessing.input_size[-1]),
    )


def native_side(table: ImageTable) -> float:
    """Side of the square that is as large as the usual training image, in pixels."""
    rows = table.split("train")
    return float(np.median(np.sqrt(rows["width"] * rows["height"])))


def copies(table: ImageTable) -> tuple[str, ...]:
    """One sentence for each kind of exact copies."""
    train, val = table.split("train")["sha256"], table.split("val")["sha256"]
    found = []
    if copies := int(train.duplicated().sum()):
        found.append(f"{copies:,} of {len(train):,} training images are exact copies of others")
    if shared := int(val.isin(set(train)).sum()):
        found.append(
            f"{shared:,} of {len(val):,} validation images are training images too: the validation "
            "figures are too good"
        )
    return tuple(found)
