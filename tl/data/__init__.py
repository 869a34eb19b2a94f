"""Images and labels: from a folder to checked tables, splits, transforms and loaders.

The names below load on first use: `import tl.data` costs nothing, and `read_table` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl.data.datamodule import ImageDataModule, ImageDataset
    from tl.data.errors import DataError
    from tl.data.reading import read_table
    from tl.data.table import ImageTable
    from tl.data.transforms import batch_mix, eval_transform, train_transform

_HOMES = {
    "DataError": "errors",
    "ImageDataModule": "datamodule",
    "ImageDataset": "datamodule",
    "ImageTable": "table",
    "batch_mix": "transforms",
    "eval_transform": "transforms",
    "read_table": "reading",
    "train_transform": "transforms",
}

__all__ = [
    "DataError",
    "ImageDataModule",
    "ImageDataset",
    "ImageTable",
    "batch_mix",
    "eval_transform",
    "read_table",
    "train_transform",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
