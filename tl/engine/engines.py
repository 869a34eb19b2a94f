"""What a caller holds: one way to run the network, and what it measured."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from tl.engine.runners import Outputs, Runner

# bf16 has 8 bits of mantissa: what it is held to where it was asked for, or on a GPU.
BF16_TOLERANCE = 2e-2


@dataclass
class Engine:
    """Runs a frozen network over batches of images.

    Args:
        name: "eager", "compile", "onnxruntime" or "bf16".
        runner: Computes one batch.
        tolerance: What `difference` was held to.
        difference: Largest difference to the fp32 network as it is, relative to its largest value
            of the same output; on images of the first batch.
        seconds_per_image: Measured on the first batch.
        setup_seconds: Until the first batch could be run.
        eager_seconds_per_image: Of the fp32 network as it is.
        work: What the set-up is called.
        notes: Why engines that were tried or asked for are not this one.
    """

    name: str
    runner: Runner
    tolerance: float
    difference: float = 0.0
    seconds_per_image: float = math.nan
    setup_seconds: float = 0.0
    eager_seconds_per_image: float = math.nan
    work: str = "preparation"
    notes: tuple[str, ...] = ()

    def __call__(self, images: Tensor) -> Outputs:
        """Outputs of one batch.

        Args:
            images: (N, 3, H, W), any N of 1 or more; H and W of the first batch.

        Returns:
            Float32 tensors of the CPU, each (N, …).
        """
        return self.runner(images)

    def run(self, batches: Iterable[Tensor]) -> Iterator[Outputs]:
        """Outputs batch by batch; a GPU has the next one before the last one is handed out."""
        waiting: deque[Callable[[], Outputs]] = deque()
        for images in batches:
            waiting.append(self.runner.start(images))
            if len(waiting) > self.runner.ahead:
                yield waiting.popleft()()
        while waiting:
            yield waiting.popleft()()

    def line(self) -> str:
        """One line: speed, set-up, difference, and why not another engine."""
        other = "unprepared" if self.name == "eager" else "eager"
        text = f"{self.name}: {milliseconds(self.seconds_per_image)} ms an image"
        text += f" after {self.setup_seconds:.1f} s of {self.work}"
        text += f" ({other} {milliseconds(self.eager_seconds_per_image)} ms)"
        text += f", difference {power(self.difference)}"
        if self.tolerance == BF16_TOLERANCE:
            text += f" (bf16 may differ by {BF16_TOLERANCE:g})"
        return "; ".join([text, *self.notes])


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1e3 * seconds:.3g}"


def power(value: float) -> str:
    """One digit, such as 2e-6."""
    return f"{value:.0e}".replace("e-0", "e-").replace("0e+00", "0")
