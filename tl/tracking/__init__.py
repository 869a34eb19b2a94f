"""The MLflow run of a job: one run, from the first line to its status, also over interruptions.

Nothing else in tl imports this room; pipelines and scripts glue it to a training. MLflow itself is
imported when a run starts, so that `tracking.enabled=false` costs nothing.
"""

from __future__ import annotations

from .run import check_store, load, repair, start_run
from .store import StoreError, TrackingError, default_uri
from .tracked import TrackedRun

__all__ = [
    "StoreError",
    "TrackedRun",
    "TrackingError",
    "check_store",
    "default_uri",
    "load",
    "repair",
    "start_run",
]
