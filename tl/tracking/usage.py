"""Load of processor, memory, disk, network and GPU, as MLflow measures it, sent as all else is."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any, Protocol

log = logging.getLogger(__name__)

SECONDS = 5.0  # between two samples
PREFIX = "system/"


class Metrics(Protocol):
    """Takes numbers of one step."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Take them."""


class UsageMonitor:
    """Samples of MLflow's system metrics, every five seconds until it ends.

    MLflow's own thread asks the store before each sample whether the run goes on, and writes to it
    directly: with a store that is away it ends for good.

    Args:
        run: Takes the samples.
        step: Of the first one: a job that goes on counts on.
    """

    def __init__(self, run: Metrics, step: int) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        kind: Any = SystemMetricsMonitor  # without types
        self._source = kind(None, sampling_interval=SECONDS)
        self._run = run
        self.step = step
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="tl.usage", daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while True:
            self._source.collect_metrics()
            if self._ended.wait(self._source.sampling_interval):
                return
            self._publish()

    def _publish(self) -> None:
        values = self._source.aggregate_metrics()
        for monitor in self._source.monitors:
            monitor.clear_metrics()
        self._run.log_metrics({f"{PREFIX}{k}": v for k, v in values.items()}, step=self.step)
        self.step += 1

    def end(self) -> None:
        """Stop with one more sample, so that a job of a few seconds has one too."""
        self._ended.set()
        self._thread.join()
        self._source.collect_metrics()
        self._publish()
