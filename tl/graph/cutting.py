"""Cut a traced model at its frontier: what goes below into a module, what is above into code."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tl.graph.errors import SplitError
from tl.graph.tracing import Trace, is_no_op

SMALL, LARGE = 2, 3  # batches that tell sizes that grow with the batch from those that do not


@dataclass(frozen=True)
class Value:
    """How one frontier tensor is stored: a row for each image.

    Args:
        name: Node that computes it.
        shape: Shape of a row.
        dim: Dimension of the batch in the model.
        times: Entries of that dimension for each image (windows); more than one only in front.
        dtype: Type in the model; anything but floating point is stored as float32.
        channels_last: Memory format in the model.
    """

    name: str
    shape: tuple[int, ...]
    dim: int
    times: int
    dtype: torch.dtype
    channels_last: bool

    @classmethod
    def of(cls, name: str, small: Any, large: Any) -> Value:
        """Find the batch in a tensor that was computed for SMALL and for LARGE images.

        Raises:
            SplitError: It is no tensor, or the images cannot be told apart in it.
        """
        if not (isinstance(small, Tensor) and isinstance(large, Tensor)):
            raise SplitError(f"{name} at the frontier is a {type(large).__name__}, not a tensor")
        a, b = tuple(small.shape), tuple(large.shape)
        grows = [i for i in range(len(b)) if len(a) == len(b) and a[i] * LARGE == b[i] * SMALL]
        grows = [i for i in grows if b[i]]
        if (
            len(grows) != 1
            or b[grows[0]] % LARGE
            or a != (*b[: grows[0]], a[grows[0]], *b[grows[0] + 1 :])
        ):
            raise SplitError(f"{name} at the frontier has no batch dimension (shapes {a}, {b})")
        dim, times = grows[0], b[grows[0]] // LARGE
        if times > 1 and dim:
            raise SplitError(f"{name} at the frontier has parts of images in dimension {dim}")
        rest = (*b[:dim], *b[dim + 1 :])
        last = large.ndim == 4 and not large.is_contiguous()
        return cls(
            name=name,
            shape=(times, *rest) if times > 1 else rest,
            dim=dim,
            times=times,
            dtype=large.dtype,
            channels_last=last and large.is_contiguous(memory_format=torch.channels_last),
        )

    def store(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Add to the prefix what turns the tensor into one row for each image."""
        if self.dim:
            node = graph.call_method("movedim", (node, self.dim, 0))
        if self.times > 1:
            node = graph.call_method("reshape", (node, (-1, *self.shape)))
        return node if self.dtype.is_floating_point else graph.call_method("float", (node,))

    def restore(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Add to the suffix the way back."""
        if not self.dtype.is_floating_point:
            node = graph.call_method("to", (node, self.dtype))
        if self.times > 1:
            node = graph.call_method("flatten", (node, 0, 1))
        if self.dim:
            node = graph.call_method("movedim", (node, 0, self.dim))
        if self.channels_last:
            # As in the model: other memory formats are slower, and round differently.
            kwargs: dict[str, Any] = {"memory_format": torch.channels_last}
            node = graph.call_method("contiguous", (node,), kwargs)
        return node


def needed(
    trace: Trace,
    roots: Iterable[fx.Node],
    *,
    stop: Container[fx.Node] = (),
    without: Container[fx.Node] = (),
) -> set[fx.Node]:
    """The roots, what they are computed from, and what overwrites any of it.

    Args:
        trace: Traced model.
        roots: Nodes that are wanted.
        stop: Nodes whose inputs are not followed.
        without: Overwriting nodes that belong elsewhere.
    """
    found: set[fx.Node] = set()

    def add(node: fx.Node) -> None:
        todo = [node]
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += [] if node in stop else node.all_input_nodes

    for root in roots:
        add(root)
    count = -1
    while count != len(found):
        count = len(found)
        for node, base in trace.overwrites.items():
            if base in found and node not in without:
                add(node)
    return found


def extract(
    trace: Trace, outputs: Sequence[fx.Node], hot: Container[fx.Node]
) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """Copy the nodes that cold nodes are computed from; the output is still missing.

    Returns:
        The new graph, and for every output the node in it.
    """
    ends = set(outputs)
    wanted = needed(trace, ends, without=hot)
    overwritten = {trace.overwrites.get(node) for node in wanted}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    results: dict[fx.Node, fx.Node] = {}
    for node in trace.graph.nodes:
        if node not in wanted:
            continue
        if is_no_op(node, trace.model):
            copies[node] = copies[node.all_input_nodes[0]]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        if node in ends:
            results[node] = copies[node]
            if node in overwritten:  # what comes later overwrites it
                results[node] = graph.call_method("clone", (copies[node],))
    return graph, results


@dataclass(frozen=True)
class Program:
    """Code of a suffix. Every weight and module is looked up in the model that it is called with.

    Args:
        graph: Inputs: a value for each frontier node, then the constants.
        constants: Tensors that tracing made.
        function: The code: model, values, constants -> logits.
    """

    graph: fx.Graph
    constants: tuple[Tensor, ...]
    function: Callable[..., Any]

    def __call__(self, model: nn.Module, values: Sequence[Tensor]) -> Tensor:
        """Logits from the frontier values."""
        like = values[0]
        constants = [
            c.to(
                like.device,
                like.dtype if like.dtype == torch.float64 and c.is_floating_point() else c.dtype,
            )
            for c in self.constants
        ]
        logits: Tensor = self.function(model, *values, *constants)
        return logits

    def only_module(self) -> str | None:
        """Name of the module where the program is nothing but one module on one value."""
        nodes = [n for n in self.graph.nodes if n.op not in {"placeholder", "output"}]
        if len(nodes) != 1 or nodes[0].op != "call_module" or len(nodes[0].args) != 1:
            return None
        return str(nodes[0].target)


def suffix_program(
    trace: Trace,
    values: Sequence[Value],
    places: Mapping[fx.Node, int],
    sizes: Mapping[fx.Node, tuple[Any, Any]],
) -> Program:
    """Write the code from the frontier values to the output of the model.

    Args:
        trace: Traced model.
        values: What the prefix gives.
        places: Frontier node of this trace -> index of its value.
        sizes: What cold nodes that depend on sizes only gave for SMALL and for LARGE images.

    Raises:
        SplitError: The suffix needs something cold that is not a tensor at the frontier.
    """
    numbers = {n for n, (_, large) in sizes.items() if not isinstance(large, Tensor)}
    stop = {*places, *numbers}
    output = next(node for node in trace.graph.nodes if node.op == "output")
    wanted = needed(trace, [output, *trace.effects], stop=stop)
    graph = fx.Graph()
    inputs = [graph.placeholder(f"value{i}") for i in range(len(values))]
    held = [n for n in trace.graph.nodes if n in wanted and trace.constant(n) is not None]
    copies: dict[fx.Node, Any] = {n: graph.placeholder(f"constant{i}") for i, n in enumerate(held)}
    overwritten = {trace.overwrites.get(node) for node in wanted}
    for node, index in places.items():
        if node in wanted:
            copies[node] = values[index].restore(graph, inputs[index])
            if node in overwritten:  # the caller's values stay as they are
                copies[node] = graph.call_method("clone", (copies[node],))
    for node in trace.graph.nodes:
        if node not in wanted or node in copies:
            continue
        if node in numbers:
            copies[node] = _number(graph, node.name, inputs[0], *sizes[node])
        elif node.op == "placeholder":
            raise SplitError(f"{node.name} differs between train and eval mode")
        elif is_no_op(node, trace.model):
            copies[node] = copies[node.all_input_nodes[0]]
        elif node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], copies.__getitem__))
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    constants = tuple(c for n in held if (c := trace.constant(n)) is not None)
    return Program(graph, constants, write(graph))


def write(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a function of the model and of the graph's inputs."""
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(compile(code.src, "<tl.graph>", "exec"), scope)  # code that torch.fx wrote
    function: Callable[..., Any] = scope["forward"]
    return function


def _number(graph: fx.Graph, name: str, value: fx.Node, small: Any, large: Any) -> Any:
    """A size, type or device as the suffix computes it from its first value."""
    if isinstance(large, torch.device):
        return graph.call_function(getattr, (value, "device"))
    if isinstance(large, torch.dtype):
        if large is torch.float32:  # a model in another precision has values in that one, too
            return graph.call_function(getattr, (value, "dtype"))
        return large
    if isinstance(large, (tuple, list)) and isinstance(small, (tuple, list)):
        if len(small) != len(large):
            raise SplitError(f"the length of {name} depends on the batch")
        parts = [_number(graph, name, value, a, b) for a, b in zip(small, large, strict=True)]
        return parts if isinstance(large, list) else tuple(parts)
    if small == large:
        return large
    whole = isinstance(small, int) and isinstance(large, int)
    if whole and small * LARGE == large * SMALL and large % LARGE == 0:
        batch = graph.call_method("size", (value, 0))
        times = large // LARGE
        return batch if times == 1 else graph.call_function(operator.mul, (batch, times))
    raise SplitError(f"{name} depends on the batch in a way that is not known ({small}, {large})")
