"""Evidence of any kind for the tests of the decision, and configs as a user asks for them."""

from __future__ import annotations

from dataclasses import replace

from tl.config import compose
from tl.decision.evidence import Amount, Backbone, Evidence, Score, Similarity, StageScore

STAGES = ("stage0", "stage1", "stage2", "stage3", "stage4", "head")


def evidence(
    per_class=10,
    classes=10,
    quality=0.8,
    gap=-0.1,
    gain=0.0,
    drift=0.05,
    error=0.02,
    *,
    chance=0.0,
    measured=True,
    pretrained=True,
    attention=False,
    batch_norm=True,
    more_data=0.05,
    **others,
):
    def score(value):
        return Score(value, error)

    images = per_class * classes
    amount = Amount(
        images,
        classes,
        per_class,
        per_class,
        per_class,
        images // 4,
        per_class // 4,
        score(more_data) if more_data is not None else None,
        50.0,
    )
    stages = (
        StageScore("stage1", 64, score(quality + gap), score(0.1)),
        StageScore("features", 512, score(quality), score(quality)),
    )
    similarity = Similarity(
        stages,
        score(quality + gain),
        score(gap),
        score(gain),
        drift if batch_norm else None,
        0.01 if batch_norm else None,
        None,
        chance,
    )
    backbone = Backbone("net", 1_000, STAGES, batch_norm, attention, pretrained, 224)
    found = similarity if measured and pretrained else None
    unmeasured = "" if found else "too few images to hold some out."
    return replace(Evidence(amount, backbone, found, unmeasured, native_side=300.0), **others)


def asked(*overrides):
    return compose("train", ["data.root=x", "finetune=auto", *overrides]).finetune


STRANGE = {"quality": 0.3, "gap": 0.06, "gain": 0.1, "drift": 1.5}
