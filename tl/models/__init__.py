"""Backbone and head from timm: weights from the hub or a file, stages, and their preprocessing."""

from __future__ import annotations

import difflib
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import timm
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import LocalEntryNotFoundError
from timm.data.config import resolve_model_data_config
from torch import nn

from tl import ranks
from tl.bundle import Preprocessing
from tl.config import ConfigError, HeadKind, ModelConfig
from tl.models.stage_head import StageClassifier
from tl.models.stages import HEAD, Stage, backbone_sha256, find_stages, tensors_sha256
from tl.models.weights import (
    WeightsError,
    find_weights_file,
    head_of_file,
    load_weights,
    new_head,
    read_sidecar,
)

__all__ = [
    "HEAD",
    "RANDOM",
    "BuiltModel",
    "Stage",
    "StageClassifier",
    "Weights",
    "WeightsError",
    "build_model",
    "check_name",
    "check_request",
    "find_stages",
    "load_weights",
    "pretrained_head",
    "tensors_sha256",
]

RANDOM = "random"  # source of weights that no pretraining made


@dataclass(frozen=True)
class Weights:
    """Where the weights of a model come from.

    Args:
        source: Name for people: a timm tag, a file name, or `random`.
        sha256: Hash of all tensors of the backbone (the head left out).
        licence: Licence of the weights as their source states it.
        notes: What was done to make them fit, one sentence each.
    """

    source: str
    sha256: str
    licence: str = "not stated"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuiltModel:
    """A backbone with its head, ready to be transferred.

    Args:
        name: timm name with tag.
        model: Takes images of shape (N, 3, H, W), gives logits of shape (N, classes).
        stages: From the stem to the head; each parameter is in exactly one.
        preprocessing: What these very weights expect.
        weights: Where the weights come from.
        model_args: Further arguments of `timm.create_model`.
        head: What the head reads, a value of `tl.config.HeadKind`.
        file: Of the weights, where they come from one.
    """

    name: str
    model: nn.Module
    stages: tuple[Stage, ...]
    preprocessing: Preprocessing
    weights: Weights
    model_args: dict[str, Any] = field(default_factory=dict)
    head: str = HeadKind.linear.value
    file: Path | None = None


@ranks.in_turn
def build_model(
    config: ModelConfig,
    classes: Sequence[str] | int,
    *,
    pretrained: bool = True,
    cache_dir: Path | None = None,
) -> BuiltModel:
    """Make a timm model with a fresh head and the weights that the config names.

    Args:
        config: Model, weights, image size and dropout.
        classes: Names behind the outputs of the head, or their number. A head is taken over from a
            file only where the file's own list of classes (of a run or a bundle) is the same.
        pretrained: False ignores `config.weights` and keeps random weights.
        cache_dir: Where the hub's downloads are kept; default: that of timm.

    Raises:
        ConfigError: No such model, or a setting that its family does not have.
        WeightsError: The weights cannot be had or do not fit.

    Example:
        >>> built = build_model(ModelConfig(name="test_resnet", weights="none"), 2)
        >>> [stage.name for stage in built.stages]
        ['stage0', 'stage1', 'stage2', 'stage3', 'stage4', 'head']
    """
    check_name(config.name)
    names = [] if isinstance(classes, int) else [*classes]
    num_classes = classes if isinstance(classes, int) else len(names)
    weights = config.weights if pretrained else "none"
    file = None if weights in {"hub", "none"} else find_weights_file(weights, config.name)
    model, model_args = _create(config, num_classes, hub=weights == "hub", cache_dir=cache_dir)
    notes: list[str] = []
    source, sidecar = config.name if weights == "hub" else RANDOM, {}
    if file is not None:
        sidecar = read_sidecar(file)
        known = sidecar.get("classes") or sidecar.get("label_names") or ()
        notes.append(load_weights(model, file, keep_head=bool(known) and [*known] == names))
        source = file.name
    pretrained_cfg: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    if weights == "hub":
        notes.append(new_head(model))
    # Convolutions run several times faster so on a CPU, and on the tensor cores of a GPU.
    model.to(memory_format=torch.channels_last)
    stages = find_stages(model)
    return BuiltModel(
        name=config.name,
        model=model,
        stages=stages,
        preprocessing=_preprocessing(model, sidecar, config.image_size),
        weights=Weights(
            source=source,
            sha256=backbone_sha256(model, stages),
            licence=_licence(weights, sidecar, pretrained_cfg),
            notes=tuple(notes),
        ),
        model_args=model_args,
        file=file,
    )


def pretrained_head(built: BuiltModel) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight (source classes, features) and bias of the linear head that the pretraining had.

    Read again from where the weights came: few need it.

    Args:
        built: In its starting weights.

    Returns:
        None where there is none: random weights, a file without head, a head of another kind.
    """
    if built.file is not None:
        return head_of_file(built.model, built.file)
    if built.weights.source != built.name:
        return None
    try:
        with nullcontext() if _hub_reachable() else _hub_offline():
            model: Any = timm.create_model(built.name, pretrained=True)
    except Exception:  # anything: the hub's client has many errors, and the head is no necessity
        return None
    head = model.get_classifier()
    return (head.weight.detach(), head.bias) if isinstance(head, nn.Linear) else None


def check_request(config: ModelConfig, *, pretrained: bool = True) -> None:
    """Refuse a wrong name or a missing file before anything slow begins.

    Raises:
        ConfigError: No such model.
        WeightsError: No such file.
    """
    check_name(config.name)
    if pretrained and config.weights not in {"hub", "none"}:
        find_weights_file(config.weights, config.name)


def check_name(name: str) -> None:
    """Refuse a name that timm does not know.

    Raises:
        ConfigError: Names the nearest models, or the tags that the architecture has.
    """
    if ":" in name:  # local-dir: and hf-hub: are timm's own sources
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}" if near else "timm.list_models() names them all"
        msg = f"model.name: timm has no model {architecture}; {hint}"
        raise ConfigError(msg)
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        have = ", ".join(tags) or "none"
        msg = f"model.name: {architecture} has no weights {tag}; there are {have}"
        raise ConfigError(msg)


def _create(
    config: ModelConfig, num_classes: int, *, hub: bool, cache_dir: Path | None
) -> tuple[nn.Module, dict[str, Any]]:
    rates = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    args: dict[str, Any] = {k: v for k, v in rates.items() if v}
    if config.image_size is not None and _fixed_size(config.name):
        args["img_size"] = config.image_size
    asks_hub = hub or config.name.startswith("hf-hub:")
    try:
        with _hub_offline() if asks_hub and not _hub_reachable() else nullcontext():
            model = timm.create_model(
                config.name, pretrained=hub, num_classes=num_classes, cache_dir=cache_dir, **args
            )
    except TypeError as error:
        msg = (
            f"model: {config.name} does not take {' or '.join(args) or 'these settings'} ({error})"
        )
        raise ConfigError(msg) from error
    except (AssertionError, ValueError) as error:
        msg = f"model: {config.name} cannot be built with {args or 'these settings'}: {error}"
        raise ConfigError(msg) from error
    except Exception as error:
        if not asks_hub and ":" not in config.name:
            raise
        first_line = str(error).strip().split("\n")[0][:200]
        if config.name.startswith("local-dir:"):
            raise ConfigError(f"model.name: {config.name}: {first_line}") from error
        if isinstance(error, LocalEntryNotFoundError):
            first_line = f"the cache lacks them, and {hub_constants.ENDPOINT} does not answer"
        msg = (
            f"cannot load the weights of {config.name} from the hub: {first_line}. "
            "Where no hub can be reached, name a file: model.weights=path.safetensors; or fill the "
            "hub's cache (HF_HOME) on a machine that has a network; or begin with random weights: "
            "model.weights=none."
        )
        raise WeightsError(msg) from error
    return model, args


def _hub_reachable() -> bool:
    """Whether the hub's host answers: a machine without a network must not wait for retries."""
    if getproxies():
        return True  # a proxy speaks for the host; its own errors are clear and fast
    host = urlparse(hub_constants.ENDPOINT)
    try:
        port = host.port or (80 if host.scheme == "http" else 443)
        with socket.create_connection((host.hostname or "", port), timeout=5):
            return True
    except OSError:
        return False


@contextmanager
def _hub_offline() -> Iterator[None]:
    """Let the hub's client look into its cache only."""
    before = hub_constants.HF_HUB_OFFLINE
    hub_constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub_constants.HF_HUB_OFFLINE = before


def _fixed_size(name: str) -> bool:
    if ":" in name:
        return False
    cfg = timm.get_pretrained_cfg(name)
    return bool(cfg and cfg.fixed_input_size)


def _licence(weights: str, sidecar: Mapping[str, Any], cfg: Mapping[str, Any]) -> str:
    if weights == "none":
        return "none (random weights)"
    stated = sidecar.get("licence") or sidecar.get("license")
    # A file of one's own is not covered by the licence of timm's tag of the same name.
    return str(stated or (cfg.get("license") if weights == "hub" else None) or "not stated")


def _preprocessing(
    model: nn.Module, sidecar: Mapping[str, Any], image_size: int | None
) -> Preprocessing:
    values: dict[str, Any] = dict(resolve_model_data_config(model))  # type: ignore[no-untyped-call]
    own = sidecar.get("preprocessing") or sidecar.get("pretrained_cfg") or sidecar
    values.update({k: own[k] for k in values if k in own})
    if image_size is not None:
        values["input_size"] = (3, image_size, image_size)
    return Preprocessing.from_dict(values)
