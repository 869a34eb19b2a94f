"""Keep exporters and compilers off the screen: what matters, their callers say in one line."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

NAMES = ("torch", "torch.onnx", "torch.export", "torch._dynamo", "torch._inductor", "timm")
# Levels of loggers and filters of warnings are global, as exporters are: one at a time.
_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, and nothing but critical errors from exporters, compilers and timm."""
    loggers = [logging.getLogger(name) for name in (*NAMES, "onnxscript", "onnx_ir")]
    with _ONE_AT_A_TIME:
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
