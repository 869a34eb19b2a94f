"""What measuring costs beyond the pass: probes, permutations, halves, scores.

    python benchmarks/evidence.py

2,000 rows of made-up features as wide as those of MobileNetV2 (its stages, and what its head
reads), with 10, 100 and 1,000 classes. Prints wall seconds, those of all processors, and those of
the parts.
"""

from __future__ import annotations

import time

import numpy as np

from tl.decision.evidence import Amount, Backbone
from tl.evidence import FLIPPED, StageFeatures, measure

ROWS = 2_000
STAGES = {"stage0": 32, "stage1": 24, "stage2": 32, "stage3": 96, "stage4": 320}
FEATURES, SOURCE_CLASSES = 1_280, 1_000
SIGNAL = 0.4


def made_up(classes: int) -> StageFeatures:
    """Gaussian classes; the first rows are flipped by adding noise."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(ROWS) % classes)

    def rows(size: int) -> np.ndarray:
        centres = SIGNAL * rng.normal(size=(classes, size))
        return (centres[labels] + rng.normal(size=(ROWS, size))).astype(np.float32)

    features = rows(FEATURES)
    flipped = features[:FLIPPED] + rng.normal(size=(FLIPPED, FEATURES)).astype(np.float32)
    return StageFeatures(
        labels,
        {name: rows(size) for name, size in STAGES.items()},
        features,
        flipped={"horizontal": flipped, "vertical": flipped},
        logits=rng.normal(size=(ROWS, SOURCE_CLASSES)).astype(np.float32),
    )


def main() -> None:
    """Measure each number of classes once."""
    for classes in (10, 100, 1_000):
        found = made_up(classes)
        each = ROWS // classes
        amount = Amount(ROWS, classes, each, each, each, 0, 0)
        backbone = Backbone("made up", 1, (*STAGES, "head"), True, False, True, 224)
        wall, processor = time.perf_counter(), time.process_time()
        evidence = measure(found, amount, backbone, seed=0)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        parts = ", ".join(f"{part} {value:.1f}" for part, value in evidence.seconds.items())
        print(
            f"{ROWS:,} images, {classes:,} classes: {wall:.1f} s, {processor:.1f} s of processors "
            f"({parts})",
            flush=True,
        )


if __name__ == "__main__":
    main()
