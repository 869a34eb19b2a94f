"""A linear classifier on the pooled features of all stages of a frozen backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Standardise(nn.Module):
    """Features minus their mean, times a scale that is zero for those that are left out.

    Args:
        size: Features.

    Attributes:
        mean: (size,), of the training images.
        scale: (size,).
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, features: Tensor) -> Tensor:
        """Rows (N, size) as the linear layer takes them."""
        return (features - self.mean) * self.scale


class StageClassifier(nn.Module):
    """Frozen features of all stages, standardised, the most useful of them kept; one linear layer.

    The idea is that of Head2Toe (Evci et al. 2022, arXiv:2201.03529): where images differ much from
    those of the pretraining, earlier features tell classes apart that the last ones confuse. A
    feature that is left out has a scale of zero and so a weight that never leaves zero: the shapes
    of all tensors are known before anything is selected.

    Args:
        backbone: Images (N, 3, H, W) to a tuple of tensors (N, …); its parameters never train.
        sizes: Name of each block of features to its number of features, in their order: what the
            head of the network reads, and the pooled output of each stage.
        places: Where in the backbone's outputs each block is.
        num_classes: Outputs.
        origin: What `tl.graph` knows of the cut that the backbone comes from.

    Example:
        >>> model = StageClassifier(nn.Identity(), {"features": 5}, [0], 3)
        >>> model.classify([torch.randn(2, 5)]).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        backbone: nn.Module,
        sizes: Mapping[str, int],
        places: Sequence[int],
        num_classes: int,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.origin = dict(origin or {})
        self.sizes = dict(sizes)
        self.places = tuple(places)
        self.num_classes = num_classes
        self.features = Standardise(sum(self.sizes.values()))
        self.head = nn.Linear(sum(self.sizes.values()), num_classes)
        # As every new head: the first loss is that of chance, and what is left out stays at zero.
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, 3, H, W)."""
        outputs = self.backbone(images)
        return self.classify([outputs[place] for place in self.places])

    def classify(self, blocks: Sequence[Tensor]) -> Tensor:
        """Logits (N, classes) of the blocks of features, each (N, …)."""
        logits: Tensor = self.head(self.rows(blocks))
        return logits

    def rows(self, blocks: Sequence[Tensor]) -> Tensor:
        """What the linear layer reads: (N, features)."""
        rows: Tensor = self.features(join(blocks))
        return rows

    def get_classifier(self) -> nn.Module:
        """The head, as timm's models have it."""
        return self.head


def join(blocks: Sequence[Tensor]) -> Tensor:
    """Blocks of features side by side: (N, features)."""
    return torch.cat([block.flatten(1) for block in blocks], dim=1)


def is_row(shape: Sequence[int]) -> bool:
    """Whether a value of this shape (without the batch) is a row of features."""
    return math.prod(shape) == shape[0]


def backbone_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of the network alone, in its own names, where a `StageClassifier` wrote it."""
    if "features.scale" not in state:
        return dict(state)
    return {
        name.removeprefix("backbone."): value
        for name, value in state.items()
        if name.startswith("backbone.") and "_tensor_constant" not in name  # torch.fx made those
    }
