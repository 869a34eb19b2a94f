"""Averages of weights: over the steps of a phase, and between before and after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from tl.config import Select
from tl.finetuning import Phase
from tl.module import TransferModule

HORIZON, LEAST, MOST = 10, 0.9, 0.9999  # share of the steps that the average reaches back
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
UNCHOSEN = 0.5  # "close to optimal" where no data are left to choose by (Wortsman et al. 2022)


def decay_of(steps: int) -> float:
    """Share of the average that stays in each step: it reaches back over a tenth of the phase.

    A decay fixed for long trainings would keep the starting weights in a short one.

    Example:
        >>> decay_of(20), decay_of(1000)
        (0.9, 0.99)
    """
    return min(max(1 - HORIZON / max(steps, 1), LEAST), MOST)


class MovingAverage(Callback):
    """Exponential moving average of what trains; validation sees it, and it is what is kept.

    Lightning's `EMAWeightAveraging` copies the whole module, what is frozen too, and counts
    batches: here a batch may hold many steps (`tl.heads`). Running statistics of BatchNorm are
    averaged, too; counters are those of the last step.

    Attributes:
        decay: Share of the average that stays in each step.
    """

    def __init__(self) -> None:
        self.decay = 0.0
        self._average: dict[str, Tensor] = {}
        self._live: dict[str, Tensor] = {}
        self._aside: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the weights as they are, or go on after an interruption."""
        assert isinstance(pl_module, TransferModule)
        self.decay = decay_of(pl_module.head_steps or int(trainer.estimated_stepping_batches))
        self._update = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
        self._live = pl_module.trained_state()
        before = self._average or self._live
        self._average = {
            # In half precision a small step towards the weights would be lost.
            name: before[name].to(
                live.device, torch.promote_types(live.dtype, torch.float32), copy=True
            )
            for name, live in self._live.items()
            if live.is_floating_point()
        }
        self._aside = [torch.empty_like(self._live[name]) for name in self._average]
        if pl_module.automatic_optimization:
            for optimizer in trainer.optimizers:
                optimizer.register_step_post_hook(lambda *_: self.update())
        else:
            pl_module.after_step = self.update

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the weights after a step of the optimizer."""
        average = [*self._average.values()]
        live = [self._live[n].to(value.dtype) for n, value in self._average.items()]
        self._update(average, live, None)

    def on_validation_start(self, *_: Any) -> None:
        """Put the average in the place of the weights."""
        with torch.no_grad():
            for name, aside in zip(self._average, self._aside, strict=True):
                aside.copy_(self._live[name])
                self._live[name].copy_(self._average[name])

    def on_validation_end(self, *_: Any) -> None:
        """Put the weights back."""
        with torch.no_grad():
            for name, aside in zip(self._average, self._aside, strict=True):
                self._live[name].copy_(aside)

    def trained_state(self) -> dict[str, Tensor]:
        """As of the module, with the average in the place of the weights."""
        return {n: self._average.get(n, v).to(v.dtype) for n, v in self._live.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed fit needs to know."""
        return {"average": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What the interrupted fit knew."""
        self._average = dict(state_dict["average"])


@dataclass(frozen=True)
class Mixture:
    """Weights between those before a phase and those after it.

    Args:
        alpha: Share of those after it; 0: the phase is not kept.
        loss: val/loss of the mixture.
        score: Its headline score on val, such as val/acc.
        losses: val/loss of each alpha that was tried.
    """

    alpha: float
    loss: float
    score: float
    losses: dict[float, float]

    def facts(self) -> dict[str, str]:
        """What a person should know."""
        how = "least val/loss" if len(self.losses) > 1 else "fixed: nothing is chosen on val"
        tried = ", ".join(f"{alpha:g}: {loss:.4f}" for alpha, loss in self.losses.items())
        return {"share of the new weights": f"{self.alpha:g} ({how})", "val/loss by share": tried}


def mix(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """`(1 - alpha) * before + alpha * after`; counters are those after."""
    return {
        name: torch.lerp(before[name], value, alpha) if value.is_floating_point() else value
        for name, value in after.items()
    }


def choose_mixture(
    model: nn.Module,
    phase: Phase,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    judge: Callable[[], tuple[float, float]],
) -> Mixture:
    """Mix the weights before and after a phase; the share is chosen on val.

    WiSE-FT of Wortsman et al. 2022 (arXiv:2109.01903): between a linear probe and the fine-tuned
    model that began with it the loss has no barrier, and a mixture is often better than both ends.

    Args:
        model: Holds the chosen mixture afterwards.
        phase: That has ended; with `select=last` nothing is chosen on val, and alpha is 0.5.
        before: What the phase changed, as it was before.
        after: The same tensors as they are now.
        judge: val/loss and headline score of the model as it is.
    """
    alphas = ALPHAS if phase.select == Select.best.value else (UNCHOSEN,)
    found: dict[float, tuple[float, float]] = {}
    for alpha in alphas:
        model.load_state_dict(mix(before, after, alpha), strict=False)
        found[alpha] = judge()
    # Of equal ones the phase as it is: it is what the history shows.
    alpha = min(found, key=lambda a: (found[a][0], -a))
    model.load_state_dict(mix(before, after, alpha), strict=False)
    return Mixture(alpha, *found[alpha], {a: loss for a, (loss, _) in found.items()})
