"""Backbone and head from timm: weights from the hub or a file, stages, and their preprocessing."""

from __future__ import annotations

import difflib
import hashlib
import json
import pickle
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import getproxies

import numpy as np
import timm
import torch
from huggingface_hub import constants as hub_constants
from timm.data import resolve_model_data_config
from timm.models import group_parameters, load_state_dict
from torch import Tensor, nn

from tl.bundle import Preprocessing
from tl.config import ConfigError, ModelConfig, RequestError

MAX_STAGES = 4  # above the stem, so that lr_ratio means the same for every family
HEAD = "head"
RANDOM = "random"  # source of weights that no pretraining made


class WeightsError(RequestError):
    """Pretrained weights cannot be had, or do not fit the model."""


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
    """

    name: str
    model: nn.Module
    stages: tuple[Stage, ...]
    preprocessing: Preprocessing
    weights: Weights
    model_args: dict[str, Any] = field(default_factory=dict)


def build_model(
    config: ModelConfig,
    num_classes: int,
    *,
    pretrained: bool = True,
    cache_dir: Path | None = None,
) -> BuiltModel:
    """Make a timm model with a fresh head and the weights that the config names.

    Args:
        config: Model, weights, image size and dropout.
        num_classes: Outputs of the head.
        pretrained: False ignores `config.weights` and keeps random weights.
        cache_dir: Where the hub's downloads are kept; default: that of timm.

    Raises:
        ConfigError: No such model, or a setting that its family does not have.
        WeightsError: The weights cannot be had or do not fit.

    Example:
        >>> built = build_model(ModelConfig(name="test_resnet", weights="none"), num_classes=2)
        >>> [stage.name for stage in built.stages]
        ['stage0', 'stage1', 'stage2', 'stage3', 'stage4', 'head']
    """
    check_name(config.name)
    weights = config.weights if pretrained else "none"
    file = None if weights in {"hub", "none"} else find_weights_file(weights, config.name)
    model, model_args = _create(config, num_classes, hub=weights == "hub", cache_dir=cache_dir)
    notes: list[str] = []
    source, sidecar = config.name if weights == "hub" else RANDOM, {}
    if file is not None:
        notes += load_weights(model, file)
        sidecar = _read_sidecar(file)
        source = file.name
    if weights == "hub" and (model.pretrained_cfg or {}).get("num_classes") != num_classes:
        notes.append(_new_head(model))
    # Convolutions run several times faster so on a CPU, and on the tensor cores of a GPU.
    model.to(memory_format=torch.channels_last)
    stages = find_stages(model)
    pretrained_cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {}) or {}
    return BuiltModel(
        name=config.name,
        model=model,
        stages=stages,
        preprocessing=_preprocessing(model, sidecar, config.image_size),
        weights=Weights(
            source=source,
            sha256=_backbone_sha256(model, stages),
            licence=_licence(weights, sidecar, pretrained_cfg),
            notes=tuple(notes),
        ),
        model_args=model_args,
    )


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
        msg = f"model.name: {architecture} has no weights {tag}; there are {', '.join(tags) or 'none'}"
        raise ConfigError(msg)


def _create(
    config: ModelConfig, num_classes: int, *, hub: bool, cache_dir: Path | None
) -> tuple[nn.Module, dict[str, Any]]:
    rates = {"drop_rate": config.drop_rate, "drop_path_rate": config.drop_path_rate}
    args: dict[str, Any] = {k: v for k, v in rates.items() if v}
    if config.image_size is not None and _fixed_size(config.name):
        args["img_size"] = config.image_size
    try:
        with _hub_offline() if hub and not _hub_reachable() else nullcontext():
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
        if not hub:
            raise
        first_line = str(error).strip().split("\n")[0][:200]
        msg = (
            f"cannot load the weights of {config.name} from the hub: {first_line}\n"
            "Where no hub can be reached, name a file: model.weights=path.safetensors; random "
            "weights: model.weights=none; or fill the hub's cache (HF_HOME) on a machine that has a network."
        )
        raise WeightsError(msg) from error
    return model, args


def _hub_reachable() -> bool:
    """Whether the hub's host answers, so that a machine without a network does not wait for retries."""
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


# --- weights from a file ------------------------------------------------------------------------


def find_weights_file(weights: str, name: str) -> Path:
    """File behind `model.weights`: itself, or `<name>.safetensors|.pth|.pt|.bin` in a folder.

    Raises:
        WeightsError: There is no such file.
    """
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        stems = dict.fromkeys((name, name.partition(".")[0]))
        tried = [
            path / f"{stem}{end}"
            for stem in stems
            for end in (".safetensors", ".pth", ".pt", ".bin")
        ]
        for file in tried:
            if file.is_file():
                return file
        have = ", ".join(
            sorted(p.name for p in path.iterdir() if p.suffix in {".safetensors", ".pth"})
        )
        msg = f"model.weights: {path} holds no {tried[0].name}; it has {have or 'no weights'}"
        raise WeightsError(msg)
    msg = f"model.weights: there is no file {path} (hub, none, a file, or a folder of files)"
    raise WeightsError(msg)


def load_weights(model: nn.Module, file: Path) -> list[str]:
    """Load a state dict into a model, all of it but the head where that has another size.

    Args:
        model: A timm model; its weights are replaced in place.
        file: `.safetensors`, or a `.pth` that holds tensors only.

    Returns:
        Sentences about what was done, for the log.

    Raises:
        WeightsError: The file cannot be read, has pickled code in it, or is of another architecture.
    """
    state = _read_state(file)
    expected = model.state_dict()
    head = _head_names(model)
    given = _fit_keys(model, state, expected, head)
    new_head = any(k not in given or given[k].shape != expected[k].shape for k in head)
    if new_head:
        given = {k: v for k, v in given.items() if not _in_head(k, head)}
    missing = [
        k
        for k in expected
        if k not in given and not (new_head and k in head) and not k.endswith("num_batches_tracked")
    ]
    other = [k for k in given if k not in expected and not k.endswith("num_batches_tracked")]
    shapes = [k for k in given if k in expected and given[k].shape != expected[k].shape]
    if missing or other or shapes:
        raise WeightsError(_misfit(file, expected, given, missing, other, shapes))
    model.load_state_dict(given, strict=False)
    if new_head:
        rows = next((v.shape[0] for k, v in state.items() if k in head), None)
        was = f"the file's head has {rows} outputs" if rows else "the file has no head"
        return [f"{was}; {_new_head(model)}"]
    return ["the head comes from the file too: it has the right number of outputs"]


def _new_head(model: nn.Module) -> str:
    """Set a head that no pretraining knows to zero, so that the first loss is that of chance.

    Kolesnikov et al. 2020 (Big Transfer, appendix on fine-tuning) start so, too: with features of a
    large norm a random head begins far from any solution and would tear the backbone along.
    """
    classifier = model.get_classifier()
    for root in classifier if isinstance(classifier, (tuple, list)) else [classifier]:
        for module in root.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return f"a new head with {model.num_classes} outputs starts from zero"


def _read_state(file: Path) -> dict[str, Tensor]:
    try:
        state = load_state_dict(str(file), device="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).split("\n")[0][:200]
        msg = f"{file} cannot be read as weights: {reason}"
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
            msg = (
                f"{file} holds pickled code, which could do anything when loaded: refused. "
                "Save the state dict as .safetensors where you trust it."
            )
        raise WeightsError(msg) from error
    if not all(isinstance(v, Tensor) for v in state.values()) or not state:
        msg = f"{file} holds no tensors by name: save model.state_dict()"
        raise WeightsError(msg)
    return dict(state)


def _fit_keys(
    model: nn.Module, state: dict[str, Tensor], expected: Mapping[str, Tensor], head: Iterable[str]
) -> dict[str, Tensor]:
    """State dict in the model's keys; families have filters for their authors' original formats."""
    if all(k in state for k in expected if k not in head and not k.endswith("num_batches_tracked")):
        return state
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return state
    try:
        return dict(convert(dict(state), model))
    except (KeyError, IndexError, RuntimeError, AttributeError, ValueError):
        return state  # a file of another family: the caller names the keys that do not fit


def _misfit(
    file: Path,
    expected: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
    missing: list[str],
    other: list[str],
    shapes: list[str],
) -> str:
    def some(keys: list[str]) -> str:
        return ", ".join(keys[:5]) + (f", … ({len(keys)} in all)" if len(keys) > 5 else "")

    lines = [f"{file} is of another architecture than the model:"]
    if missing:
        lines.append(f"  the model needs, the file lacks: {some(missing)}")
    if other:
        lines.append(f"  the file has, the model lacks: {some(other)}")
    for key in shapes[:3]:
        lines.append(
            f"  other shape: {key} is {tuple(given[key].shape)}, the model has {tuple(expected[key].shape)}"
        )
    lines.append("Choose the model that the file was made for (model.name=…) or another file.")
    return "\n".join(lines)


def _read_sidecar(file: Path) -> dict[str, Any]:
    """What lies beside a weights file: `<file>.json`, or the hub's `config.json`.

    Its preprocessing outranks that of timm's tag.
    """
    for path in (file.with_suffix(".json"), file.with_name("config.json")):
        if not path.is_file():
            continue
        try:
            sidecar = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            msg = f"{path} (beside the weights) is no JSON: {error}"
            raise WeightsError(msg) from error
        return sidecar if isinstance(sidecar, dict) else {}
    return {}


def _licence(weights: str, sidecar: Mapping[str, Any], cfg: Mapping[str, Any]) -> str:
    if weights == "none":
        return "none (random weights)"
    stated = sidecar.get("licence") or sidecar.get("license")
    # A file of one's own is not covered by the licence of timm's tag of the same name.
    return str(stated or (cfg.get("license") if weights == "hub" else None) or "not stated")


def _preprocessing(
    model: nn.Module, sidecar: Mapping[str, Any], image_size: int | None
) -> Preprocessing:
    values: dict[str, Any] = dict(resolve_model_data_config(model))
    own = sidecar.get("preprocessing") or sidecar.get("pretrained_cfg") or sidecar
    values.update({k: own[k] for k in values if k in own})
    if image_size is not None:
        values["input_size"] = (3, image_size, image_size)
    return Preprocessing.from_dict(values)


# --- stages -------------------------------------------------------------------------------------


def find_stages(model: nn.Module) -> tuple[Stage, ...]:
    """Split a model into its stem (`stage0`), at most four stages above it, and the head.

    Layers are ordered by the model's own `group_matcher(coarse=True)`; where they are finer than
    stages (a ViT's blocks, MobileNet's nine), `feature_info` says which belong to one resolution,
    and where it names a single resolution they are split evenly.

    Returns:
        Stages in forward order, the head last; every parameter and buffer is in exactly one.
    """
    head = set(_head_names(model))
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
    if hasattr(model, "group_matcher"):
        found = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
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


def _head_names(model: nn.Module) -> list[str]:
    classifier = model.get_classifier() if hasattr(model, "get_classifier") else None
    modules = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    ids = {id(p) for m in modules if isinstance(m, nn.Module) for p in m.parameters()}
    return [name for name, p in model.named_parameters() if id(p) in ids]


def _in_head(key: str, head: Iterable[str]) -> bool:
    return any(key.rpartition(".")[0] == name.rpartition(".")[0] for name in head)


# --- hashes -------------------------------------------------------------------------------------


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def _backbone_sha256(model: nn.Module, stages: Iterable[Stage]) -> str:
    state = model.state_dict()
    names = [n for s in stages if s.name != HEAD for n in (*s.parameters, *s.buffers) if n in state]
    return tensors_sha256((name, state[name]) for name in names)
