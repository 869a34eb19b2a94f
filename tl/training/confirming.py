"""Try two plans for a part of their epochs, and compare them on val, image by image."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import label_ranking_average_precision_score

from tl import display, ranks
from tl.config import Task
from tl.data.datamodule import ImageDataModule
from tl.files import replacing
from tl.finetuning import Plan
from tl.models import BuiltModel
from tl.module import TrainingError
from tl.training import run_plan

SHARE = 0.25  # of the epochs of each phase
RESULT = "confirm.json"
LEAST_IMAGES = 2  # below, a difference has no standard error


@dataclass(frozen=True)
class Tried:
    """What a plan reached in a part of its epochs.

    Args:
        method: Of transfer.
        trained: Most parameters that a phase trained.
        seconds: Wall time of the fits.
        scores: Of each validation image, in the order of the table, as `image_scores` gives them.
        task: Whose scores they are.
    """

    method: str
    trained: int
    seconds: float
    scores: tuple[float, ...]
    task: str = Task.single.value

    @property
    def score(self) -> float:
        """Mean over the validation images."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class Confirmed:
    """Outcome of the comparison of a choice and its neighbour.

    Args:
        kept: `choice` or `neighbour`.
        choice: Method.
        neighbour: Method.
        choice_score: Mean of its image scores on val; higher is better.
        neighbour_score: Likewise.
        difference: Score of the choice minus that of the neighbour.
        error: Standard error of that paired difference.
        images: Validation images.
        why: One sentence with these numbers.
        task: Whose scores they are.
    """

    kept: str
    choice: str
    neighbour: str
    choice_score: float
    neighbour_score: float
    difference: float
    error: float
    images: int
    why: str
    task: str = Task.single.value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `decision.json` keeps them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Confirmed:
        """Inverse of `to_dict`."""
        return cls(**values)


def try_plan(
    name: str,
    plan: Plan,
    built: BuiltModel,
    images: ImageDataModule,
    *,
    folder: Path,
    **settings: Any,
) -> Tried:
    """Train a copy of the model for a quarter of the epochs; `built` stays as it is.

    What was tried before an interruption is read from the folder, or goes on where it stopped.

    Args:
        name: For people: `choice` or `neighbour`.
        plan: With its full number of epochs.
        built: The model in its starting weights.
        images: Train and val are used.
        folder: For checkpoints and the outcome.
        settings: Those of `tl.training.run_plan`.
    """
    if ranks.agree((folder / RESULT).is_file()):
        return ranks.on_first(_read)(folder / RESULT)
    short = replace(plan, phases=tuple(replace(p, epochs=_part(p.epochs)) for p in plan.phases))
    epochs = sum(p.epochs for p in short.phases)
    method = plan.method.rpartition(": ")[2]  # without "auto: "
    display.say(f"trying the {name}, {method}: at most {epochs} epochs\n")
    fit = run_plan(short, copy.deepcopy(built), images, folder=folder, **settings)
    with closing(fit.predict):
        outputs, labels = (values.numpy() for values in fit.predict("val"))
    task = images.table.task
    scores = tuple(image_scores(outputs, labels, task).tolist())
    tried = Tried(method, fit.trainable_parameters, round(fit.seconds, 3), scores, task.value)
    ranks.on_first(_write)(folder / RESULT, tried)
    return tried


def image_scores(
    outputs: NDArray[np.floating], labels: NDArray[Any], task: Task
) -> NDArray[np.float64]:
    """A score of each image; higher is better.

    Args:
        outputs: Probabilities (N, classes) or numbers (N,).
        labels: Class indices (N,), marks (N, classes) or numbers (N,).
        task: One class: 1 where it was found, else 0. Several labels: how far they rank above the
            others, in [0, 1] (label ranking average precision). A number: minus the distance.
    """
    if task is Task.single:
        return np.asarray(outputs.argmax(axis=1) == labels, np.float64)
    if task is Task.regression:
        return np.asarray(-np.abs(outputs - labels), np.float64)
    if outputs.shape[1] == 1:  # nothing to rank
        return np.asarray(1 - np.abs(outputs - labels)[:, 0], np.float64)
    pairs = zip(labels, outputs, strict=True)
    found = [label_ranking_average_precision_score(y[None], p[None]) for y, p in pairs]
    return np.array(found, np.float64)


def compare(choice: Tried, neighbour: Tried) -> Confirmed:
    """The better of two by more than one standard error of the paired difference, else the cheaper.

    Cheaper is what trains fewer parameters; where both train as many, the choice stays.

    Example:
        >>> one = Tried("full", 1000, 9.0, (True,) * 20)
        >>> two = Tried("linear_probe", 10, 1.0, (True,) * 14 + (False,) * 6)
        >>> compare(one, two).kept
        'choice'
    """
    differences = np.subtract(choice.scores, neighbour.scores, dtype=np.float64)
    images = len(differences)
    mean = float(differences.mean())
    # So few images decide nothing.
    enough = images >= LEAST_IMAGES
    error = float(differences.std(ddof=1)) / math.sqrt(images) if enough else 1.0
    clear = enough and abs(mean) > error * (1 + 1e-9)
    cheaper = "neighbour" if neighbour.trained < choice.trained else "choice"
    kept = ("choice" if mean > 0 else "neighbour") if clear else cheaper
    tried = {"choice": choice, "neighbour": neighbour}
    other = tried["neighbour" if kept == "choice" else "choice"]
    figures = (
        f"{_said(tried[kept].score, choice.task)} against {_said(other.score, choice.task)} of "
        f"{images:,} validation images, standard error of the difference "
        + _said(error, choice.task, " points")
    )
    if clear:
        why = f"{tried[kept].method} was better than {other.method}: {figures}"
    else:
        why = f"no clear difference, so {tried[kept].method}, which trains less, stays: {figures}"
        if tried[kept].trained >= other.trained:
            why = f"no clear difference, so {tried[kept].method} stays: {figures}"
    return Confirmed(
        kept,
        choice.method,
        neighbour.method,
        choice.score,
        neighbour.score,
        mean,
        error,
        images,
        why,
        choice.task,
    )


def _said(score: float, task: str, unit: str = " %") -> str:
    """A score for people: an error of numbers, a share in percent."""
    return f"{abs(score):.4g}" if task == Task.regression.value else f"{100 * score:.1f}{unit}"


def uncompared(choice: str, neighbour: str, *, reason: str) -> Confirmed:
    """The choice stays because its neighbour cannot be tried."""
    return Confirmed("choice", choice, neighbour, 0.0, 0.0, 0.0, 0.0, 0, f"not compared: {reason}")


def announce(confirmed: Confirmed) -> None:
    """Say what the comparison found, and what the job goes on with."""
    both = {"choice": confirmed.choice, "neighbour": confirmed.neighbour}
    reached = {"choice": confirmed.choice_score, "neighbour": confirmed.neighbour_score}
    what = {Task.multi.value: "label ranking on val", Task.regression.value: "mean error on val"}
    rows = {
        name: f"{both[name]}: {_said(reached[name], confirmed.task)} "
        + what.get(confirmed.task, "of val")
        for name in both
    }
    if not confirmed.images:
        rows = {}
    display.facts(
        "choice and neighbour compared",
        {**rows, "kept": f"{both[confirmed.kept]}: {confirmed.why}"},
    )


@ranks.on_first
def clear_away(folders: Sequence[Path]) -> None:
    """Remove the weights of what was tried; the outcome and the curves stay."""
    for folder in folders:
        for path in (*folder.rglob("*.ckpt"), *folder.glob("*.safetensors")):
            path.unlink()


def _part(epochs: int) -> int:
    return max(1, round(SHARE * epochs))


def _read(path: Path) -> Tried:
    try:
        values = json.loads(path.read_text())
        return Tried(**{**values, "scores": tuple(values["scores"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{path} cannot be read ({error}): delete {path.parent}, and resume= tries it again"
        raise TrainingError(msg) from error


def _write(path: Path, tried: Tried) -> None:
    try:
        with replacing(path) as part:
            part.write_text(json.dumps(asdict(tried)))
    except OSError as error:
        msg = f"cannot write {path} ({error}); free some space, then continue with resume="
        raise TrainingError(msg) from error
