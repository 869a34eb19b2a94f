"""Folders of class folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from tl.config import DataConfig
from tl.data.errors import DataError
from tl.data.folder import LAYOUT, Found, count, existing_folder, is_image_name, scan, some
from tl.data.sources import Progress
from tl.data.sources.listing import NO_SPLIT, SPLITS, Listing
from tl.data.stores import FileStore


def list_folder(
    config: DataConfig,
    cache_dir: Path | None,  # noqa: ARG001
    progress: Progress | None = None,  # noqa: ARG001
) -> Listing:
    """Images of `<class>/*` or `train|val|test/<class>/*` (also valid, validation).

    Raises:
        DataError: There is no folder, or nothing in it.
    """
    found = scan(existing_folder(config.root))
    if not found.images and not found.problems:
        raise DataError(_nothing_found(found))
    text = pa.large_string()
    codes = {split: SPLITS.index(split) for split in found.split_folders}
    return Listing(
        origin=str(found.root),
        root=found.root,
        store=FileStore(found.root),
        names=pa.array([path for path, _, _ in found.images], text),
        labels=pa.array([name for _, name, _ in found.images], text),
        splits=np.array([codes.get(split, NO_SPLIT) for _, _, split in found.images], np.int8),
        classes_of=found.class_folders,
        split_names=found.split_folders,
        unnamed=found.unnamed,
        few=_too_few_classes(found),
        problems=found.problems,
        notes=_ignored_note(found),
        key=str(found.root),
    )


def _nothing_found(found: Found) -> str:
    shown = f"data.root: {found.root}"
    if not found.ignored and not any(found.class_folders.values()) and not found.unnamed:
        return f"{shown} is empty: put the images into {LAYOUT}"
    if found.ignored:
        files = f"{count(len(found.ignored), 'other file')} ({some(found.ignored)})"
        return (
            f"{shown} has no class folders with images, only {files}: put the images into {LAYOUT}"
        )
    return f"{shown} has folders, but no images in them: put the images into {LAYOUT}"


def _too_few_classes(found: Found) -> str:
    """What to say where there are fewer than two classes."""
    classes = found.class_folders.get("train", [])
    place = found.root / found.split_folders.get("train", "")
    if not classes:
        return f"{place} has no class folders: put the images into {LAYOUT}"
    text = f"{place} has only one class, {classes[0]}; a classifier needs two or more"
    if len(classes) == 1 and not found.split_folders:
        inner = scan(found.root / classes[0])
        if len({name for _, name, _ in inner.images}) > 1:
            text += f". The classes seem to lie one folder deeper: data.root={inner.root}"
    return text


def _ignored_note(found: Found) -> list[str]:
    folders = [name for name in found.ignored if name.endswith("/")]
    strays = [name for name in found.ignored if is_image_name(name)]
    others = [n for n in found.ignored if not n.endswith("/") and not is_image_name(n)]
    beside = f"beside {' and '.join(found.split_folders.values())}"
    outside = sorted(found.outside)
    lead = "leads" if len(outside) == 1 else "lead"
    links = [f"{count(len(outside), 'link')} {lead} out of {found.root}: {some(outside)}"]
    return [
        f"ignored {count(len(names), thing)} {why}: {some(names, 5)}"
        for names, thing, why in (
            (folders, "folder", beside),
            (strays, "image", "in no class folder"),
            (others, "file", "without the name of an image"),
        )
        if names
    ] + (links if outside else [])
