"""A cut that an earlier job made: where all values are kept already, nothing has to be traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tl.graph import Split, SplitError

FACTS = ("nodes", "shapes", "pooled", "pooled_sizes", "sha256")


@dataclass(frozen=True)
class KnownSplit(Split):
    """A model below one linear layer, as `facts_of` remembers it; its prefix is cut when asked for.

    Args:
        name: Of the layer in the model.
    """

    name: str = ""

    def run_suffix(self, model: nn.Module, values: Sequence[Tensor]) -> Tensor:
        """The linear layer of another copy of the model."""
        logits: Tensor = model.get_submodule(self.name)(values[0])
        return logits


def facts_of(cut: Split, model: nn.Module) -> dict[str, Any] | None:
    """What `recall` needs, fit for JSON; None where more than a linear layer is above the cut."""
    if cut.linear is None:
        return None
    name = next(name for name, module in model.named_modules() if module is cut.linear)
    return {"linear": name, **{key: getattr(cut, key) for key in FACTS}}


def recall(facts: Mapping[str, Any], model: nn.Module, make: Callable[[], Split]) -> Split:
    """The cut of a model that is what it was when the facts were found.

    Args:
        facts: From `facts_of`.
        model: With the same frozen weights.
        make: Cuts it, for the prefix.

    Raises:
        KeyError, TypeError, AttributeError: These are no such facts.
        SplitError: Later, by `prefix`: the model is another one.

    """
    linear = model.get_submodule(facts["linear"])
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"{facts['linear']} is no linear layer")

    def prefix() -> nn.Module:
        cut = make()
        if cut.sha256 != facts["sha256"]:
            raise SplitError("the frozen part is not the one that was remembered")
        return cut.prefix

    return KnownSplit(
        nodes=tuple(map(str, facts["nodes"])),
        shapes=tuple(tuple(map(int, shape)) for shape in facts["shapes"]),
        pooled=tuple(map(str, facts["pooled"])),
        pooled_sizes=tuple(map(int, facts["pooled_sizes"])),
        sha256=str(facts["sha256"]),
        linear=linear,
        name=facts["linear"],
        _prefix=prefix,
        _model=model,
        _programs=(),
    )
