"""What a search hands back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tl.runs import TrainResult


@dataclass(frozen=True)
class SearchResult:
    """What `tl.search` hands back.

    Args:
        output_dir: Folder of the search.
        values: Settings of the winner, key -> value; empty where this process only joined.
        value: What the winner reached on val.
        trials: That came to an end.
        best: The run of the winner, None with `search.finish=false` or where others train it.
        warnings: Sentences.
    """

    output_dir: Path
    values: dict[str, Any]
    value: float
    trials: int
    best: TrainResult | None
    warnings: tuple[str, ...] = ()

    @property
    def headline(self) -> float:
        """What the winner reached on val."""
        return self.value
