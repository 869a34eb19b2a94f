"""Files that may lie elsewhere: their names, and any part of them, kept on the disk in blocks."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import io
import itertools
import logging
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl.data.errors import DataError
from tl.data.folder import natural_order, nearest, some
from tl.files import replacing

log = logging.getLogger(__name__)

BLOCK = 8 << 20  # bytes that one request brings: far more than its latency costs
TRIES, PAUSE = 4, 0.5  # of a request; seconds before the second, doubled before each further one
LOOK_EVERY = 20  # how often the limit is looked after: when a process wrote this part of it
_EXTRA = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}  # scheme -> extra of the package
_written: dict[Path, int] = {}  # folder -> bytes that this process wrote since it last looked


@dataclass(frozen=True)
class RemoteFile:
    """A file on this machine or another.

    Args:
        url: Path or address.
        size: Bytes.
        stamp: Changes when the content does, as far as the place tells: ETag or time.
    """

    url: str
    size: int
    stamp: str

    @property
    def name(self) -> str:
        """Last part of the address."""
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def local(self) -> bool:
        """Whether it is a path of this machine."""
        return "://" not in self.url


def expand_braces(text: str) -> list[str]:
    """`a-{000..002}.tar` as three names, `{train,val}.tar` as two, as a shell does.

    Example:
        >>> expand_braces("{train-{08..10},val-0}.tar")
        ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-0.tar']
    """
    innermost = re.search(r"\{([^{}]*)\}", text)
    if innermost is None:
        return [text]
    inside = innermost[1]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if span:
        low, high = int(span[1]), int(span[2])
        width = max(map(len, span.groups())) if "0" in (span[1][:1], span[2][:1]) else 0
        step = 1 if high >= low else -1
        parts = [f"{n:0{width}d}" for n in range(low, high + step, step)]
    else:
        parts = inside.split(",")
    before, after = text[: innermost.start()], text[innermost.end() :]
    found = [expand_braces(f"{before}{part}{after}") for part in parts]
    return list(dict.fromkeys(itertools.chain.from_iterable(found)))


def find_files(root: str, suffix: str) -> list[RemoteFile]:
    """Files that a folder, a pattern or an address names, in natural order.

    Args:
        root: A folder, or names with `{000..009}`, `{train,val}`, `*` and `?`; local, or of any
            place that fsspec knows.
        suffix: Of the files of a folder.

    Raises:
        DataError: Nothing is found, or some of the files that braces name are missing.
    """
    names = expand_braces(root)
    found = [name for text in names for name in _matching(text, suffix)]
    if not found:
        raise DataError(f"data.root: {root} names no {suffix} file{_near(names[0], suffix)}")
    found = sorted(dict.fromkeys(found), key=natural_order)
    with ThreadPoolExecutor(max_workers=16) as pool:
        files = list(pool.map(_look_at, found))
    missing = [name for name, file in zip(found, files, strict=True) if file is None]
    if missing:
        raise DataError(
            f"data.root: {len(missing):,} of the {len(found):,} files of {root} are not there: "
            f"{some([name.rpartition('/')[2] for name in missing], 5)}"
        )
    return [file for file in files if file is not None]


def _matching(text: str, suffix: str) -> list[str]:
    if "://" not in text:
        path = Path(text).expanduser().absolute()
        if path.is_dir():
            return [str(file) for file in path.rglob(f"*{suffix}") if _counts(file, path)]
        if glob.has_magic(str(path)):
            return glob.glob(str(path), recursive=True)  # noqa: PTH207 - the whole is a pattern
        return [str(path)]
    with _told(text):
        system = filesystem(text)
        scheme = text.partition("://")[0]
        if glob.has_magic(text):
            return [_with_scheme(scheme, str(name)) for name in system.glob(text)]
        if text.endswith(suffix):
            return [text]
        return [_with_scheme(scheme, n) for n in system.find(text) if n.endswith(suffix)]


def _counts(file: Path, folder: Path) -> bool:
    return not any(part.startswith(".") for part in file.relative_to(folder).parts)


def _with_scheme(scheme: str, name: str) -> str:
    return name if "://" in name else f"{scheme}://{name}"


def _near(text: str, suffix: str) -> str:
    if "://" in text:
        return "; a web server lists no folders: name the files, as in shard-{000..009}.tar"
    folder = Path(text).expanduser().absolute().parent
    there = [f.name for f in folder.glob(f"*{suffix}")] if folder.is_dir() else []
    return nearest(Path(text).name, there)


def _look_at(name: str) -> RemoteFile | None:
    """Size and stamp of a file; None where it is not there."""
    if "://" not in name:
        try:
            status = Path(name).stat()
        except OSError:
            return None
        return RemoteFile(name, status.st_size, str(status.st_mtime_ns))
    with _told(name):
        try:
            facts = filesystem(name).info(name)
        except FileNotFoundError:
            return None
    if not facts.get("size"):
        raise DataError(f"data.root: the server of {name} does not tell how long it is")
    stamps = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "updated", "Last-Modified")
    stamp = next((str(facts[key]) for key in stamps if facts.get(key)), "")
    return RemoteFile(name, int(facts["size"]), stamp)


def filesystem(url: str) -> Any:
    """What fsspec has for an address; asked for anew each time, as a forked process needs its own.

    Raises:
        DataError: fsspec does not know the scheme, or its package is not installed.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        extra = _EXTRA.get(scheme)
        remedy = f"pip install 'tl[{extra}]'" if extra else str(error)
        raise DataError(f"data.root: {scheme}:// needs a package that is not here: {remedy}") from (
            error
        )
    except ValueError as error:
        raise DataError(f"data.root: {scheme}:// is no place that fsspec knows") from error


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """What a place answers, as one sentence."""
    try:
        yield
    except (DataError, FileNotFoundError):
        raise
    except Exception as error:  # each client has exceptions of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"data.root: {url} cannot be read: {reason}") from error


@dataclass(frozen=True)
class Blocks:
    """Parts of remote files, fetched in blocks and kept on the disk for all processes there.

    A block is a file that appears whole or not at all. When they are more than the limit the
    oldest go; another process may be reading one, which does no harm.

    Args:
        folder: Where they are kept.
        limit: Bytes to keep, roughly.
        block: Bytes of one.
    """

    folder: Path
    limit: int
    block: int = BLOCK

    def read(self, file: RemoteFile, offset: int, size: int) -> bytes:
        """Some bytes of a file.

        Raises:
            OSError: They cannot be fetched.
        """
        end = offset + size
        parts = [
            self._part(
                file, n, max(offset - n * self.block, 0), min(end - n * self.block, self.block)
            )
            for n in range(offset // self.block, max(end - 1, offset) // self.block + 1)
        ]
        return b"".join(parts)

    def _part(self, file: RemoteFile, number: int, start: int, end: int) -> bytes:
        identity = f"{file.url} {file.size} {file.stamp} {self.block}"
        key = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:24]
        place = self.folder / key / str(number)
        found = _piece(place, start, end)
        if found is not None:
            return found
        place.parent.mkdir(parents=True, exist_ok=True)
        lock_file = place.with_name(f"{number}.lock")
        with lock_file.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other workers wait instead of fetching it, too
            found = _piece(place, start, end)
            if found is not None:
                return found
            data = fetch(file, number * self.block, min((number + 1) * self.block, file.size))
            self._keep(place, data)
            lock_file.unlink(missing_ok=True)
        return data[start:end]

    def _keep(self, place: Path, data: bytes) -> None:
        """Write a block; a full disk costs the next read, never the job."""
        try:
            with replacing(place) as part:
                part.write_bytes(data)
        except OSError as error:
            log.warning("%s keeps no blocks of shards: %s", self.folder, error)
        written = _written.get(self.folder, self.limit) + len(data)
        if written > self.limit // LOOK_EVERY:
            self._make_room()
            written = 0
        _written[self.folder] = written

    def _make_room(self) -> None:
        """Delete the oldest blocks beyond the limit, and what interrupted jobs left behind."""
        kept: list[tuple[float, int, Path]] = []
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                left = path.suffix == ".part" and time.time() - status.st_mtime > 3600
                if left:
                    path.unlink()
                elif path.is_file() and not path.suffix:
                    kept.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= self.limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def _piece(place: Path, start: int, end: int) -> bytes | None:
    """Part of a block that is kept; None where it is not."""
    try:
        with place.open("rb", buffering=0) as stream:
            found = os.pread(stream.fileno(), end - start, start)
    except OSError:
        return None
    return found if len(found) == end - start else None


def fetch(file: RemoteFile, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a remote file, asked for again when the network fails.

    Raises:
        OSError: Names the file and what its place answered.
    """
    for attempt in range(TRIES):
        try:
            data = filesystem(file.url).cat_file(file.url, start=start, end=end)
        except (DataError, FileNotFoundError) as error:
            raise OSError(f"{file.url}: {error}") from error
        except Exception as error:  # each client has exceptions of its own
            if attempt + 1 == TRIES:
                reason = " ".join(str(error).split()) or type(error).__name__
                raise OSError(f"{file.url} cannot be read ({reason})") from error
            log.debug("%s: %s; trying again", file.url, error)
            time.sleep(PAUSE * 2**attempt)
            continue
        if len(data) != end - start:
            raise OSError(
                f"{file.url}: asked for {end - start:,} bytes, got {len(data):,}; its server must "
                "serve ranges, and the file must not change while it is read"
            )
        return bytes(data)
    raise AssertionError("unreachable")


class BlockStream(io.RawIOBase):
    """A remote file that can be read from anywhere, block by block.

    Args:
        file: Which.
        blocks: Where its blocks are kept.
    """

    def __init__(self, file: RemoteFile, blocks: Blocks) -> None:
        self._file, self._blocks = file, blocks
        self._at = 0
        self._held, self._data = -1, b""

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go somewhere else; nothing is read yet."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer with the next bytes, at most to the end of a block."""
        if self._at >= self._file.size:
            return 0
        number, start = divmod(self._at, self._blocks.block)
        if number != self._held:
            first = number * self._blocks.block
            size = min(self._blocks.block, self._file.size - first)
            self._data, self._held = self._blocks.read(self._file, first, size), number
        found = self._data[start : start + len(buffer)]
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)
