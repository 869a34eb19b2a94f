"""Decode every image once before hours are spent on it, and remember the outcome."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from tl.bundle import ImageError, open_image
from tl.cores import usable_cores

log = logging.getLogger(__name__)

EXIF_ORIENTATION = 0x0112
LYING_ORIENTATIONS = (5, 6, 7, 8)  # of the EXIF tag: width and height change places
# Raise it when the meaning of a remembered row changes.
CACHE_VERSION = 1


@dataclass(frozen=True)
class ImageFacts:
    """What one look at a file tells.

    Args:
        path: Relative to the data folder, posix.
        bytes: Size of the file.
        mtime_ns: Time of its last change.
        sha256: Of its contents; empty where the file cannot be read at all.
        width: Of the upright image, pixels.
        height: Of the upright image, pixels.
        decoded: Whether every pixel was decoded, not only the header.
        reason: Why the image cannot be used; empty for a good one.
    """

    path: str
    bytes: int
    mtime_ns: int
    sha256: str
    width: int
    height: int
    decoded: bool
    reason: str


NAMES = [*ImageFacts.__dataclass_fields__]
# What this process has read of remembered checks, by file: its identity, and the rows.
_memory: dict[Path, tuple[tuple[int, int, int], pd.DataFrame]] = {}


def check_images(
    root: Path,
    paths: Sequence[str],
    *,
    decode: bool,
    max_pixels: int,
    cache_file: Path | None,
    progress: Callable[[int, int], None] | None,
) -> pd.DataFrame:
    """Hash and decode files in parallel.

    Args:
        root: The data folder.
        paths: Files, relative to it.
        decode: False reads contents and headers only.
        max_pixels: Larger images are refused.
        cache_file: Parquet file with the outcome of earlier checks, replaced atomically. Bad files
            are not remembered: they are looked at again each time.
        progress: Called with (done, total) of the files that are not remembered.

    Returns:
        One row per path, in order, with the fields of `ImageFacts`.
    """
    known = _read_cache(cache_file)
    places = known.index.get_indexer(pd.Index(list(paths)))
    kept = _still_true(root, paths, known, places, decode=decode, max_pixels=max_pixels)
    new = [path for path, same in zip(paths, kept, strict=True) if not same]
    # Pillow's own limit warns or fails before ours can name the file.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    looked = []
    with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
        try:
            results = pool.map(lambda path: look_at(root, path, decode, max_pixels), new)
            for done, result in enumerate(results, start=1):
                looked.append(result)
                if progress:
                    progress(done, len(new))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    facts = known.iloc[places[kept]].reset_index()
    if looked:
        rows = pd.DataFrame(map(vars, looked), columns=NAMES)
        facts = pd.concat([facts, rows], ignore_index=True) if len(facts) else rows
        facts = facts.set_index("path").loc[list(paths)].reset_index()
    if cache_file and (new or len(known) != len(paths)):
        _write_cache(cache_file, facts[facts["reason"] == ""])
    return facts


def look_at(root: Path, path: str, decode: bool, max_pixels: int) -> ImageFacts:
    """Hash one file and decode it, or its header only."""
    file = root / path
    digest, size, mtime, width, height, reason = "", 0, 0, 0, 0, ""
    try:
        status = file.stat()
        size, mtime = status.st_size, status.st_mtime_ns
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(path, "a pipe, socket or device, not a regular file")
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        width, height = _upright_size(file, decode, max_pixels)
    except ImageError as error:
        reason = error.reason
    except FileNotFoundError:
        reason = "a link to a file that is not there" if file.is_symlink() else "no such file"
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
    return ImageFacts(path, size, mtime, digest, width, height, decode, reason)


def _upright_size(file: Path, decode: bool, max_pixels: int) -> tuple[int, int]:
    """Width and height; the full decoder speaks wherever the short way does not serve."""
    try:
        with Image.open(file) as image:
            width, height = image.size
            quick = image.format == "JPEG" and image.mode in ("RGB", "L")
            if width * height <= max_pixels and (quick or not decode):
                # Pillow decodes the whole of a PNG to look for an EXIF block behind the pixels.
                exif = {} if image.format == "PNG" and "exif" not in image.info else image.getexif()
                lying = exif.get(EXIF_ORIENTATION) in LYING_ORIENTATIONS
                if decode:
                    # libjpeg reads the whole stream, but computes an eighth of each side only.
                    image.draft(image.mode, (1, 1))
                    image.load()
                return (height, width) if lying else (width, height)
    except Exception as error:  # decoders raise whatever they like on damaged files
        log.debug("%s: %s; asking the full decoder", file, error)
    return open_image(file, max_pixels=max_pixels).size


def _still_true(
    root: Path,
    paths: Sequence[str],
    known: pd.DataFrame,
    places: NDArray[np.intp],
    *,
    decode: bool,
    max_pixels: int,
) -> NDArray[np.bool_]:
    """Which files are as they were when they were looked at, and were looked at well enough.

    Args:
        root: The data folder.
        paths: Files, relative to it.
        known: Outcome of earlier checks.
        places: Row of each file there, -1 for none.
        decode: Whether every pixel must have been decoded.
        max_pixels: Larger images are to be refused.
    """
    start = f"{root}{os.sep}"
    found = np.full((len(paths), 2), -1, np.int64)
    for number in np.flatnonzero(places >= 0).tolist():
        with contextlib.suppress(OSError):
            status = os.stat(start + paths[number])  # noqa: PTH116 - thousands of them
            found[number] = status.st_size, status.st_mtime_ns
    sizes, times = (known[name].to_numpy(np.int64) for name in ("bytes", "mtime_ns"))
    pixels = known["width"].to_numpy(np.int64) * known["height"].to_numpy(np.int64)
    enough = (pixels <= max_pixels) & (known["decoded"].to_numpy(bool) >= decode)
    kept = places >= 0
    at = places[kept]
    kept[kept] = (sizes[at] == found[kept, 0]) & (times[at] == found[kept, 1]) & enough[at]
    return kept


def cache_path(cache_dir: Path, root: Path) -> Path:
    """Where the check of a data folder is remembered."""
    key = hashlib.sha256(str(root).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache_dir / "images" / f"{key}-v{CACHE_VERSION}.parquet"


def _read_cache(file: Path | None) -> pd.DataFrame:
    """Outcome of earlier checks by path; empty where there is none."""
    nothing = pd.DataFrame(columns=NAMES).set_index("path")
    if file is None or not file.exists():
        return nothing
    try:
        status = file.stat()
        identity = status.st_ino, status.st_mtime_ns, status.st_size
        if _memory.get(file, (None, nothing))[0] != identity:
            table = pd.read_parquet(file)[NAMES].drop_duplicates("path").set_index("path")
            _memory[file] = identity, table
        return _memory[file][1]
    except Exception as error:  # a damaged cache costs a second look, never the job
        log.warning("the remembered check %s cannot be read (%s): checking again", file, error)
        return nothing


def _write_cache(file: Path, facts: pd.DataFrame) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        facts.to_parquet(partial, index=False)
        partial.replace(file)
    except OSError as error:
        log.warning("the check of the images cannot be remembered in %s: %s", file.parent, error)
        with contextlib.suppress(OSError):
            partial.unlink()
