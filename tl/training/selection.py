"""Which features of which stages a head on all stages reads: a choice from train alone.

After Head2Toe (Evci et al. 2022, arXiv:2201.03529): rank features by how well they tell the classes
apart, keep a share of them, and let cross-validation on train choose the share. With few images the
last features alone are hard to beat, so anything else must be better beyond its error.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from tl import ranks
from tl.data.datamodule import ImageDataModule
from tl.data.views import CLEAN
from tl.files import replacing
from tl.models import StageClassifier
from tl.models.stage_head import join
from tl.module import TrainingError
from tl.training.cached import CachedDataModule
from tl.training.probing import evaluating
from tl.training.standins import classes_of

FILE = "features.json"
FOLDS = 4
MOST = 500  # images that the cross-validation reads
ROW_NORM, ITERATIONS = 10.0, 40  # of its logistic regressions, with a penalty of 1
SHARES = (0.5, 0.2, 0.05)
BOLD = 40  # images; an error that fewer of them estimate says too little to leave features out
FEWEST = 16  # features that a share keeps at least
# What a stage says of the spread of each of its features is worth so many images. By measurement
# (4 photographs, 2 classes), each feature's own spread alone cost 12 points of accuracy.
PRIOR_IMAGES = 30.0
# Sum of the standard deviations of what is kept. AdamW moves each weight by about its rate, so the
# logits move in proportion to this sum, whatever the number of features.
SPREAD = 256.0

Array = NDArray[np.float64]
Indices = NDArray[np.int64]


def select_features(
    model: StageClassifier,
    data: ImageDataModule,
    cached: CachedDataModule | None,
    device: torch.device,
    folder: Path,
) -> Selection:
    """Let a head on all stages read the features that serve it best; the choice is kept on disk.

    Args:
        model: Its buffers are set.
        data: The clean images of train decide.
        cached: Where the phase reads the cache.
        device: Where to compute what is not in the cache.
        folder: `checkpoints/` of the run.

    Raises:
        TrainingError: The choice cannot be written.
    """
    found = ranks.on_first(Selection.read)(folder)
    if found is None or len(found.mean) != len(model.features.mean):
        labels = classes_of(data.table, data.table.split("train"))
        chosen = _sample(labels, np.random.default_rng(data.seed))
        if cached is not None:
            reading = cached.reading
            view = reading.rows["train"][CLEAN]
            features = join([view.gather(name, chosen) for name in reading.names])
        else:
            features = _computed(model, data, chosen, device)
        found = _selected(features.numpy(), labels[chosen], model.sizes, data.seed, folder)
    with torch.no_grad():
        model.features.mean.copy_(torch.tensor(found.mean))
        model.features.scale.copy_(torch.tensor(found.scale))
    return found


@ranks.on_first
def _selected(
    features: NDArray[np.floating],
    labels: Indices,
    sizes: Mapping[str, int],
    seed: int,
    folder: Path,
) -> Selection:
    found = select(features, labels, sizes, seed=seed)
    found.write(folder)
    return found


@torch.inference_mode()
def _computed(
    model: StageClassifier, data: ImageDataModule, chosen: Indices, device: torch.device
) -> Tensor:
    """Features (N, D) of some clean images of train."""
    subset = Subset(data.dataset("train", augment=False), chosen.tolist())
    parts = []
    with evaluating(model, device):
        for batch in DataLoader(subset, batch_size=data.batch_size):
            images = batch["image"].to(device).contiguous(memory_format=torch.channels_last)
            outputs = model.backbone(images)
            parts.append(join([outputs[place] for place in model.places]).cpu())
    return torch.cat(parts)


@dataclass(frozen=True)
class Selection:
    """What the head reads.

    Args:
        choice: In words.
        mean: (features,), of the training images.
        scale: (features,), zero for what is left out.
        kept: Stage to the number of its features that are kept and that it has.
        losses: Candidate to its held-out Brier score, in [0, 2].
        images: Training images that decided.
    """

    choice: str
    mean: list[float]
    scale: list[float]
    kept: dict[str, tuple[int, int]]
    losses: dict[str, float]
    images: int

    def facts(self) -> dict[str, str]:
        """What a person should know."""
        parts = ", ".join(f"{n} of {of} {stage}" for stage, (n, of) in self.kept.items() if n)
        ranked = sorted(self.losses, key=self.losses.__getitem__)
        shown = dict.fromkeys([self.choice, next(iter(self.kept)), *ranked])
        scores = [f"{self.losses[name]:.3f} {name}" for name in [*shown][:4] if self.losses]
        return {
            "choice": f"{self.choice}: {parts}",
            "why": f"held-out Brier score {', '.join(scores)}; more than the last features must "
            "be better beyond its error"
            if scores
            else "too few images to compare",
            "images": f"{self.images:,} of train",
        }

    def write(self, folder: Path) -> None:
        """Keep it for a resumed run.

        Raises:
            TrainingError: The file cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(folder / FILE) as part:
                part.write_text(json.dumps(asdict(self)))
        except OSError as error:
            msg = f"cannot write {folder / FILE} ({error}); free some space, then use resume="
            raise TrainingError(msg) from error

    @classmethod
    def read(cls, folder: Path) -> Selection | None:
        """What `write` kept; None where there is none."""
        try:
            values = json.loads((folder / FILE).read_text())
            return cls(**{**values, "kept": {k: tuple(v) for k, v in values["kept"].items()}})
        except (OSError, ValueError, KeyError, TypeError):
            return None


def select(
    features: NDArray[np.floating], labels: Indices, sizes: Mapping[str, int], *, seed: int = 0
) -> Selection:
    """Choose features by cross-validation.

    Args:
        features: (N, D), clean images of train.
        labels: Class indices (N,).
        sizes: Name of each block of columns to its width, in their order; the first is what the
            head of the network reads.
        seed: Of the folds.
    """
    values = np.asarray(features, np.float64)
    blocks = _blocks(sizes)
    mean, spread = scaling(values, blocks)
    scaled = (values - mean) * np.where(spread > 0, 1 / np.where(spread > 0, spread, 1), 0.0)
    losses = _held_out(scaled, labels, blocks, seed)
    choice = choose(losses, first=next(iter(sizes)))
    kept = _columns(choice, scaled, labels, blocks) & (spread > 0)
    total = float(scaled[:, kept].std(axis=0).sum()) or 1.0
    factor = np.where(kept, SPREAD / total / np.where(spread > 0, spread, 1), 0.0)
    return Selection(
        choice=choice,
        mean=mean.tolist(),
        scale=factor.tolist(),
        kept={name: (int(kept[part].sum()), sizes[name]) for name, part in blocks.items()},
        losses={name: float(loss.mean()) for name, loss in losses.items()},
        images=len(labels),
    )


def scaling(values: Array, blocks: Mapping[str, slice]) -> tuple[Array, Array]:
    """Mean and spread of each feature (D,); the spread leans on that of its stage.

    With few images the spread of a single feature is mostly chance, and dividing by it lifts what
    hardly varies. A stage whose features are constant has spread 0.
    """
    number = len(values)
    mean, variance = values.mean(axis=0), values.var(axis=0)
    for part in blocks.values():
        own = variance[part]
        level = own.mean()
        tiny = level <= 1e-12 * max(float((mean[part] ** 2).mean()), 1e-30)
        own = (number * own + PRIOR_IMAGES * level) / (number + PRIOR_IMAGES)
        variance[part] = 0.0 if tiny else own
    return mean, np.sqrt(variance)


def choose(losses: Mapping[str, Array], *, first: str) -> str:
    """The candidate to take.

    The best concatenation beyond one standard error of the paired difference to the last features;
    anything that leaves the last features out, wholly or mostly, must be better by two, and counts
    only where there are enough images to know an error.

    Args:
        losses: Candidate to the loss of each image.
        first: Name of the last features.
    """
    if first not in losses:
        return first
    safe = [n for n in losses if n.startswith(first) or n == _share_name(SHARES[0])]
    best = _better(losses, first, min(safe, key=lambda n: losses[n].mean()), errors=1.0)
    if len(losses[first]) < BOLD:
        return best
    return _better(losses, best, min(losses, key=lambda n: losses[n].mean()), errors=2.0)


def _better(losses: Mapping[str, Array], old: str, new: str, *, errors: float) -> str:
    gain = losses[old] - losses[new]
    error = float(gain.std(ddof=1)) / len(gain) ** 0.5
    return new if gain.mean() > errors * error else old


def _sample(labels: Indices, rng: np.random.Generator) -> Indices:
    """At most `MOST` rows, the classes in turn."""
    order = rng.permutation(len(labels))
    turn = np.zeros(len(labels), np.int64)
    for label in np.unique(labels):
        own = order[labels[order] == label]
        turn[own] = np.arange(len(own))
    found: Indices = np.sort(order[np.argsort(turn[order], kind="stable")][:MOST])
    return found


def _blocks(sizes: Mapping[str, int]) -> dict[str, slice]:
    ends = np.cumsum([0, *sizes.values()]).tolist()
    return {name: slice(a, b) for name, (a, b) in zip(sizes, pairwise(ends), strict=True)}


def _share_name(share: float) -> str:
    return f"{share:.0%} of all stages"


def _unions(blocks: Mapping[str, slice]) -> dict[str, tuple[str, ...]]:
    """Each stage alone, and the last features with ever more of the stages below them."""
    first, *stages = blocks
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in blocks}
    for number in range(1, len(stages) + 1):
        names = (first, *reversed(stages[-number:]))
        found[" + ".join(names)] = names
    return found


def _columns(
    choice: str, scaled: Array, labels: Indices, blocks: Mapping[str, slice]
) -> NDArray[np.bool_]:
    """Which features a candidate keeps (D,)."""
    kept = np.zeros(scaled.shape[1], bool)
    unions = _unions(blocks)
    if choice in unions:
        for name in unions[choice]:
            kept[blocks[name]] = True
        return kept
    share = next(share for share in SHARES if _share_name(share) == choice)
    order = np.argsort(-relevance(scaled, labels), kind="stable")
    kept[order[: max(FEWEST, round(share * len(order)))]] = True
    return kept


def relevance(scaled: Array, labels: Indices) -> Array:
    """How well each feature alone tells the classes apart: between over within variance (D,).

    Head2Toe ranks by the group lasso; by measurement on small sets this was as good or better.
    """
    mean = scaled.mean(axis=0)
    between, within = np.zeros_like(mean), np.zeros_like(mean)
    for label in np.unique(labels):
        rows = scaled[labels == label]
        centre = rows.mean(axis=0)
        between += len(rows) * (centre - mean) ** 2
        within += ((rows - centre) ** 2).sum(axis=0)
    floor = 1e-3 * float((between + within).mean()) + 1e-12
    found: Array = between / (within + floor)
    return found


def _held_out(
    scaled: Array, labels: Indices, blocks: Mapping[str, slice], seed: int
) -> dict[str, Array]:
    """Brier score of each image by classifiers that have not seen it, for each candidate.

    Empty where some class has a single image.
    """
    counts = np.bincount(labels)
    folds = min(FOLDS, int(counts[counts > 0].min()))
    if folds < 2 or np.count_nonzero(counts) < 2:
        return {}
    cuts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    unions, shares = _unions(blocks), [_share_name(share) for share in SHARES]
    kernels = {name: scaled[:, part] @ scaled[:, part].T for name, part in blocks.items()}
    losses = {name: np.zeros(len(labels)) for name in (*unions, *shares)}
    targets = np.eye(len(counts))[labels]
    with threadpool_limits(1):  # the matrices are small: waking threads takes longer
        for train, test in cuts.split(scaled, labels):
            for name, loss in losses.items():
                if name in unions:
                    kernel = np.sum([kernels[block] for block in unions[name]], axis=0)
                else:
                    kept = scaled[:, _columns(name, scaled[train], labels[train], blocks)]
                    kernel = kept @ kept.T
                found = _probabilities(kernel, labels, train, test)
                loss[test] = ((found - targets[test]) ** 2).sum(axis=1)
    return losses


def _probabilities(kernel: Array, labels: Indices, train: Indices, test: Indices) -> Array:
    """Of a logistic regression in the span of its rows, which is small where they are few.

    Args:
        kernel: Products of all rows (N, N).
        labels: Class indices (N,).
        train: Rows to fit.
        test: Rows to judge.

    Returns:
        (test, classes).
    """
    classes, seen = int(labels.max()) + 1, labels[train]
    own, others = kernel[np.ix_(train, train)], kernel[np.ix_(test, train)]
    mean = own.mean(axis=0)
    others = others - others.mean(axis=1, keepdims=True) - mean + mean.mean()
    own = own - mean - mean[:, None] + mean.mean()
    values, vectors = np.linalg.eigh(own)
    good = values > max(float(values[-1]), 1e-9) * 1e-6
    if not good.any():  # nothing tells the images apart
        return np.tile(np.bincount(seen, minlength=classes) / len(seen), (len(test), 1))
    root = np.sqrt(values[good])
    size = ROW_NORM / float(np.sqrt((root**2).sum() / len(train)))
    rows, others = vectors[:, good] * (root * size), others @ vectors[:, good] * (size / root)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(max_iter=ITERATIONS, tol=1e-3).fit(rows, seen)
    found = np.zeros((len(test), classes))
    found[:, model.classes_] = model.predict_proba(others)
    return found
