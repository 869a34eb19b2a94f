"""Decode every image once before hours are spent on it, and remember the outcome."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from tl.bundle import ImageError, open_image
from tl.bundle.images import upright
from tl.cores import usable_cores
from tl.data.looks import LYING, NO_LOOK, SIDE, Look, header, look
from tl.data.stores import MISSING, OUTSIDE, Images
from tl.files import replacing

log = logging.getLogger(__name__)

# Raise it when the meaning of a remembered row changes.
CACHE_VERSION = 3
CHUNK = 4096  # images whose facts are Python objects at the same time
KEPT_IN_MEMORY = 100_000  # rows of a remembered check that a process keeps for the next reading
TEXT = pa.large_string()


@dataclass(frozen=True)
class ImageFacts:
    """What one look at an image tells.

    Args:
        path: Its name in the table.
        bytes: Its size as it is stored.
        stamp: A number that changes when it may have changed; see `ImageStore.stamps`.
        sha256: Of its bytes; empty where they cannot be read at all.
        width: Of the upright image, pixels; 0 where nobody looked.
        height: Of the upright image, pixels.
        reason: Why the image cannot be used; empty for a good one.
        look: What it looks like.
    """

    path: str
    bytes: int
    stamp: int
    sha256: str
    width: int
    height: int
    reason: str
    look: Look = NO_LOOK

    def row(self) -> dict[str, Any]:
        """By columns of `SCHEMA`."""
        return vars(self) | vars(self.look)


SCHEMA = pa.schema(
    {
        "path": TEXT,
        "bytes": pa.int64(),
        "stamp": pa.int64(),
        "sha256": TEXT,
        "width": pa.int32(),
        "height": pa.int32(),
        "reason": TEXT,
        "format": TEXT,
        "mode": TEXT,
        "orientation": pa.int8(),
        "frames": pa.int8(),
        "brightness": pa.float32(),
        "contrast": pa.float32(),
        "phash": TEXT,
    }
)
# What this process has read of remembered checks, by file: its identity, and the rows.
_memory: dict[Path, tuple[tuple[int, int, int], pa.Table]] = {}


def check_images(
    images: Images,
    *,
    max_pixels: int,
    cache_file: Path | None,
    progress: Callable[[int, int], None] | None,
) -> pa.Table:
    """Hash and decode images in parallel.

    Args:
        images: What to look at.
        max_pixels: Larger images are refused.
        cache_file: Parquet file with the outcome of earlier checks, replaced atomically; that of an
            interrupted check is kept, too. Bad images are not remembered: they are looked at again
            each time.
        progress: Called with (done, total) of the images that are not remembered.

    Returns:
        One row per image, in order, with the fields of `ImageFacts`.
    """
    known = _read_cache(cache_file)
    sizes, stamps = images.stamps()
    places = pc.index_in(images.names, value_set=known["path"]).fill_null(-1).to_numpy()
    kept = _still_true(known, places, sizes, stamps, max_pixels)
    new = np.flatnonzero(~kept)
    in_place = len(known) == len(images) and bool((places == np.arange(len(images))).all())
    facts = [known if in_place and kept.all() else known.take(places[kept])]
    # Pillow's own limit warns or fails before ours can name the file.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        facts += _look(images, new, sizes, stamps, max_pixels, progress)
    except BaseException:
        _remember(cache_file, pa.concat_tables(facts))
        raise
    found = pa.concat_tables(facts)
    if len(new) or len(known) != len(images):
        _remember(cache_file, found)
    if kept.any() and len(new):
        found = found.take(np.argsort(np.concatenate([np.flatnonzero(kept), new])))
    return found


def unlooked(images: Images, max_pixels: int) -> pa.Table:
    """The facts that need no look at the bytes: `sha256` is empty, width and height are 0.

    Only what cannot be an image, such as an empty file, is looked at, for the reason.
    """
    sizes, stamps = images.stamps()
    good = sizes > 0
    empty = pa.array(np.full(len(images), ""), TEXT)
    nothing = pa.array(np.zeros(len(images), np.int32))
    columns = {"path": images.names, "bytes": sizes, "stamp": stamps}
    for column in SCHEMA:
        columns.setdefault(column.name, empty if column.type == TEXT else nothing)
    found = pa.table(columns).cast(SCHEMA)
    if good.all():
        return found
    bad = np.flatnonzero(~good)
    looks = list(_look(images, bad, sizes, stamps, max_pixels, None))
    order = np.argsort(np.concatenate([np.flatnonzero(good), bad]))
    return pa.concat_tables([found.filter(good), *looks]).take(order)


def identities(facts: pa.Table, root: Path) -> list[str]:
    """Stand for the hashes of images that nobody looked at: of place, name, size and stamp."""
    start = hashlib.sha256(os.fsencode(root))
    found = []
    for batch in facts.select(["path", "bytes", "stamp"]).to_batches(CHUNK):
        for path, size, stamp in zip(*(column.to_pylist() for column in batch), strict=True):
            digest = start.copy()
            digest.update(f"\0{path}\0{size}\0{stamp}".encode())
            found.append(digest.hexdigest())
    return found


def _look(
    images: Images,
    chosen: NDArray[np.int64],
    sizes: NDArray[np.int64],
    stamps: NDArray[np.int64],
    max_pixels: int,
    progress: Callable[[int, int], None] | None,
) -> Any:
    """Facts of some images, as tables that follow each other."""

    def facts_of(index: int) -> ImageFacts:
        return look_at(images, index, int(sizes[index]), int(stamps[index]), max_pixels)

    done = 0
    with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
        for start in range(0, len(chosen), CHUNK):
            looked: list[ImageFacts] = []
            try:
                for facts in pool.map(facts_of, chosen[start : start + CHUNK].tolist()):
                    looked.append(facts)
                    done += 1
                    if progress:
                        progress(done, len(chosen))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                yield pa.Table.from_pylist([facts.row() for facts in looked], SCHEMA)
                raise
            yield pa.Table.from_pylist([facts.row() for facts in looked], SCHEMA)


def look_at(images: Images, index: int, size: int, stamp: int, max_pixels: int) -> ImageFacts:
    """Hash one image and decode it."""
    name = images.name(index)
    digest, width, height, reason, seen = "", 0, 0, "", NO_LOOK
    try:
        if size == OUTSIDE:
            raise ImageError(name, "a link that leads out of the data folder")
        source = images.source(index)
        if isinstance(source, bytes):
            size, digest = len(source), hashlib.sha256(source).hexdigest()
        else:
            if not stat.S_ISREG(source.stat().st_mode):
                raise ImageError(name, "a pipe, socket or device, not a regular file")
            with source.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        width, height, seen = _decoded(source, max_pixels)
    except ImageError as error:
        reason = error.reason
    except FileNotFoundError:
        is_link = isinstance(source, Path) and source.is_symlink()
        reason = "a link to a file that is not there" if is_link else "no such file"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    except ValueError as error:  # a name may hold a zero byte
        reason = str(error)
    return ImageFacts(name, max(size, 0), stamp, digest, width, height, reason, seen)


def _decoded(source: Path | bytes, max_pixels: int) -> tuple[int, int, Look]:
    """Upright width and height, and the look; the full decoder speaks where the short way fails."""
    facts = None
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            width, height = image.size
            facts = header(image)
            quick = image.format == "JPEG" and image.mode in ("RGB", "L")
            if width * height <= max_pixels and quick:
                # libjpeg reads the whole stream, but computes as few pixels as the look needs.
                image.draft(image.mode, (SIDE, SIDE))
                image.load()
                seen = look(facts, upright(image))
                lying = facts["orientation"] in LYING
                return (height, width, seen) if lying else (width, height, seen)
    except Exception as error:  # decoders raise whatever they like on damaged files
        log.debug("%s; asking the full decoder", error)
    decoded = open_image(source, max_pixels=max_pixels)
    return *decoded.size, look(facts, decoded)


def _still_true(
    known: pa.Table,
    places: NDArray[Any],
    sizes: NDArray[np.int64],
    stamps: NDArray[np.int64],
    max_pixels: int,
) -> NDArray[np.bool_]:
    """Which images are as they were when they were looked at.

    Args:
        known: Outcome of earlier checks.
        places: Row of each image there, -1 for none.
        sizes: Of each image now.
        stamps: Of each image now.
        max_pixels: Larger images are to be refused.
    """
    kept: NDArray[np.bool_] = places >= 0
    at = places[kept]
    before = {
        name: known[name].to_numpy().astype(np.int64)[at]
        for name in ("bytes", "stamp", "width", "height")
    }
    same = (before["bytes"] == sizes[kept]) & (before["stamp"] == stamps[kept])
    kept[kept] = same & (before["width"] * before["height"] <= max_pixels)
    kept &= sizes != MISSING
    return kept


def cache_path(cache_dir: Path, key: str | Path) -> Path:
    """Where the check of a source is remembered."""
    digest = hashlib.sha256(os.fsencode(str(key))).hexdigest()[:16]
    return cache_dir / "images" / f"{digest}-v{CACHE_VERSION}.parquet"


def _read_cache(file: Path | None) -> pa.Table:
    """Outcome of earlier checks; empty where there is none."""
    nothing = SCHEMA.empty_table()
    if file is None or not file.exists():
        return nothing
    try:
        status = file.stat()
        identity = status.st_ino, status.st_mtime_ns, status.st_size
        if _memory.get(file, (None, nothing))[0] == identity:
            return _memory[file][1]
        table = pq.read_table(file, columns=SCHEMA.names).cast(SCHEMA)
        if len(table) <= KEPT_IN_MEMORY:
            _memory[file] = identity, table
    except Exception as error:  # a damaged cache costs a second look, never the job
        log.warning("the remembered check %s cannot be read (%s): checking again", file, error)
        return nothing
    return table


def _remember(file: Path | None, facts: pa.Table) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            pq.write_table(facts.filter(pc.equal(facts["reason"], "")), part)
    except OSError as error:
        log.warning("the check of the images cannot be remembered in %s: %s", file.parent, error)
