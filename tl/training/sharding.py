"""FSDP: each process keeps a part of the weights, gradients and optimizer states.

Lightning's own FSDP strategy is that of torch's first version, for GPUs alone. This is the second
one, by Lightning's strategy for models that are cut up in `configure_model`. What trains is a copy:
the model of the run stays whole, on the CPU of each process, and gets the best weights afterwards.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import nn

from tl.config import ConfigError
from tl.module import TransferModule

NAME = "fsdp"


def fsdp(processes: int) -> dict[str, Any]:
    """Arguments of a trainer that cuts the model up for so many processes."""
    strategy = {
        "_target_": "pytorch_lightning.strategies.ModelParallelStrategy",
        "data_parallel_size": processes,
        "tensor_parallel_size": 1,
        "save_distributed_checkpoint": False,  # whole, so that another number of processes reads it
    }
    # Weights that were gathered in inference mode could not be used for gradients afterwards.
    return {"strategy": strategy, "inference_mode": False}


def is_sharded(trainer: pl.Trainer) -> bool:
    """Whether the processes of a trainer share the model out."""
    return isinstance(trainer.strategy, ModelParallelStrategy)


def prepare_shards(module: TransferModule) -> None:
    """Let a module train a copy of its model, cut up when its trainer asks for that.

    Raises:
        ConfigError: The phase wants what needs the whole model in each process.
    """
    if module.phase.ema:
        raise ConfigError(
            "finetune.ema averages the whole model in each process: leave it out, or use "
            "trainer=ddp"
        )
    whole = copy.deepcopy(module.model)
    module.model = whole.to(memory_format=torch.contiguous_format)  # torch cuts up no other
    module.cut_up, module.before_val = _cut_up, _same_buffers


def _cut_up(module: TransferModule) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = module.device_mesh["data_parallel"]  # type: ignore[index]
    # Above the cache single layers are called, not the parts that they are in: there the whole is
    # gathered at once.
    if module.split is None:
        for part in _parts(module.model):
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh)


def _parts(model: nn.Module) -> Iterator[nn.Module]:
    """Layers that are called as one, with weights: blocks, stages, the head."""
    for child in model.children():
        within = child.children() if isinstance(child, (nn.Sequential, nn.ModuleList)) else [child]
        for part in within:
            is_called = not isinstance(part, (nn.ModuleList, nn.ModuleDict, nn.ParameterList))
            if is_called and any(True for _ in part.parameters()):
                yield part


def _same_buffers(module: TransferModule) -> None:
    """Give all processes the running statistics of the first one, as DDP does."""
    for buffer in module.model.buffers():
        dist.broadcast(buffer, src=0)
