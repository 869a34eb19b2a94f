"""Export a finished run: what its folder holds is enough, apart from a few training images."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
from safetensors.torch import load_file
from torch import nn

from tl.bundle import Outputs, Preprocessing
from tl.config import ExportConfig, HeadKind, TrainConfig
from tl.export.card import ModelCard
from tl.export.errors import ExportError
from tl.export.sealing import SealReport
from tl.export.writing import write_bundle
from tl.graph.stage_head import with_head
from tl.models import BuiltModel, Weights, find_stages
from tl.models.stage_head import backbone_state
from tl.runs import RunFolder, data_name, read_config, run_name

PACKAGES = ("tl", "torch", "torchvision", "timm", "pytorch-lightning", "onnx", "onnxruntime")


class Exported(NamedTuple):
    """A bundle and its seal."""

    folder: Path
    seal: SealReport


def export_run(folder: RunFolder, config: ExportConfig, target: Path | None = None) -> Exported:
    """Write and seal the bundle of a run.

    Args:
        folder: A run whose training is finished.
        config: Tolerance of the seal, number of golden images.
        target: Folder of the bundle; default: `bundle/` in the run.

    Returns:
        Where the bundle is, and what its seal found.

    Raises:
        RunError: The folder holds no run.
        ExportError: Training is not finished, no golden image can be found, or the seal breaks.
    """
    run = read_config(folder.path)
    facts = folder.read_model()
    plan = json.loads((folder.path / "plan.json").read_text())
    metrics = folder.read_metrics()
    weights = folder.checkpoints / "model.safetensors"
    if not weights.is_file():
        msg = f"{folder.path} is not trained to its end: continue it with resume={folder.path}"
        raise ExportError(msg)
    target = target or folder.bundle
    report = write_bundle(
        target,
        model=_network(facts, weights),
        classes=facts["classes"],
        preprocessing=Preprocessing.from_dict(facts["preprocessing"]),
        golden=_golden(folder, facts)[: config.golden_images],
        card=ModelCard(
            title=run_name(run, plan["method"]),
            data=_data(run, facts["data"]),
            backbone=facts["name"],
            weights=facts["weights"]["source"],
            weights_sha256=facts["weights"]["sha256"],
            licence=facts["weights"]["licence"],
            method=plan["method"],
            head=_head_text(folder),
            plan=_plan_text(plan),
            metrics=metrics,
            seed=run.seed,
            created=facts["created"],
            versions={name: version(name) for name in PACKAGES},
        ),
        tolerance=config.tolerance,
        outputs=_outputs(folder, facts),
    )
    return Exported(target, report)


def _network(facts: dict[str, Any], weights: Path) -> nn.Module:
    model = timm.create_model(facts["name"], num_classes=len(facts["classes"]), **facts["args"])
    state = load_file(weights)
    head = HeadKind(facts.get("head", HeadKind.linear.value))
    if head is not HeadKind.linear:
        # With its own weights: what the stages say decides which of them repeat another.
        model.load_state_dict(backbone_state(state), strict=False)
        built = BuiltModel(
            name=facts["name"],
            model=model,
            stages=find_stages(model),
            preprocessing=Preprocessing.from_dict(facts["preprocessing"]),
            weights=Weights(facts["weights"]["source"], facts["weights"]["sha256"]),
        )
        model = with_head(built, head, proven=True).model
    model.load_state_dict(state)
    return model.eval()


def _outputs(folder: RunFolder, facts: dict[str, Any]) -> Outputs:
    """What the outputs mean, from what the run wrote of its task."""
    task = facts.get("task", "single")
    values = {"task": task, "target": facts.get("target"), **folder.read_calibration()}
    if task == "multi":
        values["thresholds"] = folder.read_thresholds()
    return Outputs.from_dict(values, facts["classes"])


def _data(config: TrainConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """What the card says of the images: the bundle travels, the place of the data stays behind."""
    of_numbers = {} if len(facts["classes"]) > 1 else {"classes", "counts"}
    kept = {k: v for k, v in facts.items() if k not in of_numbers}
    if of_numbers:
        kept["images of"] = {split: sum(n.values()) for split, n in facts["counts"].items()}
    return {**kept, "root": data_name(config)}


def _head_text(folder: RunFolder) -> str:
    """Which features a head on all stages reads; empty for a plain head."""
    path = folder.checkpoints / "features.json"
    if not path.is_file():
        return ""
    kept = json.loads(path.read_text())["kept"]
    parts = ", ".join(f"{number} of {size} {name}" for name, (number, size) in kept.items())
    return f"linear, on standardised features of all stages: {parts}"


def _golden(folder: RunFolder, facts: dict[str, Any]) -> list[Path]:
    """Training images for the bundle.

    Those that the run kept, where the images are no files; else the files; where these are gone,
    what the run's own bundle has.
    """
    root = Path(facts["data"]["root"])
    kept = sorted(folder.golden.glob("*"))
    paths = kept or [path for path in (root / name for name in facts["golden"]) if path.is_file()]
    if not paths:
        earlier = (folder.bundle / "golden").glob("*")
        paths = sorted(path for path in earlier if path.suffix != ".json")
    if not paths:
        msg = (
            f"no golden images: the training images are not at {root}, and {folder.bundle} has none"
        )
        raise ExportError(msg)
    return paths


def _plan_text(plan: dict[str, Any]) -> str:
    lines = [
        f"{number}. `{phase['name']}`: trains {', '.join(phase['trainable'])} for at most "
        f"{phase['epochs']} epochs; {phase['optimizer']}, head {phase['head_lr']:g}"
        + (
            f", each stage below it {phase['lr_ratio']:g} times slower"
            * (len(phase["trainable"]) > 1)
        )
        for number, phase in enumerate(plan["phases"], 1)
    ]
    return "\n".join(lines + [f"- {note}" for note in plan["notes"]])
