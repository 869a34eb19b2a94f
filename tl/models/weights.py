"""Weights from a file: found, read without running code, and fitted to the model or refused."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from timm.models import load_state_dict
from torch import Tensor, nn

from tl.config import RequestError
from tl.models.stage_head import backbone_state
from tl.models.stages import head_names, in_head


class WeightsError(RequestError):
    """Pretrained weights cannot be had, or do not fit the model."""


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


def load_weights(model: nn.Module, file: Path, *, keep_head: bool = False) -> str:
    """Load a state dict into a model, all of it but the head.

    Args:
        model: A timm model; its weights are replaced in place.
        file: `.safetensors`, or a `.pth` that holds tensors only.

        keep_head: Take the head over, too, where it fits: it knows the same classes.

    Returns:
        A sentence about what was done, for the log.

    Raises:
        WeightsError: The file cannot be read, has pickled code in it, or is of another
            architecture.
    """
    state = _read_state(file)
    expected = model.state_dict()
    head = head_names(model)
    given = _fit_keys(model, state, expected, head)
    fits = all(k in given and given[k].shape == expected[k].shape for k in head)
    fresh_head = not (keep_head and fits)
    if fresh_head:
        given = {k: v for k, v in given.items() if not in_head(k, head)}
    missing = [
        k
        for k in expected
        if k not in given
        and not (fresh_head and k in head)
        and not k.endswith("num_batches_tracked")
    ]
    other = [k for k in given if k not in expected and not k.endswith("num_batches_tracked")]
    shapes = [k for k in given if k in expected and given[k].shape != expected[k].shape]
    if missing or other or shapes:
        raise WeightsError(_misfit(file, expected, given, missing, other, shapes))
    model.load_state_dict(given, strict=False)
    if fresh_head:
        rows = next((v.shape[0] for k, v in state.items() if k in head), None)
        was = f"the file's head has {rows} outputs" if rows else "the file has no head"
        return f"{was}; {new_head(model)}"
    return "the head comes from the file too: it knows the same classes"


def head_of_file(model: nn.Module, file: Path) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of the linear head in a file that fits the model; None where it has none."""
    head = [name for name in head_names(model) if name.endswith(".weight")]
    if len(head) != 1:
        return None
    given = _fit_keys(model, _read_state(file), model.state_dict(), head_names(model))
    weight = given.get(head[0])
    if weight is None or weight.ndim != 2:
        return None
    bias = given.get(f"{head[0].removesuffix('weight')}bias")
    return weight.float(), None if bias is None else bias.float()


def new_head(model: nn.Module) -> str:
    """Set a head that no pretraining knows to zero, so that the first loss is that of chance.

    Kolesnikov et al. 2020 (Big Transfer, appendix on fine-tuning) start so, too: with features of a
    large norm a random head begins far from any solution and would tear the backbone along.
    """
    network: Any = model
    classifier = network.get_classifier()
    for root in classifier if isinstance(classifier, (tuple, list)) else [classifier]:
        for module in root.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.zeros_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return f"a new head with {network.num_classes} outputs starts from zero"


def _read_state(file: Path) -> dict[str, Tensor]:
    try:
        state = load_state_dict(str(file), device="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).split("\n")[0][:200]
        if not file.stat().st_size:
            reason = "0 bytes"
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
    return backbone_state(state)


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
    lines += [
        f"  other shape: {key} is {tuple(given[key].shape)} in the file, "
        f"{tuple(expected[key].shape)} in the model"
        for key in shapes[:3]
    ]
    lines.append("Choose the model that the file was made for (model.name=…) or another file.")
    return "\n".join(lines)


def read_sidecar(file: Path) -> dict[str, Any]:
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
