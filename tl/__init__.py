"""Transfer learning as a service: labelled images in, a sealed and verified model out.

The names below load on first use, so that `import tl` is instant.

Example:
    >>> import tl
    >>> config = tl.compose("train", ["data.root=photos", "finetune=lp_ft"])
    >>> result = tl.train(config)  # doctest: +SKIP
    >>> result.metrics["val/acc"], result.bundle  # doctest: +SKIP
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# OpenMP's threads spin while they wait. Beside one busy process (a batch of jobs, a container with
# a quota) on 2 cores, a step of MobileNetV2 takes half the time without it, and one of a small
# network a tenth; alone it takes the same, a small network 1.4 times (benchmarks/wait_policy.py).
# libgomp reads this when torch is loaded, so it stands here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# MLflow reports its use to its makers, and waits for a network at the end where there is none. tl
# contacts nobody unasked; MLFLOW_DISABLE_TELEMETRY=false allows it. MLflow reads this on import.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

if TYPE_CHECKING:
    from tl.bundle import Bundle as Bundle
    from tl.config import ConfigError as ConfigError
    from tl.config import TlError as TlError
    from tl.config import TrainConfig as TrainConfig
    from tl.config import compose as compose
    from tl.pipelines.advise import advise as advise
    from tl.pipelines.train import train as train
    from tl.runs import TrainResult as TrainResult

_HOMES = {
    "Bundle": "tl.bundle",
    "ConfigError": "tl.config",
    "TlError": "tl.config",
    "TrainConfig": "tl.config",
    "TrainResult": "tl.runs",
    "advise": "tl.pipelines.advise",
    "compose": "tl.config",
    "train": "tl.pipelines.train",
}

__all__ = [
    "Bundle",
    "ConfigError",
    "TlError",
    "TrainConfig",
    "TrainResult",
    "advise",
    "compose",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
