"""What lies in a data folder: splits, class folders and files, by their names alone."""

from __future__ import annotations

import difflib
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tl.bundle import IMAGE_SUFFIXES
from tl.data.errors import DataError

SPLIT_NAMES = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
# Folders that archivers and network drives leave behind.
LITTER = frozenset({"__MACOSX", "@eaDir", "lost+found"})
LAYOUT = "<class>/* or train/<class>/* and val/<class>/*"


@dataclass
class Found:
    """Files of a data folder.

    Args:
        root: The data folder, absolute.
        split_folders: Split -> name of its folder; empty where the folder has no splits.
        images: (path relative to the root, class name, split); without split folders all are train.
        class_folders: Split -> class names that have a folder there, with or without images.
        ignored: Files and folders that play no part, by their names.
        unnamed: Images whose name is not UTF-8, written so that it can be printed, and their split.
        problems: Sentences about folders that cannot be right.
        outside: Links that lead out of the root.
    """

    root: Path
    split_folders: dict[str, str] = field(default_factory=dict)
    images: list[tuple[str, str, str]] = field(default_factory=list)
    class_folders: dict[str, list[str]] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    unnamed: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def where(self, split: str) -> str:
        """Name of the folder of a split for messages."""
        return self.split_folders.get(split, self.root.name)


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Sort key that puts 2 before 10 and is the plain order for names without digits."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if part.isdecimal() else part for part in parts], name


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean x?` where a similar name exists, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first names and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest:,} more" if rest > 0 else "")


def count(number: int, thing: str) -> str:
    """`1 image`, `2,000 images`."""
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its suffix."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 - a name, not a path


def existing_path(text: str, key: str = "data.root") -> Path:
    """A file or folder, absolute; without torch or pandas, so that a wrong name is refused at once.

    Raises:
        DataError: It is not there.
    """
    path = Path(text).expanduser().absolute()
    if path.exists():
        return path.resolve()
    upper = next(parent for parent in path.parents if parent.is_dir())
    first_missing = path.relative_to(upper).parts[0]
    thing = "file" if path.suffix else "folder"
    hint = nearest(first_missing, [p.name for p in upper.iterdir()])
    raise DataError(f"{key}: there is no {thing} {path} ({upper} has no {first_missing}{hint})")


def existing_folder(text: str) -> Path:
    """The data folder, absolute.

    Raises:
        DataError: It is not there, or a file.
    """
    root = existing_path(text)
    if not root.is_dir():
        raise DataError(f"data.root: {root} is a file, not a folder; unpack it if it is an archive")
    return root


def scan(root: Path) -> Found:
    """Look through a data folder without opening a file.

    Args:
        root: An existing folder, absolute.
    """
    found = Found(root)
    folders, files = _listing(root, found)
    splits = _split_folders(root, folders, found)
    found.ignored += map(escaped, files)
    if not splits:
        _read_split(root, "train", folders, found)
        return found
    for split, folder in splits.items():
        found.split_folders[split] = folder.name
        classes, strays = _listing(folder, found)
        found.ignored += [f"{folder.name}/{escaped(name)}" for name in strays]
        _read_split(folder, split, classes, found)
    used = {folder.name for folder in splits.values()}
    found.ignored += [f"{escaped(folder.name)}/" for folder in folders if folder.name not in used]
    return found


def _listing(folder: Path, found: Found) -> tuple[list[Path], list[str]]:
    """Folders, and names of files, that count, each in natural order; hidden ones do not."""
    try:
        with os.scandir(folder) as entries:
            shown = [e for e in entries if not e.name.startswith(".") and e.name not in LITTER]
            folders = [e.name for e in shown if e.is_dir()]
            links = [e.path for e in shown if e.is_symlink()]
            files = [e.name for e in shown if not e.is_dir()]
    except OSError as error:
        found.problems.append(f"{folder} cannot be listed: {(error.strerror or '').lower()}")
        return [], []
    for link in links:
        if not Path(os.path.realpath(link)).is_relative_to(found.root):
            found.outside.append(escaped(os.path.relpath(link, found.root)))
    names = sorted(folders, key=natural_order)
    return [folder / name for name in names], sorted(files, key=natural_order)


def _split_folders(root: Path, folders: list[Path], found: Found) -> dict[str, Path]:
    """Split -> folder. A folder called `train` that holds images itself is a class of trains."""
    named = [folder for folder in folders if folder.name.lower() in SPLIT_NAMES]
    if len(named) < len(folders):
        named = [folder for folder in named if _is_split(folder)]
    splits: dict[str, Path] = {}
    for folder in named:
        split = SPLIT_NAMES[folder.name.lower()]
        if split in splits:
            both = f"{splits[split].name} and {folder.name}"
            found.problems.append(f"{root} has both {both}: keep one of them as {split}")
        else:
            splits[split] = folder
    return {split: splits[split] for split in ("train", "val", "test") if split in splits}


def _is_split(folder: Path) -> bool:
    folders, files = _listing(folder, Found(folder))
    return bool(folders) or not any(map(is_image_name, files))


def _read_split(folder: Path, split: str, classes: list[Path], found: Found) -> None:
    above = frozenset(_identity(path) for path in (found.root, folder))
    names = found.class_folders.setdefault(split, [])
    for class_folder in classes:
        if not _printable(class_folder.name):
            shown = escaped(class_folder.name)
            found.problems.append(f"the folder name {shown} is not UTF-8: rename it")
            continue
        # The same accented letter has two spellings in Unicode; archives mix them between splits.
        name = unicodedata.normalize("NFC", class_folder.name)
        if name not in names:
            names.append(name)
        for path in _files(class_folder, above, found):
            if not is_image_name(path):
                found.ignored.append(escaped(path))
            elif _printable(path):
                found.images.append((path, name, split))
            else:
                found.unnamed.append((escaped(path), split))


def _files(folder: Path, above: frozenset[tuple[int, int]], found: Found) -> Iterator[str]:
    """Files of a class below the root, in depth. A link to a folder around it is not followed."""
    identity = _identity(folder)
    if identity in above:
        return
    folders, files = _listing(folder, found)
    place = folder.relative_to(found.root).as_posix()
    yield from (f"{place}/{name}" for name in files)
    for inner in folders:
        yield from _files(inner, above | {identity}, found)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _printable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def escaped(name: str) -> str:
    """A file name that can be printed: bytes that are no UTF-8 become backslash codes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
