"""Write a bundle: the trained model in every form in which it is used, sealed by its own test.

The folder loads in timm (`local-dir:`), in ONNX Runtime without torch, and as an MLflow pyfunc. It
takes its place only when all of them give the probabilities that the trained model gives.
"""

from __future__ import annotations

from tl.export.card import ModelCard
from tl.export.errors import ExportError
from tl.export.from_run import export_run
from tl.export.sealing import SealReport, seal
from tl.export.speed import exported
from tl.export.writing import write_bundle

__all__ = [
    "ExportError",
    "ModelCard",
    "SealReport",
    "export_run",
    "exported",
    "seal",
    "write_bundle",
]
