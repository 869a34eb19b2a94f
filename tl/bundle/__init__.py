"""Read a bundle and predict with ONNX Runtime: images in, class probabilities or numbers out.

Nothing here imports torch or another room of tl: a copy of this folder travels inside every bundle
as its MLflow code, so a bundle serves without either. The decoding and the preprocessing are those
of training and evaluation too.
"""

from __future__ import annotations

from .images import IMAGE_SUFFIXES, ImageError, open_image
from .outputs import Abstain, Outputs
from .preprocessing import Preprocessing
from .reader import Bundle, BundleError
from .seal import seal_sha256
from .serving import _load_pyfunc

__all__ = [
    "IMAGE_SUFFIXES",
    "Abstain",
    "Bundle",
    "BundleError",
    "ImageError",
    "Outputs",
    "Preprocessing",
    "_load_pyfunc",
    "open_image",
    "seal_sha256",
]
