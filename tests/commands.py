"""Call the console script from tests: in this process for speed, or as a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
SCRIPT = Path(sys.executable).with_name("tl")
# A whole run in about a second: tiny network and images, no processes beside this one.
TINY = [
    "experiment=smoke",
    "model.image_size=32",
    "tracking.system_metrics=false",
    "export.enabled=false",
]
UNTRACKED = [*TINY, "tracking.enabled=false"]


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def refused(self, *parts: str, code: int = 2) -> None:
        """Assert one clear message on stderr with these parts, and nothing else."""
        assert self.code == code, self.out + self.err
        for part in parts:
            assert part in self.err, f"{part!r} is not in:\n{self.err}"
        assert "Traceback" not in self.err + self.out
        assert "site-packages" not in self.err
        assert len(self.err.strip().splitlines()) <= 20


class Command:
    """`tl` in this process; hands on what pytest captured."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capfd, self._monkeypatch = capfd, monkeypatch

    def __call__(self, *args: object) -> Done:
        from tl.pipelines import main

        self._capfd.readouterr()
        self._monkeypatch.setattr(sys, "argv", ["tl"])  # Hydra reads it, our entry sets it
        with _signals_kept():
            try:
                main([str(a) for a in args])
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
        return Done(code, *self._capfd.readouterr())


@contextmanager
def _signals_kept() -> Iterator[None]:
    """The console script takes Ctrl-C and SIGTERM; the test session wants them back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def script(
    *args: object,
    command: tuple[object, ...] = (SCRIPT,),
    preexec: Callable[[], None] | None = None,
    **env: str,
) -> Done:
    """The installed console script in a process of its own."""
    done = subprocess.run(
        [str(a) for a in (*command, *args)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=preexec,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def start(*args: object) -> subprocess.Popen[str]:
    """The installed console script, under way."""
    return subprocess.Popen(
        [str(a) for a in (SCRIPT, *args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(file: Path, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait until a process has made a file."""
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{file} never appeared"
        time.sleep(0.01)


def files(folder: Path) -> set[str]:
    """All files below a folder, relative to it."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
