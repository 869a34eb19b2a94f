"""The ONNX graph of a model."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tl.export.errors import ExportError

logger = logging.getLogger(__name__)


class _WithProbabilities(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images)
        return logits, logits.softmax(-1)


def write_onnx(path: Path, model: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Write one file that takes `images` and gives `logits` and `probabilities`, for any batch.

    Args:
        path: File to write.
        model: On the CPU, in eval mode.
        input_size: Channels, height and width.

    Raises:
        ExportError: Neither torch.export nor tracing gives a graph.
    """
    module = _WithProbabilities(model).eval()
    example = (torch.zeros(2, *input_size),)
    names: dict[str, Any] = {
        "input_names": ["images"],
        "output_names": ["logits", "probabilities"],
        "external_data": False,
        "verbose": False,
    }
    with quiet():
        try:
            shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
            torch.onnx.export(module, example, path, dynamo=True, dynamic_shapes=shapes, **names)
            return
        except Exception as error:  # torch.export has dozens of ways to refuse a graph
            reason = _reason(error)
        axes = {name: {0: "batch"} for name in ("images", "logits", "probabilities")}
        try:
            torch.onnx.export(module, example, path, dynamo=False, dynamic_axes=axes, **names)
        except Exception as error:
            text = f"the model has no ONNX form: {reason}; by tracing: {_reason(error)}"
            raise ExportError(text) from error
    logger.warning(
        "ONNX: the graph was traced (TorchScript), because torch.export said: %s", reason
    )


def _reason(error: BaseException) -> str:
    """First line of the innermost cause: the exporter wraps it in advice to its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = str(error).strip().split("\n")[0]
    plain = re.sub("\x1b\\[[0-9;]*m", "", line)  # without the colours of a terminal
    return f"{type(error).__name__}: {plain}"


@contextmanager
def quiet() -> Iterator[None]:
    """Exporter and timm speak of their own inner life; what matters, our callers raise or log."""
    names = ("torch", "torch.onnx", "torch.export", "onnxscript", "onnx_ir", "timm")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
