"""Write docs/configuration.md from the schemas and presets: `make docs`."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from tl.config import DECIDED, PIPELINES, SearchConfig, schema_keys
from tl.config.launchers import PREFIX
from tl.config.ray import RayConfig
from tl.config.slurm import SlurmConfig

REPO = Path(__file__).parents[1]
LAUNCHERS = {"slurm": SlurmConfig, "ray": RayConfig}
INTRODUCTION = """\
# Configuration

Written by `make docs` from `tl/config/` and `conf/`; do not edit.

A setting is `key=value` on the command line: `tl train data.root=photos finetune.epochs=5`.
A preset is `group=name`: `finetune=lp_ft` takes all values of `conf/finetune/lp_ft.yaml`. A
setting on the command line wins over `experiment=`, that over the other presets, and they over the
defaults below. Unknown keys and values of the wrong kind or out of their range are refused before
anything runs, all at once.

`tl train` begins with {presets}.
`finetune=auto` decides {decided} from the images, where the command line does not say them; the
defaults below are those of the other methods.
`tl train --cfg job` shows the whole config that a command line makes.
"""


def page() -> str:
    """The whole page."""
    defaults = yaml.safe_load((REPO / "conf" / "train.yaml").read_text())["defaults"]
    chosen = {k: v for entry in defaults if isinstance(entry, dict) for k, v in entry.items()}
    groups = (
        k for k, v in chosen.items() if (REPO / "conf" / k).is_dir() and v not in {None, "none"}
    )
    presets = ", ".join(f"`{group}={chosen[group]}`" for group in groups)
    decided = ", ".join(f"`{key}`" for key in DECIDED)
    parts = [INTRODUCTION.format(presets=presets, decided=decided)]
    parts += [_table(f"tl {name}", schema) for name, schema in PIPELINES.items()]
    for name, schema in LAUNCHERS.items():
        parts.append(_table(f"tl train -m hydra/launcher={name}", schema, PREFIX))
    return "\n".join([*parts, *_presets()])


def _table(title: str, schema: type[Any], prefix: str = "") -> str:
    lines = [
        f"## {title}",
        "",
        "| key | value | default | what it is |",
        "| --- | --- | --- | --- |",
    ]
    if schema is SearchConfig:
        lines[2:2] = [
            "And every setting of `tl train`, of the job whose settings are searched.",
            "",
        ]
    for key, owner, field in schema_keys(schema):
        if schema is SearchConfig and not key.startswith("search."):
            continue
        hint = typing.get_type_hints(owner)[field.name]
        if dataclasses.is_dataclass(hint) or key.endswith("phases"):
            continue
        cells = (
            f"`{prefix}{key}`",
            _kind(hint, field.metadata),
            _default(field),
            field.metadata["help"],
        )
        lines.append("| " + " | ".join(map(_escape, cells)) + " |")
    return "\n".join([*lines, ""])


def _escape(text: str) -> str:
    """Text that Markdown would take for a tag, emphasis or the next cell; code stays."""
    for sign in "|" if text.startswith("`") else "|<*":
        text = text.replace(sign, f"\\{sign}")
    return text


def _kind(hint: Any, limits: typing.Mapping[str, Any]) -> str:
    """The kind of a value and its limits, in words."""
    options = [o for o in typing.get_args(hint) if o is not type(None)]
    if hint is Any:
        return "text or list, or null"
    if typing.get_origin(hint) is list:
        return f"list: {_kind(options[0], limits)}"
    if typing.get_origin(hint) is dict:
        return "keys and values"
    if len(options) == 1:
        return f"{_kind(options[0], limits)}, or null"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{name}`" for name in hint.__members__)
    if "choices" in limits:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    word = {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}[hint]
    signs = {"low": "≥", "above": ">", "high": "≤"}
    return ", ".join([word, *(f"{signs[k]} {limits[k]}" for k in signs if k in limits)])


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        assert field.default_factory is not dataclasses.MISSING
        value = field.default_factory()
    if value == "???":
        return "required"
    if isinstance(value, Enum):
        value = value.name
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n")
    return f"`{text.strip()}`"


def _presets() -> Iterator[str]:
    yield "## Presets\n"
    conf = REPO / "conf"
    for group in sorted(p for p in conf.rglob("*") if p.is_dir() and any(p.glob("*.yaml"))):
        name = group.relative_to(conf).as_posix()
        yield f"### {name}\n\n| preset | what it is |\n| --- | --- |"
        for file in sorted(group.glob("*.yaml")):
            comments = (line[2:] for line in file.read_text().splitlines() if line[:2] == "# ")
            text = next(line for line in comments if not line.startswith("@package"))
            yield f"| `{name}={file.stem}` | {text} |"
        yield ""


if __name__ == "__main__":
    (REPO / "docs" / "configuration.md").write_text(page())
