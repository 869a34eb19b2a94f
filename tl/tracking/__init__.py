"""The MLflow run of a job: one run, from the first line to its status, also over interruptions.

Nothing else in tl imports this room; pipelines and scripts glue it to a training. MLflow itself is
imported when a run starts, so that `tracking.enabled=false` costs nothing.
"""

from __future__ import annotations

from .parents import above, await_run
from .run import check_store, counted, load, repair, start_run
from .store import StoreError, TrackingError, default_uri
from .syncing import Synced, runs_below, sync_run
from .tracked import TrackedRun

__all__ = [
    "StoreError",
    "Synced",
    "TrackedRun",
    "TrackingError",
    "above",
    "await_run",
    "check_store",
    "counted",
    "default_uri",
    "load",
    "repair",
    "runs_below",
    "start_run",
    "sync_run",
]
