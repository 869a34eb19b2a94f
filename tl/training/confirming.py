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

from tl import display
from tl.config import ActivationsConfig
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
        correct: Of each validation image, in the order of the table, whether its label was found.
    """

    method: str
    trained: int
    seconds: float
    correct: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """Share of the validation images, in [0, 1]."""
        return sum(self.correct) / len(self.correct)


@dataclass(frozen=True)
class Confirmed:
    """Outcome of the comparison of a choice and its neighbour.

    Args:
        kept: `choice` or `neighbour`.
        choice: Method.
        neighbour: Method.
        choice_accuracy: On val, in [0, 1].
        neighbour_accuracy: Likewise.
        difference: Accuracy of the choice minus that of the neighbour.
        error: Standard error of that paired difference.
        images: Validation images.
        why: One sentence with these numbers.
    """

    kept: str
    choice: str
    neighbour: str
    choice_accuracy: float
    neighbour_accuracy: float
    difference: float
    error: float
    images: int
    why: str

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
    trainer: Mapping[str, Any],
    callbacks: Mapping[str, Any],
    cache: ActivationsConfig,
    seed: int,
) -> Tried:
    """Train a copy of the model for a quarter of the epochs; `built` stays as it is.

    What was tried before an interruption is read from the folder, or goes on where it stopped.

    Args:
        name: For people: `choice` or `neighbour`.
        plan: With its full number of epochs.
        built: The model in its starting weights.
        images: Train and val are used.
        folder: For checkpoints and the outcome.
        trainer: As in `tl.training.run_plan`, like what follows.
        callbacks: Likewise.
        cache: Likewise.
        seed: Likewise.
    """
    if (folder / RESULT).is_file():
        return _read(folder / RESULT)
    short = replace(plan, phases=tuple(replace(p, epochs=_part(p.epochs)) for p in plan.phases))
    epochs = sum(p.epochs for p in short.phases)
    method = plan.method.rpartition(": ")[2]  # without "auto: "
    display.say(f"trying the {name}, {method}: at most {epochs} epochs\n")
    fit = run_plan(
        short,
        copy.deepcopy(built),
        images,
        folder=folder,
        trainer=trainer,
        callbacks=callbacks,
        cache=cache,
        seed=seed,
    )
    with closing(fit.predict):
        probabilities, labels = fit.predict("val")
    correct = (probabilities.argmax(dim=1) == labels).tolist()
    tried = Tried(method, fit.trainable_parameters, round(fit.seconds, 3), tuple(correct))
    _write(folder / RESULT, tried)
    return tried


def compare(choice: Tried, neighbour: Tried) -> Confirmed:
    """The better of two by more than one standard error of the paired difference, else the cheaper.

    Cheaper is what trains fewer parameters; where both train as many, the choice stays.

    Example:
        >>> one = Tried("full", 1000, 9.0, (True,) * 20)
        >>> two = Tried("linear_probe", 10, 1.0, (True,) * 14 + (False,) * 6)
        >>> compare(one, two).kept
        'choice'
    """
    differences = np.subtract(choice.correct, neighbour.correct, dtype=np.float64)
    images = len(differences)
    mean = float(differences.mean())
    # So few images decide nothing.
    enough = images >= LEAST_IMAGES
    error = float(differences.std(ddof=1)) / math.sqrt(images) if enough else 1.0
    clear = abs(mean) > error * (1 + 1e-9)
    cheaper = "neighbour" if neighbour.trained < choice.trained else "choice"
    kept = ("choice" if mean > 0 else "neighbour") if clear else cheaper
    tried = {"choice": choice, "neighbour": neighbour}
    other = tried["neighbour" if kept == "choice" else "choice"]
    figures = (
        f"{100 * tried[kept].accuracy:.1f} % against {100 * other.accuracy:.1f} % of {images:,} "
        f"validation images, standard error of the difference {100 * error:.1f} points"
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
        choice.accuracy,
        neighbour.accuracy,
        mean,
        error,
        images,
        why,
    )


def uncompared(choice: str, neighbour: str, *, reason: str) -> Confirmed:
    """The choice stays because its neighbour cannot be tried."""
    return Confirmed("choice", choice, neighbour, 0.0, 0.0, 0.0, 0.0, 0, f"not compared: {reason}")


def announce(confirmed: Confirmed) -> None:
    """Say what the comparison found, and what the job goes on with."""
    both = {"choice": confirmed.choice, "neighbour": confirmed.neighbour}
    reached = {"choice": confirmed.choice_accuracy, "neighbour": confirmed.neighbour_accuracy}
    rows = {name: f"{both[name]}: {100 * reached[name]:.1f} % of val" for name in both}
    if not confirmed.images:
        rows = {}
    display.facts(
        "choice and neighbour compared",
        {**rows, "kept": f"{both[confirmed.kept]}: {confirmed.why}"},
    )


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
        return Tried(**{**values, "correct": tuple(values["correct"])})
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
