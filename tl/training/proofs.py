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

from tl.config import HeadKind
from tl.files import replacing
from tl.finetuning import Phase, state_names
from tl.graph import Split
from tl.graph.known import facts_of, recall
from tl.models import BuiltModel, tensors_sha256
from tl.training.probing import Stored

MOST = 1000  # entries of the file
VERSION = 1  # of what `tl.graph` makes of a model


class Proofs:
    """A JSON file of proofs; without it, or with a damaged one, everything is proven again.

    Args:
        file: It need not exist.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: dict[str, Any] = {}
        self._state: tuple[int, int, int] | None = None

    def know(self, built: BuiltModel, phase: Phase) -> bool:
        """Whether this backbone was cut for such a phase before: then that was worth it."""
        wanted = (built.weights.sha256, list(phase.trainable), phase.trains)
        return any(
            tuple(entry.get(key) for key in ("backbone", "trainable", "trains")) == wanted
            for entry in self._read().values()
            if isinstance(entry, dict)
        )

    def cut(
        self,
        built: BuiltModel,
        phase: Phase,
        make: Callable[[], Split],
        prove: Callable[[Split], Stored],
    ) -> tuple[Split, Stored]:
        """A model cut for a phase, and the outcome of its proof.

        Both are remembered for this architecture with these very weights in all that the phase
        leaves as it is. A cut below one linear layer is then not even made again, unless somebody
        asks for its prefix.

        Args:
            built: Frozen for the phase.
            phase: About to begin.
            make: Cuts the model.
            prove: Proves a cut.

        Raises:
            SplitError: As `make` and `prove` do; failures are not remembered.
        """
        facts = _identity(built, phase)
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        known_cut, known_outcome = _recalled(self._read().get(key), built, make)
        cut = known_cut or make()
        if known_outcome is not None:
            return cut, known_outcome
        stored = prove(cut)
        known = dict(list(self._read().items())[1 - MOST :])
        remembered = facts_of(cut, built.model) if built.head == HeadKind.linear.value else None
        self._write({**known, key: {**facts, "stored": asdict(stored), "cut": remembered}})
        return cut, stored

    def _read(self) -> dict[str, Any]:
        """All entries; read again where another job has written some meanwhile."""
        with contextlib.suppress(OSError, ValueError):
            status = self.file.stat()
            state = status.st_ino, status.st_mtime_ns, status.st_size
            if self._state != state:
                known = json.loads(self.file.read_text())
                self._known = known if isinstance(known, dict) else {}
                self._state = state
            return self._known
        return {}

    def _write(self, known: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.file) as part:
                part.write_text(json.dumps(known, indent=1))


def _recalled(
    entry: Any, built: BuiltModel, make: Callable[[], Split]
) -> tuple[Split | None, Stored | None]:
    """What an entry says, where it is one."""
    with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError):
        stored = Stored(tuple(entry["stored"]["dtypes"]), str(entry["stored"]["text"]))
        return entry["cut"] and recall(entry["cut"], built.model, make), stored
    return None, None


def _identity(built: BuiltModel, phase: Phase) -> dict[str, Any]:
    """All that a cut and its proof depend on, as plain JSON."""
    moves = state_names(built.model, built.stages, phase)
    frozen = {
        name: value
        for name, value in built.model.state_dict().items()
        if name not in moves and not name.endswith("num_batches_tracked")  # counters
    }
    return {
        "model": built.name,
        "backbone": built.weights.sha256,
        "model_args": built.model_args,
        "input_size": built.preprocessing.input_size,
        "classes": getattr(built.model, "num_classes", None),
        "head": built.head,
        "frozen": tensors_sha256(frozen.items()),
        "trainable": phase.trainable,
        "trains": phase.trains,
        "freeze_batch_norm": phase.freeze_batch_norm,
        "versions": [VERSION, torch.__version__, timm.__version__],
    }
