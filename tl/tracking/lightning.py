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
        run: The run, which also keeps and sends the metrics.
        step_offset: Steps of the phases before this one.
    """

    def __init__(self, run: TrackedRun, step_offset: int) -> None:
        super().__init__(tracking_uri=run.uri, run_id=run.run_id or "")
        self._initialized = True  # `experiment` is the client, and asks for nothing
        self._run = run
        self._step_offset = step_offset

    @property
    def save_dir(self) -> str:
        """The folder of the run: Lightning falls back to the working directory without one."""
        return str(self._run.output_dir)

    @property
    def name(self) -> str:
        """The room's name: Lightning's own would ask the store."""
        return "mlflow"

    @property
    def version(self) -> str:
        """The job, which is known before its run is."""
        return self._run.job

    @property
    def run_id(self) -> str | None:
        """The run, where it is made already."""
        return self._run.run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Record metrics of one step of this phase."""
        self._run.log_metrics(dict(metrics), step=(step or 0) + self._step_offset)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Nothing: the resolved config of the whole job is logged, which says more."""

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:  # noqa: ARG002
        """Send what there is; the status is set once, at the end of the job."""
        self._run.flush()
