"""The Hydra launcher of `tl train -m`: it hands the jobs to a batch (`hydra/launcher=…`).

Installed as `hydra_plugins.tl`, the only namespace from which Hydra takes launchers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from omegaconf import DictConfig, OmegaConf

Composed = tuple[int, list[str], DictConfig]
# Engine, its settings, number and overrides and config of each job -> objective of each.
Launch = Callable[[str, Mapping[str, Any], Sequence[Composed]], Sequence[float]]
_launch: list[Launch] = []


class BatchLauncher(BasicLauncher):
    """Runs a batch; the jobs of other pipelines one after the other, as Hydra does.

    Args:
        engine: What starts the workers.
        settings: Of the engine.
    """

    def __init__(self, engine: str, **settings: Any) -> None:
        super().__init__()
        self.engine = engine
        self.settings = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run all jobs; failures are told by the batch, not by Hydra."""
        if not _launch:
            return super().launch(job_overrides, initial_job_idx)
        assert self.hydra_context is not None
        assert self.config is not None
        compose = self.hydra_context.config_loader.load_sweep_config
        jobs = [
            (initial_job_idx + i, filter_overrides(one), _own(compose(self.config, list(one))))
            for i, one in enumerate(job_overrides)
        ]
        found = _launch[-1](self.engine, self.settings, jobs)  # type: ignore[arg-type]
        return [
            JobReturn(overrides=list(one), status=JobStatus.COMPLETED, _return_value=objective)
            for one, objective in zip(job_overrides, found, strict=True)
        ]


def _own(config: DictConfig) -> DictConfig:
    """What is not about Hydra."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])


@contextmanager
def launching(launch: Launch | None) -> Iterator[None]:
    """Make the launcher known to Hydra; the jobs that it gets meanwhile go to `launch`."""
    # Hydra finds it itself in an installed wheel, not in an editable installation.
    Plugins.instance().register(BatchLauncher)
    # In the place of Hydra's own, which is there now; a YAML file would be checked against that.
    basic = {"_target_": "hydra_plugins.tl.BatchLauncher", "engine": "basic"}
    ConfigStore.instance().store("basic", basic, group="hydra/launcher", provider="tl")
    if launch is None:
        yield
        return
    _launch.append(launch)
    try:
        yield
    finally:
        _launch.pop()
