"""Settings: dataclass fields with a help text and limits, checked when an object is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import field, fields, is_dataclass
from typing import Any

from omegaconf import MISSING

from tl.config.errors import ConfigError


def setting(
    default: Any = NO_DEFAULT,
    help: str = "",
    *,
    factory: Any = NO_DEFAULT,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] | None = None,
    common: bool = False,
) -> Any:
    """Dataclass field with help and limits (`low <= x <= high`, `x > above`, or one of `choices`).

    `common` marks the settings that `tl PIPELINE --help` shows.
    """
    limits = {"low": low, "high": high, "above": above, "choices": choices}
    metadata = {
        "help": help,
        "common": common,
        **{k: v for k, v in limits.items() if v is not None},
    }
    if factory is not NO_DEFAULT:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


class Checked:
    """Base of all schemas: limits and cross-field rules are checked when an object is made."""

    def problems(self) -> list[str]:
        """Rules that involve more than one field; each message begins with the field's name."""
        return []

    def __post_init__(self) -> None:
        found = [p for f in fields(self) for p in limit_problems(f, getattr(self, f.name))]  # type: ignore[arg-type]
        found = found or self.problems()
        if found:
            raise ConfigError(found)


class Request(Checked):
    """Base of the schemas that a pipeline takes whole: required settings must be there, too."""

    def __post_init__(self) -> None:
        # A resumed run takes its settings from its own folder.
        missing = [] if getattr(self, "resume", None) else list(_missing(self, ""))
        try:
            super().__post_init__()
        except ConfigError as error:
            missing += error.problems
        if missing:
            raise ConfigError(missing)


def _missing(node: Any, path: str) -> Iterator[str]:
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            yield from _missing(value, f"{path}{f.name}.")
        elif value == MISSING or (value == "" and f.default == MISSING):
            yield f"{path}{f.name} is required: {f.metadata['help']}"


def limit_problems(f: dataclasses.Field[Any], value: Any) -> list[str]:
    """Sentences about a value that is outside the limits of its field; empty when it is inside."""
    if value is None or isinstance(value, dict) or value == MISSING:
        return []
    if isinstance(value, (list, tuple)):
        return [p for v in value for p in limit_problems(f, v)]
    m = f.metadata
    if "choices" in m and value not in m["choices"]:
        return [f"{f.name} must be one of {', '.join(map(str, m['choices']))}, got {value}"]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        bad = (
            ("low" in m and value < m["low"])
            or ("high" in m and value > m["high"])
            or ("above" in m and value <= m["above"])
            or value != value
        )
        if bad:
            return [f"{f.name} must be {_limits_text(m)}, got {value:g}"]
    return []


def _limits_text(m: Mapping[str, Any]) -> str:
    if "low" in m and "high" in m:
        return f"in [{m['low']:g}, {m['high']:g}]"
    if "above" in m and "high" in m:
        return f"in ({m['above']:g}, {m['high']:g}]"
    if "above" in m:
        return f"above {m['above']:g}"
    if "low" in m:
        return f"at least {m['low']:g}"
    return f"at most {m['high']:g}" if "high" in m else "a number"
