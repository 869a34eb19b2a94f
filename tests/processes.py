"""Training jobs as processes of their own, to be killed and resumed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path


def start(*args: str, group: bool = False) -> subprocess.Popen[str]:
    code = "from tl.pipelines import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=group,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


def kill_when(process: subprocess.Popen[str], file: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{file} never appeared"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def timeless(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.endswith("_seconds")}
