"""Progress: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tl.display.tables import console, say


@contextmanager
def bar(
    title: str, unit: str = "images", every_s: float = 10.0
) -> Iterator[Callable[[int, int], None]]:
    """Show progress: a bar on a terminal, one plain line every `every_s` seconds in a log.

    Yields:
        A function of (done, total); it may be called as often as one likes.

    Example:
        >>> with bar("checking images") as update:
        ...     update(3, 10)
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit, markup=False),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        return
    last = time.monotonic()

    def log(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= every_s:
            last = now
            say(f"{title}: {done:,} of {total:,} {unit}")

    yield log
