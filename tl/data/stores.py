"""Where the bytes of images are, and a lazy sequence over some of them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
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

MISSING, OUTSIDE = -1, -2  # instead of a size
CHUNK = 8192  # names that are Python objects at the same time


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

    def stamps(
        self, names: pa.Array, places: Sequence[NDArray[np.int64]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Size of each image in bytes, and a number that changes when its bytes may have changed.

        Nothing is read for it. `MISSING` stands for the size of what is not there or no regular
        file, `OUTSIDE` for a link that leads out of the root of a store that forbids it.
        """


@dataclass(frozen=True)
class FileStore:
    """One file an image.

    Args:
        root: Folder to which the names are relative, absolute and without links.
        confined: Whether links that lead out of the root count as `OUTSIDE`.
    """

    root: Path
    confined: bool = False
    columns: tuple[str, ...] = ()

    def source(self, name: str, place: tuple[int, ...]) -> Path | bytes:  # noqa: ARG002
        """The file."""
        return self.root / name

    def stamps(
        self,
        names: pa.Array,
        places: Sequence[NDArray[np.int64]],  # noqa: ARG002
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Size and time of the last change, nanoseconds."""
        sizes, times = np.full(len(names), MISSING, np.int64), np.zeros(len(names), np.int64)
        start = f"{self.root}{os.sep}"
        inside: dict[str, bool] = {}  # of the folders, each of which is looked at once
        for number, name in enumerate(_each(names)):
            file = start + name
            folder = os.path.dirname(file)  # noqa: PTH120 - a million of them
            if self.confined and folder not in inside:
                inside[folder] = self._inside(folder)
            try:
                status = os.lstat(file)
                if stat.S_ISLNK(status.st_mode):
                    if self.confined and not self._inside(file):
                        sizes[number] = OUTSIDE
                        continue
                    status = os.stat(file)  # noqa: PTH116
            except (OSError, ValueError):  # a name may hold a zero byte
                continue
            if self.confined and not inside[folder]:
                sizes[number] = OUTSIDE
            elif stat.S_ISREG(status.st_mode):
                sizes[number], times[number] = status.st_size, status.st_mtime_ns
        return sizes, times

    def _inside(self, path: str) -> bool:
        real = os.path.realpath(path)
        return real == str(self.root) or real.startswith(f"{self.root}{os.sep}")


def _each(names: pa.Array) -> Iterator[str]:
    """Names as Python text, some at a time."""
    for start in range(0, len(names), CHUNK):
        yield from names.slice(start, CHUNK).to_pylist()


class Images:
    """Some images of a table, read when they are asked for.

    Holds a few arrays, and no Python object a row: a million of them go to a loader worker as they
    are, and its memory does not grow.

    Args:
        store: Where the bytes are.
        names: Name of each image, (N,).
        places: Columns of the store, int64 (N,) each.
    """

    def __init__(
        self, store: ImageStore, names: pa.Array, places: Sequence[NDArray[np.int64]] = ()
    ) -> None:
        self.store = store
        self.names = names
        self.places = list(places)

    @classmethod
    def of_rows(cls, store: ImageStore, rows: pd.DataFrame) -> Images:
        """Images of some rows of a table."""
        names: Any = pa.array(rows["path"], type=pa.large_string())
        return cls(
            store,
            names.combine_chunks() if isinstance(names, pa.ChunkedArray) else names,
            [rows[column].to_numpy(np.int64) for column in store.columns],
        )

    @classmethod
    def of_files(cls, root: Path, names: Sequence[str]) -> Images:
        """Files below a folder, without a table."""
        return cls(FileStore(root), pa.array(names, type=pa.large_string()))

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        """Name of an image for people."""
        return str(self.names[index].as_py())

    def source(self, index: int) -> Path | bytes:
        """The file of an image where it is one, else its bytes.

        Raises:
            OSError: It cannot be read.
        """
        return self.store.source(self.name(index), tuple(int(p[index]) for p in self.places))

    def stamps(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sizes, and numbers that change when an image may have changed; see `ImageStore`."""
        return self.store.stamps(self.names, self.places)

    def blocks(self) -> NDArray[np.int64] | None:
        """Block of each image that is fetched at once, where more is read than is kept; or None."""
        blocks_of = getattr(self.store, "blocks_of", None)
        found: NDArray[np.int64] | None = blocks_of(self.places) if blocks_of else None
        return found

    def read(self, index: int) -> bytes:
        """Bytes of an image as they are stored.

        Raises:
            DataError: They are not there any more.
        """
        try:
            source = self.source(index)
            return source if isinstance(source, bytes) else source.read_bytes()
        except OSError as error:
            raise self.changed(index, (error.strerror or str(error)).lower()) from error

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
            raise self.changed(index, error.reason) from error
        except OSError as error:
            raise self.changed(index, (error.strerror or str(error)).lower()) from error

    def changed(self, index: int, reason: str) -> DataError:
        """The error of an image that the check of the table found good."""
        place = getattr(self.store, "root", None)
        name = self.name(index) if place is None else place / self.name(index)
        return DataError(f"{name}: {reason}. Was it changed while the job ran?")
