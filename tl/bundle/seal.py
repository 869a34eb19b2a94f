"""One number that says whether a bundle is still the one that was sealed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

# What decides no answer: the card, which a person may correct, and what MLflow adds or rewrites.
UNSEALED = {
    *("README.md", "MLmodel", "requirements.txt", "python_env.yaml", "conda.yaml"),
    *("input_example.json", "serving_input_example.json", "registered_model_meta"),
}
CHUNK = 1 << 20  # bytes


def seal_sha256(folder: str | os.PathLike[str]) -> str:
    """Hash of all files of a bundle that decide an answer, with their names; hex.

    Weights, graph, classes, preprocessing, golden images and the code that reads them. Copies of a
    bundle have the same one.

    Args:
        folder: The bundle.

    Raises:
        OSError: A file cannot be read.
    """
    root = Path(folder)
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if not path.is_file() or name.as_posix() in UNSEALED or "__pycache__" in name.parts:
            continue
        content = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                content.update(chunk)
        digest.update(f"{name.as_posix()} {content.hexdigest()}\n".encode())
    return digest.hexdigest()
