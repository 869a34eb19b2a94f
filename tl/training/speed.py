"""What a plan costs, measured on a few images before any training."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from tl.data.datamodule import ImageDataModule
from tl.decision import Cost
from tl.finetuning import Phase, Plan, freeze
from tl.models import HEAD, BuiltModel
from tl.training.activations import HEAD_VIEWS, VIEWS

SAMPLE = 8  # images
TRIES, TRY_SECONDS = 3, 0.5  # at least; the best counts: other programs only make it slower
EPOCH_SECONDS = 0.02  # of Lightning, beside its steps
ADAM = 2  # numbers that AdamW keeps for each one that trains


def estimate(plan: Plan, built: BuiltModel, data: ImageDataModule, *, cached: bool) -> Cost:
    """Time a forward pass, decoding, and one step of each phase on a few images.

    Args:
        plan: What would train.
        built: Its weights stay; what is frozen and all modes are left as the last phase wants them.
        data: Images.
        cached: Whether frozen parts may be computed once per image and kept.
    """
    model = built.model
    inputs, decode = _inputs(data)
    model.eval()
    with torch.no_grad():
        forward = _seconds(lambda: model(inputs)) / SAMPLE
    seconds, extra, most = {}, 0.0, 0
    for phase in plan.phases:
        freeze(model, built.stages, phase)
        step, saved = _step(model, inputs)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        seconds[phase.name] = _phase_seconds(
            phase, data, forward=forward, step=step, decode=decode, cached=cached
        )
        # A head whose inputs are cached keeps no activations of images.
        activations = 0.0 if cached and phase.trainable == (HEAD,) else saved * data.batch_size
        extra = max(extra, 4.0 * (1 + ADAM) * trained + activations)
        most = max(most, trained)
    resident = psutil.Process().memory_info().rss
    return Cost(1 / forward, 1e3 * decode, seconds, resident + extra, most)


def _inputs(data: ImageDataModule) -> tuple[Tensor, float]:
    """Images (SAMPLE, 3, H, W) as training sees them, and seconds of decoding one."""
    dataset = data.dataset("train", augment=True)
    images, seconds = [], []
    for i in range(min(SAMPLE, len(dataset))):
        began = time.perf_counter()
        images.append(dataset[i]["image"])
        seconds.append(time.perf_counter() - began)
    decode = statistics.median(seconds) / torch.get_num_threads()
    batch = torch.stack([images[i % len(images)] for i in range(SAMPLE)])
    return batch.contiguous(memory_format=torch.channels_last), decode


def _step(model: nn.Module, inputs: Tensor) -> tuple[float, float]:
    """Seconds an image of a training step, and bytes an image that wait for the backward pass."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    # A forward pass in train mode would move the statistics of BatchNorm.
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def step() -> None:
        sizes.clear()
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(inputs).sum()
        loss.backward()
        model.zero_grad(set_to_none=True)

    seconds = _seconds(step) / SAMPLE
    for name, buffer in model.named_buffers():
        buffer.copy_(kept[name])
    saved = sum(size for place, size in sizes.items() if place not in weights)
    return seconds, saved / SAMPLE


def _phase_seconds(
    phase: Phase,
    data: ImageDataModule,
    *,
    forward: float,
    step: float,
    decode: float,
    cached: bool,
) -> float:
    """Of all epochs, by the cheaper of the two ways.

    A backward pass takes about twice its forward pass, so of a step that lasts `step`, of which
    `forward` is the whole forward pass, about 1.5 times the rest is above the frozen frontier.
    """
    train, val = (len(data.table.split(split)) for split in ("train", "val"))
    fixed = phase.epochs * EPOCH_SECONDS
    images = phase.epochs * (train * (step + decode) + val * (forward + decode))
    if not cached:
        return fixed + images
    above = 0.0 if phase.trainable == (HEAD,) else 1.5 * max(step - forward, 0.0)
    views = HEAD_VIEWS if phase.trainable == (HEAD,) else VIEWS
    fill = train * views * (forward + decode)
    values = phase.epochs * (train * above + val * above / 3)
    return fixed + min(images, fill + values)


def _seconds(work: Callable[[], object]) -> float:
    """The best of some calls after a first one, which prepares kernels.

    Where other programs keep the machine busy, the processor's time of this one is the smaller
    figure: what one core alone would need.
    """
    work()
    found: list[float] = []
    deadline = time.perf_counter() + TRY_SECONDS
    while len(found) < TRIES or time.perf_counter() < deadline:
        began, used = time.perf_counter(), time.process_time()
        work()
        found.append(min(time.perf_counter() - began, time.process_time() - used))
    return min(found)
