"""Is the challenger worse than the champion? Asked of the champion's own test images."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tl.bundle import Bundle, BundleError, ImageError
from tl.config import Task
from tl.evaluation import PairingError, PairResult, aligned, not_worse, predictions_table
from tl.registry.errors import NotPromotedError, RegistryError
from tl.registry.images import Finder, Found
from tl.registry.store import Registry, asking
from tl.registry.versions import call

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

PREDICTIONS, TRAINED_ON = "predictions.parquet", "train_images.parquet"
NAMES = {"acc": "accuracy", "map": "mAP", "mae": "mean absolute error"}
CONFIDENCE = 0.95  # one-sided


@dataclass(frozen=True)
class Judgement:
    """What the images say of a challenger and the champion.

    Args:
        result: Challenger (a) against champion (b).
        metric: `acc`, `map` or `mae`.
        split: Of the champion's images: `test`, or `val` where it had no test.
        margin: How much worse the challenger may be.
        passed: Whether it is not worse by more, with the confidence.
        predicted: Images that the challenger's bundle looked at for this.
        left_out: Images that the challenger knew from its training.
    """

    result: PairResult
    metric: str
    split: str
    margin: float
    passed: bool
    predicted: int = 0
    left_out: int = 0

    def words(self) -> list[str]:
        """The figures, and what to know of them; one sentence each."""
        r = self.result
        worst = -r.high if self.metric == "mae" else r.low
        difference = -r.difference if self.metric == "mae" else r.difference
        allowed = f"{self.margin:g}"
        if self.metric == "mae":
            allowed = f"{100 * self.margin:g} % of {self._text(r.b)}"
        said = [
            f"{NAMES[self.metric]} {self._text(r.a)} against the champion's {self._text(r.b)} on "
            f"{r.images:,} {self.split} images: {self._better(difference)}, at worst "
            f"{self._better(worst)} (95 % sure); "
            f"the margin is {allowed}"
        ]
        if self.predicted:
            said.append(f"its bundle looked at {self.predicted:,} of them now, as its run had not")
        if self.left_out:
            said.append(
                f"{self.left_out:,} of the champion's {self.split} images do not count: the "
                "challenger was trained or chosen with them"
            )
        if self.split == "val":
            said.append(
                "the champion had no test images: those of val count, with which both were chosen; "
                "data.test_fraction=0.2 in training keeps some apart"
            )
        if not self.passed and (needed := self.images_needed()):
            said.append(
                f"with about {needed:,} such images a difference like this one would do: "
                f"{r.images:,} are too few to tell"
            )
        return said

    def _better(self, difference: float) -> str:
        text = self._text(abs(difference))
        return "the same" if difference == 0 else text + (" worse" if difference < 0 else " better")

    def _text(self, value: float) -> str:
        return f"{value:.4g}" if self.metric == "mae" else f"{value:.3f}"

    def images_needed(self) -> int | None:
        """Images with which this difference would pass; None where it is beyond the margin."""
        r = self.result
        if self.metric == "mae":
            reach, room = r.high - r.difference, self.margin * r.b - r.difference
        else:
            reach, room = r.difference - r.low, r.difference + self.margin
        # An interval shrinks with the root of the number of images.
        return math.ceil(r.images * (reach / room) ** 2) if room > 0 else None


def judge(
    registry: Registry,
    challenger: ModelVersion,
    champion: ModelVersion,
    bundle: Bundle,
    *,
    margin: float,
    root: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Judgement:
    """Compare a challenger with the champion on the champion's test images.

    Args:
        registry: Where both are.
        challenger: Version that wants its place.
        champion: Version that has it.
        bundle: Of the challenger, for images that its run did not judge.
        margin: How much worse the challenger may be; see `tl.evaluation.not_worse`.
        root: Where the images are; default: where they were for the champion.
        progress: Called with (done, total) while images are predicted.

    Raises:
        RegistryError: A table of predictions is missing, or an image that it takes.
        NotPromotedError: No image is left that the challenger had not seen before.
        PairingError: They have other classes or labels.
    """
    theirs, ours = (_predictions(registry, version) for version in (champion, challenger))
    split = "test" if (theirs["split"] == "test").any() else "val"
    wanted = theirs[theirs["split"] == split].drop_duplicates("sha256").reset_index(drop=True)
    # What was chosen with an image is no judge of it, unless both were.
    fair = ours[ours["split"].isin({"test", split})].drop_duplicates("sha256")
    table = fair[fair["sha256"].isin(wanted["sha256"])]
    missing = wanted[~wanted["sha256"].isin(table["sha256"])]
    seen = 0
    if len(missing):
        known = _seen(registry, challenger, ours)
        seen = int(missing["sha256"].isin(known).sum())
        missing = missing[~missing["sha256"].isin(known)]
        if not len(missing) and not len(table):
            raise NotPromotedError(
                f"{call(challenger)} was trained or chosen with every {split} image of the "
                f"champion, {call(champion)}: on them it cannot lose. Keep test images apart, as a "
                "folder test or a column split (docs/data.md), and train it again"
            )
    if len(missing):
        sources = Finder(registry, champion, root).find(missing, Task(bundle.task), bundle.classes)
        table = pd.concat([table, _predicted(bundle, missing, sources, progress)])
    try:
        both = aligned(table.assign(split=split), wanted, split)
    except PairingError as error:
        msg = f"{call(challenger)} and the champion, {call(champion)}, cannot be compared: {error}"
        raise PairingError(msg) from error
    passed, result = not_worse(
        both.a, both.b, margin, metric=both.metric, confidence=CONFIDENCE, seed=0
    )
    return Judgement(result, both.metric, split, margin, passed, len(missing), seen)


def _predictions(registry: Registry, version: ModelVersion) -> pd.DataFrame:
    table = _artifact(registry, version, PREDICTIONS)
    if table is None:
        raise RegistryError(
            f"the run of {call(version)} ({version.run_id}) has no {PREDICTIONS} in the store: it "
            "is not wholly there yet (tl sync with its folder), or somebody removed it"
        )
    if "sha256" not in table:
        raise RegistryError(
            f"the predictions of {call(version)} (run {version.run_id}) do not say which images "
            "they are of, as those of earlier versions of tl: train it again"
        )
    return table


def _artifact(registry: Registry, version: ModelVersion, name: str) -> pd.DataFrame | None:
    """A table among the files of a version's run; None where there is none of that name."""
    run_id = version.run_id
    if not run_id:
        raise RegistryError(f"{call(version)} names no run: tl register did not make it")
    with asking(registry, f"read {name} of the run {run_id}"):
        if name not in {file.path for file in registry.client.list_artifacts(run_id)}:
            return None
        with tempfile.TemporaryDirectory(prefix="tl-promote-") as folder:
            return pd.read_parquet(registry.client.download_artifacts(run_id, name, folder))


def _seen(registry: Registry, version: ModelVersion, table: pd.DataFrame) -> Collection[str]:
    """Hashes of the images that a version was trained or chosen with."""
    trained = _artifact(registry, version, TRAINED_ON)
    if trained is None:
        raise RegistryError(
            f"the run of {call(version)} did not judge all of the champion's test images, and "
            f"nobody knows whether it was trained on the others: it has no {TRAINED_ON}. Train it "
            "again with this version of tl"
        )
    return {*trained["sha256"], *table.loc[table["split"] == "val", "sha256"]}


def _predicted(
    bundle: Bundle,
    rows: pd.DataFrame,
    sources: Found,
    progress: Callable[[int, int], None] | None,
) -> pd.DataFrame:
    """What a bundle says of images that another run has judged."""
    task = Task(bundle.task)
    try:
        outputs = bundle.answers(sources, progress=progress)
    except (BundleError, ImageError) as error:
        raise RegistryError(f"a test image cannot be predicted: {error}") from error
    index = {name: k for k, name in enumerate(bundle.classes)}
    targets: NDArray[Any]
    if task is Task.regression:
        targets = rows["target"].to_numpy()
    elif task is Task.multi:
        targets = np.zeros((len(rows), len(index)))
        for row, names in enumerate(rows["labels"]):
            targets[row, [index[name] for name in names]] = 1
    else:
        targets = np.array([index[name] for name in rows["label"]])
    return predictions_table(
        rows[["path", "split", "sha256"]],
        outputs,
        bundle.classes,
        task=task,
        targets=targets,
        thresholds=bundle.outputs.thresholds or None,
    )
