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
from numpy.typing import NDArray

from tl.config import DataConfig, is_remote
from tl.data.errors import DataError
from tl.data.folder import SPLIT_NAMES, existing_folder, some
from tl.data.remote import Blocks, RemoteFile, fetch, find_files
from tl.data.sources.columns import GUESSES, labels_of, one_hot, text_of, weights_of
from tl.data.sources.listing import Listing, plain, split_codes
from tl.data.tar import TEXTS, TarStore, index_path, read_index

SUFFIX = ".tar"
CLASSES_FILE = "classes.txt"  # beside the shards: one class name a line, where labels are numbers
SHOWN_PROBLEMS = 10
SAMPLE = 1000  # images whose .json says which keys there are
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
        DataError: There are no shards, they are damaged, or their place is out of reach.
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
    if problems:
        raise DataError(problems)
    if not len(index.table):
        ending = config.columns.image
        what = f".{ending.lstrip('.')} members" if ending else "images"
        raise DataError(f"data.root: there are no {what} in {some([s.name for s in shards])}")
    return _listing(config, root, index.table, TarStore(index.shards, blocks))


def _listing(config: DataConfig, root: str, table: pa.Table, store: TarStore) -> Listing:
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
    beside = _Beside(config, root, table)
    labels, label_name, classes = beside.labels()
    words = beside.texts("split")
    if words is None:
        names_there = [shard.url.removeprefix(prefix) for shard in store.shards]
        words = _words_of_shards(names_there).take(pa.array(shard))
    splits, split_names, wrong = split_codes(words, f"{root}: split")
    groups, weights = beside.texts("group"), beside.weights()
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
        groups=groups,
        weights=weights,
        classes=classes or _class_names(prefix, store.blocks),
        split_names=split_names,
        label_name=label_name,
        row_name=beside.row,
        problems=[*beside.problems, *wrong],
        notes=notes,
        key=root,
    )


class _Beside:
    """What stands beside the images: `.cls`, `.txt`, or the keys of `.json`."""

    def __init__(self, config: DataConfig, root: str, table: pa.Table) -> None:
        self.config, self.root, self.table = config, root, table
        self.problems: list[str] = []
        self.shown = ""
        sample = map(_record, table["json"].slice(0, SAMPLE).to_pylist())
        self.keys = list(dict.fromkeys(key for record in sample for key in record))

    def has(self, member: str) -> bool:
        """Whether any image has a member with this ending beside it."""
        return bool(self.table[member].null_count < len(self.table))

    def row(self, index: int) -> str:
        """Where an image stands."""
        shard = self.table["shard"][index].as_py().rpartition("/")[2]
        return f"{shard}/{self.table['key'][index].as_py()}"

    def labels(self) -> tuple[pa.Array, str, tuple[str, ...] | None]:
        """Label of each image, what it is called, and class names where keys are classes."""
        asked = self.config.columns.label
        if isinstance(asked, list):
            return self._one_hot(asked)
        asked = asked or ("cls" if self.has("cls") else self._guess("label") or FOLDER)
        if asked == FOLDER:
            return self._folders(), "class", None
        member = asked in TEXTS and self.has(asked)
        self.shown = f".{asked}" if member else f"{asked} of .json"
        values = self.table[asked] if member else self._column("label", asked)
        split = self.config.task in ("auto", "multi")
        return labels_of(values, self.config.label_separator, split=split), asked, None

    def _folders(self) -> pa.Array:
        self.shown = "the folder of each member"
        inside = pc.extract_regex(plain(self.table["key"]), r"(?:^|/)(?P<folder>[^/]+)/[^/]+$")
        found = pc.struct_field(inside, "folder").cast(pa.large_string())
        if len(found) and found.null_count == len(found):
            beside = [f".{name}" for name in ("json", "txt") if self.has(name)]
            have = f"; beside them is {' and '.join(beside)}" if beside else ""
            have += f" with {', '.join(self.keys)}" if self.keys else ""
            raise DataError(
                f"{self.root}: the images have no labels: there is no .cls, no label in .json and "
                f"no folder{have}; name the key or member with data.columns.label"
            )
        return found

    def _one_hot(self, names: list[str]) -> tuple[pa.Array, str, tuple[str, ...]]:
        """Indices of the keys that are 1, a list for each image."""
        self.shown = f"{len(names)} keys of .json"
        marks = pa.table({name: self._column("label", name) for name in names})
        lists, sizes = one_hot(marks, names, self.problems, {"origin": self.root, "first": "1"})
        if self.config.task != "multi" and len(sizes) and (sizes == 1).all():
            lists = lists.flatten().cast(pa.int64())
        return lists, some(names, 5), tuple(names)

    def texts(self, role: str) -> pa.Array | None:
        """Split or group of each image; None where the shards have none."""
        name = getattr(self.config.columns, role) or self._guess(role)
        return None if name is None else text_of(self._column(role, name))

    def weights(self) -> NDArray[np.float32] | None:
        """Weight of each image; None where the shards have none."""
        name = self.config.columns.weight or self._guess("weight")
        if name is None:
            return None
        said: list[str] = []
        found = weights_of(self._column("weight", name), self.row, said)
        self.problems += [f"{self.root}: {name} of .json: {text}" for text in said]
        return found

    def _guess(self, role: str) -> str | None:
        lower = {key.lower(): key for key in reversed(self.keys)}
        return next((lower[name] for name in GUESSES[role] if name in lower), None)

    def _column(self, role: str, name: str) -> pa.Array:
        """Values of a key of `.json`, of one kind."""
        texts = self.table["json"]
        values = [
            _record(text).get(name)
            for start in range(0, len(texts), SAMPLE)  # few Python objects at a time
            for text in texts.slice(start, SAMPLE).to_pylist()
        ]
        if name not in self.keys and all(value is None for value in values):
            there = ", ".join(self.keys) or "no .json beside the images"
            self.problems.append(f"data.columns.{role}: {name} is no key of .json (there: {there})")
        with contextlib.suppress(pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            found = pa.array(values)
            if not pa.types.is_struct(found.type):
                return found
        kinds = sorted({type(value).__name__ for value in values if value is not None})
        self.problems.append(
            f"{self.root}: {name} of .json must be of one simple kind, got {' and '.join(kinds)}"
        )
        return pa.nulls(len(values), pa.large_string())


def _record(text: str | None) -> dict[str, Any]:
    """A `.json`; empty where there is none, or none that can be read, which is told elsewhere."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


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
