"""Manifests: CSV, TSV, JSON Lines or Parquet with one row an image."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tl.config import DataConfig
from tl.data.errors import DataError
from tl.data.folder import count, existing_folder, existing_path, some
from tl.data.sources import Progress
from tl.data.sources.columns import (
    Columns,
    find_columns,
    labels_of,
    one_hot,
    text_of,
    weights_of,
)
from tl.data.sources.listing import NO_SPLIT, Listing, plain, split_codes
from tl.data.sources.texts import first_row, kind_of, read_rows, sample_rows
from tl.data.stores import FileStore, ImageStore

SAMPLE_ROWS = 1000
FIRST_FILES = 100  # looked for at once: a wrong folder is said before a million of them
SHOWN = 3
TEXT = pa.large_string()
ADDRESS = r"^[A-Za-z][A-Za-z0-9+.-]+://"


def list_manifest(
    config: DataConfig, cache_dir: Path | None, progress: Progress | None = None
) -> Listing:
    """Images of a manifest: files relative to it or to `data.root`, or bytes in Parquet.

    Raises:
        DataError: It cannot be read, or its columns cannot be told.
    """
    file, root = _places(config)
    origin = str(file)
    if not file.is_file():
        raise DataError(f"{origin} is no file")
    if kind_of(file) == "parquet":
        from tl.data.sources.tables import images_in, list_tables

        schema = parquet_schema(file)
        if images_in(schema) and config.columns.image is None:
            return list_tables(config, {"": [file]}, file.parent, origin, cache_dir, progress)
        sample = _parquet(file, None)
    else:
        sample = sample_rows(file)
    columns = find_columns(origin, sample, config.columns)
    if columns.bytes is not None:
        raise DataError(
            f"data.columns.bytes: images as bytes are read from Parquet only, not from {origin}"
        )
    needed = columns.needed()
    whole = kind_of(file) == "parquet"
    table = _parquet(file, needed) if whole else read_rows(file, needed)
    first = 0 if whole else first_row(file)
    problems: list[str] = []
    names = file_names(table[columns.image], root, origin, first, problems)
    listing = assemble(
        config, table, columns, origin=origin, root=root, first=first,
        store=FileStore(root, confined=True), names=names,
    )  # fmt: skip
    listing.problems = problems + listing.problems
    listing.key = f"{root}\0{file}"
    if len(listing) and not problems:
        listing.problems += _nothing_there(root, names, columns.image or "")
    return listing


def _places(config: DataConfig) -> tuple[Path, Path]:
    """The manifest, and the folder to which its paths are relative."""
    if config.table is not None:
        return existing_path(config.table, "data.table"), existing_folder(config.root)
    path = existing_path(config.root)
    if path.is_dir():  # as datasets' imagefolder has it
        named = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
        found = [path / name for name in named if (path / name).is_file()]
        if not found:
            raise DataError(
                f"data.root: {path} is a folder; data.format=manifest wants a file, or "
                "data.table=FILE beside the folder"
            )
        return found[0], path
    return path, path.parent


def parquet_schema(file: Path) -> pa.Schema:
    """Columns of a Parquet file.

    Raises:
        DataError: It is none.
    """
    try:
        return pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        text = str(error).split("\n")[0]
        raise DataError(f"{file} is no Parquet file, or is cut off: {text[:160]}") from error


def _parquet(file: Path, columns: list[str] | None) -> pa.Table:
    """Some columns of all rows, or all columns of the first rows."""
    try:
        if columns is not None:
            return pq.read_table(file, columns=columns)
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(SAMPLE_ROWS):
                return pa.Table.from_batches([batch])
            return parquet.schema_arrow.empty_table()
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} cannot be read: {str(error)[:160]}") from error


def assemble(
    config: DataConfig,
    table: pa.Table,
    columns: Columns,
    *,
    origin: str,
    root: Path,
    first: int,
    store: ImageStore,
    names: pa.Array,
    features: dict[str, tuple[str, ...]] | None = None,
    describe: Callable[[int], str] | None = None,
) -> Listing:
    """A listing from the columns of a table.

    Args:
        config: `task` and `label_separator` count.
        table: One row an image.
        columns: What they mean.
        origin: Of the table, for messages.
        root: Folder of the images.
        first: Number of the first row, for messages.
        store: Reads the images.
        names: Of the images.
        features: Column -> class names, where the source fixes them.
        describe: From the index of a row to its place; None: its number.
    """
    place = describe or (lambda index: f"row {index + first:,}")
    problems, notes = [], columns.note(Path(origin).name)
    if not len(table):
        problems.append(f"{origin} has no rows")
    label_name = f"column {some(columns.label, 5)}"
    classes = (features or {}).get(columns.label[0])
    if len(columns.label) > 1:
        labels = _marks(config, table, columns, problems, notes, origin, first)
        classes = columns.label
    else:
        # Numbers that separate: never where one number or one class is asked for.
        split = config.task in ("auto", "multi")
        labels = labels_of(table[columns.label[0]], config.label_separator, split=split)
    splits = np.full(len(table), NO_SPLIT, np.int8)
    called: dict[str, str] = {}
    if columns.split is not None:
        words = text_of(table[columns.split])
        splits, called, wrong = split_codes(words, f"{origin}: column {columns.split}")
        problems += wrong
    weights = None
    if columns.weight is not None:
        said: list[str] = []
        weights = weights_of(table[columns.weight], place, said)
        problems += [f"{origin}: column {columns.weight}: {text}" for text in said]
    problems += _copies(names, origin, place)
    return Listing(
        origin=origin,
        root=root,
        store=store,
        names=names,
        labels=labels,
        splits=splits,
        groups=None if columns.group is None else text_of(table[columns.group]),
        weights=weights,
        classes=classes,
        split_names=called,
        label_name=label_name,
        row_name=place,
        problems=problems,
        notes=notes,
        key=origin,
    )


def _marks(
    config: DataConfig,
    table: pa.Table,
    columns: Columns,
    problems: list[str],
    notes: list[str],
    origin: str,
    first: int,
) -> pa.Array:
    """Labels from one column a class; one class each where every row has exactly one."""
    place = {"origin": origin, "first": str(first)}
    lists, sizes = one_hot(table, columns.label, problems, place)
    if config.task == "multi" or not len(sizes) or (sizes != 1).any():
        return lists
    if config.task == "auto":
        notes.append(f"{origin}: each row has one label: data.task=single")
    return lists.flatten().cast(pa.int64())


def _copies(names: pa.Array, origin: str, place: Callable[[int], str]) -> list[str]:
    """A sentence where images stand in several rows."""
    encoded = names.dictionary_encode()
    if len(encoded.dictionary) == len(names):
        return []
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    numbers = np.bincount(codes)
    several = np.flatnonzero(numbers > 1)
    shown = [
        f"{encoded.dictionary[int(code)].as_py()[:80]} "
        f"({', '.join(place(int(row)) for row in np.flatnonzero(codes == code)[:SHOWN])})"
        for code in several[: SHOWN + 1]
    ]
    text = some(shown, SHOWN) if len(several) <= SHOWN else ", ".join(shown[:SHOWN]) + ", …"
    stand = "stands" if len(several) == 1 else "stand"
    return [
        f"{origin}: {count(len(several), 'image')} {stand} in several rows: {text}; keep one row "
        "an image (several labels go into one cell, see data.label_separator)"
    ]


# --- paths ----------------------------------------------------------------------------------------


def file_names(column: Any, root: Path, origin: str, first: int, problems: list[str]) -> pa.Array:
    """Paths relative to the root, in one spelling.

    Args:
        column: Paths as the manifest has them.
        root: Folder to which they are relative.
        origin: Of the manifest, for messages.
        first: Number of the first row, for messages.
        problems: Sentences about paths that lead out of the root, or are none, are added.
    """
    names = text_of(plain(column))

    def rows(chosen: NDArray[np.intp]) -> str:
        shown = [
            f"row {index + first:,}: {str(names[index].as_py())[:80]}" for index in chosen.tolist()
        ]
        return some(shown, SHOWN)

    missing = np.flatnonzero(names.is_null().to_numpy(zero_copy_only=False))
    if len(missing):
        shown = some([f"row {i + first:,}" for i in missing.tolist()], SHOWN)
        problems.append(f"{origin}: {count(len(missing), 'row')} without a path ({shown})")
        names = names.fill_null("")
    if pc.any(pc.match_substring(names, "\\")).as_py():
        names = pc.replace_substring(names, "\\", "/")
    addresses = np.flatnonzero(
        pc.match_substring_regex(names, ADDRESS).to_numpy(zero_copy_only=False)
    )
    if len(addresses):
        problems.append(
            f"{origin}: {count(len(addresses), 'link')} to the internet instead of paths "
            f"({rows(addresses)}): images elsewhere are read from tar shards; copy single files "
            "into a folder first"
        )
        return pc.if_else(pc.match_substring_regex(names, ADDRESS), "", names)
    odd = pc.match_substring_regex(names, r"^/|^[A-Za-z]:/|(^|/)\.{1,2}(/|$)|//|^~|\x00")
    places = np.flatnonzero(odd.to_numpy(zero_copy_only=False))
    if not len(places):
        return names
    mended = [_inside(name, root) for name in names.take(places).to_pylist()]
    wrong = places[np.array([name is None for name in mended])]
    if len(wrong):
        lead = "leads" if len(wrong) == 1 else "lead"
        problems.append(
            f"{origin}: {count(len(wrong), 'path')} {lead} out of {root} ({rows(wrong)}): name the "
            "folder that holds all images with data.root=FOLDER data.table=MANIFEST"
        )
    mask = np.zeros(len(names), bool)
    mask[places] = True
    filled = pa.array([name or "" for name in mended], TEXT)
    return pc.replace_with_mask(names, pa.array(mask), filled)


def _inside(name: str, root: Path) -> str | None:
    """A path below the root without dots; None where it leads elsewhere."""
    start = f"{root}/"
    if name.startswith("/"):
        name = posixpath.normpath(name)
        if not name.startswith(start):
            name = os.path.realpath(name)
        return name[len(start) :] if name.startswith(start) else None
    name = posixpath.normpath(name)
    outside = name == ".." or name.startswith(("../", "~")) or name[1:3] == ":/" or "\0" in name
    return None if outside else name


def _nothing_there(root: Path, names: pa.Array, column: str) -> list[str]:
    """A sentence where none of the first files is there: the folder is wrong, not the files."""
    some_names = names.slice(0, FIRST_FILES).to_pylist()
    if any(os.path.lexists(f"{root}/{name}") for name in some_names):
        return []
    return [
        f"none of the first {count(len(some_names), 'file')} of column {column} is there, such as "
        f"{root}/{some_names[0][:120]}: paths are relative to the manifest, or to data.root with "
        "data.table=MANIFEST"
    ]
