"""Tar shards in the layout of WebDataset as a listing: members of one name are one sample."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tl.config import DataConfig, is_remote
from tl.data.errors import DataError
from tl.data.folder import SPLIT_NAMES, existing_folder, some
from tl.data.remote import Blocks, RemoteFile, fetch, find_files
from tl.data.sources.listing import Listing, plain, split_codes
from tl.data.tar import TarStore, index_path, read_index

SUFFIX = ".tar"
CLASSES_FILE = "classes.txt"  # beside the shards: one class name a line, where labels are numbers
SHOWN_PROBLEMS = 10
# Keys of the .json member that are taken where none is named.
LABELS = ("label", "labels", "class", "class_name", "cls", "target")
GUESSES = {"split": ("split",), "group": ("group",), "weight": ("weight",)}
FOLDER = "folder"  # the label is the folder that a member lies in


def list_shards(
    config: DataConfig,
    cache_dir: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> Listing:
    """Every image of the shards that `data.root` names, with what stands beside it.

    A sample is an image with a label of the same name: `.cls` (a number or a name), or a key of
    `.json`; where there is neither, the folder in front of the name. The split comes from `.json`,
    or from a word in the name of the shard (`train-000.tar`, `val/000.tar`).

    Args:
        config: `data.root` is a folder of shards, or their names with `{000..009}` or `*`, here or
            at any address that fsspec knows. `columns` names keys of `.json`; `columns.image` the
            ending of the images where a sample has several.
        cache_dir: Remembers where the images are, and keeps remote shards.
        progress: Called with (done, total) of shards.

    Raises:
        DataError: There are no shards, or their place is out of reach.
    """
    root = config.root
    if not is_remote(root) and not re.search(r"[{*?\[]", root) and not root.endswith(SUFFIX):
        root = str(existing_folder(root))
    shards = find_files(root, SUFFIX)
    blocks = None
    if not all(shard.local for shard in shards):
        kept = cache_dir or Path(tempfile.gettempdir()) / f"tl-shards-{os.getuid()}"
        blocks = Blocks(kept / "shards" / "blocks", int(config.remote_gb * 1e9))
    index = read_index(
        shards,
        suffix=config.columns.image,
        blocks=blocks,
        cache_file=index_path(cache_dir, root) if cache_dir else None,
        progress=progress,
    )
    problems = index.problems[:SHOWN_PROBLEMS]
    if len(index.problems) > SHOWN_PROBLEMS:
        problems.append(f"and {len(index.problems) - SHOWN_PROBLEMS:,} more problems of shards")
    if not len(index.table) and not problems:
        ending = config.columns.image
        what = f".{ending.lstrip('.')} members" if ending else "images"
        raise DataError(f"data.root: there are no {what} in {some([s.name for s in shards])}")
    return _listing(config, root, index.table, TarStore(index.shards, blocks), problems)


def _listing(
    config: DataConfig, root: str, table: pa.Table, store: TarStore, problems: list[str]
) -> Listing:
    prefix = _common_folder(store.shards)
    numbers = {shard.url: number for number, shard in enumerate(store.shards)}
    encoded = plain(table["shard"]).dictionary_encode()
    of_shard = np.array([numbers[url] for url in encoded.dictionary.to_pylist()], np.int64)
    shard = of_shard[np.asarray(encoded.indices)] if len(table) else np.zeros(0, np.int64)
    relative = pa.array([s.url.removeprefix(prefix) for s in store.shards], pa.large_string())
    keys = plain(table["key"]).cast(pa.large_string())
    suffixes = plain(table["suffix"]).cast(pa.large_string())
    slash, dot = (pa.scalar(sign, pa.large_string()) for sign in "/.")
    names = pc.binary_join_element_wise(relative.take(pa.array(shard)), keys, slash)
    names = pc.binary_join_element_wise(names, suffixes, dot)
    beside = _Beside(config, table, problems)
    labels, label_name = beside.labels()
    words = beside.values("split")
    if words is None:
        words = _words_of_shards([s.url.removeprefix(prefix) for s in store.shards]).take(
            pa.array(shard)
        )
    splits, split_names, wrong = split_codes(words, "split")
    weights = beside.values("weight")
    notes = [
        f"{len(names):,} images in {len(store.shards):,} tar shards; label: {beside.shown}"
        + (f"; streamed: more than data.remote_gb={config.remote_gb:g}" if store.streamed else "")
    ]
    return Listing(
        origin=root,
        root=Path(prefix),
        store=store,
        names=names,
        labels=labels,
        splits=splits,
        places={
            "_shard": shard,
            "_offset": table["offset"].to_numpy(),
            "_size": table["size"].to_numpy(),
        },
        groups=_texts(beside.values("group")),
        weights=beside.weights(weights) if weights is not None else None,
        classes=_class_names(prefix, store.blocks),
        split_names=split_names,
        label_name=label_name,
        problems=[*problems, *beside.problems, *wrong],
        notes=notes,
        key=root,
    )


class _Beside:
    """What stands beside the images: `.cls`, `.txt`, or the keys of `.json`."""

    def __init__(self, config: DataConfig, table: pa.Table, problems: Sequence[str]) -> None:
        self.columns, self.table = config.columns, table
        self.problems: list[str] = []
        self.shown = ""
        self._records: list[dict[str, Any]] | None = None
        self._broken = bool(problems)

    def records(self) -> list[dict[str, Any]]:
        """The `.json` of each image; empty where it has none."""
        if self._records is None:
            self._records = []
            for text in self.table["json"].to_pylist():
                found = {}
                with contextlib.suppress(ValueError, TypeError):
                    found = json.loads(text)
                self._records.append(found if isinstance(found, dict) else {})
        return self._records

    def has(self, member: str) -> bool:
        """Whether any image has a member with this ending beside it."""
        return bool(self.table[member].null_count < len(self.table))

    def keys(self) -> list[str]:
        """Keys of the first `.json` that there is."""
        return sorted(next(filter(None, self.records()), {})) if self.has("json") else []

    def labels(self) -> tuple[pa.Array, str]:
        """Label of each image, and what it is called."""
        asked = self.columns.label
        if isinstance(asked, list):
            return self._one_hot(asked), ", ".join(asked)
        if asked is None:
            guesses = [key for key in LABELS if key in self.keys()] if not self.has("cls") else []
            asked = "cls" if self.has("cls") else guesses[0] if guesses else FOLDER
        if asked in ("cls", "txt") and self.has(asked):
            self.shown = f".{asked}"
            return _numbers_or_names(plain(self.table[asked])), asked
        if asked == FOLDER:
            return self._folders(), "class"
        self.shown = f"{asked} of .json"
        if asked not in self.keys():
            there = ", ".join(self.keys()) or "no .json beside the images"
            self.problems.append(f"data.columns.label={asked} is no key of .json (there: {there})")
        return self._array([record.get(asked) for record in self.records()], asked), asked

    def _folders(self) -> pa.Array:
        self.shown = "the folder of each member"
        keys = plain(self.table["key"])
        inside = pc.extract_regex(keys, r"(?:^|/)(?P<folder>[^/]+)/[^/]+$")
        found = pc.struct_field(inside, "folder")
        if found.null_count == len(found) and not self._broken:
            beside = [name for name in ("json", "txt") if self.has(name)]
            have = f"; beside them is .{' and .'.join(beside)}" if beside else ""
            keys_there = f" with {', '.join(self.keys())}" if self.keys() else ""
            self.problems.append(
                "the images in the shards have no labels: there is no .cls, no label in .json and "
                f"no folder{have}{keys_there}; name the key or member with data.columns.label"
            )
        return found.cast(pa.large_string())

    def _one_hot(self, names: list[str]) -> pa.Array:
        """Names of the keys that are 1, a list for each image."""
        self.shown = f"{len(names)} keys of .json"
        missing = [name for name in names if name not in self.keys()]
        if missing:
            self.problems.append(f"data.columns.label: .json has no key {some(missing)}")
        found = []
        for number, record in enumerate(self.records()):
            values = [record.get(name, 0) for name in names]
            if any(value not in (0, 1) for value in values) and not self.problems:
                name, value = next((n, v) for n, v in zip(names, values, strict=True)
                                   if v not in (0, 1))  # fmt: skip
                key = self.table["key"][number].as_py()
                self.problems.append(f"{key}.json: {name} must be 0 or 1, got {value!r}")
            found.append([n for n, value in zip(names, values, strict=True) if value == 1])
        return pa.array(found, pa.list_(pa.large_string()))

    def values(self, role: str) -> pa.Array | None:
        """Split, group or weight of each image; None where the shards have none."""
        asked = getattr(self.columns, role)
        names = (asked,) if asked else GUESSES[role]
        name = next((name for name in names if name in self.keys()), None)
        if name is None:
            if asked:
                there = ", ".join(self.keys()) or "no .json beside the images"
                self.problems.append(f"data.columns.{role}={asked} is no key of .json ({there})")
            return None
        return self._array([record.get(name) for record in self.records()], name)

    def _array(self, values: list[Any], name: str) -> pa.Array:
        """Arrow's type for values of one kind."""
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            found = pa.array(values)
            if pa.types.is_string(found.type):
                return found.cast(pa.large_string())
            if pa.types.is_list(found.type) and pa.types.is_string(found.type.value_type):
                return found.cast(pa.list_(pa.large_string()))
            if not pa.types.is_struct(found.type):
                return found
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        self.problems.append(f".json: {name} must be of one simple kind, got {' and '.join(kinds)}")
        return pa.nulls(len(values), pa.large_string())

    def weights(self, values: pa.Array) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Weights as numbers; one that is missing is 1."""
        try:
            found = values.cast(pa.float32()).fill_null(1.0).to_numpy(zero_copy_only=False)
        except pa.ArrowInvalid:
            self.problems.append(f".json: weight must be a number, got {values[0].as_py()!r}")
            return np.ones(len(values), np.float32)
        if len(found) and not (np.isfinite(found).all() and found.min() >= 0):
            self.problems.append(".json: weight must be a finite number of 0 or more")
        return np.asarray(found, np.float32)


def _texts(values: pa.Array | None) -> pa.Array | None:
    return None if values is None else values.cast(pa.large_string())


def _numbers_or_names(texts: pa.Array) -> pa.Array:
    """Whole numbers where all are, else numbers, else names."""
    for pattern, kind in ((r"^\d+$", pa.int64()), (r"^[-+]?[\d.]+(e[-+]?\d+)?$", pa.float64())):
        if pc.all(pc.match_substring_regex(texts, pattern)).as_py():
            with contextlib.suppress(pa.ArrowInvalid):
                return texts.cast(kind)
    return pc.if_else(pc.equal(texts, ""), None, texts).cast(pa.large_string())


def _words_of_shards(names: Sequence[str]) -> pa.Array:
    """The word for a split in the name of each shard; empty for all where one has none."""
    found = []
    for name in names:
        words = [w for w in re.split(r"[^a-z]+", name.lower()) if w in SPLIT_NAMES]
        found.append(words[-1] if words else None)
    return pa.array(found if all(found) else [None] * len(found), pa.large_string())


def _common_folder(shards: Sequence[RemoteFile]) -> str:
    """What the addresses of all shards begin with, up to a slash."""
    common = os.path.commonprefix([shard.url for shard in shards])  # noqa: RUF071 - of addresses
    return common.rpartition("/")[0] + "/"


def _class_names(prefix: str, blocks: Blocks | None) -> tuple[str, ...] | None:
    """Names in `classes.txt` beside the shards, a line each."""
    if blocks is None:
        path = Path(prefix) / CLASSES_FILE
        text = path.read_text() if path.is_file() else ""
    else:
        try:
            file = find_files(f"{prefix}{CLASSES_FILE}", CLASSES_FILE)[0]
            text = fetch(file, 0, file.size).decode()
        except DataError:
            text = ""
    return tuple(line.strip() for line in text.splitlines() if line.strip()) or None
