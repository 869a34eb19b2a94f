"""What was measured of a data set with a backbone, as plain values: the input of the decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Score:
    """A figure and its standard error, both in the unit that its place says."""

    value: float
    error: float

    def interval(self) -> tuple[float, float]:
        """About 95 %: two standard errors to either side."""
        return self.value - 2 * self.error, self.value + 2 * self.error


@dataclass(frozen=True)
class Amount:
    """How much data there is to learn from.

    Args:
        images: Training images; exact copies count once.
        classes: Classes.
        per_class: Median of the training images of a class.
        least: Images of the smallest class.
        most: Images of the largest class.
        val_images: Validation images.
        val_least: Validation images of the smallest class.
        more_data: Quality of the probe on all training images minus that on half of them, in
            [-1, 1]; None where half is too little to try.
        effective_rank: exp(entropy) of the spectrum of the last features (Garrido et al. 2023,
            RankMe, arXiv:2210.02885); None where nothing was measured.
        half_data: Quality on half of the training images minus that on a quarter of them; None
            where a quarter is too little to try.
    """

    images: int
    classes: int
    per_class: float
    least: int
    most: int
    val_images: int
    val_least: int
    more_data: Score | None = None
    effective_rank: float | None = None
    half_data: Score | None = None


@dataclass(frozen=True)
class StageScore:
    """How well simple classifiers separate the classes by the pooled features of a stage.

    Args:
        stage: `stage0` … `stage4`; the last entry of a list is `features`, what the head reads.
        size: Features.
        probe: Quality of a ridge classifier, cross-validated: balanced accuracy corrected for
            chance, `(a - 1/C) / (1 - 1/C)`; 0 is chance, 1 is perfect.
        knn: The same for 5 nearest neighbours by cosine, leave-one-out.
    """

    stage: str
    size: int
    probe: Score
    knn: Score


@dataclass(frozen=True)
class Similarity:
    """How much of what the backbone learned serves these images.

    Args:
        stages: From the stem to what the head reads.
        concat: Quality of the probe on all stages together.
        depth_gap: Quality of the best earlier stage minus that of the last features; its error is
            that of the paired difference.
        concat_gain: `concat` minus the quality of the last features, likewise.
        drift: Distance between the channel statistics of these images and the running statistics
            of BatchNorm: mean of ((m - m')^2 + (s - s')^2) / s'^2; None without BatchNorm.
        drift_floor: What `drift` would be by chance for so many images of the pretraining.
        source_energy: logsumexp of the pretraining's own logits, mean over images, in nats; None
            where the pretraining's head is not at hand.
        chance: Share of label permutations whose probe is at least as good as the true one: near 1
            the labels say nothing about the images.
        drift_error: Standard error of `drift`, by leaving out each image; None where it is unknown.
    """

    stages: tuple[StageScore, ...]
    concat: Score
    depth_gap: Score
    concat_gain: Score
    drift: float | None = None
    drift_floor: float | None = None
    source_energy: Score | None = None
    chance: float = 0.0
    drift_error: float | None = None

    @property
    def quality(self) -> Score:
        """Quality of the probe on what the head reads."""
        return self.stages[-1].probe

    @property
    def best_stage(self) -> str:
        """Name of the stage that separates the classes best."""
        return max(self.stages, key=lambda s: s.probe.value).stage


@dataclass(frozen=True)
class Flips:
    """Change of the probe's quality on images that are flipped; None where it was not measured.

    Negative: the flip destroys what tells the classes apart.
    """

    horizontal: Score | None = None
    vertical: Score | None = None


@dataclass(frozen=True)
class Backbone:
    """What a decision must know of the network.

    Args:
        name: timm name.
        parameters: Number of all parameters.
        stages: Names from the stem to the head.
        batch_norm: Whether it has BatchNorm.
        attention: Whether it has attention layers that low-rank adapters fit.
        pretrained: False for random weights.
        input_size: Side of the images in pixels.
    """

    name: str
    parameters: int
    stages: tuple[str, ...]
    batch_norm: bool
    attention: bool
    pretrained: bool
    input_size: int


@dataclass(frozen=True)
class Evidence:
    """All that was measured, from the training split only (but for the sizes of val).

    Args:
        amount: How much data.
        backbone: The network.
        similarity: How much of the pretraining serves; None where nothing could be measured.
        unmeasured: Why not, one sentence.
        flips: Whether flips keep the classes apart.
        native_side: Median side of the images in pixels, before any resizing.
        scores: Transferability scores that rank backbones (`logme`, `leep`, `h_score`, …); they
            grow with the number of classes and choose no method.
        seconds: What the measuring took, by part.
        warnings: Sentences about what is odd with the data.
        sampled: Images of train that were measured; `amount` counts all of them.
    """

    amount: Amount
    backbone: Backbone
    similarity: Similarity | None = None
    unmeasured: str = ""
    flips: Flips = field(default_factory=Flips)
    native_side: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    sampled: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `evidence.json` keeps them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evidence:
        """Inverse of `to_dict`."""

        def score(value: Mapping[str, float] | None) -> Score | None:
            return None if value is None else Score(**value)

        given = dict(values)
        amount = dict(given["amount"])
        for name in ("more_data", "half_data"):  # files of before have no quarters
            amount[name] = score(amount.get(name))
        similarity = given["similarity"]
        if similarity is not None:
            similarity = dict(similarity)
            similarity["stages"] = tuple(
                StageScore(s["stage"], s["size"], Score(**s["probe"]), Score(**s["knn"]))
                for s in similarity["stages"]
            )
            for name in ("concat", "depth_gap", "concat_gain", "source_energy"):
                similarity[name] = score(similarity[name])
            given["similarity"] = Similarity(**similarity)
        backbone = {**given["backbone"], "stages": tuple(given["backbone"]["stages"])}
        given["amount"], given["backbone"] = Amount(**amount), Backbone(**backbone)
        given["flips"] = Flips(**{k: score(v) for k, v in given["flips"].items()})
        given["warnings"] = tuple(given["warnings"])
        return cls(**given)
