"""What a few images tell before a phase: its seconds, and what rounding the cache may do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from tl.data.datamodule import ImageDataModule
from tl.finetuning import Phase
from tl.graph import Split
from tl.graph.proof import without_zeros
from tl.training.costs import PhaseCosts

SAMPLE = 4  # images
# Relative change of the gradients that rounding may make: bf16 arithmetic changes them as much, and
# between two batches they differ by about their own size.
HARMLESS = 2e-2


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Eval mode on a device; modes and place are as they were afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.to(device).eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        model.cpu()


class Probe:
    """Seconds that a phase takes, measured on a few images.

    Args:
        model: Frozen for the phase; left as it is.
        data: Images.
        device: Where the phase trains.

    Attributes:
        noise: (SAMPLE, 3, H, W), channels last.
    """

    def __init__(self, model: nn.Module, data: ImageDataModule, device: torch.device) -> None:
        self.model, self.data, self.device = model, data, device
        noise = torch.rand(SAMPLE, *data.preprocessing.input_size, generator=torch.Generator())
        self.noise = noise.contiguous(memory_format=torch.channels_last)

    @cached_property
    def whole(self) -> float:
        """Seconds an image of the whole model in eval mode."""
        inputs = self.noise.to(self.device)
        with evaluating(self.model, self.device), torch.no_grad():
            return self._seconds(lambda: self.model(inputs))

    def images(self) -> Tensor:
        """Clean images of train (SAMPLE, 3, H, W), channels last."""
        dataset = self.data.dataset("train", augment=False)
        items = [dataset[i]["image"] for i in range(min(SAMPLE, len(dataset)))]
        images = torch.stack(items if len(items) > 1 else items * 2)
        return images.contiguous(memory_format=torch.channels_last)

    @property
    def least_seconds(self) -> float:
        """Seconds that an epoch with the whole model takes at the very least."""
        table = self.data.table
        images = len(table.split("train")) + len(table.split("val"))
        return images * self.whole

    def costs(
        self,
        phase: Phase,
        cut: Split,
        *,
        views: int,
        missing: int,
        bytes_per_view: int,
        limit: int,
        disk_free: int,
    ) -> PhaseCosts:
        """What the phase costs either way.

        Args:
            phase: About to begin.
            cut: The model, cut at the frontier of the phase.
            views: Kept for each image of train, the clean one among them.
            missing: Views of images that are not in the cache yet.
            bytes_per_view: Size of what is kept of one view of one image.
            limit: Bytes that the cache may hold.
            disk_free: Bytes free where the cache is.
        """
        dataset = self.data.dataset("train", augment=False)
        began = time.perf_counter()
        for i in range(some := min(SAMPLE, len(dataset))):
            dataset[i]
        # All loaders are at work at once.
        decode = (time.perf_counter() - began) / some / torch.get_num_threads()
        with torch.no_grad():
            values = cut.values(cut.prefix(self.noise))
        inputs = [value.to(self.device) for value in values]

        def step() -> None:
            cut.suffix(inputs).sum().backward()  # type: ignore[no-untyped-call]
            self.model.zero_grad(set_to_none=True)

        with evaluating(self.model, self.device):
            train = self._seconds(step)
            with torch.no_grad():
                above = self._seconds(lambda: cut.suffix(inputs))
        below = max(self.whole - above, 0.0)
        return PhaseCosts(
            epochs=phase.epochs,
            train_images=len(self.data.table.split("train")),
            val_images=len(self.data.table.split("val")),
            views=views,
            missing=missing,
            whole_train=below + train + decode,
            whole_eval=self.whole + decode,
            prefix=below + decode,
            suffix_train=train,
            suffix_eval=above,
            bytes_per_view=bytes_per_view,
            limit=limit,
            disk_free=disk_free,
        )

    def _seconds(self, work: Callable[[], object]) -> float:
        """Seconds an image of the second call: the first one prepares kernels."""
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        began = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (time.perf_counter() - began) / SAMPLE


@dataclass(frozen=True)
class Stored:
    """Precision of each value in the cache, and how it was found."""

    dtypes: tuple[str, ...]
    text: str


def harmless(cut: Split, model: nn.Module, values: Sequence[Tensor]) -> Stored:
    """Float16 for values with space or tokens where that leaves the gradients as they are.

    Embeddings stay in float32. Zeros among what trains (a new head) would hide every difference, so
    small numbers stand in for them meanwhile.

    Args:
        cut: The model, cut at the frontier of the phase.
        model: The live model; left as it is.
        values: Of some images.
    """
    dtypes = ["float32" if len(shape) < 2 else "float16" for shape in cut.shapes]
    if "float16" not in dtypes:
        return Stored(tuple(dtypes), "float32")
    rounded = [
        value.half().float() if dtype == "float16" else value
        for value, dtype in zip(values, dtypes, strict=True)
    ]
    with evaluating(model, values[0].device), without_zeros(model):
        exact, changed = _gradients(cut, model, values), _gradients(cut, model, rounded)
    change = float((exact - changed).norm() / exact.norm().clamp_min(1e-30))
    if change <= HARMLESS:
        return Stored(tuple(dtypes), f"float16 (gradients change by {change:.0e})")
    return Stored(
        ("float32",) * len(dtypes), f"float32 (float16 would change gradients by {change:.0e})"
    )


def _gradients(cut: Split, model: nn.Module, values: Sequence[Tensor]) -> Tensor:
    logits = cut.suffix(values)
    weights = torch.linspace(-1, 1, logits.numel(), device=logits.device).view_as(logits)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((logits * weights).sum(), trained, allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])
