"""Decode every image once before hours are spent on it, and remember the outcome."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from PIL import Image

from tl.bundle import ImageError, open_image

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


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: its CPU affinity, cut by the quota of its container."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [_quota(cgroup / "cpu.max")]
    try:
        own = Path("/proc/self/cgroup").read_text().split("::")[-1].strip().lstrip("/")
        quotas.append(_quota(cgroup / own / "cpu.max"))
        v1 = cgroup / "cpu"
        limit = int((v1 / "cpu.cfs_quota_us").read_text())
        quotas.append(limit / int((v1 / "cpu.cfs_period_us").read_text()) if limit > 0 else None)
    except (OSError, ValueError):
        pass  # cgroup v2 only, or no cgroups: what was found so far counts
    return max(1, min([cores, *(int(q) for q in quotas if q is not None)]))


def _quota(file: Path) -> float | None:
    try:
        limit, period = file.read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


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
    facts: dict[str, ImageFacts] = {}
    for path in paths:
        old = known.get(path)
        if old and _still_true(root / path, old, decode, max_pixels):
            facts[path] = old
    new = [path for path in paths if path not in facts]
    # Pillow's own limit warns or fails before ours can name the file.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    with ThreadPoolExecutor(max_workers=usable_cores()) as pool:
        try:
            results = pool.map(lambda path: look_at(root, path, decode, max_pixels), new)
            for done, result in enumerate(results, start=1):
                facts[result.path] = result
                if progress:
                    progress(done, len(new))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if cache_file and (new or len(known) != len(paths)):
        _write_cache(cache_file, [f for f in facts.values() if not f.reason])
    names = list(ImageFacts.__dataclass_fields__)
    return pd.DataFrame([asdict(facts[path]) for path in paths], columns=names)


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


def _still_true(file: Path, old: ImageFacts, decode: bool, max_pixels: int) -> bool:
    try:
        status = file.stat()
    except OSError:
        return False
    same = (status.st_size, status.st_mtime_ns) == (old.bytes, old.mtime_ns)
    return same and old.decoded >= decode and old.width * old.height <= max_pixels


def cache_path(cache_dir: Path, root: Path) -> Path:
    """Where the check of a data folder is remembered."""
    key = hashlib.sha256(str(root).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return cache_dir / "images" / f"{key}-v{CACHE_VERSION}.parquet"


def _read_cache(file: Path | None) -> dict[str, ImageFacts]:
    if file is None or not file.exists():
        return {}
    try:
        table = pd.read_parquet(file)
        rows = table[list(ImageFacts.__dataclass_fields__)].itertuples(index=False)
        return {row.path: ImageFacts(*row) for row in rows}  # type: ignore[misc]
    except Exception as error:  # a damaged cache costs a second look, never the job
        log.warning("the remembered check %s cannot be read (%s): checking again", file, error)
        return {}


def _write_cache(file: Path, facts: list[ImageFacts]) -> None:
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame([asdict(fact) for fact in facts]).to_parquet(partial, index=False)
        partial.replace(file)
    except OSError as error:
        log.warning("the check of the images cannot be remembered in %s: %s", file.parent, error)
        with contextlib.suppress(OSError):
            partial.unlink()
