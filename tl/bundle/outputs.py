"""What the outputs of a network mean: one class an image, several labels, or a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ACTIVATIONS = {"single": "softmax", "multi": "sigmoid", "regression": "identity"}
# Outputs of `model.onnx`: what the network computes, and what it means.
NAMES = {
    "single": ("logits", "probabilities"),
    "multi": ("logits", "probabilities"),
    "regression": ("standardised", "values"),
}


@dataclass(frozen=True)
class Abstain:
    """From which score on an answer is sure.

    Args:
        precision: Share of right answers among the sure ones that was wanted, in (0, 1).
        threshold: Smallest score of a sure answer, in [0, 1]; None: val could not show any such
            threshold, and no answer is sure.
        note: One sentence for a person.

    Raises:
        ValueError: A value out of range.
    """

    precision: float
    threshold: float | None
    note: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.precision < 1:
            raise ValueError(f"abstain.precision must be in (0, 1), got {self.precision}")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"abstain.threshold must be in [0, 1] or null, got {self.threshold}")

    def sure(self, score: float) -> bool:
        """Whether an answer with this score is sure."""
        return self.threshold is not None and score >= self.threshold


@dataclass(frozen=True)
class Outputs:
    """Content of `bundle.json`.

    Args:
        task: `single` (one class an image), `multi` (any number of labels), `regression` (one
            number).
        thresholds: Of `multi`: the probability from which each class counts as present, in the
            order of the classes; in [0, 1].
        mean: Of `regression`: what an output of 0 means, in units of the target.
        std: Of `regression`: what an output of 1 lies above that; above 0.
        temperature: What the logits were divided by for the probabilities of `model.onnx`, which
            are calibrated by it; above 0. 1: as the network was trained.
        abstain: Of `single`: from which score on an answer is sure; None: nobody asked.

    Raises:
        ValueError: A value that no network can have.
    """

    task: str = "single"
    thresholds: tuple[float, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    temperature: float = 1.0
    abstain: Abstain | None = None

    def __post_init__(self) -> None:
        if self.task not in ACTIVATIONS:
            raise ValueError(f"task must be one of {', '.join(ACTIVATIONS)}, got {self.task}")
        if not all(0 <= t <= 1 for t in self.thresholds):
            raise ValueError(f"thresholds must be in [0, 1], got {list(self.thresholds)}")
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"std must be above 0 and mean finite, got {self.std}, {self.mean}")

        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")

    @property
    def names(self) -> tuple[str, str]:
        """Outputs of `model.onnx`."""
        return NAMES[self.task]

    @property
    def used(self) -> str:
        """Output of `model.onnx` from which the answers come.

        Numbers come from the standardised ones: a large mean would round the others.
        """
        return self.names[0 if self.task == "regression" else 1]

    def answers(self, used: NDArray[np.float32]) -> NDArray[Any]:
        """What `used` says: probabilities (N, classes), or numbers (N, 1)."""
        return self.mean + self.std * used.astype(np.float64) if self._number else used

    def difference(self, found: NDArray[Any], expected: NDArray[Any]) -> NDArray[np.float64]:
        """Largest difference of an image's answers, (N,): of a probability, or in units of std."""
        return np.abs(found - expected).max(axis=1) / self.std  # type: ignore[no-any-return]

    @property
    def _number(self) -> bool:
        return self.task == "regression"

    @property
    def columns(self) -> dict[str, Any]:
        """Columns of a table of predictions, and their values for an image that cannot be used."""
        if self._number:
            return {"value": math.nan}
        if self.task == "multi":
            return {"labels": [], "scores": [], "top": []}
        unsure = {"sure": False} if self.abstain else {}
        return {"label": None, "score": math.nan, **unsure, "top": []}

    def row(self, answer: NDArray[Any], classes: Sequence[str], top_k: int) -> dict[str, Any]:
        """Values of `columns` for the answer of one image, (classes,) or (1,)."""
        values = answer.astype(float)
        if self._number:
            return {"value": float(values[0])}
        order = np.argsort(-values, kind="stable")
        top = [[classes[i], float(values[i])] for i in order[:top_k]]
        if self.task == "multi":
            there = order[values[order] >= np.asarray(self.thresholds)[order]]
            return {
                "labels": [classes[i] for i in there],
                "scores": values[there].tolist(),
                "top": top,
            }
        score = float(values[order[0]])
        sure = {"sure": self.abstain.sure(score)} if self.abstain else {}
        return {"label": classes[order[0]], "score": score, **sure, "top": top}

    def to_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """Plain values, as in `bundle.json`."""
        values: dict[str, Any] = {"task": self.task, "activation": ACTIVATIONS[self.task]}
        if self.task == "multi":
            values["thresholds"] = dict(zip(classes, self.thresholds, strict=True))
        if self._number:
            values["target"] = {"name": classes[0], "mean": self.mean, "std": self.std}
        else:
            values["temperature"] = self.temperature
        if self.abstain:
            values["abstain"] = asdict(self.abstain)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], classes: Sequence[str]) -> Outputs:
        """From `bundle.json`.

        Raises:
            ValueError: A key is missing, or a value is out of range.
        """
        task = str(values.get("task", "single"))
        try:
            if task == "regression":
                target = values["target"]
                return cls(task, mean=float(target["mean"]), std=float(target["std"]))
            # Older bundles say nothing of a temperature, and have none.
            temperature = float(values.get("temperature", 1.0))
            if task == "multi":
                found = values["thresholds"]
                thresholds = tuple(float(found[name]) for name in classes)
                return cls(task, thresholds=thresholds, temperature=temperature)
            abstain = None
            if asked := values.get("abstain"):
                limit = asked["threshold"]
                limit = None if limit is None else float(limit)
                note = str(asked.get("note", ""))
                abstain = Abstain(float(asked["precision"]), limit, note)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{task} does not fit: no {error}") from error
        return cls(task, temperature=temperature, abstain=abstain)
