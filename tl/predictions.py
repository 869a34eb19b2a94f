"""Predictions of many images: which files to read, and the table to write. No torch."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl.bundle import IMAGE_SUFFIXES
from tl.config import RequestError
from tl.files import replacing

if TYPE_CHECKING:
    import pandas as pd

FORMATS = (".parquet", ".csv", ".json")


class PredictError(RequestError):
    """Nothing to predict, or nowhere to write."""


def find_images(source: str) -> list[Path]:
    """Files behind a path, a folder (in depth, hidden files left out) or a glob pattern, sorted.

    A file that is named is taken whatever its ending; in a folder the ending decides.

    Raises:
        PredictError: There are none.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in path.rglob("*") if _is_image(p, path)]
    else:
        found = [Path(p) for p in glob.glob(str(path), recursive=True)]  # noqa: PTH207 - absolute patterns
        found = [p for p in found if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]
    if found:
        return sorted(found)
    kind = "no images in the folder" if path.is_dir() else "no file, folder or pattern with images:"
    msg = f"source: {kind} {source} (endings: {' '.join(sorted(IMAGE_SUFFIXES))})"
    raise PredictError(msg)


def _is_image(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()


def output_path(output: str | None, folder: str | None) -> Path | None:
    """File to write, or None; its folder exists afterwards.

    Raises:
        PredictError: The format is unknown, or the folder cannot be made.
    """
    if output is None:
        if folder is None:
            return None
        output = "predictions.parquet"
    path = Path(folder or ".", output).expanduser()
    if path.suffix.lower() not in FORMATS:
        msg = f"output: {output} must end in {', '.join(FORMATS)}"
        raise PredictError(msg)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        msg = f"output: cannot make {path.parent}: {error.strerror}"
        raise PredictError(msg) from error
    return path


def write_predictions(table: pd.DataFrame, path: Path) -> None:
    """Write a table of predictions; the ending of the file names the format.

    In CSV the best classes of column `top` are `class:probability` with `|` between them, as are
    several labels and their scores.

    Raises:
        PredictError: The file cannot be written.
    """
    kind = path.suffix.lower()
    try:
        with replacing(path) as part:
            if kind == ".parquet":
                rows = table.copy()
                if "top" in rows:
                    top = rows["top"].map(lambda t: [{"label": c, "score": p} for c, p in t])
                    rows["top"] = top
                rows.to_parquet(part, index=False)
            elif kind == ".csv":
                _flat(table).to_csv(part, index=False)
            else:
                table.to_json(part, orient="records", indent=1, force_ascii=False)
    except OSError as error:
        msg = f"output: cannot write {path}: {error.strerror or error}"
        raise PredictError(msg) from error


def _flat(table: pd.DataFrame) -> pd.DataFrame:
    """The table with texts in place of lists."""
    texts: dict[str, Any] = {}
    if "top" in table:
        texts["top"] = ["|".join(f"{c}:{p:.6f}" for c, p in top) for top in table["top"]]
    if "labels" in table:
        texts["labels"] = table["labels"].map("|".join)
        texts["scores"] = table["scores"].map(lambda scores: "|".join(f"{p:.6f}" for p in scores))
    return table.assign(**texts)
