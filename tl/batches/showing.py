"""What a batch shows while it runs: a live table on a terminal, lines in a log."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.live import Live
from rich.table import Table

from tl.batches.driving import View
from tl.batches.jobs import DONE, INTERRUPTED, RUNNING, WAITING, WRONG
from tl.batches.ledger import Ledger
from tl.display import console, say
from tl.display.tables import new_table
from tl.sections import duration

ROWS = 20  # of the table; of more jobs, those that run or went wrong
LINE_SECONDS = 60.0  # between two lines about the whole in a log
TAIL_BYTES = 2048
EPOCH = re.compile(r"\S+ +\d+/\d+  ")
ORDER = (RUNNING, WAITING, INTERRUPTED, *WRONG, DONE)

Watch = Callable[[Sequence[View]], None]


@contextmanager
def watching(ledger: Ledger, limit: int, *, quiet: bool = False) -> Iterator[Watch]:
    """Show the jobs of a batch.

    Args:
        ledger: Of the batch.
        limit: Jobs at once.
        quiet: Lines only, as the jobs themselves print.

    Yields:
        A function that takes all jobs after each look.
    """
    if quiet or not console.is_terminal:
        yield _Lines(limit)
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda views: live.update(_table(ledger, views, limit), refresh=True)


class _Lines:
    """A line where a job begins or ends, and one about the whole now and then."""

    def __init__(self, limit: int) -> None:
        self.limit, self.last = limit, time.monotonic()
        self.known: dict[str, tuple[str, int]] = {}

    def __call__(self, views: Sequence[View]) -> None:
        for view in views:
            now = (view.state, len(view.entry.attempts))
            before = self.known.get(view.entry.key)
            self.known[view.entry.key] = now
            if before != now and view.state not in (WAITING, *(() if before else (DONE,))):
                say(f"job {view.entry.number} {_said(view)}")
        if time.monotonic() - self.last > LINE_SECONDS:
            self.last = time.monotonic()
            say(summary(views, self.limit))


def _said(view: View) -> str:
    entry, tries = view.entry, len(view.entry.attempts)
    again = f", attempt {tries}" if tries > 1 else ""
    if view.state == RUNNING:
        return f"began{again}: {' '.join(entry.overrides)}"
    seconds = f" after {duration(entry.attempts[-1].seconds)}" if entry.attempts else ""
    why = f": {entry.error}" if entry.error else ""
    return f"{view.state}{seconds}{again}{why}{'; tried again' if view.open and why else ''}"


def summary(views: Sequence[View], limit: int) -> str:
    """Counts of states and the time that is left, in one line."""
    counts = Counter("queued" if v.queued and v.state != RUNNING else v.state for v in views)
    states = [f"{counts[s]} {s}" for s in ("queued", *ORDER) if counts[s] and s != DONE]
    text = ", ".join([f"{counts[DONE]} of {len(views)} jobs done", *states])
    left = _left(views, limit)
    return f"{text}; about {duration(left)} left" if left else text


def _left(views: Sequence[View], limit: int) -> float | None:
    """Seconds until the last job ends, if the others take as long as those that are done."""
    took = [v.entry.attempts[-1].seconds for v in views if v.state == DONE and v.entry.attempts]
    to_do = sum(view.open for view in views)
    if not took or not to_do:
        return None
    running = [v.entry.attempts[-1] for v in views if v.state == RUNNING and v.entry.attempts]
    mean = sum(took) / len(took)
    spent = sum(min(max(time.time() - attempt.began, 0.0), mean) for attempt in running)
    return max((to_do * mean - spent) / max(min(limit, to_do), 1), 0.0)


def _table(ledger: Ledger, views: Sequence[View], limit: int) -> Table:
    table = new_table()
    for title in ("job", "state", "time", "", "progress"):
        table.add_column(title, no_wrap=True, overflow="ellipsis")
    for view in _shown(views):
        entry = view.entry
        state = "queued" if view.queued and view.state != RUNNING else view.state
        table.add_row(
            str(entry.number),
            state,
            _time(view),
            " ".join(entry.overrides),
            _progress(ledger, view),
        )
    table.caption = summary(views, limit)
    table.caption_justify = "left"
    return table


def _shown(views: Sequence[View]) -> list[View]:
    if len(views) <= ROWS:
        return list(views)
    ranked = sorted(views, key=lambda v: ORDER.index(v.state) if v.state != WAITING else 99)
    return sorted(ranked[:ROWS], key=lambda v: v.entry.number)


def _time(view: View) -> str:
    if not view.entry.attempts:
        return ""
    last = view.entry.attempts[-1]
    running = view.state == RUNNING
    return duration(max(time.time() - last.began, 0.0) if running else last.seconds)


def _progress(ledger: Ledger, view: View) -> str:
    if view.state == RUNNING:
        return last_line(ledger.log(view.entry))
    return view.entry.error if view.state in WRONG else ""


def last_line(log: Path) -> str:
    """What a job printed last: of its last lines that of an epoch, where there is one."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(file.tell() - TAIL_BYTES, 0))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    epochs = [line for line in lines if EPOCH.match(line)]
    return (epochs or lines or [""])[-1]
