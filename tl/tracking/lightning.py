"""Lightning's view of a tracked run."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytorch_lightning.loggers import MLFlowLogger
from pytorch_lightning.utilities import rank_zero_only

if TYPE_CHECKING:
    from .tracked import TrackedRun


class RunLogger(MLFlowLogger):
    """Logs one phase into a run that outlives it.

    Lightning ends a logger's run after each fit and counts steps anew in each; here the run goes
    on, and the steps of a phase follow those of the phase before.

    Args:
        run: The run, which also batches the metrics.
        step_offset: Steps of the phases before this one.
    """

    def __init__(self, run: TrackedRun, step_offset: int) -> None:
        super().__init__(tracking_uri=run.uri, run_id=run.run_id)
        self._run = run
        self._step_offset = step_offset

    @property
    def save_dir(self) -> str:
        """The folder of the run: Lightning falls back to the working directory without one."""
        return str(self._run.output_dir)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Queue metrics of one step of this phase."""
        self._run.log_metrics(dict(metrics), step=(step or 0) + self._step_offset)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Nothing: the resolved config of the whole job is logged, which says more."""

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:  # noqa: ARG002
        """Write what is queued; the status is set once, at the end of the job."""
        self._run.flush()
