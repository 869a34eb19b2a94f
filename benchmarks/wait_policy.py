"""What OpenMP's wait policy costs or saves in training on a CPU, alone and beside a busy process.

    python benchmarks/wait_policy.py

Prints seconds and ratios of passive waiting to libgomp's default (the two in turn, three pairs):
for steps of MobileNetV2 with 32 images of 224 px, and of timm's smallest EfficientNet with 10 of
32 px. tl sets the passive policy in `tl/__init__.py`.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

STEP = """
import time, timm, torch
model = timm.create_model({model!r}, num_classes=2).to(memory_format=torch.channels_last)
images = torch.randn({images}, 3, {size}, {size}).contiguous(memory_format=torch.channels_last)
def step():
    model(images).sum().backward()
step()
begin = time.perf_counter()
for _ in range({steps}):
    step()
print(time.perf_counter() - begin)
"""
CASES = {
    "mobilenetv2_100, 32 x 224 px": {
        "model": "mobilenetv2_100",
        "images": 32,
        "size": 224,
        "steps": 2,
    },
    "test_efficientnet, 10 x 32 px": {
        "model": "test_efficientnet",
        "images": 10,
        "size": 32,
        "steps": 30,
    },
}


def seconds(policy: dict[str, str], case: dict[str, object]) -> float:
    """Wall time of the steps of one case in a fresh process."""
    code = STEP.format(**case)
    env = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"} | policy
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    return float(done.stdout)


def main() -> None:
    """Measure each case alone and beside one process that keeps a core busy."""
    for busy in (0, 1):
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            for name, case in CASES.items():
                pairs = [
                    (seconds({"OMP_WAIT_POLICY": "PASSIVE"}, case), seconds({}, case))
                    for _ in range(3)
                ]
                passive, default = (
                    statistics.median(column) for column in zip(*pairs, strict=True)
                )
                ratio = statistics.median(a / b for a, b in pairs)
                print(
                    f"{name}, {busy} busy processes beside: passive {passive:.2f} s, "
                    f"default {default:.2f} s, passive/default {ratio:.2f}",
                    flush=True,
                )
        finally:
            for other in others:
                other.kill()


if __name__ == "__main__":
    main()
