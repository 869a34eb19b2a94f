"""A head on all stages: cut below the classifier, and everything the prefix gives feeds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tl.config import ConfigError, HeadKind
from tl.graph import Split, split
from tl.graph.cutting import LARGE
from tl.graph.errors import SplitError
from tl.graph.proof import prove
from tl.models import HEAD, BuiltModel, Stage, StageClassifier
from tl.models.stage_head import is_row

FEATURES = "features"  # what the head of the network reads


@dataclass(frozen=True)
class StageSplit(Split):
    """A `StageClassifier` as prefix and suffix.

    Everything but its suffix is that of the same network with a linear probe: hash, values and
    pooled stages are alike, so both read the same rows of the cache.
    """

    @property
    def inputs(self) -> tuple[int, ...]:
        """Places of what the suffix reads in the outputs of the prefix."""
        return self._classifier.places

    def run_suffix(self, model: nn.Module, values: Sequence[Tensor]) -> Tensor:
        """The suffix with the weights of another copy of the model."""
        assert isinstance(model, StageClassifier)
        return model.classify(values)

    def rows(self, values: Sequence[Tensor]) -> Tensor:
        """What the linear layer reads: standardised features, (N, features)."""
        device = self._classifier.features.mean.device  # what is held for a fit is gathered in it
        return self._classifier.rows([value.to(device) for value in values])

    @property
    def bytes_per_image(self) -> int:
        """Bytes of what is read of one image in float32."""
        return 4 * sum(self._classifier.sizes.values())

    @property
    def _classifier(self) -> StageClassifier:
        assert isinstance(self._model, StageClassifier)
        return self._model


def cut_model(built: BuiltModel, images: Tensor) -> Split:
    """`split` of a model; a head on all stages is cut as it was built.

    Args:
        built: With the phase's `requires_grad` and modes.
        images: A small batch as the model gets it: (N, 3, H, W).

    Raises:
        SplitError: As `split`; or something else than the head trains in a model whose head reads
            all stages.
    """
    model = built.model
    if not isinstance(model, StageClassifier):
        return split(model, built.stages, images)
    if any(p.requires_grad for p in model.backbone.parameters()):
        raise SplitError("a head on all stages trains alone")
    return StageSplit(
        _prefix=lambda: model.backbone,
        linear=model.head,
        _model=model,
        _programs=(),
        **model.origin,
    )


def with_head(built: BuiltModel, kind: HeadKind, *, proven: bool = False) -> BuiltModel:
    """The same backbone with the head that a config asks for.

    Args:
        built: From `build_model`; its backbone is shared by the result, its own head is dropped. A
            last stage that is pooled into just what the head of the network reads counts once.
        kind: `HeadKind.linear` gives `built` back.
        proven: The features are known to be those of the network: it was trained before.

    Raises:
        ConfigError: The network cannot be cut; names the remedy.

    Example:
        >>> from tl.config import ModelConfig
        >>> from tl.models import build_model
        >>> built = build_model(ModelConfig(name="test_resnet", weights="none"), 2)
        >>> staged = with_head(built, HeadKind.stages)
        >>> list(staged.model.sizes), staged.stages[-1].parameters
        (['features', 'stage0', 'stage1', 'stage2', 'stage3'], ('head.weight', 'head.bias'))
    """
    if kind is HeadKind.linear or built.head == kind.value:
        return built
    size = built.preprocessing.input_size
    noise = torch.rand(LARGE, *size, generator=torch.Generator().manual_seed(0))
    noise = noise.contiguous(memory_format=torch.channels_last)
    try:
        parts = _cut_below_head(built, noise, proven=proven)
        model = _classifier(parts, noise, int(built.model.num_classes))  # type: ignore[arg-type]
    except SplitError as error:
        msg = (
            f"finetune.head=stages needs the features of all stages of {built.name}, and they "
            f"cannot be had ({error}); finetune=linear_probe works with any model"
        )
        raise ConfigError(msg) from error
    return replace(built, model=model, stages=_stages(built.stages, model), head=kind.value)


def _cut_below_head(built: BuiltModel, noise: Tensor, *, proven: bool) -> Split:
    """The network cut below its own classifier; its modes and flags are as before."""
    model = built.model
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    head = set(built.stages[-1].parameters) if built.stages[-1].name == HEAD else set()
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in head)
        parts = split(model.eval(), built.stages, noise)
        if not proven:
            prove(parts, model, noise)
        return parts
    finally:
        for module, training in modes:
            module.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _classifier(parts: Split, noise: Tensor, num_classes: int) -> StageClassifier:
    """The classifier, without stages that only repeat what the head of the network reads."""
    rows = [place for place, shape in enumerate(parts.shapes) if is_row(shape)]
    names = {place: f"{FEATURES}{number or ''}" for number, place in enumerate(rows)}
    with torch.no_grad():
        outputs = [value.flatten(1) for value in parts.prefix(noise)]
    for place, stage in enumerate(parts.pooled, len(parts.nodes)):
        found = outputs[place]
        same = (outputs[row] for row in rows if outputs[row].shape == found.shape)
        near = 1e-4 * float(found.abs().max())
        if not any(torch.allclose(found, other, rtol=1e-3, atol=near) for other in same):
            names[place] = stage
    if not set(names) - set(rows):
        raise SplitError("it has no stage whose output can be pooled beside its last features")
    sizes = {name: outputs[place].shape[1] for place, name in names.items()}
    origin = {
        "nodes": parts.nodes,
        "shapes": parts.shapes,
        "pooled": parts.pooled,
        "pooled_sizes": parts.pooled_sizes,
        "sha256": parts.sha256,
    }
    return StageClassifier(parts.prefix, sizes, [*names], num_classes, origin)


def _stages(stages: Sequence[Stage], model: StageClassifier) -> tuple[Stage, ...]:
    """Stages of the network in the names of the classifier; what is in none joins the last."""
    parameters = {name for name, _ in model.backbone.named_parameters()}
    buffers = {name for name, _ in model.backbone.named_buffers()}
    found: list[tuple[str, list[str], list[str]]] = []
    for stage in stages:
        if stage.name == HEAD:
            continue
        own = [name for name in stage.parameters if name in parameters]
        still = [name for name in stage.buffers if name in buffers]
        parameters.difference_update(own)
        buffers.difference_update(still)
        if own:
            found.append((stage.name, own, still))
        elif still and found:
            found[-1][2].extend(still)
    found[-1][1].extend(sorted(parameters))
    found[-1][2].extend(sorted(buffers))
    body = [
        Stage(name, tuple(f"backbone.{n}" for n in own), tuple(f"backbone.{n}" for n in still))
        for name, own, still in found
    ]
    head = Stage(
        HEAD,
        tuple(f"head.{n}" for n, _ in model.head.named_parameters()),
        tuple(f"features.{n}" for n, _ in model.features.named_buffers()),
    )
    return (*body, head)
