"""What engines cost in earlier jobs on this machine, so that the next one guesses better."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import operator
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import fx, nn

log = logging.getLogger(__name__)

VERSION = 1
KEPT = 200  # figures, the newest
# An engine that lost on a busy day is tried again.
SHELF_LIFE = 7 * 24 * 3600.0


@dataclass(frozen=True)
class Graph:
    """What of a network decides how fast engines run it.

    Args:
        id: Hash of its code and of the size of its images; not of its weights.
        nodes: How many operations it has.
        kind: "convolutions" or "products": what most of its layers with weights are.
    """

    id: str
    nodes: int
    kind: str


@dataclass(frozen=True)
class Cost:
    """What an engine cost.

    Args:
        setup: Seconds until its first result.
        ratio: Of its seconds an image to those of the fp32 network as it is.
        difference: Relative, to the fp32 network; None where nobody looked.
        failed: Why it does not run at all; empty when it does.
    """

    setup: float
    ratio: float
    difference: float | None = None
    failed: str = ""


# Where nothing is remembered: (seconds, seconds per node, ratio). MobileNetV2 on two cores of an
# EPYC 9004 (310 nodes) and ViT-S gave them; the ratios are on the side of trying.
PRIORS = {
    "eager": {"convolutions": (0.1, 0.0, 0.7), "products": (0.1, 0.0, 1.0)},
    "bf16": {"convolutions": (0.1, 0.0, 0.4), "products": (0.1, 0.0, 0.5)},
    "onnxruntime": {"convolutions": (0.2, 0.002, 0.35), "products": (0.2, 0.002, 0.8)},
    "onnxruntime-export": {"convolutions": (3.0, 0.03, 0.35), "products": (3.0, 0.03, 0.8)},
    "compile": {"convolutions": (10.0, 0.05, 0.5), "products": (10.0, 0.05, 0.7)},
}


def describe(prefix: nn.Module, shape: tuple[int, ...]) -> Graph:
    """Facts of a network that takes images of `shape` (3, H, W)."""
    text = prefix.code if isinstance(prefix, fx.GraphModule) else repr(prefix)
    digest = hashlib.sha256(f"{text}\n{shape}".encode()).hexdigest()[:16]
    modules = list(prefix.modules())
    nodes = len(modules)
    if isinstance(prefix, fx.GraphModule):
        nodes = sum(_computes(prefix, node) for node in prefix.graph.nodes)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in modules)
    products = sum(isinstance(module, nn.Linear) for module in modules)
    return Graph(digest, max(1, nodes), "convolutions" if convolutions >= products else "products")


def _computes(module: fx.GraphModule, node: fx.Node) -> bool:
    """Not so what reads shapes, checks them or does nothing."""
    if node.op == "call_module":
        return not isinstance(module.get_submodule(str(node.target)), nn.Identity)
    idle = (getattr, operator.eq, torch._assert)
    return node.op in ("call_function", "call_method") and node.target not in idle


def machine(device: torch.device, threads: int) -> str:
    """Everything besides the network that the figures depend on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif found := torch.cpu.get_capabilities().get("cpu_name"):
        name = str(found)
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}"
    return f"{device.type} {name}, {threads} threads, {versions}"


class Memory:
    """Figures in a JSON file; anything wrong with it costs a guess, never the job.

    Args:
        file: None remembers nothing.
        place: From `machine`.
        graph: Of the network at hand.
    """

    def __init__(self, file: Path | None, place: str, graph: Graph) -> None:
        self.file = file
        self.place = place
        self.graph = graph
        self.rows = _read(file)

    def expected(self, engine: str) -> Cost:
        """The same network here before; else the most alike; else a guess."""
        rows = [
            row
            for row in self.rows
            if row["engine"] == engine
            and row["machine"] == self.place
            and row["kind"] == self.graph.kind
        ]
        same = [row for row in rows if row["graph"] == self.graph.id]
        if same:
            return _cost(same[-1])
        alike = [row for row in rows if not row["failed"]]
        if alike:
            row = min(alike, key=lambda r: abs(math.log(r["nodes"] / self.graph.nodes)))
            return Cost(row["setup"] * self.graph.nodes / row["nodes"], row["ratio"])
        seconds, per_node, ratio = PRIORS[engine][self.graph.kind]
        return Cost(seconds + per_node * self.graph.nodes, ratio)

    def keep(self, costs: dict[str, Cost]) -> None:
        """Add figures of this job, and forget the oldest."""
        if self.file is None or not costs:
            return
        mine: dict[str, Any] = {"machine": self.place, "graph": self.graph.id}
        mine |= {"nodes": self.graph.nodes, "kind": self.graph.kind}
        new = [{**mine, "engine": e, **asdict(c), "time": time.time()} for e, c in costs.items()]
        keys = {(self.place, self.graph.id, engine) for engine in costs}
        # Read again: other jobs write it too. The last one wins, and a lost figure is a guess.
        old = [r for r in _read(self.file) if (r["machine"], r["graph"], r["engine"]) not in keys]
        partial = self.file.with_name(f"{self.file.name}.{os.getpid()}.partial")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"version": VERSION, "rows": [*old, *new][-KEPT:]}, indent=1)
            partial.write_text(text)
            partial.replace(self.file)
        except OSError as error:
            log.debug("speeds of engines cannot be remembered in %s: %s", self.file, error)
            with contextlib.suppress(OSError):
                partial.unlink()


def _cost(row: dict[str, Any]) -> Cost:
    return Cost(row["setup"], row["ratio"], row["difference"], row["failed"])


def _read(file: Path | None) -> list[dict[str, Any]]:
    if file is None:
        return []
    try:
        found = json.loads(file.read_text())
        return list(_usable(found["rows"])) if found["version"] == VERSION else []
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.debug("remembered speeds of engines in %s are no use: %s", file, error)
        return []


def _usable(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of the right form that are not too old."""
    now = time.time()
    for row in rows:
        words = all(isinstance(row[k], str) for k in ("machine", "graph", "kind", "engine"))
        numbers = [float(row[name]) for name in ("setup", "ratio", "nodes", "time")]
        sound = all(map(math.isfinite, numbers)) and row["nodes"] > 0 and row["ratio"] >= 0
        if words and sound and isinstance(row["failed"], str) and now - row["time"] < SHELF_LIFE:
            yield row
