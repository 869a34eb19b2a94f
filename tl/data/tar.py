"""Tar shards in the layout of WebDataset: where each image lies in them, and reading it there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tl.bundle import IMAGE_SUFFIXES
from tl.data.remote import Blocks, BlockStream, RemoteFile
from tl.files import replacing

log = logging.getLogger(__name__)

INDEX_VERSION = 1  # raise it when the meaning of a remembered index changes
SAVE_SECONDS = 30.0  # an interrupted pass over many shards loses no more than this
TEXT_BYTES = 1 << 20  # a label that is longer is none
TEXTS = ("cls", "json", "txt")  # members beside an image that are read
FIELDS = pa.schema(
    [
        ("shard", pa.string()),
        ("stamp", pa.string()),
        ("key", pa.string()),
        ("suffix", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        *((name, pa.string()) for name in TEXTS),
    ]
)


@dataclass(frozen=True)
class TarStore:
    """Reads images out of shards by place; a store of `tl.data.stores`.

    Args:
        shards: All of them, in order.
        blocks: What keeps parts of remote shards; None where all lie on this machine.
    """

    shards: tuple[RemoteFile, ...]
    blocks: Blocks | None = None
    columns: tuple[str, ...] = ("_shard", "_offset", "_size")

    @property
    def streamed(self) -> bool:
        """Whether the shards are more than is kept of them on the disk."""
        remote = sum(shard.size for shard in self.shards if not shard.local)
        return self.blocks is not None and remote > self.blocks.limit

    def source(self, name: str, place: tuple[int, ...]) -> bytes:  # noqa: ARG002
        """The bytes of an image.

        Raises:
            OSError: The shard is gone, shorter than it was, or out of reach.
        """
        number, offset, size = place
        shard = self.shards[number]
        if not shard.local:
            assert self.blocks is not None
            return self.blocks.read(shard, offset, size)
        with Path(shard.url).open("rb", buffering=0) as stream:
            found = os.pread(stream.fileno(), size, offset)
        if len(found) != size:
            raise OSError(f"{shard.name} is shorter than it was")
        return found

    @property
    def window(self) -> int:
        """Blocks whose images are mixed: a quarter of what is kept on the disk, at most 2 GB."""
        if self.blocks is None:
            return 1
        return max(1, min(self.blocks.limit // 4 // self.blocks.block, 256))

    def stamps(
        self,
        names: pa.Array,  # noqa: ARG002
        places: Sequence[NDArray[np.int64]],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Size of each image, and a number of its shard's stamp and its place there."""
        shard, offset, size = places
        texts = [f"{each.url} {each.size} {each.stamp}" for each in self.shards]
        digests = b"".join(_digest(text)[:8] for text in texts)
        numbers = np.frombuffer(digests, np.int64)
        return size, numbers[shard] ^ offset

    def blocks_of(self, places: Sequence[NDArray[np.int64]]) -> NDArray[np.int64] | None:
        """Number of the block that each image begins in, where shards are streamed; else None.

        Args:
            places: The values of `columns`, (N,) each.
        """
        if not self.streamed or self.blocks is None:
            return None
        shard, offset, _ = places
        per_shard = max(file.size for file in self.shards) // self.blocks.block + 1
        return shard * per_shard + offset // self.blocks.block


@dataclass
class TarIndex:
    """What lies in some shards.

    Args:
        shards: In order.
        table: One row an image, in the order of the shards and of their members: `FIELDS`.
        problems: Sentences about shards that cannot be used.
    """

    shards: tuple[RemoteFile, ...]
    table: pa.Table
    problems: list[str] = field(default_factory=list)


def read_index(
    shards: Sequence[RemoteFile],
    *,
    suffix: str | None,
    blocks: Blocks | None,
    cache_file: Path | None,
    progress: Callable[[int, int], None] | None,
) -> TarIndex:
    """List the images of shards; those that did not change are remembered.

    Args:
        shards: In order.
        suffix: Of the images, where samples have several; None: the only one that they have.
        blocks: For remote shards.
        cache_file: Parquet file with what earlier calls found, replaced atomically.
        progress: Called with (done, total) of the shards that are not remembered.
    """
    known = _remembered(cache_file, suffix)
    parts = {shard: known[shard.url, shard.stamp] for shard in shards
             if (shard.url, shard.stamp) in known}  # fmt: skip
    new = [shard for shard in shards if shard not in parts]
    problems: list[str] = []
    saved = time.monotonic()
    with ThreadPoolExecutor(max_workers=4) as pool:
        found = pool.map(lambda shard: _Reader(shard, suffix).read(blocks), new)
        try:
            for done, (shard, (part, wrong)) in enumerate(zip(new, found, strict=True), start=1):
                problems += wrong
                if not wrong:
                    parts[shard] = part
                if progress:
                    progress(done, len(new))
                if time.monotonic() - saved > SAVE_SECONDS:
                    _remember(cache_file, suffix, list(parts.values()))
                    saved = time.monotonic()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    table = pa.concat_tables([parts[s] for s in shards if s in parts] or [FIELDS.empty_table()])
    if new:
        _remember(cache_file, suffix, [table])
    return TarIndex(tuple(shards), table, problems)


class _Reader:
    """Reads the names, places and labels of one shard, and judges them."""

    def __init__(self, shard: RemoteFile, suffix: str | None) -> None:
        self.shard, self.suffix = shard, suffix
        self.images: dict[str, list[tuple[str, int, int]]] = {}
        self.texts: dict[str, dict[str, str]] = {}
        self.problems: list[str] = []
        self.repeated: list[str] = []

    def read(self, blocks: Blocks | None) -> tuple[pa.Table, list[str]]:
        """Rows of the shard, and what is wrong with it."""
        try:
            with self._open(blocks) as stream:
                self._members(stream)
        except (OSError, tarfile.TarError) as error:
            self._wrong(self._damage(error))
        if self.repeated:
            names = ", ".join(self.repeated[:3])
            self._wrong(f"{len(self.repeated):,} members repeat the name of another: {names}")
        return self._table(), self.problems

    def _open(self, blocks: Blocks | None) -> BinaryIO:
        if self.shard.local:
            return Path(self.shard.url).open("rb", buffering=0)
        assert blocks is not None
        return BlockStream(self.shard, blocks)  # type: ignore[return-value]

    def _wrong(self, text: str) -> None:
        self.problems.append(f"{self.shard.url}: {text}")

    def _members(self, stream: BinaryIO) -> None:
        head = stream.read(4)
        packed = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
        if head[:2] in packed:
            self._wrong(f"packed with {packed[head[:2]]}: unpack it, as images are read by place")
            return
        stream.seek(0)
        with tarfile.open(fileobj=stream, mode="r:", ignore_zeros=False) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined] # it would keep them all
                self._member(member, stream)
            stream.seek(archive.offset)
            end = stream.read(512)
        if end.strip(b"\0") or not end:
            raise tarfile.ReadError("no end of the archive")

    def _member(self, member: tarfile.TarInfo, stream: BinaryIO) -> None:
        name = member.name
        if member.isdir():
            return
        if not member.isreg() or member.issparse():
            self._wrong(f"{name} is {_kind(member)}; only regular files are read")
            return
        if name.startswith("/") or ".." in name.split("/"):
            self._wrong(f"the name {name} leads out of the archive; write it again without")
            return
        folder, _, base = name.removeprefix("./").rpartition("/")
        stem, dot, suffix = base.partition(".")
        suffix = suffix.lower()
        if not dot or not stem or folder.startswith("__MACOSX"):
            return
        key = f"{folder}/{stem}" if folder else stem
        if _is_image(suffix, self.suffix):
            there = self.images.setdefault(key, [])
            if any(each[0] == suffix for each in there):
                self.repeated.append(name)
            there.append((suffix, member.offset_data, member.size))
        elif suffix in TEXTS:
            texts = self.texts.setdefault(key, {})
            if suffix in texts:
                self.repeated.append(name)
            texts[suffix] = self._text(member, stream)

    def _text(self, member: tarfile.TarInfo, stream: BinaryIO) -> str:
        if member.size > TEXT_BYTES:
            self._wrong(f"{member.name} has {member.size:,} bytes; {TEXT_BYTES:,} at most are read")
            return ""
        stream.seek(member.offset_data)
        data = b""
        while len(data) < member.size and (more := stream.read(member.size - len(data))):
            data += more
        try:
            text = data.decode().strip()
        except UnicodeDecodeError:
            self._wrong(f"{member.name} is not UTF-8")
            return ""
        if member.name.lower().endswith(".json"):
            try:
                if not isinstance(json.loads(text), dict):
                    self._wrong(f"{member.name} holds no JSON object")
            except ValueError as error:
                self._wrong(f"{member.name} is no JSON ({error})")
        return text

    def _damage(self, error: Exception) -> str:
        if isinstance(error, tarfile.TarError):
            seen = f" after {len(self.images):,} images" if self.images else ""
            return f"truncated, damaged or no tar file{seen} ({error}); fetch it or write it again"
        return f"cannot be read: {(getattr(error, 'strerror', None) or str(error)).lower()}"

    def _table(self) -> pa.Table:
        several = [(key, found) for key, found in self.images.items() if len(found) > 1]
        if several and not self.repeated:
            key, found = several[0]
            names = " and ".join(suffix for suffix, _, _ in found)
            self._wrong(
                f"{len(several):,} samples have several images (first: {key} has {names}); name "
                f"one of them: data.columns.image={found[0][0]}"
            )
        keys = list(self.images)
        first = [found[0] for found in self.images.values()]
        beside = [self.texts.get(key, {}) for key in keys]
        alone = sorted(self.texts.keys() - self.images.keys())
        if alone:
            self._wrong(f"{len(alone):,} samples have a label but no image (first: {alone[0]})")
        columns = {
            "shard": [self.shard.url] * len(keys),
            "stamp": [self.shard.stamp] * len(keys),
            "key": keys,
            "suffix": [suffix for suffix, _, _ in first],
            "offset": [offset for _, offset, _ in first],
            "size": [size for _, _, size in first],
            **{name: [texts.get(name) for texts in beside] for name in TEXTS},
        }
        return pa.table(columns, FIELDS)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def _is_image(suffix: str, asked: str | None) -> bool:
    if asked is not None:
        return suffix == asked.lower().lstrip(".")
    return f".{suffix}" in IMAGE_SUFFIXES


def _kind(member: tarfile.TarInfo) -> str:
    if member.issym() or member.islnk():
        return f"a link to {member.linkname}"
    if member.isdev():
        return "a device or a pipe"
    return "a sparse file" if member.issparse() else "of an unknown kind"


def index_path(cache_dir: Path, root: str) -> Path:
    """Where the index of the shards of a `data.root` is remembered."""
    key = _digest(root).hex()[:16]
    return cache_dir / "shards" / f"{key}-v{INDEX_VERSION}.parquet"


def _remembered(file: Path | None, suffix: str | None) -> dict[tuple[str, str], pa.Table]:
    """Rows of each shard by address and stamp."""
    if file is None or not file.is_file():
        return {}
    try:
        table = pq.read_table(file)
        if not table.schema.equals(FIELDS) or (table.schema.metadata or {}).get(b"suffix") != (
            str(suffix).encode()
        ):
            return {}
    except (OSError, pa.ArrowException) as error:
        log.warning("the remembered index %s cannot be read (%s): reading again", file, error)
        return {}
    found: dict[tuple[str, str], pa.Table] = {}
    shards = table["shard"].combine_chunks().dictionary_encode()
    numbers = np.asarray(shards.indices)
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(numbers)], strict=True):
        part = table.slice(start, end - start)
        found[part["shard"][0].as_py(), part["stamp"][0].as_py()] = part
    return found


def _remember(file: Path | None, suffix: str | None, parts: Sequence[pa.Table]) -> None:
    if file is None or not parts:
        return
    table = pa.concat_tables(parts).replace_schema_metadata({"suffix": str(suffix)})
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as part:
            pq.write_table(table, part)
