"""The boundaries of the decision table, and the names of its rows."""

from __future__ import annotations

from dataclasses import dataclass

TIERS = ("tiny", "small", "medium", "large")
SIMILAR, DIFFERENT, UNKNOWN = "similar", "different", "unknown"


@dataclass(frozen=True)
class Thresholds:
    """Where one cell of the table ends and the next begins.

    Published figures stand behind `tiny`, `quality` and `strong`; the others are defaults
    of our own. `benchmarks/regret.py` can fit them, a data set left out at a time.

    Args:
        tiny: Below so many images a class, data is tiny. On VTAB-1k (ViT-B/16) a linear classifier
            beats full fine-tuning clearly only at 2.5 images a class, and never from 9.8 on.
        small: Below so many, small.
        medium: Below so many, medium.
        least_images: Fewer training images than that in all are tiny, however few the classes.
        medium_images: Fewer are at most small; 0: off.
        large_images: Fewer are at most medium; 0: off.
        errors: Standard errors by which a figure must pass its threshold.
        errors_few: The same below `few_images`, where chance alone would pass one of them often.
        quality: Below this quality of the probe on the last features the images are different: on
            VTAB-1k all 9 tasks below 0.5 gain 8.5 points or more by full fine-tuning.
        depth_gap: An earlier stage better than the last features by this much says different.
        concat_gain: All stages together better by this much say different.
        drift: Channel statistics further than this from those of the pretraining, beyond what
            chance does and their error, are foreign. Measured with three small networks of
            ImageNet: photographs 0.03 to 0.07, the same in grey or as negatives 0.08 to 0.12;
            edges, black and white, 32 pixels enlarged, surfaces, hands before a plain wall 0.22 to
            0.43; scanned digits 0.5, noise 1.0; photographs at 128 instead of 224 pixels 0.14.
        few_images: With fewer training images `errors_few` holds.
        enough: Quality beyond which, less its error, a linear classifier is all that similar images
            need, so little is left to gain; None: off.
        chance: Labels that as many permutations fit as well as the true ones say nothing.
        chance_images: With fewer images that cannot be told.
        flip_drop: A flip that costs the probe this much destroys classes.
        vflip_drop: An up-down flip that costs less is worth having: the images have no up.
        val_images: With fewer validation images no epoch is chosen by them.
        val_least: Likewise, of the smallest class.
        batch_norm_images: With fewer training images BatchNorm keeps its statistics: with 1,000, a
            head that was trained by the old ones was better off (docs/decision-table.md).
        batch_norm_batch: Likewise, images per step.
        small_side: Images whose median side is at most so many pixels are small.
        small_input: Side of the input at which small images are read where all stages of a network
            with BatchNorm train, in pixels: as good as 224 there, in half the time. BiT reads
            images below 96 pixels at 128, which was worse (docs/decision-table.md).
        strong: Images from which on mixup pays (BiT, Kolesnikov et al. 2020, arXiv:1912.11370).
    """

    tiny: float = 5
    small: float = 20
    medium: float = 100
    least_images: int = 20
    medium_images: int = 0
    large_images: int = 0
    errors: float = 1.0
    errors_few: float = 2.0
    quality: float = 0.5
    depth_gap: float = 0.02
    concat_gain: float = 0.05
    drift: float = 0.2
    few_images: int = 64
    enough: float | None = 0.9
    chance: float = 0.05
    chance_images: int = 40
    flip_drop: float = 0.02
    vflip_drop: float = 0.005
    val_images: int = 50
    val_least: int = 2
    batch_norm_images: int = 10_000
    batch_norm_batch: int = 16
    small_side: int = 64
    small_input: int = 160
    strong: int = 20_000

    def bounds(self) -> tuple[float, float, float]:
        """Images a class where small, medium and large begin."""
        return self.tiny, self.small, self.medium

    def images(self) -> tuple[int, int, int]:
        """Images in all that small, medium and large need."""
        return self.least_images, self.medium_images, self.large_images
