"""The ONNX graph of a model."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tl.bundle import Outputs
from tl.cores import usable_cores
from tl.export.errors import ExportError
from tl.quiet import quiet

logger = logging.getLogger(__name__)

OPSET = 20  # the newest that tracing knows, and the one that torch.export takes by itself
# Of an output, relative to the largest: rounding makes less, a wrong part of the graph more.
DIFFERENCE = 1e-3
SIZES = (Tensor.size, Tensor.shape.__get__)  # type: ignore[attr-defined]


class _WithAnswers(nn.Module):
    """The network, and what its outputs mean."""

    def __init__(self, model: nn.Module, outputs: Outputs) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(images)
        return found, activated(found, self.outputs)


class _Traced(_WithAnswers):
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        # The tracer of torch 2.14 prints the whole graph when an operator has no ONNX form, since
        # it switches its own log on whatever `verbose` says.
        torch._C._jit_set_onnx_log_enabled(False)
        with _FixedSizes():
            return super().forward(images)


class _FixedSizes(TorchFunctionMode):
    """Lets a network that is traced see all sizes but that of the batch as plain numbers.

    Tracing else records what is computed from sizes, such as the padding of TensorFlow's networks
    or the windows of a Swin, as nodes that run for every image again; and it warns of each check of
    a size as of a branch on a value.
    """

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func not in SIZES:
            return found
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(found, tuple):
                return (*found[:1], *map(int, found[1:]))
            dim = args[1] if len(args) > 1 else (kwargs or {})["dim"]
            return found if dim in (0, -args[0].dim()) else int(found)


def activated(found: Tensor, outputs: Outputs) -> Tensor:
    """What the outputs (N, C) of a network mean: probabilities, or numbers (N, 1)."""
    if outputs.task == "regression":
        return found * outputs.std + outputs.mean
    if outputs.temperature != 1:
        found = found / outputs.temperature
    return found.softmax(-1) if outputs.task == "single" else found.sigmoid()


def write_onnx(
    path: Path, model: nn.Module, input_size: tuple[int, int, int], outputs: Outputs | None = None
) -> None:
    """Write one file that takes `images` and gives `logits` and `probabilities`, for any batch.

    The probabilities are calibrated: those of the logits divided by the temperature. Where the
    network predicts a number, it gives `standardised` and `values`.

    Tracing takes half a second where torch.export takes ten, and its graph computes the same in the
    same time; but it can bake a value of its example in. So it counts only where it noticed no
    branch on a value and agrees with the network on other batches than its example.

    Args:
        path: File to write.
        model: On the CPU, in eval mode.
        input_size: Channels, height and width.
        outputs: What the outputs mean; default: one class an image.

    Raises:
        ExportError: Neither torch.export nor tracing gives a graph.
    """
    outputs = outputs or Outputs()
    module = _WithAnswers(model, outputs).eval()
    example = torch.zeros(2, *input_size)
    with quiet():
        doubt = ""
        try:
            doubt = _trace(path, model, example, outputs) or _difference(path, module, input_size)
            if not doubt:
                return
        except Exception as error:
            failure = _reason(error)
        logger.debug("ONNX: by torch.export, because tracing said: %s", doubt or failure)
        shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
        try:
            torch.onnx.export(
                module, (example,), path, dynamo=True, dynamic_shapes=shapes, **_names(outputs)
            )
            return
        except Exception as error:  # torch.export has dozens of ways to refuse a graph
            reason = _reason(error)
            if not doubt:
                text = f"the model has no ONNX form: {reason}; by tracing: {failure}"
                raise ExportError(text) from error
        _trace(path, model, example, outputs)
    logger.warning(
        "ONNX: the graph was traced (TorchScript), because torch.export said: %s", reason
    )


def _names(outputs: Outputs) -> dict[str, Any]:
    return {
        "input_names": ["images"],
        "output_names": list(outputs.names),
        "opset_version": OPSET,
        "external_data": False,
        "verbose": False,
    }


def _trace(path: Path, model: nn.Module, example: Tensor, outputs: Outputs) -> str:
    """Write the graph of one run; returns what speaks against it, in the words of the tracer."""
    # dynamo=False is deprecated. torch is pinned exactly; where a later one lacks it, this raises
    # and torch.export is all there is.
    axes = {name: {0: "batch"} for name in ("images", *outputs.names)}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        module = _Traced(model, outputs).eval()
        names = _names(outputs)
        torch.onnx.export(module, (example,), path, dynamo=False, dynamic_axes=axes, **names)
    told = [w for w in found if issubclass(w.category, torch.jit.TracerWarning)]  # type: ignore[attr-defined]
    return str(told[0].message) if told else ""


def _difference(path: Path, module: _WithAnswers, input_size: tuple[int, int, int]) -> str:
    """Where the file and the network differ on a batch of three and of one; empty if they agree."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    images = torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = module(images)[0].numpy()
    limit = DIFFERENCE * max(1.0, float(np.abs(wanted).max()))
    for size in (1, 3):
        found = session.run([module.outputs.names[0]], {"images": images[:size].numpy()})[0]
        # Written so that NaN differs, too.
        if found.shape != wanted[:size].shape or not np.abs(found - wanted[:size]).max() <= limit:
            return f"the traced graph computes something else for {size} images"
    return ""


def _reason(error: BaseException) -> str:
    """First line of the innermost cause: the exporter wraps it in advice to its developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = str(error).strip().split("\n")[0]
    plain = re.sub("\x1b\\[[0-9;]*m", "", line)  # without the colours of a terminal
    return f"{type(error).__name__}: {plain}"
