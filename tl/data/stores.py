"""Where the bytes of images are, and a lazy sequence over some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image

from tl.bundle import ImageError, open_image
from tl.bundle.images import MAX_PIXELS
from tl.data.errors import DataError


class ImageStore(Protocol):
    """Reads the bytes of one image; cheap to pickle, so that loader workers may have it."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Private columns of whole numbers in the table that say where an image lies."""

    def source(self, name: str, place: tuple[int, ...]) -> Path | bytes:
        """The file of an image where it is one, else its bytes.

        Args:
            name: Of the image, as the table has it.
            place: What the private columns say of it.

        Raises:
            OSError: It cannot be read.
        """


@dataclass(frozen=True)
class FileStore:
    """One file an image.

    Args:
        root: Folder to which the names are relative.
    """

    root: Path
    columns: tuple[str, ...] = ()

    def source(self, name: str, place: tuple[int, ...]) -> Path | bytes:  # noqa: ARG002
        """The file."""
        return self.root / name


class Images:
    """Some images of a table, read when they are asked for.

    Holds a few arrays, and no Python object a row: a million of them go to a loader worker as they
    are, and its memory does not grow.

    Args:
        store: Where the bytes are.
        rows: Rows of the table.
    """

    def __init__(self, store: ImageStore, rows: pd.DataFrame) -> None:
        self.store = store
        self._names = pa.array(rows["path"], type=pa.large_string())
        self._places: list[NDArray[Any]] = [rows[c].to_numpy(np.int64) for c in store.columns]

    @classmethod
    def of_files(cls, root: Path, names: Sequence[str]) -> Images:
        """Files below a folder, without a table."""
        return cls(FileStore(root), pd.DataFrame({"path": names}))

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """Name of an image for people."""
        return str(self._names[index].as_py())

    def source(self, index: int) -> Path | bytes:
        """The file of an image where it is one, else its bytes."""
        return self.store.source(self.name(index), tuple(int(p[index]) for p in self._places))

    def read(self, index: int) -> bytes:
        """Bytes of an image as they are stored.

        Raises:
            DataError: They are not there any more.
        """
        try:
            source = self.source(index)
            return source if isinstance(source, bytes) else source.read_bytes()
        except OSError as error:
            raise self._changed(index, (error.strerror or str(error)).lower()) from error

    def open(self, index: int, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """An upright RGB image.

        Args:
            index: Which, from 0.
            max_pixels: Larger images are refused.

        Raises:
            DataError: It went bad after the check of the table.
        """
        try:
            return open_image(self.source(index), max_pixels=max_pixels)
        except ImageError as error:
            raise self._changed(index, error.reason) from error
        except OSError as error:
            raise self._changed(index, (error.strerror or str(error)).lower()) from error

    def _changed(self, index: int, reason: str) -> DataError:
        place = getattr(self.store, "root", None)
        name = self.name(index) if place is None else place / self.name(index)
        return DataError(f"{name}: {reason}. Was it changed while the job ran?")
