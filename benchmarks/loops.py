"""Loops that compare.py times inside a process: `python benchmarks/loops.py NAME key=value …`.

The settings are those of `tl train`; each loop reads the images through tl's own loader and prints
one JSON object. torch is loaded before tl here, so that what is no part of tl runs under OpenMP's
own wait policy; compare.py sets tl's for the loop that is.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tl
from tl.config import TrainConfig
from tl.data import ImageDataModule, read_table
from tl.finetuning import Phase, build_plan, freeze, parameter_groups, set_modes
from tl.models import BuiltModel, build_model
from tl.module import warmup_cosine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Parts = tuple[TrainConfig, BuiltModel, ImageDataModule, Phase]


def parts(settings: list[str]) -> Parts:
    """Config, model, images and first phase of a job."""
    config = tl.compose("train", settings)
    torch.manual_seed(config.seed)
    table = read_table(config.data, seed=config.seed, cache_dir=config.cache.path())
    built = build_model(config.model, table.classes, pretrained=config.finetune.pretrained)
    images = ImageDataModule.from_config(table, built.preprocessing, config)
    number = len(table.split("train"))
    size = config.data.batch_size
    plan = build_plan(config.finetune, built, train_images=number, batch_size=size)
    return config, built, images, plan.phases[0]


@torch.inference_mode()
def eager(settings: list[str]) -> dict[str, Any]:
    """One pass of timm's model as it comes, in the default memory format."""
    config, _, images, _ = parts(settings)
    name = config.model.name.partition(".")[0]
    file = None if config.model.weights == "none" else config.model.weights
    overlay = {"pretrained_cfg_overlay": {"file": file}} if file else {}
    model = timm.create_model(name, pretrained=bool(file), num_classes=0, **overlay).eval()
    loader = images.loader("all")
    began = time.perf_counter()
    model.to(DEVICE)
    for batch in loader:
        model(batch["image"].to(DEVICE)).cpu()
    return {"images": len(images.table.split("all")), "seconds": time.perf_counter() - began}


def prefix(settings: list[str]) -> dict[str, Any]:
    """One pass as a job of tl makes it: trace, proof, choice of the engine, cache on disk."""
    from tl.training.activations import Activations

    config, built, images, phase = parts(settings)
    freeze(built.model, built.stages, phase)
    activations = Activations(config.cache, built, images)
    began = time.perf_counter()
    prepared = activations.prepare(phase, DEVICE, as_before=None)
    seconds = time.perf_counter() - began
    activations.close()
    if prepared.data is None:
        raise SystemExit(f"{prepared.title}: {prepared.facts}")
    number = len(images.table.split("all"))
    return {"images": number, "seconds": seconds, **prepared.facts}


def plain(settings: list[str]) -> dict[str, Any]:
    """Epochs of a PyTorch loop that does the work of a phase, and nothing else."""
    _, built, images, phase = parts(settings)
    model = built.model.to(DEVICE)
    freeze(model, built.stages, phase)
    train, val = images.train_dataloader(), images.val_dataloader()
    optimizer = torch.optim.AdamW(parameter_groups(model, built.stages, phase), lr=phase.head_lr)
    schedule = warmup_cosine(optimizer, len(train) * phase.epochs, phase.warmup)
    seconds, hits = [], 0
    for epoch in range(phase.epochs):
        began = time.perf_counter()
        train.sampler.set_epoch(epoch)  # type: ignore[attr-defined] # tl's sampler has it
        set_modes(model, freeze_batch_norm=phase.freeze_batch_norm)
        for batch in train:
            loss = F.cross_entropy(forward(model, batch), batch["label"].to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            if phase.gradient_clip:
                nn.utils.clip_grad_norm_(model.parameters(), phase.gradient_clip)
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.inference_mode():
            found = [forward(model, b).argmax(1).cpu() == b["label"] for b in val]
        hits = int(torch.cat(found).sum())
        seconds.append(time.perf_counter() - began)
    return {"epochs": seconds, "accuracy": hits / len(images.table.split("val"))}


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Logits, channels last."""
    images = batch["image"].to(DEVICE).contiguous(memory_format=torch.channels_last)
    logits: Tensor = model(images)
    return logits


LOOPS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "eager": eager,
    "prefix": prefix,
    "plain": plain,
}

if __name__ == "__main__":
    print(json.dumps(LOOPS[sys.argv[1]](sys.argv[2:])))
