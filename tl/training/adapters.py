"""Low-rank adapters of attention layers: added before a phase, merged into the weights after it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tl.config import ConfigError, Trains
from tl.finetuning import ADAPTER, Phase
from tl.models import HEAD, BuiltModel, Stage
from tl.training.probing import evaluating

WRAPPED = "base_layer."  # how peft names the layer inside an adapter


def attention_layers(built: BuiltModel, phase: Phase) -> list[str]:
    """Names of the linear layers of attention in the stages that a phase trains.

    Attention is what says so in the name of its class, or has a `qkv`. Some families (BEiT, EVA,
    Swin v2) read the weights of `qkv` without calling the layer: an adapter would not be called
    either, so such layers are left out.

    Returns:
        Nothing where the phase trains no adapters.

    Raises:
        ConfigError: There are none.
    """
    if phase.trains != Trains.lora.value:
        return []
    own = {n for s in built.stages if s.name in phase.trainable for n in s.parameters}
    layers = [n for n in _projections(built.model) if f"{n}.weight" in own]
    called: set[str] = set()
    hooks = [
        built.model.get_submodule(n).register_forward_pre_hook(lambda *_, n=n: called.add(n))
        for n in layers
    ]
    try:
        if layers:
            device = next(built.model.parameters()).device
            with evaluating(built.model, device), torch.no_grad():
                built.model(torch.zeros(1, *built.preprocessing.input_size, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    if not called:
        where = ", ".join(name for name in phase.trainable if name != HEAD)
        msg = (
            f"finetune.phases.{phase.name}.trains=lora: {built.name} has no attention "
            f"layers that an adapter fits in {where}. Take more stages (train_stages=-1: all), or "
            "train the normalisation layers instead: finetune=norm_affine"
        )
        raise ConfigError(msg)
    return [name for name in layers if name in called]


def _projections(model: nn.Module) -> list[str]:
    """Linear layers that an attention has as its parts, whole or as a part's only one."""
    found: dict[str, None] = {}
    for path, module in model.named_modules():
        names = " ".join(kind.__name__.lower() for kind in type(module).__mro__)
        if not ("attention" in names or "attn" in names or hasattr(module, "qkv")):
            continue
        for child, part in module.named_children():
            linear = [n for n, layer in part.named_modules() if isinstance(layer, nn.Linear)]
            if len(linear) == 1:  # more are a network of their own, for biases of positions
                found[".".join(filter(None, (path, child, linear[0])))] = None
    return [*found]


def add_adapters(
    built: BuiltModel, phase: Phase, layers: Sequence[str], *, seed: int
) -> tuple[Stage, ...]:
    """Give layers adapters of `phase.lora_rank` (LoRA, Hu et al. 2022, arXiv:2106.09685).

    They are scaled by two (alpha is twice the rank), have no dropout, and begin with nothing.

    Args:
        built: Its model gets them in place; other layers keep their names.
        phase: About to begin.
        layers: Names of linear layers.
        seed: Of the run; adapters of a phase begin alike in a resumed run.

    Returns:
        The stages of the model with the names that it has now.
    """
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds, and few phases need it

    config = LoraConfig(
        r=phase.lora_rank,
        lora_alpha=2 * phase.lora_rank,
        lora_dropout=0.0,
        target_modules="|".join(re.escape(name) for name in layers),
    )
    key = f"{seed} {phase.name} adapters".encode()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) >> 1)
        inject_adapter_in_model(config, built.model)
    return tuple(_renamed(stage, built.model) for stage in built.stages)


def _renamed(stage: Stage, model: nn.Module) -> Stage:
    """A stage by the names of a model with adapters; an adapter belongs to its layer's stage."""
    own = set(stage.parameters)
    names = []
    for name, _ in model.named_parameters():
        layer, _, adapter = name.partition(f".{ADAPTER}")
        if (f"{layer}.weight" if adapter else name.replace(WRAPPED, "")) in own:
            names.append(name)
    return Stage(stage.name, tuple(names), stage.buffers)


def adapter_facts(phase: Phase, layers: Sequence[str]) -> dict[str, str]:
    """What a person should know about the adapters of a phase."""
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
    return {"rank": str(phase.lora_rank), "on": f"{len(layers)} attention layers ({kinds})"}


def merge_adapters(model: nn.Module) -> None:
    """Add what adapters learned to the weights, and take them out: names are as before."""
    from peft.tuners.lora import LoraLayer

    for name, layer in [*model.named_modules()]:
        if isinstance(layer, LoraLayer):
            merging: Any = layer
            merging.merge(safe_merge=True)
            model.set_submodule(name, merging.get_base_layer())
    del model.peft_config
