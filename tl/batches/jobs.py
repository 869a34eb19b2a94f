"""Jobs of a batch, what is known of each, and which of them a call runs."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, field, replace

from tl.config import BatchConfig, TrackingConfig, TrainConfig, to_yaml

# What a job is doing. `refused`: the request was wrong, so that trying again is no use.
WAITING, RUNNING, DONE = "waiting", "running", "done"
FAILED, LOST, REFUSED, INTERRUPTED = "failed", "lost", "refused", "interrupted"
WRONG = (FAILED, LOST, REFUSED)


@dataclass(frozen=True)
class Job:
    """One job of a batch, before it is in the ledger.

    Args:
        number: Its place in the batch.
        overrides: What it sets on the command line, for people.
        config: As validated.
    """

    number: int
    overrides: tuple[str, ...]
    config: TrainConfig

    @property
    def settings(self) -> TrainConfig:
        """What decides what the job finds: no places, no tracking, nothing about the batch."""
        return replace(self.config, output_dir=None, resume=None, batch=BatchConfig())

    @property
    def key(self) -> str:
        """Hash of the settings."""
        text = to_yaml(replace(self.settings, tracking=TrackingConfig()))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Attempt:
    """One try at a job.

    Args:
        worker: That ran it.
        host: Where.
        pid: Of the job's own process.
        began: In seconds since 1970 by the clock of that host.
        ended: Likewise; None while it runs.
        state: How it ended.
        error: First line of what went wrong.
    """

    worker: str
    host: str
    pid: int
    began: float
    ended: float | None = None
    state: str = RUNNING
    error: str = ""

    @property
    def seconds(self) -> float:
        """How long it took; 0 while it runs."""
        return max((self.ended or self.began) - self.began, 0.0)


@dataclass(frozen=True)
class Entry:
    """What the ledger knows of a job.

    Args:
        key: Hash of its settings.
        number: Of its folder, and of its log.
        overrides: For people.
        settings: YAML of its config.
        state: What was last written; `Ledger.state` knows whether that is still true.
        attempts: All of them, over all calls.
        retry_at: When it may be tried again, by the clock of the machine that wrote it.
    """

    key: str
    number: int
    overrides: tuple[str, ...]
    settings: str
    state: str = WAITING
    attempts: tuple[Attempt, ...] = ()
    retry_at: float = 0.0

    @property
    def error(self) -> str:
        """First line of what went wrong last."""
        return self.attempts[-1].error if self.attempts else ""


@dataclass(frozen=True)
class Rules:
    """Which jobs a call of a batch runs.

    Args:
        attempts: Tries of a job in this call.
        backoff: Seconds before the second.
        before: Key -> attempts that there were before this call; others are none of its jobs.
        left: Those of them that are left as they are.
    """

    attempts: int
    backoff: float
    before: dict[str, int] = field(default_factory=dict)
    left: tuple[str, ...] = ()

    def failures(self, entry: Entry) -> int:
        """Tries of this call that went wrong."""
        tries = entry.attempts[self.before.get(entry.key, 0) :]
        return sum(attempt.state in WRONG for attempt in tries)

    def may_run(self, entry: Entry, state: str) -> bool:
        """Whether a job should be run in this call, now or after its back-off."""
        if entry.key not in self.before or entry.key in self.left or state in (DONE, RUNNING):
            return False
        if state == REFUSED:
            return not self.failures(entry)
        if state in (FAILED, LOST):
            return self.failures(entry) < self.attempts
        return True

    def wait(self, entry: Entry) -> float:
        """Seconds until it may be tried again, at most its whole back-off."""
        again = self.failures(entry)
        if not again:
            return 0.0
        return min(max(entry.retry_at - time.time(), 0.0), self.pause(again))

    def pause(self, failures: int) -> float:
        """Seconds of back-off after so many failures."""
        return self.backoff * 2.0 ** max(failures - 1, 0)
