"""Tables that hold the images themselves: Parquet, and Arrow files of `datasets`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tl.config import DataConfig
from tl.data.arrow import UNPACKED, ArrowStore, open_arrow, unpack
from tl.data.errors import DataError
from tl.data.folder import some
from tl.data.sources import Progress
from tl.data.sources.columns import find_columns
from tl.data.sources.listing import SPLIT_WORDS, SPLITS, Listing
from tl.data.sources.manifest import assemble, parquet_schema

SAMPLE_ROWS = 1000
TEXT = pa.large_string()


def images_in(schema: pa.Schema) -> list[str]:
    """Columns that hold images as bytes, or as structs of `bytes` and `path`."""
    return [field.name for field in schema if _holds_images(field.type)]


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        names = {kind.field(i).name for i in range(kind.num_fields)}
        return "bytes" in names and _holds_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def class_names(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """Column -> class names, as `datasets` notes them in what it writes."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    found = {}
    for name, feature in noted.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else feature
        inner = inner[0] if isinstance(inner, list) and inner else inner
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            found[name] = tuple(inner.get("names") or ())
    return {name: names for name, names in found.items() if names}


def list_tables(
    config: DataConfig,
    files: Mapping[str, Sequence[Path]],
    root: Path,
    origin: str,
    cache_dir: Path | None,
    progress: Progress | None = None,
    *,
    elsewhere: bool = False,
) -> Listing:
    """Images of tables, all of the same columns.

    Args:
        config: `columns`, `task` and `label_separator` count.
        files: What a split is called, or "" for none -> its files, Parquet or Arrow.
        root: Folder of the files.
        origin: Of the whole, for messages.
        cache_dir: Where the images of Parquet files are unpacked.
        progress: Called with (done, total) of these images.
        elsewhere: Whether images may be files that the tables name.

    Raises:
        DataError: Files that cannot be read, or differ; columns that cannot be told.
    """
    flat = [(name, file) for name, group in files.items() for file in group]
    if not flat:
        raise DataError(f"{origin} has no Parquet or Arrow files")
    packed = [file.suffix != ".arrow" for _, file in flat]
    schemas = [
        parquet_schema(file) if is_packed else open_arrow(file).schema
        for (_, file), is_packed in zip(flat, packed, strict=True)
    ]
    sample = _rows(flat[0][1], None, packed=packed[0])
    columns = find_columns(origin, sample, config.columns, images=images_in(schemas[0]))
    if columns.bytes is None:
        raise DataError(
            f"{origin} has no column with images as bytes; for a table of paths name the file "
            "itself with data.root or data.table"
        )
    needed = columns.needed()
    _same_columns(flat, schemas, [*needed, columns.bytes])
    parts = [
        _rows(file, needed, packed=is_packed)
        for (_, file), is_packed in zip(flat, packed, strict=True)
    ]
    table = pa.concat_tables(parts, promote_options="permissive")
    sizes = [len(part) for part in parts]
    labels = _labels_of_files(flat, root)
    part, row = np.repeat(np.arange(len(parts)), sizes), np.concatenate([*map(np.arange, sizes)])
    paths, column = tuple(file for _, file in flat), columns.bytes
    if any(packed):
        paths, column = tuple(unpack(paths, column, cache_dir, progress)), UNPACKED
    store = ArrowStore(paths, column, root, anywhere=elsewhere)
    listing = assemble(
        config, table, columns, origin=origin, root=root, first=0, store=store,
        names=_names(labels, sizes),
        features=class_names(schemas[0]),
        describe=lambda index: f"{labels[int(part[index])]}, row {int(row[index]):,}",
    )  # fmt: skip
    listing.places = {"_part": part.astype(np.int64), "_row": row.astype(np.int64)}
    if columns.split is None or columns.split in columns.guessed.values():
        _splits_of_files(listing, [name for name, _ in flat], sizes)
    return listing


def _rows(file: Path, columns: Sequence[str] | None, *, packed: bool) -> pa.Table:
    """Some columns of all rows, or all but the images of the first rows."""
    try:
        if not packed:
            table = open_arrow(file)
            return table.slice(0, SAMPLE_ROWS) if columns is None else table.select(columns)
        if columns is not None:
            return pq.read_table(file, columns=list(columns))
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            images = images_in(schema)
            small = [name for name in schema.names if name not in images]
            empty = schema.empty_table()
            for batch in parquet.iter_batches(SAMPLE_ROWS, columns=small):
                part = pa.Table.from_batches([batch])
                for name in images:  # their names count, their bytes do not
                    nothing = pa.nulls(len(part), schema.field(name).type)
                    part = part.append_column(schema.field(name), nothing)
                return part
            return empty
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file} cannot be read: {str(error)[:160]}") from error


def _same_columns(
    flat: Sequence[tuple[str, Path]], schemas: Sequence[pa.Schema], needed: Sequence[str]
) -> None:
    problems = []
    for (_, file), schema in zip(flat, schemas, strict=True):
        lacking = [name for name in needed if name not in schema.names]
        if lacking:
            problems.append(f"{file} lacks the column {some(lacking)}, which {flat[0][1]} has")
    if problems:
        raise DataError(problems)


def _labels_of_files(flat: Sequence[tuple[str, Path]], root: Path) -> list[str]:
    """What to call each file: its path below the root."""
    return [
        file.relative_to(root).as_posix() if file.is_relative_to(root) else f"{name}/{file.name}"
        for name, file in flat
    ]


def _names(labels: Sequence[str], sizes: Sequence[int]) -> pa.Array:
    """`table.parquet#17` for each row, from 0."""
    chunks: list[Any] = []
    for label, size in zip(labels, sizes, strict=True):
        numbers = pa.array(np.arange(size)).cast(TEXT)
        start, sign = pa.scalar(label, TEXT), pa.scalar("#", TEXT)
        chunks.append(pa.compute.binary_join_element_wise(start, numbers, sign))
    return pa.chunked_array(chunks, TEXT).combine_chunks()


def _splits_of_files(listing: Listing, names: Sequence[str], sizes: Sequence[int]) -> None:
    """Splits as the files are called, where the rows do not say them."""
    known = [SPLIT_WORDS.get(name.lower()) for name in names]
    if not any(names):
        return
    unknown = sorted({n for n, split in zip(names, known, strict=True) if n and split is None})
    if unknown:
        listing.problems.append(
            f"{listing.origin} has splits that are neither train, val nor test: "
            f"{some([repr(name) for name in unknown], 5)}; name one file or folder with data.root, "
            "or rename them"
        )
        return
    codes = [-1 if split is None else SPLITS.index(split) for split in known]
    listing.splits = np.repeat(np.array(codes, np.int8), sizes)
    for name, split in zip(names, known, strict=True):
        if split is not None:
            listing.split_names.setdefault(split, name)
