"""What was proven of a cut model, remembered for the next job with the same model."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch

from tl.files import replacing
from tl.finetuning import Phase
from tl.graph import Split
from tl.models import BuiltModel
from tl.training.probing import Stored

MOST = 1000  # entries of the file


class Proofs:
    """A JSON file of proofs; without it, or with a damaged one, everything is proven again.

    Args:
        file: It need not exist.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def know(self, built: BuiltModel, phase: Phase) -> bool:
        """Whether this backbone was cut for such a phase before: then that was worth it."""
        wanted = (built.weights.sha256, list(phase.trainable), phase.trains)
        return any(
            tuple(entry.get(key) for key in ("backbone", "trainable", "trains")) == wanted
            for entry in self._read().values()
            if isinstance(entry, dict)
        )

    def of(
        self, cut: Split, built: BuiltModel, phase: Phase, prove: Callable[[], Stored]
    ) -> Stored:
        """The outcome of `prove` for this model, cut for this phase; proven now where it is new.

        Raises:
            SplitError: As `prove` does; failures are not remembered.
        """
        facts = {
            "model": built.name,
            "backbone": built.weights.sha256,
            "model_args": built.model_args,
            "classes": getattr(built.model, "num_classes", None),
            "frozen part": cut.sha256,
            "frontier": cut.nodes,
            "trainable": phase.trainable,
            "trains": phase.trains,
            "freeze_batch_norm": phase.freeze_batch_norm,
            "torch": torch.__version__,
            "timm": timm.__version__,
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        known = self._read()
        with contextlib.suppress(KeyError, TypeError):
            found = known[key]["stored"]
            return Stored(tuple(found["dtypes"]), str(found["text"]))
        stored = prove()
        known = dict(list(known.items())[1 - MOST :])
        self._write({**known, key: {**facts, "stored": asdict(stored)}})
        return stored

    def _read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            known = json.loads(self.file.read_text())
            if isinstance(known, dict):
                return known
        return {}

    def _write(self, known: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as part:
                part.write_text(json.dumps(known, indent=1))
