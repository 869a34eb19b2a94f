"""The frozen frontier: a model as `prefix(images) -> values` and `suffix(values) -> logits`.

`split` traces a model with torch.fx, finds what no trainable parameter reaches, and cuts there: the
prefix is computed once for an image, the suffix is what trains. The suffix has no weights of its
own but runs code on the model's live modules, so optimizer, checkpoints and export see one model.
`prove` compares logits and gradients with those of the whole model before anything relies on it.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from timm.layers.linear import Linear as TimmLinear
from torch import Tensor, fx, nn

from tl.graph.cutting import LARGE, SMALL, Program, Value, extract, needed, suffix_program, write
from tl.graph.errors import SplitError, first_line
from tl.graph.proof import Proof, prove
from tl.graph.tracing import Kind, Trace, frontier, mark, trace
from tl.models import Stage, tensors_sha256

__all__ = ["Proof", "Split", "SplitError", "prove", "split"]


@dataclass(frozen=True)
class Split:
    """A model that is cut at its frozen frontier.

    Args:
        nodes: Names of the frontier's nodes.
        shapes: Shape of each value, without the batch.
        pooled: Names of the stages wholly below the frontier.
        pooled_sizes: Channels of each.
        sha256: Hash of what computes the values: graph, weights and buffers.
        linear: The live head where the suffix is nothing but this layer on one row of features.
    """

    nodes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    pooled: tuple[str, ...]
    pooled_sizes: tuple[int, ...]
    sha256: str
    linear: nn.Linear | None
    _prefix: Callable[[], nn.Module] = field(repr=False)
    _model: nn.Module = field(repr=False)
    _programs: tuple[Program, ...] = field(repr=False)  # eval, train

    @cached_property
    def prefix(self) -> nn.Module:
        """Images (N, 3, H, W) -> tuple of tensors, in eval mode.

        These are the frontier values, each (N, *shape), then the pooled features of stages, each
        (N, channels). It shares the memory of the model's weights, but not its modules.
        """
        return self._prefix()

    def suffix(self, values: Sequence[Tensor]) -> Tensor:
        """Logits (N, classes) from frontier values; follows `model.training`."""
        return self.run_suffix(self._model, values)

    def run_suffix(self, model: nn.Module, values: Sequence[Tensor]) -> Tensor:
        """The suffix with the weights of another copy of the model."""
        return self._programs[model.training](model, values)

    @property
    def inputs(self) -> tuple[int, ...]:
        """Places of what the suffix reads in the outputs of the prefix."""
        return tuple(range(len(self.nodes)))

    def values(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What the suffix reads of the outputs of the prefix."""
        return tuple(outputs[place] for place in self.inputs)

    def rows(self, values: Sequence[Tensor]) -> Tensor:
        """What `linear` reads: (N, features)."""
        return values[0]

    @property
    def bytes_per_image(self) -> int:
        """Bytes of the values of one image in float32."""
        return sum(4 * math.prod(shape) for shape in self.shapes)


def split(model: nn.Module, stages: Sequence[Stage], images: Tensor) -> Split:
    """Cut a model below the first layers that train.

    Args:
        model: Model with the phase's `requires_grad` and modes (`tl.finetuning.freeze`).
        stages: Its stages, from the stem to the head.
        images: A small batch as the model gets it: (N, 3, H, W).

    Raises:
        SplitError: It cannot be traced, nothing is frozen, or the frontier has no batch dimension.

    Example:
        >>> from tl.config import ModelConfig
        >>> from tl.models import build_model
        >>> built = build_model(ModelConfig(name="test_resnet", weights="none"), 2)
        >>> for name, parameter in built.model.named_parameters():
        ...     _ = parameter.requires_grad_(name in built.stages[-1].parameters)
        >>> parts = split(built.model.eval(), built.stages, torch.zeros(2, 3, 64, 64))
        >>> parts.shapes, parts.linear is built.model.get_classifier()
        (((96,),), True)
    """
    train, test = trace(model, train=True), trace(model, train=False)
    trainable = {n for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    hot = mark(train, trainable, drawing=True)
    hot_test = mark(test, trainable, drawing=False)
    cut = _common_ends(train, test, hot, trainable)
    tops = _stage_tops(test, stages, hot_test)
    numbers = [n for n, k in test.kinds.items() if k is Kind.SIZES and n not in hot_test]
    small, large = _measure(test, [*cut, *tops.values(), *numbers], hot_test, images)
    nothing = [
        node for node in cut if not isinstance(large[node], Tensor) and small[node] is large[node]
    ]
    cut, numbers = [node for node in cut if node not in nothing], numbers + nothing
    values = {node: Value.of(node.name, small[node], large[node]) for node in cut}
    sizes = {test.keys[node]: (small[node], large[node]) for node in numbers}
    layouts = {name: _layout(model, small[node], large[node]) for name, node in tops.items()}
    pooled = {name: found for name, found in layouts.items() if found is not None}
    prefix = _prefix(
        test, values, [(tops[name], dims) for name, (dims, _) in pooled.items()], hot_test
    )

    inside = needed(test, cut, without=hot_test)
    programs = _suffixes(train, test, hot, values, sizes, inside.union(numbers))
    return Split(
        _prefix=lambda: prefix,
        nodes=tuple(value.name for value in values.values()),
        shapes=tuple(value.shape for value in values.values()),
        pooled=tuple(pooled),
        pooled_sizes=tuple(channels for _, channels in pooled.values()),
        sha256=_sha256(test, inside, [test.keys[node] for node in cut]),
        linear=_linear(model, [*values.values()], programs),
        _model=model,
        _programs=programs,
    )


def _suffixes(
    train: Trace,
    test: Trace,
    hot: set[fx.Node],
    values: Mapping[fx.Node, Value],
    sizes: Mapping[str, tuple[Any, Any]],
    inside: set[fx.Node],
) -> tuple[Program, Program]:
    """Code from the frontier values to the logits, in eval mode and in the modes of the phase.

    Args:
        train: The model in the modes of the phase.
        test: In eval mode.
        hot: Nodes of `train` that training reaches.
        values: Nodes of the frontier in `test`.
        sizes: What cold nodes that depend on sizes only gave, by their keys.
        inside: Nodes of `test` below the frontier, and those of `sizes`.
    """
    order = {test.keys[node]: i for i, node in enumerate(values)}

    def program(trace: Trace, cold: set[fx.Node]) -> Program:
        places = {n: order[k] for n, k in trace.keys.items() if k in order and n not in hot}
        known = {n: sizes[k] for n, k in trace.keys.items() if n in cold and k in sizes}
        return suffix_program(trace, [*values.values()], places, known)

    return program(test, inside), program(train, {n for n in train.graph.nodes if n not in hot})


def _common_ends(
    train: Trace, test: Trace, hot: set[fx.Node], trainable: set[str]
) -> list[fx.Node]:
    """Nodes of the frontier in eval mode, found by what they compute.

    Args:
        train: The model in the modes of the phase.
        test: In eval mode.
        hot: Nodes of `train` that training reaches.
        trainable: Names of what trains.

    Raises:
        SplitError: The two modes do not share the frontier, or it is not worth a cut.
    """
    ends = _without_derived(train, frontier(train, hot))
    _check_worth(train, ends, trainable)
    by_key = {test.keys[node]: node for node in reversed(test.graph.nodes)}
    lost = [node.name for node in ends if train.keys[node] not in by_key]
    if lost:
        raise SplitError(f"{lost[0]} at the frontier differs between train and eval mode")
    # Two nodes that compute the same have one key, and one value.
    return list(dict.fromkeys(by_key[train.keys[node]] for node in ends))


def _prefix(
    test: Trace,
    values: Mapping[fx.Node, Value],
    tops: Sequence[tuple[fx.Node, tuple[int, ...]]],
    hot: set[fx.Node],
) -> fx.GraphModule:
    """What computes the values and the pooled stages.

    Args:
        test: The model in eval mode.
        values: Nodes of the frontier, and how they are stored.
        tops: Last node of each stage, and the dimensions to take its mean over.
        hot: What training reaches.
    """
    graph, copies = extract(test, [*values, *(node for node, _ in tops)], hot)
    rows = [value.store(graph, copies[node]) for node, value in values.items()]
    means = [
        graph.call_method("mean", (copies[node], dims)) if dims else copies[node]
        for node, dims in tops
    ]
    graph.output((*rows, *means))
    return fx.GraphModule(test.shadow, graph, "Prefix").eval()


def _check_worth(trace: Trace, ends: Sequence[fx.Node], trainable: set[str]) -> None:
    """Refuse a frontier that no frozen weight lies below.

    Raises:
        SplitError: Nothing trains, or nothing is frozen.
    """
    if not trainable:
        raise SplitError("no layer trains")
    inside = needed(trace, ends)
    if not any(trace.reads[node] for node in inside):
        raise SplitError("nothing is frozen below the first trainable layer")


def _without_derived(trace: Trace, ends: Sequence[fx.Node]) -> list[fx.Node]:
    """Leave out what follows from the rest without weights (a pooled copy): less to store."""
    kept = list(ends)
    for node in reversed(ends):
        rest = [other for other in kept if other is not node]
        between = needed(trace, [node], stop=rest).difference(rest)
        if not any(n.op == "placeholder" or trace.reads[n] for n in between):
            kept = rest
    return kept


def _stage_tops(trace: Trace, stages: Sequence[Stage], hot: set[fx.Node]) -> dict[str, fx.Node]:
    """The last node of each stage that lies wholly below what trains."""
    tops = {}
    for index, stage in enumerate(stages[:-1]):
        own = set(stage.parameters)
        readers = [n for n in trace.graph.nodes if own & set(trace.reads[n])]
        later = {name for s in stages[index + 1 :] for name in s.parameters}
        ends = frontier(trace, mark(trace, later, drawing=False))
        if readers and ends and not hot & {*readers, ends[-1]} and ends[-1].op != "placeholder":
            tops[stage.name] = ends[-1]
    return tops


def _measure(
    trace: Trace, nodes: Sequence[fx.Node], hot: set[fx.Node], images: Tensor
) -> tuple[dict[fx.Node, Any], dict[fx.Node, Any]]:
    """What cold nodes give for SMALL and for LARGE images."""
    graph, copies = extract(trace, nodes, hot)
    graph.output(tuple(copies[node] for node in nodes))
    run = write(graph)  # a GraphModule would print its own errors
    enough = images if len(images) >= LARGE else torch.cat([images] * LARGE)
    try:
        with torch.no_grad():
            small, large = (
                dict(zip(nodes, run(trace.shadow, enough[:n]), strict=True)) for n in (SMALL, LARGE)
            )
    except Exception as error:  # anything: it is the model's own code
        raise SplitError(f"the traced model does not run ({first_line(error)})") from error
    return small, large


def _layout(model: nn.Module, small: Any, large: Any) -> tuple[tuple[int, ...], int] | None:
    """Dimensions to take the mean over and the channels of a stage's output; None if unclear."""
    if not isinstance(large, Tensor) or small.shape != (SMALL, *large.shape[1:]):
        return None
    if len(large) != LARGE or not large.is_floating_point():
        return None
    if large.ndim == 2:
        return (), large.shape[1]
    if large.ndim == 3:
        return (1,), large.shape[2]
    if large.ndim != 4:
        return None
    info = getattr(model, "feature_info", None)
    widths = {entry["num_chs"] for entry in info} if isinstance(info, list) else set()
    last = str(getattr(model, "output_fmt", "NCHW")) == "NHWC"
    if (large.shape[1] in widths) != (large.shape[3] in widths):
        last = large.shape[3] in widths
    return ((1, 2), large.shape[3]) if last else ((2, 3), large.shape[1])


def _sha256(trace: Trace, inside: set[fx.Node], ends: Sequence[str]) -> str:
    """Hash of the graph below the frontier and of the weights and buffers that it reads."""
    read: dict[str, Tensor] = {}
    for node in inside:
        target = str(node.target)
        if node.op == "call_module":
            module = trace.model.get_submodule(target)
            read |= {f"{target}.{n}": t for n, t in module.named_parameters()}
            # A counter, which no output depends on.
            buffers = {n: t for n, t in module.named_buffers() if "num_batches_tracked" not in n}
            read |= {f"{target}.{n}": t for n, t in buffers.items()}
        elif node.op == "get_attr" and trace.constant(node) is None:
            value = operator.attrgetter(target)(trace.model)
            read |= {target: value} if isinstance(value, Tensor) else {}
    text = f"{tensors_sha256(read.items())} {' '.join(ends)}"
    return hashlib.sha256(text.encode()).hexdigest()


def _linear(
    model: nn.Module, values: Sequence[Value], programs: Sequence[Program]
) -> nn.Linear | None:
    names = {program.only_module() for program in programs}
    name = names.pop()
    if names or name is None or [len(value.shape) for value in values] != [1]:
        return None
    module = model.get_submodule(name)
    if isinstance(module, nn.Linear) and type(module) in {nn.Linear, TimmLinear}:
        return module
    return None
