"""Images as bytes in Arrow files: read at random places without a copy of the whole in memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tl.data.errors import DataError
from tl.data.stores import MISSING

BATCH = 64  # rows that are unpacked at once: images may have megabytes
UNPACKED = "image"
_temporary: list[tempfile.TemporaryDirectory[str]] = []  # live as long as the process


@dataclass
class ArrowStore:
    """Images in a column of Arrow files, mapped into memory.

    Args:
        files: Arrow streams or files, as `datasets` and `unpack` write them.
        column: Bytes, or structs of `bytes` and `path`.
        root: Folder to which paths without bytes are relative, and which they must not leave.
        anywhere: Whether they may leave it: who made the table put the files there.
    """

    files: tuple[Path, ...]
    column: str
    root: Path
    anywhere: bool = False
    columns: tuple[str, ...] = ("_part", "_row")
    _open: dict[int, pa.ChunkedArray] = field(default_factory=dict, repr=False, compare=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to a process."""
        return {**self.__dict__, "_open": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In a loader worker."""
        self.__dict__.update(state, _lock=threading.Lock())

    def source(self, name: str, place: tuple[int, ...]) -> Path | bytes:  # noqa: ARG002
        """Bytes of an image, or its file where only its path is kept.

        Raises:
            OSError: Neither is there.
        """
        value: Any = self._part(place[0])[place[1]].as_py()
        path = None
        if isinstance(value, dict):
            value, path = value["bytes"], value.get("path")
        if value is not None:
            return bytes(value)
        if not path:
            raise OSError("no image")
        file: Path = self.root / str(path)
        if self.anywhere or Path(os.path.realpath(file)).is_relative_to(self.root):
            return file
        raise OSError(
            f"no bytes, only a path out of the data folder ({path}); datasets.save_to_disk keeps "
            "the images themselves"
        )

    def stamps(
        self, names: pa.Array, places: Sequence[NDArray[np.int64]]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Size of each image, and time of the last change of its file, nanoseconds."""
        sizes, stamps = np.full(len(names), MISSING, np.int64), np.zeros(len(names), np.int64)
        parts, rows = places
        for part, file in enumerate(self.files):
            inside = np.flatnonzero(parts == part)
            if not len(inside):
                continue
            lengths = self._lengths(self._part(part))
            sizes[inside] = lengths[rows[inside]]
            stamps[inside] = file.stat().st_mtime_ns
        for index in np.flatnonzero(sizes == MISSING).tolist():
            with contextlib.suppress(OSError, ValueError):
                source = self.source("", (int(parts[index]), int(rows[index])))
                if isinstance(source, Path):
                    status = source.stat()
                    sizes[index], stamps[index] = status.st_size, status.st_mtime_ns
        return sizes, stamps

    @staticmethod
    def _lengths(column: pa.ChunkedArray) -> NDArray[np.int64]:
        found = []
        for chunk in column.chunks:
            values = pc.struct_field(chunk, "bytes") if pa.types.is_struct(chunk.type) else chunk
            lengths = pc.binary_length(values).fill_null(MISSING)
            found.append(lengths.to_numpy(zero_copy_only=False).astype(np.int64))
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def _part(self, number: int) -> pa.ChunkedArray:
        with self._lock:
            if number not in self._open:
                self._open[number] = open_arrow(self.files[number])[self.column]
            return self._open[number]


def open_arrow(file: Path) -> pa.Table:
    """A table of an Arrow stream or file, mapped into memory.

    Raises:
        DataError: It is neither, or cut off.
    """
    try:
        mapped = pa.memory_map(str(file))
        try:
            return pa.ipc.open_stream(mapped).read_all()
        except pa.ArrowInvalid:
            mapped.seek(0)
            return pa.ipc.open_file(mapped).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        text = str(error).split("\n")[0]
        raise DataError(f"{file} is no Arrow file, or is cut off: {text[:160]}") from error


def unpack(
    files: Sequence[Path],
    column: str,
    cache_dir: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write the images of Parquet files down as Arrow files, once.

    Parquet packs thousands of images into one block, so that a single one costs all of them; Arrow
    files are read anywhere at once. What was unpacked stays in the cache until the file changes.

    Args:
        files: Parquet files.
        column: With bytes, or structs of `bytes` and `path`.
        cache_dir: Where to; None: a folder that goes with this process.
        progress: Called with (done, total) of the images.

    Raises:
        DataError: A file is damaged, or the disk is full.
    """
    if cache_dir is None:
        _temporary.append(tempfile.TemporaryDirectory(prefix="tl-"))
        cache_dir = Path(_temporary[-1].name)
    found, done = [], 0
    rows = [pq.read_metadata(file).num_rows for file in files]

    def update(row: int) -> None:
        if progress:
            progress(done + row, sum(rows))

    for file, number in zip(files, rows, strict=True):
        status = file.stat()
        place = hashlib.sha256(os.fsencode(f"{file}\0{column}")).hexdigest()[:16]
        stamp = f"{status.st_size:x}-{status.st_mtime_ns:x}"
        target = cache_dir / "unpacked" / place / f"{stamp}.arrow"
        if not target.is_file():
            _unpack_one(file, column, target, update)
            for old in target.parent.glob("*.arrow"):
                if old != target:
                    old.unlink(missing_ok=True)
        found.append(target)
        done += number
    return found


def _unpack_one(file: Path, column: str, target: Path, update: Callable[[int], None]) -> None:
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        needed, free = file.stat().st_size, shutil.disk_usage(target.parent).free
        if needed > free:
            raise DataError(
                f"{file}: unpacking its images needs {needed / 1e9:.1f} GB in {target.parent}, "
                f"which has {free / 1e9:.1f} GB: cache.dir names another disk"
            )
        with pq.ParquetFile(file) as parquet, partial.open("wb") as stream:
            kind = parquet.schema_arrow.field(column).type
            schema = pa.schema({UNPACKED: kind})
            with pa.ipc.new_stream(stream, schema) as writer:
                written = 0
                for batch in parquet.iter_batches(BATCH, columns=[column]):
                    writer.write_batch(pa.record_batch([batch.column(0)], schema))
                    written += len(batch)
                    update(written)
        partial.replace(target)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: its images cannot be unpacked: {str(error)[:160]}") from error
    finally:
        partial.unlink(missing_ok=True)
