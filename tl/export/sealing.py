"""The seal of a bundle: file to answers of each of its forms against the trained model."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import nn

from tl.bundle import Bundle, BundleError, Outputs, Preprocessing, open_image
from tl.cores import usable_cores
from tl.export.errors import ExportError
from tl.export.graph import activated
from tl.models import StageClassifier
from tl.quiet import quiet

# One image takes other paths through some networks than many do, so both are tried.
BATCH_SIZES = (1, 5)


@dataclass(frozen=True)
class SealReport:
    """What the comparison of the forms of a model showed.

    Attributes:
        largest_difference: Over all golden images, classes and forms: of a probability, or of a
            number in units of its standard deviation in training.
        tolerance: The difference that was allowed.
        images: Golden images compared.
        onnx_bytes: Size of `model.onnx`.
        what: What the difference is one of.
    """

    largest_difference: float
    tolerance: float
    images: int
    onnx_bytes: int
    what: str = "a probability"


def seal(
    folder: Path,
    model: nn.Module,
    preprocessing: Preprocessing,
    *,
    tolerance: float,
    outputs: Outputs | None = None,
) -> SealReport:
    """Compare file to answers of the trained model with each form in the folder.

    The reference is `model` behind timm's own evaluation transform. Writes
    `golden/expected.json` when all agree.

    Args:
        folder: Bundle with its golden images; the card and `MLmodel` may still be missing.
        model: On the CPU, in eval mode.
        preprocessing: What its weights expect.
        tolerance: Largest difference of a probability that is accepted; of a number, in units of
            its standard deviation.
        outputs: What the outputs mean; default: one class an image.

    Raises:
        ExportError: A form differs by more, or cannot be read; names form and image.
    """
    images = sorted(p for p in (folder / "golden").iterdir() if p.name != "expected.json")
    outputs = outputs or Outputs()
    what = "a probability" if outputs.task != "regression" else "a number (in standard deviations)"
    expected = torch_answers(model, preprocessing.to_dict(), images, outputs)
    try:
        found = _answers_of_forms(folder, images, model, outputs)
    except (BundleError, RuntimeError, ValueError, KeyError) as error:
        raise ExportError(f"{folder}: what was written cannot be read: {error}") from error
    largest = 0.0
    for form, values in found.items():
        wanted = expected[np.arange(len(values)) % len(images)]
        difference = outputs.difference(values, wanted)
        worst = int(np.nan_to_num(difference, nan=np.inf).argmax())
        if not difference[worst] <= tolerance:
            raise ExportError(
                f"sealing failed: {form} differs from the trained model by "
                f"{difference[worst]:.2g} in {what} of golden/"
                f"{images[worst % len(images)].name}, above the tolerance of {tolerance:g}; "
                "no bundle was written. export.tolerance=... accepts a larger difference"
            )
        largest = max(largest, float(difference[worst]))
    record = {p.name: [float(v) for v in row] for p, row in zip(images, expected, strict=True)}
    text = json.dumps({"tolerance": tolerance, "images": record}, indent=1)
    (folder / "golden" / "expected.json").write_text(text + "\n", encoding="utf-8")
    size = (folder / "model.onnx").stat().st_size
    return SealReport(largest, tolerance, len(images), size, what)


def torch_answers(
    model: nn.Module,
    config: Mapping[str, Any],
    paths: Sequence[Path],
    outputs: Outputs,
    batch_size: int = 16,
) -> NDArray[Any]:
    """Probabilities (or numbers) of image files by PyTorch through timm's own evaluation transform.

    Args:
        model: On the CPU, in eval mode.
        config: Data config of timm.
        paths: Image files.
        outputs: What the outputs mean.
        batch_size: Images per call of the network.

    Returns:
        (images, classes) in [0, 1]; with one class an image each row has sum 1. Numbers: (images,
        1), in units of the target.
    """
    transform = create_transform(**config, is_training=False)
    rows = []
    with torch.inference_mode():
        for start in range(0, len(paths), batch_size):
            images = [transform(open_image(path)) for path in paths[start : start + batch_size]]
            # The order in which convolutions run fastest on a CPU; the values stay the same.
            batch = torch.stack(images).contiguous(memory_format=torch.channels_last)
            found = model(batch)
            # A number is standardised here: `answers` makes it one of the target, without rounding.
            number = outputs.task == "regression"
            rows.append((found if number else activated(found, outputs)).numpy())
    return outputs.answers(np.concatenate(rows))


def _answers_of_forms(
    folder: Path, images: Sequence[Path], model: nn.Module, outputs: Outputs
) -> dict[str, NDArray[Any]]:
    """Name of each form -> its answers; row i is of image i modulo their number."""
    if isinstance(model, StageClassifier):
        name = "model.safetensors with model.json, in tl,"
        loaded: nn.Module = copy.deepcopy(model)
        loaded.load_state_dict(load_file(folder / "model.safetensors"))
        config = json.loads((folder / "model.json").read_text(encoding="utf-8"))["pretrained_cfg"]
    else:
        name = "model.safetensors with config.json, in timm,"
        with quiet():
            loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        config = resolve_model_data_config(loaded)  # type: ignore[no-untyped-call]
    found = {name: torch_answers(loaded, config, images, outputs)}
    exported = Bundle.load(folder, threads=usable_cores())
    for size in BATCH_SIZES:
        count = max(size, len(images)) if size == 1 else size
        files = [images[i % len(images)] for i in range(count)]
        name = f"model.onnx with preprocessing.json, in ONNX Runtime at batch size {size},"
        found[name] = exported.answers(files, batch_size=size)
    return found
