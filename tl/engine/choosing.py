"""Which engine runs the frozen part of a network: the one that is done first, set-up included."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tl.config import ConfigError
from tl.cores import usable_cores
from tl.engine.comparing import relative_difference, timed
from tl.engine.engines import BF16_TOLERANCE, Engine, milliseconds, power
from tl.engine.memory import Cost, Memory, describe, machine
from tl.engine.onnx import onnx_runner
from tl.engine.runners import (
    Outputs,
    Runner,
    TorchRunner,
    UnavailableError,
    compiled,
    eager,
    first_line,
    has_bf16,
    own_copy,
    plain,
)
from tl.quiet import quiet

log = logging.getLogger(__name__)

CHOICES = ("auto", "eager", "compile", "onnxruntime", "bf16")
BF16_ROUNDING = 2.0**-8
COMPARED = 8  # images at most
SHARE = 32  # one image in so many is spent on comparing
CHUNKS = (2, 4, 8, 16, 32)
TUNED = 100  # times the largest chunk: only then the best chunk is looked for
GAIN = 0.2  # seconds: what a guess has to promise before the way without one is left
DEAR = 1.0  # seconds: failures that cost less are found again rather than remembered
# What the set-up of each way is called.
WORK = {
    "eager": "preparation",
    "bf16": "preparation",
    "compile": "compilation",
    "onnxruntime": "export",
    "onnxruntime-export": "export",
}


def choose_engine(
    prefix: nn.Module,
    images: Tensor,
    *,
    device: torch.device,
    images_to_run: int,
    choice: str = "auto",
    tolerance: float = 1e-4,
    memory: Path | None = None,
    threads: int | None = None,
    loading_seconds: float = 0.0,
) -> Engine:
    """The engine that is done first with so many images, within the tolerance.

    Every engine is compared with the fp32 network on images of the first batch: alone, and within
    the whole batch. What fails, differs or turns out slow is left, and the line of the engine says
    why; nothing of that is an error.

    Args:
        prefix: In eval mode; (N, 3, H, W) -> tuple of float32 tensors (N, …). Left as it is: an
            engine has weights of its own.
        images: The first batch, (N, 3, H, W) float32 of the CPU.
        device: Where to compute.
        images_to_run: How many images are ahead.
        choice: "auto", or an engine; where that is impossible the engine is eager.
        tolerance: Largest relative difference of an output to the fp32 network. bf16 has its own,
            `BF16_TOLERANCE`: on a CPU when asked for, on a GPU always. "eager" stays fp32.
        memory: JSON file of measured speeds, read and written; None remembers nothing.
        threads: Of ONNX Runtime; by default the cores that this process may use.
        loading_seconds: What the loader needs for an image: no engine of a GPU pays that is faster.

    Raises:
        ConfigError: There is no such engine.
    """
    if choice not in CHOICES:
        raise ConfigError(f"engine {choice!r}: choose one of {', '.join(CHOICES)}")
    try:
        base = own_copy(prefix, device)
    except UnavailableError as error:
        return Engine("eager", plain(prefix, device), tolerance, notes=(str(error),))
    place = machine(device, threads := threads or usable_cores())
    remembered = Memory(memory, place, describe(prefix, tuple(images.shape[1:])))
    trial = _Trial(
        base, images, device, images_to_run, tolerance, threads, loading_seconds, choice, remembered
    )
    trial.measure_reference()
    engine = trial.best()
    remembered.keep(trial.costs)
    return engine


@dataclass
class _Trial:
    """Engines tried one by one, until no other one promises to be done earlier."""

    base: nn.Module
    images: Tensor
    device: torch.device
    images_to_run: int
    tolerance: float
    threads: int
    loading_seconds: float
    choice: str
    memory: Memory
    reference: Outputs = ()
    reference_seconds: float = math.nan
    rows: Tensor = field(default_factory=lambda: torch.arange(0))
    tried: dict[str, Engine] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    costs: dict[str, Cost] = field(default_factory=dict)

    def measure_reference(self) -> None:
        """Outputs and seconds of the fp32 network on a few images, the first and the last too."""
        number = min(len(self.images), max(2, min(COMPARED, self.images_to_run // SHARE)))
        self.rows = torch.linspace(0, len(self.images) - 1, number).long()
        sample = self.images[self.rows]
        runner = plain(self.base, self.device)
        runner(sample[:1])
        if self.device.type == "cuda":  # busy with a whole batch only
            runner(self.images)
            self.reference_seconds = timed(runner, self.images)[1]
            self.reference = runner(sample)
        else:
            self.reference, self.reference_seconds = timed(runner, sample)

    def best(self) -> Engine:
        """Try in the order of what they promise, and stop when no promise is better."""
        names = self._candidates()
        while True:
            totals = {name: self._total(name) for name in names if name not in self.left}
            if not totals:  # what was asked for does not work
                names = ["eager"]
                continue
            name = min(totals, key=totals.__getitem__)
            if name in self.tried:
                break
            try:
                self.tried[name] = self._set_up(name)
            except UnavailableError as error:
                self.left[name] = str(error)
            except Exception as error:  # engines are large, and none is worth losing the job
                self.left[name] = first_line(error)
        engine = self.tried[name]
        engine.notes += tuple(self._notes(name, totals[name], names))
        return engine

    def _candidates(self) -> list[str]:
        """Engines that may run at all."""
        if self.choice == "onnxruntime":
            return ["onnxruntime", "onnxruntime-export"]
        if self.choice != "auto":
            return [self.choice]
        if self.device.type == "cuda":
            return ["eager", "bf16", "compile"]
        if self.device.type != "cpu":
            return ["eager"]
        names = ["eager", "onnxruntime", "onnxruntime-export", "compile"]
        return [*names, "bf16"] if self.tolerance >= BF16_ROUNDING else names

    def _total(self, name: str) -> float:
        """Seconds until all images are done; the set-up of what was tried is paid already."""
        if name in self.tried:
            return self._seconds_ahead(self.tried[name].seconds_per_image)
        if self._hopeless(name):
            return math.inf
        if name == "onnxruntime-export" and not (
            "onnxruntime" in self.left or self._hopeless("onnxruntime")
        ):
            return math.inf  # the same engine, seconds later: for what cannot be traced
        return self._promise(name)

    def _promise(self, name: str) -> float:
        """Seconds with an engine that was not tried: set-up, comparison, all images."""
        cost = self.memory.expected(name)
        each = cost.ratio * self.reference_seconds
        if name == "eager":
            return cost.setup + self._seconds_ahead(each)
        return cost.setup + GAIN + (1 + len(self.images)) * each + self._seconds_ahead(each)

    def _seconds_ahead(self, seconds_per_image: float) -> float:
        if self.device.type == "cuda":  # the processor loads meanwhile
            seconds_per_image = max(seconds_per_image, self.loading_seconds)
        return self.images_to_run * seconds_per_image

    def _hopeless(self, name: str) -> str:
        """Why an earlier job found that this network does not run that way; empty otherwise."""
        if self.choice != "auto" or name == "eager":
            return ""
        cost = self.memory.expected(name)
        if cost.failed:
            return cost.failed
        different = cost.difference is not None and cost.difference > self._allowed(name)
        return self._too_different(name, cost.difference or 0.0) if different else ""

    def _allowed(self, name: str) -> float:
        cuda = self.device.type == "cuda"
        own = self._is_bf16(name) and (cuda or self.choice == "bf16")
        return max(self.tolerance, BF16_TOLERANCE) if own else self.tolerance

    def _is_bf16(self, name: str) -> bool:
        """On a GPU the compiled network is in bf16 too, where that has it."""
        compiled_so = self.device.type == "cuda" and name == "compile" and has_bf16(self.device)
        return name == "bf16" or compiled_so

    def _too_different(self, name: str, difference: float) -> str:
        allowed = self._allowed(name)
        return f"differs by {power(difference)} from fp32, and {power(allowed)} is allowed"

    def _notes(self, chosen: str, total: float, names: Iterable[str]) -> Iterator[str]:
        """What was tried, asked for or expected to be best, and is not the engine."""
        for name, reason in self.left.items():
            yield f"{_label(name)} left out: {reason}"
        for name, engine in self.tried.items():
            if name not in (chosen, "eager"):
                slow = milliseconds(engine.seconds_per_image)
                yield f"{_label(name)} left out: {slow} ms an image"
        for name in names:
            if name in self.left or name in self.tried or not (reason := self._hopeless(name)):
                continue
            if self._promise(name) < total:
                yield f"{_label(name)} left out, as an earlier job found: {reason}"

    def _set_up(self, name: str) -> Engine:
        """Build, compare, measure, remember."""
        begin = time.perf_counter()
        batch = self.images
        try:
            with quiet():
                runner = self._build(name)
                single = runner(self.images[:1])
            setup = time.perf_counter() - begin
            if isinstance(runner, TorchRunner) and not runner.fixed and self.device.type == "cpu":
                batch = self.images[self.rows]  # more would cost what the job has not earned yet
                self._tune(runner)
            outputs, seconds = self._measure(runner, batch)
            if len(batch) != len(self.rows):
                outputs = tuple(output[self.rows] for output in outputs)
            difference = max(
                relative_difference(outputs, self.reference),
                relative_difference(single, tuple(r[:1] for r in self.reference)),
            )
        except Exception as error:
            spent = time.perf_counter() - begin
            if spent > DEAR:
                self.costs[name] = Cost(spent, 0.0, failed=first_line(error))
            raise
        ratio = seconds / self.reference_seconds
        self.costs[name] = Cost(setup, ratio, min(difference, 1e9))
        allowed = self._allowed(name)
        notes: tuple[str, ...] = ()
        if difference > allowed:
            if name != "eager":
                raise UnavailableError(self._too_different(name, difference))
            notes = (
                f"folded, channels-last eager left out: {self._too_different(name, difference)}",
            )
            runner = plain(self.base, self.device)
            difference, seconds = 0.0, self.reference_seconds
        return Engine(
            name=name.removesuffix("-export"),
            runner=runner,
            tolerance=allowed,
            difference=difference,
            seconds_per_image=seconds,
            setup_seconds=setup,
            eager_seconds_per_image=self.reference_seconds,
            work=WORK[name],
            notes=notes,
        )

    def _build(self, name: str) -> Runner:
        if name == "compile":
            size = len(self.images)
            return compiled(self.base, self.device, batch=size, bf16=self._is_bf16(name))
        if not name.startswith("onnxruntime"):
            return eager(self.base, self.device, bf16=name == "bf16")
        if self.device.type != "cpu":
            raise UnavailableError(
                f"it runs on the processor here, and the images go to {self.device}"
            )
        # Not the images that it is compared on: what one run bakes in must not fit them by chance.
        example = torch.zeros(2, *self.images.shape[1:])
        traced = name == "onnxruntime"
        return onnx_runner(self.base, example, self.reference, traced=traced, threads=self.threads)

    def _measure(self, runner: Runner, batch: Tensor) -> tuple[Outputs, float]:
        """Outputs of a batch and seconds an image; a second time where the first would lose."""
        if self.device.type == "cuda":
            runner(batch)
        outputs, seconds = timed(runner, batch)
        if seconds > self.reference_seconds / 2:
            outputs, again = timed(runner, batch)
            seconds = min(seconds, again)
        return outputs, seconds

    def _tune(self, runner: TorchRunner) -> None:
        """Find the number of images at once that is fastest, where the job is worth it."""
        most = min(len(self.images), max(CHUNKS))
        if self.images_to_run < TUNED * most:
            return
        seconds = {}
        for size in (size for size in CHUNKS if size <= most):
            runner.chunk = size
            runner(self.images[:size])
            begin = time.perf_counter()
            runner(self.images[:most])
            seconds[size] = time.perf_counter() - begin
        runner.chunk = min(seconds, key=seconds.__getitem__)


def _label(name: str) -> str:
    return {"onnxruntime-export": "onnxruntime by torch.export"}.get(name, name)
