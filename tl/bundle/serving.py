"""A bundle as MLflow calls it: images as text, paths or arrays in, tables of answers out."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .images import ImageError
from .reader import Bundle, BundleError, listed

if TYPE_CHECKING:
    import pandas as pd

# In a server, the folder whose files a request may name; without it, none.
FILES = "TL_SERVE_FILES"
LONGEST_PATH = 4096


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
                contents, a path (in a server only below the folder that TL_SERVE_FILES names), or
                an array of (height, width, 3), as nested lists too; an array of (images, height,
                width, 3) is as many images.
            params: None are known.

        Raises:
            MlflowException: Bad input; a server answers with status 400 and the reason.
        """
        import pandas as pd

        try:
            sources = [_source(value, i) for i, value in enumerate(_cells(model_input))]
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


def _cells(model_input: Any) -> list[Any]:
    """One value for each image."""
    columns = getattr(model_input, "columns", None)
    if columns is not None or isinstance(model_input, Mapping):
        names = list(model_input if columns is None else columns)
        if "image" not in names:
            raise BundleError(
                f"the input must have a column image, got {', '.join(map(str, names))}"
            )
        model_input = model_input["image"]
    values = list(_unpacked(listed(model_input)))
    # MLflow takes a lone array of (height, width, 3) for a table of as many rows as it is high.
    rows = [v for v in values if isinstance(v, np.ndarray) and v.ndim == 2 and v.shape[1] == 3]
    if rows and len(rows) == len(values) and len({row.shape for row in rows}) == 1:
        return [np.stack(rows)]
    return values


def _unpacked(values: Any) -> Iterator[Any]:
    """Images from lists of them, however deep: MLflow packs a column into a table of one row."""
    for value in values:
        # A list of texts is a list of images, one of numbers an array.
        if isinstance(value, (list, tuple)) and not isinstance(_first(value), (int, float)):
            yield from _unpacked(value)
            continue
        found = value
        if isinstance(value, (list, tuple)):
            try:
                found = np.array(value)
            except ValueError as error:
                raise ImageError("image", "an array whose rows differ in length") from error
        if isinstance(found, np.ndarray) and (found.ndim == 4 or found.dtype == object):
            yield from _unpacked(found)
        else:
            yield found


def _first(value: Any) -> Any:
    """The first number or text within nested lists; None within empty ones."""
    while isinstance(value, (list, tuple, np.ndarray)):
        value = value[0] if len(value) else None
    return value


def _source(value: Any, index: int) -> Any:
    """A source for `Bundle.answers`; base64 text becomes the file's contents."""
    if isinstance(value, np.ndarray):
        return _pixels(value, index)
    if not isinstance(value, str):
        return value
    if len(value) < LONGEST_PATH and (path := _file(value)) is not None:
        return path
    try:
        text = value.partition(",")[2] if value.startswith("data:") else value
        return base64.b64decode("".join(text.split()), validate=True)
    except ValueError as error:
        reason = "neither base64 text nor a file that exists"
        if _is_server():
            reason = f"neither base64 text nor a file in the folder that {FILES} names"
            if not os.environ.get(FILES):
                reason = f"not base64 text, and a server without {FILES} opens no files"
        raise ImageError(f"image {index}", reason) from error


def _pixels(array: NDArray[Any], index: int) -> NDArray[np.uint8]:
    """An image from numbers that came through JSON, which knows no uint8."""
    name = f"image {index}"
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ImageError(name, f"an array must be (height, width, 3), got {array.shape}")
    if array.dtype.kind not in "iu":
        wanted = "an array must hold whole numbers from 0 to 255"
        raise ImageError(name, f"{wanted}, got {array.dtype}, such as {array.flat[0]}")
    if array.min() < 0 or array.max() > 255:
        found = f"{array.min()} to {array.max()}"
        raise ImageError(name, f"an array must hold numbers from 0 to 255, got {found}")
    return array.astype(np.uint8)


def _file(text: str) -> Path | None:
    """The file of that name, where there is one and it may be opened."""
    try:
        path = Path(text)
        if not _is_server():
            return path if path.is_file() else None
        if not os.environ.get(FILES):
            return None
        # Resolved, so that neither `..` nor a link leads out of the folder.
        folder = Path(os.environ[FILES]).resolve()
        path = (folder / path).resolve()
        return path if path.is_relative_to(folder) and path.is_file() else None
    except (OSError, ValueError):  # base64 text that is too long for a name, or holds a NUL
        return None


def _is_server() -> bool:
    """Whether strangers may be asking: a server must not open files that they name.

    `mlflow models predict` marks its process like a server, but its user is at the keyboard.
    """
    if "_MLFLOW_IS_IN_SERVING_ENVIRONMENT" not in os.environ:
        return False
    program, *arguments = sys.argv or [""]
    if Path(program).name == "_mlflow_pyfunc_backend_predict.py":
        return False
    by_mlflow = Path(program).name == "mlflow" or Path(program).parent.name == "mlflow"
    return not (by_mlflow and arguments[:2] == ["models", "predict"])
