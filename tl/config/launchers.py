"""Settings of a launcher: what stands below `hydra.launcher` on the command line."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from tl.config.errors import ConfigError
from tl.config.settings import Checked

PREFIX = "hydra.launcher."
T = TypeVar("T", bound=Checked)


def launcher_config(schema: type[T], settings: Mapping[str, Any]) -> T:
    """Settings below `hydra.launcher`, checked; all problems at once.

    Raises:
        ConfigError: A key is unknown, or a value of the wrong kind or out of its range.
    """
    from tl.config.validation import convert

    known = [f.name for f in fields(schema)]  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {PREFIX}{near[0]}? " if near else ""
            problems.append(f"{PREFIX}{key} is unknown; {hint}there are {', '.join(known)}")
            continue
        if value is None:  # in a preset: the default, where an empty dict would not take new keys
            continue
        try:
            found[key] = convert(schema, key, value)
        except ConfigError as error:
            problems += [f"{PREFIX}{p}" for p in error.problems]
    if problems:
        raise ConfigError(problems)
    try:
        return schema(**found)
    except ConfigError as error:
        raise ConfigError([f"{PREFIX}{p}" for p in error.problems]) from None
