"""Stages: the stem, at most four groups of layers above it, and the head; and their hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.models import group_parameters
from torch import Tensor, nn

MAX_STAGES = 4  # above the stem, so that lr_ratio means the same for every family
HEAD = "head"


@dataclass(frozen=True)
class Stage:
    """A group of neighbouring layers that freezes and learns as one.

    Args:
        name: `stage0` (the stem) to `stage4`, and `head`.
        parameters: Names of its parameters in the model.
        buffers: Names of its buffers (BatchNorm statistics) in the model.
    """

    name: str
    parameters: tuple[str, ...]
    buffers: tuple[str, ...] = ()


def find_stages(model: nn.Module) -> tuple[Stage, ...]:
    """Split a model into its stem (`stage0`), at most four stages above it, and the head.

    Layers are ordered by the model's own `group_matcher(coarse=True)`; where they are finer than
    stages (a ViT's blocks, MobileNet's nine), `feature_info` says which belong to one resolution,
    and where it names a single resolution they are split evenly.

    Returns:
        Stages in forward order, the head last; every parameter and buffer is in exactly one.
    """
    head = set(head_names(model))
    groups = _layer_groups(model)
    backbone = {name: group for name, group in groups.items() if name not in head}
    level = _merge_levels(model, backbone)
    names = [f"stage{i}" for i in range(max(level.values()) + 1)] if level else []
    parameters: dict[str, list[str]] = {name: [] for name in [*names, HEAD]}
    owner: dict[str, str] = {}
    for name, _ in model.named_parameters():
        stage = HEAD if name in head else names[level[backbone[name]]]
        parameters[stage].append(name)
        owner[name] = stage
    buffers: dict[str, list[str]] = {name: [] for name in parameters}
    for name, _ in model.named_buffers():
        buffers[_buffer_stage(name, owner)].append(name)
    return tuple(
        Stage(name, tuple(parameters[name]), tuple(buffers[name]))
        for name in parameters
        if parameters[name]
    )


def _layer_groups(model: nn.Module) -> dict[str, int]:
    """Parameter name -> number of its layer group, in forward order."""
    names = [name for name, _ in model.named_parameters()]
    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is not None:
        found = group_parameters(model, matcher(coarse=True), reverse=True)
        if set(names) <= set(found):
            return {name: int(found[name]) for name in names}
    children = list(dict.fromkeys(name.split(".")[0] for name in names))
    return {name: children.index(name.split(".")[0]) for name in names}


def _merge_levels(model: nn.Module, backbone: Mapping[str, int]) -> dict[int, int]:
    """Layer group -> stage index: 0 for the stem, then at most `MAX_STAGES` more."""
    groups = sorted(set(backbone.values()))
    if not groups:
        return {}
    above = groups[1:]
    if len(above) > MAX_STAGES:
        parts = _by_resolution(model, backbone, above) or [
            part.tolist() for part in np.array_split(above, MAX_STAGES)
        ]
    else:
        parts = [[group] for group in above]
    return {groups[0]: 0, **{g: i for i, part in enumerate(parts, 1) for g in part}}


def _by_resolution(
    model: nn.Module, backbone: Mapping[str, int], above: list[int]
) -> list[list[int]] | None:
    info = getattr(model, "feature_info", None)
    if not isinstance(info, list) or len({entry["reduction"] for entry in info}) < 3:
        return None
    ends = []
    for entry in info:
        inside = [g for name, g in backbone.items() if name.startswith(f"{entry['module']}.")]
        if not inside:
            return None
        ends.append(max(inside))
    ends = sorted({end for end in ends if end in above})
    if not ends:
        return None
    parts: list[list[int]] = [[] for _ in ends]
    for group in above:
        # What comes after the last resolution (a convolution before the head) belongs to it.
        parts[next((i for i, end in enumerate(ends) if group <= end), len(ends) - 1)].append(group)
    while len(parts) > MAX_STAGES:
        parts[:2] = [parts[0] + parts[1]]
    return parts


def _buffer_stage(buffer: str, owner: Mapping[str, str]) -> str:
    """Stage of the nearest module around a buffer that has parameters; the later one of several."""
    prefix = buffer
    while prefix:
        prefix = prefix.rpartition(".")[0]
        near = [s for name, s in owner.items() if name.startswith(f"{prefix}." if prefix else "")]
        if near:
            return near[-1]
    return HEAD


def head_names(model: nn.Module) -> list[str]:
    """Names of the parameters of a timm model's classifier."""
    classifier = getattr(model, "get_classifier", lambda: None)()
    modules = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    ids = {id(p) for m in modules if isinstance(m, nn.Module) for p in m.parameters()}
    return [name for name, p in model.named_parameters() if id(p) in ids]


def in_head(key: str, head: Iterable[str]) -> bool:
    """Whether a key of a state dict belongs to one of the modules of the head."""
    return any(key.rpartition(".")[0] == name.rpartition(".")[0] for name in head)


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def backbone_sha256(model: nn.Module, stages: Iterable[Stage]) -> str:
    """SHA-256 of all weights and buffers but those of the head."""
    state = model.state_dict()
    names = [n for s in stages if s.name != HEAD for n in (*s.parameters, *s.buffers) if n in state]
    return tensors_sha256((name, state[name]) for name in names)
