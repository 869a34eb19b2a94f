"""Ways to run a frozen network over batches with torch: plain, bf16, compiled; CPU and GPU."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from tl.engine.folding import fold_batchnorm

Outputs = tuple[Tensor, ...]


def chunk_size(device: torch.device) -> int | None:
    """Images at once: few on a CPU, or the values of a layer fall out of its caches."""
    return max(4, 2 * torch.get_num_threads()) if device.type == "cpu" else None


class UnavailableError(Exception):
    """This engine cannot run here; its text is the rest of a sentence: why not."""


class Runner:
    """Computes the outputs of batches of any size, as float32 tensors of the CPU.

    Args:
        ahead: Batches that may be under way while the outputs of one are used.
    """

    ahead = 0

    def start(self, images: Tensor) -> Callable[[], Outputs]:
        """Begin with a batch; calling what comes back waits for its outputs."""
        outputs = self(images)
        return lambda: outputs

    def __call__(self, images: Tensor) -> Outputs:
        """Outputs of `images` (N, 3, H, W), each (N, …)."""
        raise NotImplementedError


class TorchRunner(Runner):
    """A module on its device, in pieces of a batch.

    Args:
        module: In eval mode; gives a tuple of tensors.
        device: Where it lies.
        chunk: Images at once; None takes a batch as it comes.
        fixed: Fill the last piece up, for a module that is compiled for one size.
        bf16: Compute under autocast.
    """

    def __init__(
        self,
        module: Callable[[Tensor], Outputs],
        device: torch.device,
        *,
        chunk: int | None,
        fixed: bool = False,
        bf16: bool = False,
    ) -> None:
        self.module = module
        self.device = device
        self.chunk = chunk
        self.fixed = fixed
        self.bf16 = bf16
        self.ahead = 1 if device.type == "cuda" else 0
        self._copies = torch.cuda.Stream(device) if self.ahead else None  # type: ignore[no-untyped-call]

    def __call__(self, images: Tensor) -> Outputs:
        """Outputs of `images`, waited for."""
        return self.start(images)()

    def start(self, images: Tensor) -> Callable[[], Outputs]:
        """Begin with a batch; on a GPU nothing waits until the result is asked for."""
        whole: Outputs = ()
        begin, pinned = 0, self._copies is not None
        for piece in torch.split(images, self.chunk or max(1, len(images))):
            with torch.inference_mode():
                values = self._compute(piece)
            # Made outside of inference mode: a suffix may train on them.
            whole = whole or tuple(
                torch.empty(len(images), *v.shape[1:], pin_memory=pinned) for v in values
            )
            for target, value in zip(whole, values, strict=True):
                target[begin : begin + len(piece)].copy_(value[: len(piece)], non_blocking=pinned)
            begin += len(piece)
        if self._copies is None:
            return lambda: whole
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(torch.cuda.current_stream(self.device))

        def finish() -> Outputs:
            done.synchronize()
            return whole

        return finish

    def _compute(self, images: Tensor) -> Outputs:
        if self.fixed and self.chunk and len(images) < self.chunk:
            last = images[-1:].expand(self.chunk - len(images), *images.shape[1:])
            images = torch.cat([images, last])
        images = self._upload(images)
        autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.bf16:
            autocast = torch.autocast(self.device.type, dtype=torch.bfloat16)
        with autocast:
            return self.module(images)

    def _upload(self, images: Tensor) -> Tensor:
        """To the device, channels-last; a GPU takes it while it computes the batch before."""
        if self._copies is None:
            return images.to(self.device).contiguous(memory_format=torch.channels_last)
        with torch.cuda.stream(self._copies):
            images = images.pin_memory().to(self.device, non_blocking=True)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._copies)
        images.record_stream(now)
        return images.contiguous(memory_format=torch.channels_last)


def own_copy(prefix: nn.Module, device: torch.device) -> nn.Module:
    """A copy that nobody trains, moves or sets modes of.

    Raises:
        UnavailableError: The module refuses to be copied.
    """
    try:
        return copy.deepcopy(prefix).to(device).eval().requires_grad_(False)
    except Exception as error:
        raise UnavailableError(f"the network cannot be copied: {first_line(error)}") from error


def prepared(base: nn.Module) -> nn.Module:
    """A copy with folded BatchNorm and channels-last weights."""
    module = copy.deepcopy(base)
    if isinstance(module, fx.GraphModule):
        fold_batchnorm(module)
    return module.to(memory_format=torch.channels_last)


def plain(base: nn.Module, device: torch.device) -> TorchRunner:
    """The fp32 network as it is: what every engine is compared with."""
    return TorchRunner(base, device, chunk=chunk_size(device))


def eager(base: nn.Module, device: torch.device, *, bf16: bool = False) -> TorchRunner:
    """Folded, channels-last.

    Raises:
        UnavailableError: bf16 is asked for, and the device only emulates it.
    """
    if bf16 and not has_bf16(device):
        raise UnavailableError(f"this {device.type} has no bf16 arithmetic")
    return TorchRunner(prepared(base), device, chunk=chunk_size(device), bf16=bf16)


def compiled(base: nn.Module, device: torch.device, *, batch: int, bf16: bool) -> TorchRunner:
    """`torch.compile` with frozen weights, for one batch size; the first call compiles.

    Args:
        base: In eval mode.
        device: Where it lies.
        batch: Images of a usual batch.
        bf16: Compute under autocast.

    Raises:
        UnavailableError: There is no C++ compiler.
    """
    if device.type == "cpu" and not any(map(shutil.which, _compilers())):
        raise UnavailableError("torch.compile needs a C++ compiler, such as g++, and there is none")
    module = torch.compile(prepared(base), dynamic=False, options={"freezing": True})
    chunk = min(batch, chunk_size(device) or batch)
    return TorchRunner(module, device, chunk=chunk, fixed=True, bf16=bf16)


def _compilers() -> tuple[str, ...]:
    named = os.environ.get("CXX")
    return (named,) if named else ("g++", "clang++", "c++")


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic, not an emulation."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return device.type == "cpu" and any(found.get(name) for name in ("avx512_bf16", "amx_bf16"))


def first_line(error: BaseException) -> str:
    """Kind and first line of the innermost cause: compilers wrap it in advice to developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = next((part for part in str(error).splitlines() if part.strip()), "").strip()
    return f"{type(error).__name__}: {line}"[:200] if line else type(error).__name__
