"""What measuring costs beyond the pass: probes, permutations, halves, scores.

    python benchmarks/evidence.py

2,000 rows of made-up features as wide as those of MobileNetV2 and of ResNet-50 (stages, and what
the head reads), with 10, 100 and 1,000 classes. Prints wall seconds, those of all processors, and
those of the parts.
"""

from __future__ import annotations

import time
from itertools import product

import numpy as np

from tl.decision.evidence import Amount, Backbone
from tl.evidence import FLIPPED, StageFeatures, measure

ROWS = 2_000
WIDTHS = {  # stem and stages, and what the head reads
    "mobilenetv2": (32, 24, 32, 96, 320, 1_280),
    "resnet50": (64, 256, 512, 1_024, 2_048, 2_048),
}
SOURCE_CLASSES = 1_000
SIGNAL = 0.4


def made_up(classes: int, widths: tuple[int, ...]) -> StageFeatures:
    """Gaussian classes; the first rows are flipped by adding noise."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(ROWS) % classes)

    def rows(size: int) -> np.ndarray:
        centres = SIGNAL * rng.normal(size=(classes, size))
        return (centres[labels] + rng.normal(size=(ROWS, size))).astype(np.float32)

    features = rows(widths[-1])
    flipped = features[:FLIPPED] + rng.normal(size=(FLIPPED, widths[-1])).astype(np.float32)
    return StageFeatures(
        labels,
        {f"stage{number}": rows(size) for number, size in enumerate(widths[:-1])},
        features,
        flipped={"horizontal": flipped, "vertical": flipped},
        logits=rng.normal(size=(ROWS, SOURCE_CLASSES)).astype(np.float32),
    )


def main() -> None:
    """Measure each network with each number of classes once."""
    for (name, widths), classes in product(WIDTHS.items(), (10, 100, 1_000)):
        found = made_up(classes, widths)
        each = ROWS // classes
        amount = Amount(ROWS, classes, each, each, each, 0, 0)
        backbone = Backbone(name, 1, (*found.stages, "head"), True, False, True, 224)
        wall, processor = time.perf_counter(), time.process_time()
        evidence = measure(found, amount, backbone, seed=0)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        parts = ", ".join(f"{part} {value:.1f}" for part, value in evidence.seconds.items())
        print(
            f"{name}, {ROWS:,} images, {classes:,} classes: {wall:.1f} s, "
            f"{processor:.1f} s of processors ({parts})",
            flush=True,
        )


if __name__ == "__main__":
    main()
