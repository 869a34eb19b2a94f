"""What `compose.yaml` starts, on loopback and without containers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

REPO = Path(__file__).parents[1]
# ${NAME}, ${NAME:-default} and ${NAME:?message}, as Compose fills them
VARIABLE = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}")


def composed(values: dict[str, str]) -> dict[str, Any]:
    """Content of compose.yaml with its variables filled in."""

    def fill(found: re.Match[str]) -> str:
        name, kind, text = found.groups()
        if value := values.get(name):
            return value
        assert kind == ":-", f"compose.yaml needs {name}"
        return text

    text = (REPO / "compose.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(VARIABLE.sub(fill, text)))


def variables() -> dict[str, str | None]:
    """Names in compose.yaml with their defaults; None where a person must say it."""
    text = (REPO / "compose.yaml").read_text(encoding="utf-8")
    found: dict[str, str | None] = {}
    for name, kind, default in VARIABLE.findall(text):
        found[name] = default if kind == ":-" else found.get(name)
    return found
