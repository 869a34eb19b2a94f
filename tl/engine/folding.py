"""BatchNorm folded into the convolution before it: one pass over the values less per layer."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


@torch.no_grad()
def fold_batchnorm(module: fx.GraphModule) -> int:
    """Fold, in place, every BatchNorm in eval mode that alone reads a convolution.

    torch.fx's own pass knows modules of the class `nn.BatchNorm2d` only; timm's norms with an
    activation are traced as a call of `F.batch_norm`, or kept as one module.

    Args:
        module: A graph with weights of its own: they are replaced.

    Returns:
        How many were folded.
    """
    called = [node.target for node in module.graph.nodes if node.op == "call_module"]
    folded = 0
    for node in list(module.graph.nodes):
        norm = _norm(module, node)
        source = next(iter(node.all_input_nodes), None)
        if norm is None or source is None or source.op != "call_module":
            continue
        conv = module.get_submodule(str(source.target))
        # `getattr` reads its number of axes, which folding does not change.
        alone = all(user is node or user.target is getattr for user in source.users)
        if type(conv) is not nn.Conv2d or called.count(source.target) > 1 or not alone:
            continue
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *norm)
        kept = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(kept, BatchNormAct2d):
            module.set_submodule(str(node.target), nn.Sequential(kept.drop, kept.act))
        else:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
        folded += 1
    module.recompile()
    return folded


def _norm(module: fx.GraphModule, node: fx.Node) -> tuple[Any, ...] | None:
    """Running mean and variance, epsilon, weight and bias of a BatchNorm that can be folded."""
    if node.op == "call_module":
        norm = module.get_submodule(str(node.target))
        if type(norm) not in (nn.BatchNorm2d, BatchNormAct2d):
            return None
        assert isinstance(norm, nn.BatchNorm2d)
        if norm.training or norm.running_mean is None:
            return None
        return norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    bound = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    found = bound.arguments
    if found["training"] is not False or not isinstance(found["eps"], float):
        return None
    tensors: dict[str, Any] = {}
    for name in ("running_mean", "running_var", "weight", "bias"):
        at = found[name]
        if at is None and name in ("weight", "bias"):
            tensors[name] = None
        elif isinstance(at, fx.Node) and at.op == "get_attr":
            owner, _, attribute = str(at.target).rpartition(".")
            tensors[name] = getattr(module.get_submodule(owner), attribute)
        else:
            return None
    mean, variance = tensors["running_mean"], tensors["running_var"]
    return mean, variance, found["eps"], tensors["weight"], tensors["bias"]
