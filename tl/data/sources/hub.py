"""Data sets of Hugging Face: saved folders, copied Parquet files, and names of the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tl.config import DataConfig
from tl.data.errors import DataError
from tl.data.folder import existing_path, some
from tl.data.sources import Progress
from tl.data.sources.listing import SPLIT_WORDS, Listing
from tl.data.sources.tables import list_tables

HUB = "hub:"
# train-00000-of-00003.parquet, validation.parquet, test-0.parquet
FILE = re.compile(r"^([A-Za-z]+)(?:[-_.][0-9].*)?$")


def list_datasets(
    config: DataConfig, cache_dir: Path | None, progress: Progress | None = None
) -> Listing:
    """Images of a data set, by name or as it lies on the disk.

    What `datasets` writes is read with pyarrow alone; the library is needed for names only.

    Raises:
        DataError: There is no such data set, or it cannot be read.
    """
    if config.root.startswith(HUB):
        return _from_hub(config, cache_dir)
    path = existing_path(config.root)
    if path.is_file():
        return list_tables(config, {"": [path]}, path.parent, str(path), cache_dir, progress)
    if (path / "dataset_dict.json").is_file():
        noted = _json(path / "dataset_dict.json")
        files = {name: _saved(path / name) for name in noted.get("splits", [])}
    elif (path / "state.json").is_file():
        files = {"": _saved(path)}
    else:
        files = _by_name(path)
    return list_tables(config, files, path, str(path), cache_dir, progress)


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _saved(folder: Path) -> list[Path]:
    """Arrow files of one split that `save_to_disk` wrote, in order."""
    noted = _json(folder / "state.json")
    if noted.get("_indices_data_files"):
        raise DataError(f"{folder} is a selection of rows: save flatten_indices() of it")
    names = [str(entry.get("filename")) for entry in noted.get("_data_files") or []]
    wrong = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if wrong:
        raise DataError(f"{folder}/state.json names files that are not there: {some(wrong)}")
    return [folder / name for name in names]


def _by_name(path: Path) -> dict[str, list[Path]]:
    """Parquet and Arrow files of a folder by the split that their names begin with."""
    inner = path / "data"
    folder = inner if inner.is_dir() and any(inner.glob("*.parquet")) else path
    found: dict[str, list[Path]] = {}
    for file in sorted([*folder.glob("*.parquet"), *folder.glob("*.arrow")]):
        match = FILE.match(file.stem)
        name = match[1] if match and match[1].lower() in SPLIT_WORDS else ""
        found.setdefault(name, []).append(file)
    if not found:
        raise DataError(
            f"data.root: {path} is no data set: it has neither dataset_dict.json or state.json "
            "(datasets.save_to_disk) nor .parquet files"
        )
    return found


def _from_hub(config: DataConfig, cache_dir: Path | None) -> Listing:
    """`hub:owner/name[@revision]`, with a configuration after a colon."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data.root={config.root} needs the library datasets: pip install 'tl[hub]'"
        ) from error
    name, _, part = config.root.removeprefix(HUB).partition(":")
    name, _, revision = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise DataError(f"data.root={config.root}: a name is hub:owner/name")
    try:
        loaded = datasets.load_dataset(name, part or None, revision=revision or None)
    except Exception as error:  # a dozen kinds: no network, no such name, no permission
        text = str(error).strip().split("\n")[0]
        raise DataError(
            f"data.root={config.root} cannot be loaded: {text[:200]}; without a network copy the "
            "data set elsewhere with datasets.save_to_disk and name that folder"
        ) from error
    files = {
        split: [Path(entry["filename"]) for entry in data.cache_files]
        for split, data in loaded.items()
    }
    first = next(iter(files.values()))
    root = first[0].parent if first else Path(name)
    return list_tables(config, files, root, config.root, cache_dir, elsewhere=True)
