"""Settings of a batch of jobs (`tl train -m …`): none of them changes what a job finds."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tl.config.errors import ConfigError
from tl.config.settings import Checked, setting

RETRIES = ("failed", "all", "none")
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


@dataclass
class BatchConfig(Checked):
    """How the jobs of a batch are run."""

    retry: str = setting(
        "failed",
        "jobs that an earlier call of the same command tried: failed: run again what is not done; "
        "none: leave what failed; all: run everything anew",
        choices=RETRIES,
        common=True,
    )
    attempts: int = setting(
        2, "how often a job is tried that fails or is lost, in one call", low=1, high=20
    )
    backoff: float = setting(
        10.0, "seconds before the second attempt; twice as many before each further one", low=0
    )
    jobs: int | None = setting(
        None, "jobs at once; default: what memory, cores and GPUs hold", low=1, common=True
    )
    budget: str | None = setting(
        None,
        "time for the whole batch, such as 2h or 1h30m: what runs then is checkpointed, and the "
        "same command goes on",
        common=True,
    )
    memory_gb: float | None = setting(
        None, "memory of a job, GB; default: estimated from its plan", above=0
    )
    shard: str | None = setting(
        None, "INDEX/COUNT, from 0/COUNT: this call runs every COUNT-th job only"
    )

    def problems(self) -> list[str]:
        """Texts that stand for numbers can be read."""
        found: list[str] = []
        for read in (self.budget_seconds, self.shard_of):
            try:
                read()
            except ConfigError as error:
                found += error.problems
        return found

    def budget_seconds(self) -> float | None:
        """Seconds of `budget`.

        Raises:
            ConfigError: It is no time.

        Example:
            >>> BatchConfig(budget="1h30m").budget_seconds()
            5400.0
        """
        if self.budget is None:
            return None
        text = str(self.budget).strip()
        if re.fullmatch(r"(\d+(\.\d+)?[hms])+", text):
            parts = re.findall(r"(\d+(?:\.\d+)?)([hms])", text)
            seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
            if seconds > 0:
                return seconds
        msg = f"budget must be a time such as 2h, 45m or 1h30m, got {self.budget}"
        raise ConfigError(msg)

    def shard_of(self) -> tuple[int, int]:
        """Index and count of `shard`; (0, 1) where there is none.

        Raises:
            ConfigError: It is no such pair.
        """
        if self.shard is None:
            return 0, 1
        found = re.fullmatch(r"(\d+)/(\d+)", str(self.shard).strip())
        if found and int(found[1]) < int(found[2]):
            return int(found[1]), int(found[2])
        msg = f"shard must be INDEX/COUNT with INDEX below COUNT, such as 0/4, got {self.shard}"
        raise ConfigError(msg)
