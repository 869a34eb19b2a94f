"""Sources: each says what images it has and what they are; `tl.data.reading` does the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tl.config import DataConfig, DataFormat, is_remote
from tl.data.errors import DataError
from tl.data.folder import existing_folder, existing_path

if TYPE_CHECKING:
    from tl.data.sources.listing import Listing

Progress: TypeAlias = Callable[[int, int], None]

MANIFESTS = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".csv.gz", ".tsv.gz", ".jsonl.gz")
# Written by datasets.save_to_disk.
SAVED = ("dataset_dict.json", "state.json")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
READERS = {
    DataFormat.folder: ("folder", "list_folder"),
    DataFormat.manifest: ("manifest", "list_manifest"),
    DataFormat.datasets: ("hub", "list_datasets"),
    DataFormat.shards: ("shards", "list_shards"),
}


def list_images(
    config: DataConfig, cache_dir: Path | None, progress: Progress | None = None
) -> Listing:
    """What the source of a config has; no image is opened for it.

    Args:
        config: `root`, `table`, `format` and `columns` count.
        cache_dir: For what a source must write down to be read at random.
        progress: Called with (done, total) where that takes long.

    Raises:
        DataError: There is no such source, or it cannot be read at all.
    """
    module, function = READERS[source_format(config)]
    found: Listing = getattr(import_module(f"tl.data.sources.{module}"), function)(
        config, cache_dir, progress
    )
    return found


def source_format(config: DataConfig) -> DataFormat:
    """What lies at `data.root`, by names alone; without pandas or torch.

    Raises:
        DataError: It is not there, or no form of data.
    """
    root = config.root
    if config.format is not DataFormat.auto:
        if config.format is DataFormat.folder or (config.table and not is_remote(root)):
            existing_folder(root)
        elif not is_remote(root) and not _is_pattern(root):
            existing_path(root)
        return config.format
    if root.startswith("hub:"):
        return DataFormat.datasets
    if is_remote(root) or _is_pattern(root) or root.endswith(".tar"):
        return DataFormat.shards
    if config.table is not None:
        existing_folder(root)
        existing_path(config.table, "data.table")
        return DataFormat.manifest
    path = existing_path(root)
    if path.is_dir():
        return _folder_format(path)
    if path.name.lower().endswith(MANIFESTS):
        return DataFormat.manifest
    raise DataError(
        f"data.root: {path} is a file, not a folder; unpack it if it is an archive (manifests end "
        f"in {', '.join(MANIFESTS[:5])}, shards in .tar)"
    )


def _is_pattern(root: str) -> bool:
    return any(sign in root for sign in "*{?") and root.endswith((".tar", "}"))


def _folder_format(path: Path) -> DataFormat:
    if not os.access(path, os.R_OK | os.X_OK):
        msg = (
            f"data.root: user {os.getuid()} may not read {path}; "
            "let it (chmod -R a+rX), or run as the folder's owner"
        )
        raise DataError(msg)
    if any((path / name).is_file() for name in SAVED):
        return DataFormat.datasets
    if any((path / name).is_file() for name in METADATA):
        return DataFormat.manifest
    entries = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    files = [entry.name.lower() for entry in entries if entry.is_file()]
    folders = [entry for entry in entries if entry.is_dir()]
    if any(name.endswith(".tar") for name in files) and not folders:
        return DataFormat.shards
    if folders and not files and all(map(_only_shards, folders)):
        return DataFormat.shards
    tables = any(name.endswith(".parquet") for name in files)
    if (tables and not folders) or (not tables and _only_tables(folders)):
        return DataFormat.datasets
    return DataFormat.folder


def _only_shards(folder: Path) -> bool:
    """Whether a folder, such as one of a split, holds tar files and nothing else."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    return bool(entries) and all(entry.name.lower().endswith(".tar") for entry in entries)


def _only_tables(folders: list[Path]) -> bool:
    """Whether a repository of a data set was copied: a folder `data` of Parquet files."""
    return [f.name for f in folders] == ["data"] and any(folders[0].glob("*.parquet"))
