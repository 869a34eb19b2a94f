"""Find images again by the hash of their bytes."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from tl.bundle import IMAGE_SUFFIXES
from tl.config import DataConfig, DataFormat, Task, TrainConfig, validate
from tl.data import DataError, read_table
from tl.data.sources import source_format
from tl.data.stores import Images
from tl.registry.errors import RegistryError
from tl.registry.store import Registry, asking
from tl.registry.versions import call

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

Place = Path | tuple[Images, int]
NAMED = 3  # images that an error names


@dataclass(frozen=True)
class Found:
    """Images for `tl.bundle.Bundle.answers`, read when their turn comes.

    Args:
        names: For errors.
        places: A file, or an image of a table by its number.
    """

    names: list[str]
    places: list[Place]

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        """Name of an image."""
        return self.names[index]

    def source(self, index: int) -> Path | bytes:
        """A file, or the contents of one."""
        place = self.places[index]
        return place if isinstance(place, Path) else place[0].source(place[1])


class Finder:
    """The images of a version's run, wherever they still are.

    Args:
        registry: Where the run is.
        version: Whose images.
        root: Where to look; default: where they were when it was trained.
    """

    def __init__(self, registry: Registry, version: ModelVersion, root: str | None) -> None:
        self._registry, self._version, self._root = registry, version, root

    def find(self, rows: pd.DataFrame, task: Task, classes: Sequence[str]) -> Found:
        """Image of each row [path, sha256].

        Args:
            rows: Of the images.
            task: What they are labelled with.
            classes: Names of the labels.

        Raises:
            RegistryError: Some are nowhere; names them and where they were looked for.
        """
        config = self._data()
        place = Path(config.root)
        wanted: list[str] = rows["sha256"].tolist()
        found: dict[str, Place] = dict(_named(place, rows))
        left = set(wanted) - set(found)
        if left and self._root and place.is_dir():  # moved, so perhaps under other names
            found |= _hashed(place, left)
            left -= set(found)
        if left:
            found |= _of_table(config, left, task, classes)
            left -= set(found)
        if left:
            names = rows.loc[rows["sha256"].isin(left), "path"].tolist()
            some = ", ".join(map(str, names[:NAMED])) + (" and others" * (len(names) > NAMED))
            raise RegistryError(
                f"{len(left):,} of the champion's test images are needed, which the run of the "
                f"challenger did not judge, and they are no longer at {place} ({some}): say where "
                "they are with data.root=, or train the challenger with the same test images"
            )
        return Found(rows["path"].tolist(), [found[digest] for digest in wanted])

    def _data(self) -> DataConfig:
        """Settings of the data of the version's run."""
        run_id = str(self._version.run_id)
        with (
            asking(self._registry, f"read config.yaml of the run {run_id}"),
            tempfile.TemporaryDirectory(prefix="tl-promote-") as folder,
        ):
            path = self._registry.client.download_artifacts(run_id, "config.yaml", folder)
            text = Path(path).read_text(encoding="utf-8")
        try:
            config = validate(DictConfig(OmegaConf.create(text)), TrainConfig)
        except Exception as error:
            msg = f"config.yaml of {call(self._version)} (run {run_id}) cannot be read: {error}"
            raise RegistryError(msg) from error
        data = config.data
        if self._root:
            data.root = str(Path(self._root).expanduser().absolute())
        return data


def _named(root: Path, rows: pd.DataFrame) -> Iterator[tuple[str, Path]]:
    """Images that still are files of their name."""
    for name, digest in zip(rows["path"], rows["sha256"], strict=True):
        path = root / str(name)
        if path.is_file() and _digest(path) == digest:
            yield digest, path


def _hashed(root: Path, wanted: set[str]) -> dict[str, Place]:
    """Images among all files below a folder; stops when there is nothing left to look for."""
    found: dict[str, Place] = {}
    for path in sorted(root.rglob("*")):
        if len(found) == len(wanted):
            break
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            digest = _digest(path)
            if digest in wanted:
                found[digest] = path
    return found


def _of_table(
    config: DataConfig, wanted: set[str], task: Task, classes: Sequence[str]
) -> dict[str, Place]:
    """Images that lie in a table or in shards, as the run read them."""
    try:
        if source_format(config) is DataFormat.folder:
            return {}
        table = read_table(
            config, seed=0, cache_dir=None, required_splits=(), classes=classes, task=task
        )
    except DataError:
        return {}  # what is missing is said by its name
    rows = table.rows[table.rows["sha256"].isin(wanted)].drop_duplicates("sha256")
    images = Images.of_rows(table.store, rows)
    return {digest: (images, i) for i, digest in enumerate(rows["sha256"])}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
