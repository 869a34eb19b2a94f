"""What several processes of one fit must decide alike."""

from __future__ import annotations

import pytorch_lightning as pl
import torch


def together(
    trainer: pl.Trainer, due: bool, stops: bool, seconds: float = 0.0
) -> tuple[bool, bool, float]:
    """The same answer in all processes, which must all ask here.

    Args:
        trainer: Of the fit.
        due: Whether this process would write the state; one is enough.
        stops: Whether it was asked to stop; one is enough.
        seconds: The longest counts.
    """
    if trainer.world_size == 1:
        return due, stops, seconds
    mine = torch.tensor([due, stops, seconds], device=trainer.strategy.root_device)
    found = trainer.strategy.reduce(mine, reduce_op="max").tolist()
    return bool(found[0]), bool(found[1]), float(found[2])
