"""What the scripts of the peers share: arguments, images, the model and its weights, the report."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, RandomHorizontalFlip

BEGAN = time.perf_counter()
BATCH = 32  # as tl has it by default
WORKERS = 2


def arguments(description: str, **further: Any) -> argparse.Namespace:
    """Command line of a peer; `further` are options with their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--model", default="mobilenetv2_100", help="name of timm")
    parser.add_argument("--weights", help=".safetensors; default: random weights")
    parser.add_argument("--size", type=int, default=224, help="side of the input in pixels")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in further.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser.parse_args()


def weights_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `timm.create_model` for the weights: a file in place of the hub."""
    if not args.weights:
        return {"pretrained": False}
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": args.weights}}


def timm_model(args: argparse.Namespace, classes: int) -> nn.Module:
    """The backbone with a head of so many classes; 0: pooled features."""
    model: nn.Module = timm.create_model(args.model, num_classes=classes, **weights_of(args))
    return model


def image_folders(
    args: argparse.Namespace, model: nn.Module, *, flip: bool
) -> tuple[ImageFolder, ImageFolder]:
    """Images of train and val in the preprocessing of the weights.

    Args:
        args: Command line.
        model: Says what its weights expect.
        flip: Mirror half of the images of train.
    """
    config = resolve_model_data_config(model) | {"input_size": (3, args.size, args.size)}
    transform = create_transform(**config, is_training=False)
    changed = Compose([RandomHorizontalFlip(), transform]) if flip else transform
    return ImageFolder(args.data / "train", changed), ImageFolder(args.data / "val", transform)


def loader(images: ImageFolder, *, shuffle: bool) -> DataLoader[Any]:
    """Batches of a folder, read by as many processes as the machine of the figures has cores."""
    return DataLoader(
        images, BATCH, shuffle=shuffle, num_workers=WORKERS, persistent_workers=shuffle
    )


def report(tool: str, images: int, seconds: Mapping[str, float], accuracy: float) -> None:
    """Print the one line that compare.py reads; `all` counts from the import of this file on."""
    parts = {**seconds, "all": time.perf_counter() - BEGAN}
    rounded = {name: round(value, 2) for name, value in parts.items()}
    line = {"tool": tool, "images": images, "seconds": rounded, "accuracy": round(accuracy, 4)}
    print(json.dumps(line), flush=True)
