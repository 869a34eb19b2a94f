"""Scores of images as a short text, so that a study alone has all that compares its trials."""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray


def pack(scores: NDArray[np.float64]) -> str:
    """Scores of images as text; right or wrong takes a bit, anything else four bytes."""
    if np.isin(scores, (0, 1)).all():
        bits = np.packbits(scores.astype(bool)).tobytes()
        return f"b{len(scores)}:{base64.b64encode(bits).decode()}"
    return f"f{len(scores)}:{base64.b64encode(scores.astype('<f4').tobytes()).decode()}"


def unpack(text: str) -> NDArray[np.float64]:
    """Inverse of `pack`.

    Example:
        >>> unpack(pack(np.array([1.0, 0.0, 1.0]))).tolist()
        [1.0, 0.0, 1.0]
    """
    head, _, data = text.partition(":")
    raw, number = base64.b64decode(data), int(head[1:])
    if head[0] == "b":
        return np.unpackbits(np.frombuffer(raw, np.uint8), count=number).astype(np.float64)
    return np.frombuffer(raw, "<f4").astype(np.float64)
