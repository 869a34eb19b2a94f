"""What the tests of bundles share: nets with honest probabilities, pictures, a card."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from tl.bundle import Preprocessing, open_image
from tl.export import ModelCard, SealReport, write_bundle

CLASSES = ("ant", "bee", "wood wasp")
CARD = ModelCard(
    title="Insects",
    data={"images": 12, "counts": {"train": {"ant": 5, "bee": 7}}, "sha256": "12ab"},
    backbone="test_resnet",
    weights="none",
    weights_sha256=None,
    licence="apache-2.0",
    method="linear_probe",
    plan="1. head: 5 epochs",
    metrics={"val/acc": 0.91666, "val/f1_macro": 0.9},
    seed=7,
    created="2024-05-06 07:08",
    versions={"torch": "2.14.1"},
    limits=["Trained on twelve images."],
)


def network(name: str, **arguments) -> nn.Module:
    """Random weights, running statistics that are not those of a new net, and no sure answers."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(CLASSES), **arguments)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif key.endswith("running_var"):
            buffer.uniform_(0.7, 1.4)
    config = resolve_model_data_config(model)
    model.eval()
    with torch.inference_mode():
        spread = model(torch.randn(4, *config["input_size"])).std()
    with torch.no_grad():
        model.get_classifier().weight.mul_(1.0 / float(spread))
    return model.train()  # as training hands it over


def preprocessing_of(model: nn.Module) -> Preprocessing:
    return Preprocessing.from_dict(resolve_model_data_config(model))


def make_photos(folder: Path) -> list[Path]:
    """Three pictures of random blots, of three sizes and suffixes."""
    rng = np.random.default_rng(0)
    paths = []
    for i, suffix in enumerate((".png", ".JPG", ".jpeg")):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8))
        paths.append(folder / f"photo {i}{suffix}")
        coarse.resize((190 + 20 * i, 170), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def export(folder: Path, model: nn.Module, photos: list[Path], **changes) -> SealReport:
    arguments = {
        "model": model,
        "classes": CLASSES,
        "preprocessing": preprocessing_of(model),
        "golden": photos,
        "card": CARD,
        **changes,
    }
    return write_bundle(folder, **arguments)


def torch_reference(model: nn.Module, path: Path) -> np.ndarray:
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        logits = copy.deepcopy(model).eval()(transform(open_image(path))[None])
    return logits.softmax(-1)[0].numpy()


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
