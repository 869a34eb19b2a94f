"""Ctrl-C and SIGTERM: a process ends at once, a fit after the optimizer step that runs.

`docker stop`, Kubernetes and Slurm send SIGTERM and wait for 10 to 30 seconds before they kill. A
fit uses that time to write its state.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from tl.config import ConfigError, Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STEP_SECONDS = 5.0  # that a step may still take: half of what `docker stop` waits
VARIABLE = "TL_STOP_SECONDS"  # another number, where who sends SIGTERM waits for longer
# A launcher sends what its terminal has sent already: one wish, not two.
SAME_SECONDS = 1.0


@dataclass
class _State:
    signum: int = 0  # of the first signal
    since: float = 0.0
    waits: bool = False  # for the end of a step
    ends: bool = False
    patience: float = STEP_SECONDS


_state = _State()


def install() -> None:
    """Take both signals from now on; what this process was asked before is forgotten.

    Call it in the main thread, and again in a forked child.

    Raises:
        ConfigError: `TL_STOP_SECONDS` is no number of seconds.
    """
    global _state
    _state = _State(patience=_patience())
    for signum in SIGNALS:
        signal.signal(signum, request)
    signal.signal(signal.SIGALRM, _overdue)


def request(signum: int, _frame: FrameType | None = None) -> None:
    """Ask this process to stop, as a signal does.

    Raises:
        Interrupted: No fit runs, or the one that does was asked before.
    """
    if _state.ends:
        return  # a second Ctrl-C in the clean-up must not leave the run open in the tracking store
    now, first = time.monotonic(), not _state.signum
    if first:
        _state.signum, _state.since = signum, now
    if not _state.waits:
        stop()
    if first:
        signal.setitimer(signal.ITIMER_REAL, _state.patience)
    elif signum == _state.signum and now - _state.since > SAME_SECONDS:
        stop()


def requested() -> bool:
    """Whether this process was asked to stop."""
    return bool(_state.signum)


@contextmanager
def after_step() -> Iterator[None]:
    """Let what runs in here stop itself: it asks `requested` after each step, and calls `stop`.

    Where it does not in time, or a second signal comes, it ends where it stands.

    Raises:
        Interrupted: The process was asked to stop.
    """
    _state.waits = True
    try:
        yield
    finally:
        _state.waits = False
        in_time()
    if requested():
        stop()


def in_time() -> None:
    """The step has ended: what is written now may take as long as it needs."""
    if requested():
        signal.setitimer(signal.ITIMER_REAL, 0)


def stop() -> NoReturn:
    """End the job; signals that come now are not heard.

    Raises:
        Interrupted: Always.
    """
    in_time()
    _state.ends = True
    raise Interrupted


def _patience() -> float:
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return STEP_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ConfigError(f"{VARIABLE} must be a number of seconds, got {text!r}")
    return seconds


def _overdue(_signum: int, _frame: FrameType | None) -> None:
    stop()
