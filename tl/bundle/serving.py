"""A bundle as MLflow calls it: tables of base64 text in, tables of answers out."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .images import ImageError
from .reader import Bundle, BundleError, listed

if TYPE_CHECKING:
    import pandas as pd


def _load_pyfunc(path: str) -> Pyfunc:
    """Entry point of MLflow: `loader_module` in `MLmodel` names this file."""
    return Pyfunc(Bundle.load(path))


class Pyfunc:
    """A bundle as `mlflow.pyfunc` calls it."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:  # noqa: ARG002
        """Columns label, score and probabilities of each image.

        With several labels an image: labels, scores and probabilities. With a number: value.

        Args:
            model_input: Table with a column `image`, or a list of its cells: base64 text, file
                contents, or a path (not in a server); or uint8 arrays of (height, width, 3).
            params: None are known.

        Raises:
            MlflowException: Bad input; a server answers with status 400 and the reason.
        """
        import pandas as pd

        try:
            sources = [_cell(value, i) for i, value in enumerate(_cells(model_input))]
            answers = self._bundle.answers(sources)
        except (BundleError, ImageError) as error:
            from mlflow.exceptions import MlflowException

            raise MlflowException.invalid_parameter_value(str(error)) from error
        classes, outputs = self._bundle.classes, self._bundle.outputs
        rows = [outputs.row(answer, classes, 0) for answer in answers]
        columns = [name for name in outputs.columns if name != "top"]
        if outputs.task != "regression":
            columns.append("probabilities")
            for row, answer in zip(rows, answers.astype(float).tolist(), strict=True):
                row["probabilities"] = dict(zip(classes, answer, strict=True))
        return pd.DataFrame(rows, columns=columns)


def _cells(model_input: Any) -> Sequence[Any]:
    columns = getattr(model_input, "columns", None)
    if columns is not None or isinstance(model_input, Mapping):
        names = list(model_input if columns is None else columns)
        if "image" not in names:
            raise BundleError(
                f"the input must have a column image, got {', '.join(map(str, names))}"
            )
        # MLflow packs a mapping of lists into a table of one row that holds the lists.
        column = listed(model_input["image"])
        return [c for cell in column for c in (cell if isinstance(cell, list) else [cell])]
    return listed(model_input)


def _cell(value: Any, index: int) -> Any:
    """A source for `Bundle.probabilities`; base64 text becomes the file's contents."""
    if not isinstance(value, str):
        return value
    # A server must not open files that a stranger names.
    serving = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT" in os.environ
    if not serving and len(value) < 4096 and Path(value).is_file():
        return value
    try:
        text = value.partition(",")[2] if value.startswith("data:") else value
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        reason = "not base64 text" if serving else "neither base64 text nor a file that exists"
        raise ImageError(f"image {index}", reason) from error
