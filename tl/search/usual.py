"""The space of those who name none."""

from __future__ import annotations

from tl.config import TrainConfig
from tl.search.space import PHASES, Dimension

RATES = {"adamw": (1e-4, 0.1), "sgd": (1e-3, 1.0)}
LOWER = 10.0  # stages that were pretrained learn slower than a new head


def default_space(config: TrainConfig, *, labels: bool) -> tuple[Dimension, ...]:
    """Learning rates of the phases, weight decay, label smoothing; the ratio where stages train.

    Args:
        config: Of the job, with its phases.
        labels: Whether the images have labels, not numbers.
    """
    tune = config.finetune
    found = []
    shared = [name for name, phase in tune.phases.items() if phase.head_lr is None]
    low, high = RATES[tune.optimizer.value if tune.optimizer else "adamw"]
    if shared:
        found.append(Dimension("finetune.head_lr", (), low, high, log=True))
    for name, phase in tune.phases.items():
        if phase.head_lr is not None:
            key = f"{PHASES}{name}.head_lr"
            found.append(Dimension(key, (), low / LOWER, high / LOWER, log=True))
    if any(phase.train_stages for phase in tune.phases.values()):
        found.append(Dimension("finetune.lr_ratio", (), 1.0, 100.0, log=True))
    found.append(Dimension("finetune.weight_decay", (), 1e-4, 0.3, log=True))
    if labels:
        found.append(Dimension("finetune.label_smoothing", (), 0.0, 0.2))
    return tuple(found)
