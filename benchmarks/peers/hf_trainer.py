"""The Hugging Face `Trainer` on transformers' wrapper of a timm model, backbone frozen."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from shared import BATCH, WORKERS, arguments, image_folders, report
from torch import nn
from torchvision.datasets import ImageFolder
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction


def local_checkpoint(args: argparse.Namespace, folder: Path) -> Path:
    """A folder as the hub's timm repositories are: config.json and model.safetensors."""
    cfg = timm.get_pretrained_cfg(args.model).to_dict()
    config = {"architecture": args.model, "num_classes": 1000, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    if args.weights:
        file.symlink_to(Path(args.weights).resolve())
    else:
        save_file(timm.create_model(args.model).state_dict(), file, {"format": "pt"})
    return folder


def collate(rows: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    """A batch in the names of the wrapper."""
    images, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}


def hits(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy."""
    found = np.asarray(prediction.predictions).argmax(-1)
    return {"accuracy": float((found == prediction.label_ids).mean())}


def trainer_of(
    args: argparse.Namespace, model: nn.Module, train: ImageFolder, val: ImageFolder, folder: Path
) -> Trainer:
    """Trainer that judges val after each epoch."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "dataloader_num_workers": WORKERS,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "num_train_epochs": args.frozen,
        "learning_rate": 1e-3,  # the default, 5e-5, is for whole networks: a head would hardly move
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": args.seed,
    }
    return Trainer(
        model,
        TrainingArguments(str(folder), **settings),
        data_collator=collate,
        train_dataset=train,
        eval_dataset=val,
        compute_metrics=hits,
    )


def main() -> None:
    """Train the head for `--frozen` epochs."""
    args = arguments(__doc__, frozen=5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        classes = len(list((args.data / "train").iterdir()))
        torch.manual_seed(args.seed)
        model = AutoModelForImageClassification.from_pretrained(
            local_checkpoint(args, folder), num_labels=classes, ignore_mismatched_sizes=True
        )
        head = {id(p) for p in model.timm_model.get_classifier().parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in head)
        train, val = image_folders(args, model.timm_model, flip=True)
        began = time.perf_counter()
        trainer = trainer_of(args, model, train, val, folder / "output")
        trainer.train()
        seconds = {"fit": time.perf_counter() - began}
        judged = [row for row in trainer.state.log_history if "eval_accuracy" in row]
    report("Hugging Face Trainer", len(train) + len(val), seconds, judged[-1]["eval_accuracy"])


if __name__ == "__main__":
    main()
