"""Write the files of a bundle, and put it in its place when it is sealed."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from torch import nn

from tl.bundle import Outputs, Preprocessing
from tl.config import HeadKind
from tl.export.card import ModelCard, model_card
from tl.export.errors import BundlePlaceError, ExportError
from tl.export.graph import write_onnx
from tl.export.mlmodel import write_mlmodel
from tl.export.sealing import SealReport, seal
from tl.models import StageClassifier


def write_bundle(
    folder: Path,
    *,
    model: nn.Module,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    golden: Sequence[Path],
    card: ModelCard,
    tolerance: float = 1e-4,
    outputs: Outputs | None = None,
) -> SealReport:
    """Write and seal a bundle; it appears whole or not at all.

    Args:
        folder: Where; a bundle that is there is replaced, any other content is refused.
        model: timm model with its head, or a `StageClassifier`; images (N, 3, height, width) to
            outputs (N, classes).
        classes: Names in the order of the outputs; for a number the name of the target.
        preprocessing: What the weights expect.
        golden: Images to keep inside as the bundle's own test, at least one.
        card: Content of its README.md.
        tolerance: Largest difference of a probability between PyTorch and the forms written; of a
            number, in units of its standard deviation.
        outputs: What the outputs mean; default: one class an image.

    Raises:
        ExportError: The model cannot be exported, a form computes differently, or the folder
            cannot be written.
        ImageError: A golden image cannot be decoded.
    """
    folder = folder.absolute()
    partial = folder.with_name(f".{folder.name}.partial")
    outputs = outputs or Outputs()
    _check(folder, model, classes, golden)
    network = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
    network.to(memory_format=torch.contiguous_format)  # safetensors takes no other
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise BundlePlaceError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        _write_forms(partial, network, classes, preprocessing, outputs)
        _copy_golden(partial / "golden", golden)
        report = seal(partial, network, preprocessing, tolerance=tolerance, outputs=outputs)
        in_timm = (partial / "config.json").is_file()
        text = model_card(card, classes, preprocessing, report, outputs, in_timm=in_timm)
        (partial / "README.md").write_text(text, encoding="utf-8")
        write_mlmodel(partial, preprocessing, outputs)
        _replace(partial, folder)
    except OSError as error:
        raise ExportError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def _check(folder: Path, model: nn.Module, classes: Sequence[str], golden: Sequence[Path]) -> None:
    outputs = getattr(model, "num_classes", None)
    if outputs != len(classes):
        raise ExportError(f"the model has {outputs} outputs for {len(classes)} classes")
    odd = [name for name in classes if name != " ".join(name.splitlines()) or not name]
    if odd or len(set(classes)) != len(classes):
        raise ExportError(f"class names must differ and be one line each, got {list(classes)}")
    if not golden:
        raise ExportError("a bundle needs at least one golden image to be sealed with")
    if folder.exists() and not folder.is_dir():
        raise BundlePlaceError(f"{folder} is a file; choose another place for the bundle")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "model.onnx").is_file():
        raise BundlePlaceError(f"{folder} holds other files than a bundle; choose another place")


def _write_forms(
    folder: Path,
    model: nn.Module,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    outputs: Outputs,
) -> None:
    """Weights, ONNX, and what one needs to know to use them."""
    _write_weights(folder, model, classes, preprocessing)
    write_onnx(folder / "model.onnx", model, preprocessing.input_size, outputs)
    (folder / "classes.txt").write_text("\n".join(classes) + "\n", encoding="utf-8")
    for name, values in (
        ("preprocessing", preprocessing.to_dict()),
        ("bundle", outputs.to_dict(classes)),
    ):
        text = json.dumps(values, indent=1, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def _write_weights(
    folder: Path, model: nn.Module, classes: Sequence[str], preprocessing: Preprocessing
) -> None:
    """`model.safetensors` and `config.json`, as `timm.create_model("local-dir:...")` wants them.

    A head on all stages has no place in timm's format: `model.json` is beside its weights.
    """
    if isinstance(model, StageClassifier):
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        facts = {
            "head": HeadKind.stages.value,
            "label_names": list(classes),
            "features": model.sizes,
            "pretrained_cfg": preprocessing.to_dict(),
        }
        text = json.dumps(facts, indent=1, ensure_ascii=False) + "\n"
        (folder / "model.json").write_text(text, encoding="utf-8")
        return
    try:
        save_for_hf(
            model,
            str(folder),
            model_config={"label_names": list(classes)},
            safe_serialization=True,
            data_config=preprocessing.to_dict(),
        )
    except (AttributeError, KeyError, ValueError, RuntimeError) as error:
        raise ExportError(f"timm cannot save this model: {error}") from error


def _copy_golden(folder: Path, golden: Sequence[Path]) -> None:
    folder.mkdir()
    for i, path in enumerate(golden):
        shutil.copyfile(path, folder / f"{i:02d}{path.suffix.lower()}")


def _replace(partial: Path, folder: Path) -> None:
    """Put the sealed bundle in its place; the one that is there goes only when that worked."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    try:
        partial.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
