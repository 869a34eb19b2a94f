"""What is on disk between phases: their results, and the weights that the next one starts from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from tl.files import replacing
from tl.module import TrainingError

PROGRESS = "progress.json"
DECISION = "activations.json"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class PhaseResult:
    """What a finished phase did.

    Args:
        name: Name of the phase.
        epochs: Epochs that ran.
        best_epoch: Epoch (from 1) of the least val/loss, or the last one where the phase says
            `select=last`: its weights are taken.
        best_loss: val/loss of the weights that are kept.
        best_score: Their headline score, such as val/acc.
        kept: False where the phase did not improve on the phases before: their weights stay.
        steps: Optimizer steps.
        seconds: Wall time of the fit, over all its parts when it was resumed.
        trainable_parameters: Number of parameters that trained.
        checkpoint: File below `checkpoints/`; holds what the phase changed.
        cached: Whether the phase read the activation cache.
        alpha: Share of the phase's weights where they were mixed with those before it.
    """

    name: str
    epochs: int
    best_epoch: int
    best_loss: float
    best_score: float
    kept: bool
    steps: int
    seconds: float
    trainable_parameters: int
    checkpoint: str
    cached: bool = False
    alpha: float = 1.0


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Content of a checkpoint, tensors on the CPU.

    Raises:
        TrainingError: The file is missing or damaged.
    """
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each kind of damage has an exception of its own
        reason = (str(error) or type(error).__name__).split("\n")[0]
        msg = (
            f"the checkpoint {path} cannot be read ({reason}). Delete {path.parent} and the run's "
            f"checkpoints/{PROGRESS}, then continue with resume=: it trains from its first phase"
        )
        raise TrainingError(msg) from error
    return checkpoint


def load_model(model: nn.Module, checkpoint: Path) -> None:
    """Load what a phase trained from its checkpoint; the rest of the model stays as it is.

    Raises:
        TrainingError: The checkpoint is missing or damaged.
    """
    state = read_checkpoint(checkpoint)["state_dict"]
    found = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    model.load_state_dict(found, strict=False)


def save_weights(model: nn.Module, folder: Path) -> Path:
    """Write the weights of a finished plan as `model.safetensors`, for export."""
    path = folder / WEIGHTS
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    try:
        with replacing(path) as part:
            save_file(state, part)
    except (OSError, RuntimeError, SafetensorError) as error:
        msg = f"cannot write {path} ({error}); free some space, then continue with resume="
        raise TrainingError(msg) from error
    return path


def load_kept(model: nn.Module, folder: Path, done: list[PhaseResult]) -> None:
    """Load the best weights of all finished phases into a model in its starting weights."""
    for result in done:
        if result.kept:
            load_model(model, folder / result.checkpoint)


def read_progress(folder: Path) -> tuple[list[PhaseResult], list[dict[str, Any]]]:
    """Finished phases and the history of their epochs; both empty before the first is finished."""
    path = folder / PROGRESS
    if not path.is_file():
        return [], []
    try:
        state = json.loads(path.read_text())
        return [PhaseResult(**phase) for phase in state["phases"]], state["history"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"{path} cannot be read ({error}): delete it, and resume= trains from the first phase"
        raise TrainingError(msg) from error


def write_progress(folder: Path, done: list[PhaseResult], rows: list[dict[str, Any]]) -> None:
    """Write what `read_progress` reads, in one move."""
    text = json.dumps({"phases": [asdict(r) for r in done], "history": rows}, indent=1)
    try:
        with replacing(folder / PROGRESS) as part:
            part.write_text(text)
    except OSError as error:
        msg = f"cannot write {folder / PROGRESS} ({error}); free some space, then use resume="
        raise TrainingError(msg) from error


def read_decision(folder: Path) -> bool | None:
    """Whether an interrupted phase read the activation cache; None where it did not begin."""
    try:
        return bool(json.loads((folder / DECISION).read_text())["cached"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_decision(folder: Path, *, cached: bool) -> None:
    """Write what `read_decision` reads: a resumed phase must see the same batches."""
    path = folder / DECISION
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            part.write_text(json.dumps({"cached": cached}))
    except OSError as error:
        msg = f"cannot write {path} ({error}); free some space, then use resume="
        raise TrainingError(msg) from error
