"""What the outputs of a network mean: one class an image, several labels, or a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
class Outputs:
    """Content of `bundle.json`.

    Args:
        task: `single` (one class an image), `multi` (any number of labels), `regression` (one
            number).
        thresholds: Of `multi`: the probability from which each class counts as present, in the
            order of the classes; in [0, 1].
        mean: Of `regression`: what an output of 0 means, in units of the target.
        std: Of `regression`: what an output of 1 lies above that; above 0.

    Raises:
        ValueError: A value that no network can have.
    """

    task: str = "single"
    thresholds: tuple[float, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.task not in ACTIVATIONS:
            raise ValueError(f"task must be one of {', '.join(ACTIVATIONS)}, got {self.task}")
        if not all(0 <= t <= 1 for t in self.thresholds):
            raise ValueError(f"thresholds must be in [0, 1], got {list(self.thresholds)}")
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"std must be above 0 and mean finite, got {self.std}, {self.mean}")

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
        return {"label": None, "score": math.nan, "top": []}

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
        return {"label": classes[order[0]], "score": float(values[order[0]]), "top": top}

    def to_dict(self, classes: Sequence[str]) -> dict[str, Any]:
        """Plain values, as in `bundle.json`."""
        values: dict[str, Any] = {"task": self.task, "activation": ACTIVATIONS[self.task]}
        if self.task == "multi":
            values["thresholds"] = dict(zip(classes, self.thresholds, strict=True))
        if self._number:
            values["target"] = {"name": classes[0], "mean": self.mean, "std": self.std}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], classes: Sequence[str]) -> Outputs:
        """From `bundle.json`.

        Raises:
            ValueError: A key is missing, or a value is out of range.
        """
        task = str(values.get("task", "single"))
        try:
            if task == "multi":
                thresholds = values["thresholds"]
                return cls(task, thresholds=tuple(float(thresholds[name]) for name in classes))
            if task == "regression":
                target = values["target"]
                return cls(task, mean=float(target["mean"]), std=float(target["std"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{task} does not fit: no {error}") from error
        return cls(task)
