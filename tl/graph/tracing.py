"""Trace a model with torch.fx, and say of every node what it depends on."""

from __future__ import annotations

import copy
import hashlib
import inspect
import operator
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any

from timm.layers.linear import Linear as TimmLinear
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.fx.proxy import ParameterProxy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from tl.graph.errors import SplitError, first_line

_METADATA = {"shape", "ndim", "device", "dtype", "size", "dim", "numel", "nelement", "ndimension"}
_DRAWS = {"bernoulli", "multinomial", "normal", "poisson", "rand", "randint", "randn", "randperm"}
_DRAWS |= {"rand_like", "randint_like", "randn_like", "rrelu", "gumbel_softmax"}
_DRAWS |= {f"{name}_" for name in ("bernoulli", "cauchy", "exponential", "geometric", "log_normal")}
_DRAWS |= {"normal_", "random_", "uniform_"}
_RATES = ("drop_prob", "drop_rate", "dropout")  # attributes that say how much a module drops
_SDPA_DROPOUT = 4  # position of dropout_p in scaled_dot_product_attention


class Kind(IntEnum):
    """What the value of a node depends on."""

    CONSTANT = 0  # weights and constants only
    SIZES = 1  # also sizes, type or device of a tensor, but not what is in it
    DATA = 2  # what is in the images


@dataclass(frozen=True)
class Trace:
    """A traced model.

    Args:
        graph: Nodes in the order of the forward pass; targets are names in the model.
        shadow: Copy of the modules that shares the memory of the weights; holds constants that
            tracing met.
        model: The model itself.
    """

    graph: fx.Graph
    shadow: nn.Module
    model: nn.Module

    def constant(self, node: fx.Node) -> Tensor | None:
        """The tensor of a node that tracing made, which the model itself does not have."""
        if node.op != "get_attr" or "." in str(node.target) or hasattr(self.model, _name(node)):
            return None
        value = getattr(self.shadow, _name(node))
        if not isinstance(value, Tensor):
            raise SplitError(f"{_name(node)} is a {type(value).__name__}, which cannot be cached")
        return value

    @cached_property
    def keys(self) -> dict[fx.Node, str]:
        """A hash for each node of how it is computed from the images."""
        return keys(self)

    @cached_property
    def reads(self) -> dict[fx.Node, list[str]]:
        """Names of the parameters that each node itself reads."""
        return {node: _parameters_of(node, self.model) for node in self.graph.nodes}

    @cached_property
    def overwrites(self) -> dict[fx.Node, fx.Node]:
        """Node that works in place -> the node whose value it overwrites."""
        found = ((node, _overwritten(node, self.model)) for node in self.graph.nodes)
        return {node: base for node, base in found if base is not None}

    @cached_property
    def effects(self) -> set[fx.Node]:
        """Nodes that change a buffer of the model."""
        found: set[fx.Node] = set()
        for node, base in self.overwrites.items():
            if base.op == "get_attr" or base in found:
                found.add(node)
        return found

    @cached_property
    def kinds(self) -> dict[fx.Node, Kind]:
        """What each node depends on."""
        found: dict[fx.Node, Kind] = {}
        for node in self.graph.nodes:
            kind = max((found[n] for n in node.all_input_nodes), default=Kind.CONSTANT)
            if node.op == "placeholder":
                kind = Kind.DATA
            elif _reads_metadata(node):
                kind = min(kind, Kind.SIZES)
            found[node] = kind
        return found


class _BufferProxy(ParameterProxy):
    """A buffer whose sizes are known while tracing, as those of parameters are."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, name: str, param: Tensor) -> None:
        fx.Proxy.__init__(self, node, tracer)
        self.param = param  # type: ignore[assignment]
        self.name = name


class _Tracer(fx.Tracer):
    """Tracer that takes a module whole where it cannot be traced into."""

    def __init__(self, *, proxy_buffers: bool) -> None:
        super().__init__(
            autowrap_functions=tuple(get_notrace_functions()),  # type: ignore[no-untyped-call]
            param_shapes_constant=True,
        )
        self.proxy_buffers = proxy_buffers
        self.whole: list[str] = []
        # timm's own Linear is torch's but for scripting; taken whole, it is seen as what it is.
        self._leaves = (*get_notrace_modules(), TimmLinear)  # type: ignore[no-untyped-call]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self._leaves) or super().is_leaf_module(m, module_qualified_name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        buffer = isinstance(attr_val, Tensor) and not isinstance(attr_val, nn.Parameter)
        if not (buffer and self.proxy_buffers):
            return super().getattr(attr, attr_val, parameter_proxy_cache)
        # A raw buffer would be computed with while tracing, and its later changes be lost.
        for name, value in self.root.named_buffers():
            if value is attr_val:
                if name not in parameter_proxy_cache:
                    node = self.create_node("get_attr", name, (), {})
                    parameter_proxy_cache[name] = _BufferProxy(self, node, name, value)
                return parameter_proxy_cache[name]
        return attr_val

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        before, depth = set(self.graph.nodes), len(self.module_stack)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:  # anything: its forward runs with proxies for tensors
            while len(self.module_stack) > depth:
                self.module_stack.popitem(last=True)
            for node in reversed(list(self.graph.nodes)):
                if node not in before:
                    self.graph.erase_node(node)
            path = self.path_of_module(m)
            self.whole.append(path)
            return self.create_proxy("call_module", path, args, kwargs)


def trace(model: nn.Module, *, train: bool) -> Trace:
    """Trace a model in the modes that its modules are in, or in eval mode.

    Raises:
        SplitError: torch.fx cannot trace it.
    """
    best: tuple[int, Trace] | None = None
    error: Exception | None = None
    for proxy_buffers in (True, False):
        tracer = _Tracer(proxy_buffers=proxy_buffers)
        try:
            # Some models keep what they computed (attention biases); a traced value must not stay.
            shadow = _shadow(model)
            graph = tracer.trace(shadow if train else shadow.eval(), _defaults(shadow))
        except Exception as found:  # anything: user code runs with proxies for tensors
            error = error or found
            continue
        if best is None or len(tracer.whole) < best[0]:
            best = len(tracer.whole), Trace(graph, shadow, model)
        if not tracer.whole:
            break
    if best is None:
        assert error is not None
        msg = f"torch.fx cannot trace {type(model).__name__} ({first_line(error)})"
        raise SplitError(msg) from error
    return best[1]


def _defaults(model: nn.Module) -> dict[str, Any]:
    """What a model's forward gets besides the images (no mask, no flags)."""
    arguments = inspect.signature(model.forward).parameters.values()
    return {a.name: a.default for a in arguments if a.default is not inspect.Parameter.empty}


def _shadow(model: nn.Module) -> nn.Module:
    """Copy of all modules whose tensors share the memory of the model's, and do not train."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(b): b.detach() for b in model.buffers()}
    return copy.deepcopy(model, memo)


# --- what a node is -----------------------------------------------------------------------------


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _parameters_of(node: fx.Node, model: nn.Module) -> list[str]:
    target = str(node.target)
    if node.op == "call_module":
        return [f"{target}.{n}" for n, _ in model.get_submodule(target).named_parameters()]
    return [target] if node.op == "get_attr" else []


def is_no_op(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node gives back its input."""
    return node.op == "call_module" and type(model.get_submodule(str(node.target))) is nn.Identity


def _overwritten(node: fx.Node, model: nn.Module) -> fx.Node | None:
    name = _name(node)
    overwrites = (
        (node.op == "call_module" and getattr(model.get_submodule(name), "inplace", False))
        or (node.op in {"call_method", "call_function"} and re.search(r"[^_]_$", name))
        or node.target in {operator.setitem, operator.iadd, operator.imul, operator.isub}
        or node.kwargs.get("inplace") is True
    )
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if overwrites and isinstance(first, fx.Node) else None


def _draws(node: fx.Node, model: nn.Module, kinds: Mapping[fx.Node, Kind]) -> bool:
    """Whether a node draws random numbers or mixes the images of a batch, in the present modes."""
    name = _name(node)
    if node.op == "call_module":
        return any(_module_draws(module) for module in model.get_submodule(name).modules())
    if node.op == "call_function" and "dropout" in name:
        active = node.kwargs.get("training", True)
        return active is not False and node.kwargs.get("p") not in (0, 0.0)
    if name == "scaled_dot_product_attention":
        args = node.args[_SDPA_DROPOUT : _SDPA_DROPOUT + 1] or (node.kwargs.get("dropout_p", 0.0),)
        return isinstance(args[0], fx.Node) or float(args[0]) != 0  # type: ignore[arg-type]
    if name == "batch_norm":  # of weights, too (standardised convolutions)
        of_data = kinds[node] is Kind.DATA
        return of_data and node.kwargs.get("training") is not False
    return node.op in {"call_function", "call_method"} and name in _DRAWS


def _module_draws(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return bool(module.training or module.running_mean is None)
    if not module.training:
        return False
    if isinstance(module, _DropoutNd):
        return bool(module.p > 0)
    rates = [getattr(module, name, None) for name in _RATES]
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _reads_metadata(node: fx.Node) -> bool:
    if node.op == "call_method":
        return _name(node) in _METADATA
    return node.target is getattr and node.args[1] in _METADATA


def mark(trace: Trace, trainable: Container[str], *, drawing: bool) -> set[fx.Node]:
    """The hot nodes: whatever a trainable parameter reaches, and what changes a buffer.

    Args:
        trace: Traced model.
        trainable: Names of the parameters that train.
        drawing: Also what draws random numbers, or mixes the images of a batch, is hot.
    """
    hot: set[fx.Node] = set()
    overwritten: set[fx.Node] = set()
    for node in trace.graph.nodes:
        inputs = node.all_input_nodes
        if (
            any(n in hot or n in overwritten for n in inputs)
            or node in trace.effects
            or any(name in trainable for name in trace.reads[node])
            or (drawing and _draws(node, trace.model, trace.kinds))
        ):
            hot.add(node)
            if node in trace.overwrites:  # who reads it from here on reads what the hot node wrote
                overwritten.add(trace.overwrites[node])
    return hot


def frontier(trace: Trace, hot: set[fx.Node]) -> list[fx.Node]:
    """The cold nodes that depend on the images and feed a hot node or the output."""
    return [
        node
        for node in trace.graph.nodes
        if node not in hot
        and trace.kinds[node] is Kind.DATA
        and any(user in hot or user.op == "output" for user in node.users)
    ]


# --- identity of a node -------------------------------------------------------------------------


class _Text:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def keys(trace: Trace) -> dict[fx.Node, str]:
    """A hash for each node of how it is computed from the images; equal in any trace and process.

    Names of weights are in it, their values are not.
    """
    found: dict[fx.Node, str] = {}

    def hashed(node: fx.Node) -> Any:
        return _Text(found[node])

    for node in trace.graph.nodes:
        constant = trace.constant(node)
        if constant is not None:
            value = constant.detach().cpu().contiguous()
            target = f"{tuple(value.shape)} {value.dtype} {value.flatten().tolist()}"
        elif isinstance(node.target, str):
            target = "images" if node.op == "placeholder" else node.target
        else:
            target = f"{getattr(node.target, '__module__', '')}.{_name(node)}"
        if node.op == "call_module":
            target += repr(trace.model.get_submodule(str(node.target)))
        args = fx.node.map_arg((node.args, node.kwargs), hashed)
        text = re.sub(r" at 0x[0-9a-f]+", "", f"{node.op} {target} {args!r}")
        found[node] = hashlib.sha256(text.encode()).hexdigest()
    return found
