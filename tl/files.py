"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; it takes that place at the end, and is gone on any error.

    What was at `path` before stays until then, whatever happens. Processes that write the same file
    at once do not meet: the last one wins.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_texts(
    folder: Path, texts: Mapping[str, str], refusal: Callable[[str], Exception]
) -> None:
    """Write texts, each whole or not at all.

    Args:
        folder: The `output_dir` of a job; made where it is missing.
        texts: Name of a file -> what it holds.
        refusal: Makes the error that is raised where they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with replacing(folder / name) as part:
                part.write_text(text, encoding="utf-8")
    except OSError as error:
        place = error.filename or folder
        msg = f"cannot write {place}: {error.strerror}; choose another output_dir"
        raise refusal(msg) from error
