"""The seal of a bundle: file to probabilities of each of its forms against the trained model."""

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

from tl.bundle import Bundle, BundleError, Preprocessing, open_image
from tl.export.errors import ExportError
from tl.models import StageClassifier
from tl.quiet import quiet

# One image takes other paths through some networks than many do, so both are tried.
BATCH_SIZES = (1, 5)


@dataclass(frozen=True)
class SealReport:
    """What the comparison of the forms of a model showed.

    Attributes:
        largest_difference: Of a probability, over all golden images, classes and forms.
        tolerance: The difference that was allowed.
        images: Golden images compared.
        onnx_bytes: Size of `model.onnx`.
    """

    largest_difference: float
    tolerance: float
    images: int
    onnx_bytes: int


def seal(
    folder: Path, *, model: nn.Module, preprocessing: Preprocessing, tolerance: float
) -> SealReport:
    """Compare file to probabilities of the trained model with each form in the folder.

    The reference is `model` behind timm's own evaluation transform. Writes
    `golden/expected.json` when all agree.

    Args:
        folder: Bundle with its golden images; the card and `MLmodel` may still be missing.
        model: On the CPU, in eval mode.
        preprocessing: What its weights expect.
        tolerance: Largest difference of a probability that is accepted.

    Raises:
        ExportError: A form differs by more, or cannot be read; names form and image.
    """
    images = sorted(p for p in (folder / "golden").iterdir() if p.name != "expected.json")
    expected = torch_probabilities(model, preprocessing.to_dict(), images)
    try:
        found = _probabilities_of_forms(folder, images, model)
    except (BundleError, RuntimeError, ValueError, KeyError) as error:
        raise ExportError(f"{folder}: what was written cannot be read: {error}") from error
    largest = 0.0
    for form, values in found.items():
        wanted = expected[np.arange(len(values)) % len(images)]
        difference = np.abs(values - wanted).max(axis=1)
        worst = int(np.nan_to_num(difference, nan=np.inf).argmax())
        if not difference[worst] <= tolerance:
            raise ExportError(
                f"sealing failed: {form} differs from the trained model by "
                f"{difference[worst]:.2g} in a probability of golden/"
                f"{images[worst % len(images)].name}, above the tolerance of {tolerance:g}; "
                "no bundle was written. export.tolerance=... accepts a larger difference"
            )
        largest = max(largest, float(difference[worst]))
    record = {p.name: [float(v) for v in row] for p, row in zip(images, expected, strict=True)}
    text = json.dumps({"tolerance": tolerance, "images": record}, indent=1)
    (folder / "golden" / "expected.json").write_text(text + "\n", encoding="utf-8")
    return SealReport(largest, tolerance, len(images), (folder / "model.onnx").stat().st_size)


def torch_probabilities(
    model: nn.Module, config: Mapping[str, Any], paths: Sequence[Path], batch_size: int = 16
) -> NDArray[np.float32]:
    """Probabilities of image files by PyTorch through timm's own evaluation transform.

    Args:
        model: On the CPU, in eval mode.
        config: Data config of timm.
        paths: Image files.
        batch_size: Images per call of the network.

    Returns:
        (images, classes), each row in [0, 1] with sum 1.
    """
    transform = create_transform(**config, is_training=False)
    rows = []
    with torch.inference_mode():
        for start in range(0, len(paths), batch_size):
            images = [transform(open_image(path)) for path in paths[start : start + batch_size]]
            # The order in which convolutions run fastest on a CPU; the values stay the same.
            batch = torch.stack(images).contiguous(memory_format=torch.channels_last)
            rows.append(model(batch).softmax(-1).numpy())
    return np.concatenate(rows)


def _probabilities_of_forms(
    folder: Path, images: Sequence[Path], model: nn.Module
) -> dict[str, NDArray[np.float32]]:
    """Name of each form -> its probabilities; row i is of image i modulo their number."""
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
    found = {name: torch_probabilities(loaded, config, images)}
    exported = Bundle.load(folder)
    for size in BATCH_SIZES:
        count = max(size, len(images)) if size == 1 else size
        files = [images[i % len(images)] for i in range(count)]
        name = f"model.onnx with preprocessing.json, in ONNX Runtime at batch size {size},"
        found[name] = exported.probabilities(files, batch_size=size)
    return found
