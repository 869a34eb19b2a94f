"""Command lines against the schemas: help texts, and all wrong overrides in one error."""

from __future__ import annotations

import difflib
import hashlib
import re
import typing
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from enum import Enum
from importlib.resources import files
from typing import Any

from tl.config import (
    DECIDED,
    PIPELINES,
    ConfigError,
    compose,
    convert,
    limit_problems,
    no_phase,
    plain_folders,
    plain_names,
    quoted_place,
    schema_keys,
    spelled_space,
    unknown_key,
)

# Free-form nodes: what stands below them is checked where it is used.
OPEN_NODES = ("trainer", "callbacks", "logger", "tracking.tags", "search.space")
# Flags of Hydra: those that name files of the user's own, and all that are followed by a value.
FILE_FLAGS = {"--config-dir", "-cd", "--config-path", "-cp"}
VALUE_FLAGS = FILE_FLAGS | {
    "--config-name",
    "-cn",
    "--cfg",
    "-c",
    "--package",
    "-p",
    "--info",
    "-i",
}
BATCH_FLAGS = {"-m", "--multirun"}
# What does not change what the jobs of a batch find.
RUNNING_ONLY = ("batch.", "tracking.", "hydra.", "hydra/", "output_dir=")


def groups() -> dict[str, list[str]]:
    """Config group -> its options, as they lie in the package `tl.conf`."""
    root = files("tl.conf")
    return {
        entry.name: sorted(f.name[:-5] for f in entry.iterdir() if f.name.endswith(".yaml"))
        for entry in sorted(root.iterdir(), key=lambda e: e.name)
        if entry.is_dir() and not entry.name.startswith("_") and entry.name != "hydra"
    }


def help_text(name: str, summary: str) -> str:
    """What `tl NAME --help` prints."""
    schema = PIPELINES[name]
    root = files("tl.conf").joinpath(f"{name}.yaml").read_text()
    lines = [f"{summary}", "", root.split("\n")[0].lstrip("# "), ""]
    some = {"advise": {"model", "augment", "cache"}, "audit": {"model", "cache"}}
    every = {"train": {*groups()} - {"search"}, "search": {*groups()}}
    offered = {**every, **some}.get(name, set())
    presets = {group: options for group, options in groups().items() if group in offered}
    if presets:
        lines.append("Presets (group=option):")
        lines += [f"  {group:<12} {' '.join(options)}" for group, options in presets.items()]
        lines.append("")
    lines.append("Settings used most (key=value):")
    few = len(list(schema_keys(schema))) <= 16
    for key, owner, field in schema_keys(schema):
        if "<name>" in key or not (few or field.metadata.get("common")):
            continue
        if is_dataclass(typing.get_type_hints(owner)[field.name]):
            continue
        lines.append(f"  {key:<22} {field.metadata['help']}{_default_text(key, field)}")
    lines += [
        "",
        f"tl {name} --cfg job shows every setting; docs/configuration.md explains them.",
        "Several values and -m run one job for each: tl train -m model=resnet18,resnet50 …",
    ]
    return "\n".join(lines if name == "train" else lines[:-1])


def _default_text(key: str, field: Any) -> str:
    value = field.default
    if value in (NO_DEFAULT, None, "???"):
        return ""
    text = value.name if isinstance(value, Enum) else value
    group, _, name = key.rpartition(".")
    decided = group == "finetune" and name in DECIDED
    return f" [decided; other methods {text}]" if decided else f" [{text}]"


def check_overrides(name: str, args: list[str]) -> None:
    """Check all `key=value` arguments at once, before Hydra stops at the first.

    Raises:
        ConfigError: Names every unknown key, unknown preset and bad value, and what else is wrong
            with the config that the good ones make.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    parser = OverridesParser.create()
    flags, overrides = split_flags(args)
    own_files = bool({flag.split("=")[0] for flag in flags} & FILE_FLAGS)
    batch = bool(set(flags) & BATCH_FLAGS)
    problems: list[str] = []
    good: list[str] = []
    if batch and name == "search":
        problems.append("tl search tries several values itself: leave -m out")
    for arg in overrides:
        try:
            override = parser.parse_overrides([arg])[0]
        except OverrideParseException:
            problems.append(f"cannot read {arg!r}: write key=value, in quotes where it has spaces")
            continue
        found = (
            [] if override.is_hydra_override() else _override_problems(name, override, own_files)
        )
        if override.is_sweep_override() and not batch and not found:
            found.append(f"{arg} has several values: they need -m, which runs one job for each")
        if name == "train" and not batch and override.key_or_group.startswith("batch."):
            found.append(f"{arg} is for a batch: it needs -m")
        problems += found
        if not found:
            good += _one_value(arg, override)
    if problems:
        # Files of the user's own are found by Hydra only.
        if not own_files:
            try:
                compose(name, good)
            except ConfigError as error:
                problems += [p for p in error.problems if p not in problems]
        raise ConfigError(problems)


def spelled(name: str, args: list[str]) -> list[str]:
    """Arguments of pipeline `name` as Hydra reads them, where people write them more simply.

    A list needs no brackets (`model=a,b` of `tl advise`, `runs=a,b` of `tl compare`), the name of a
    run no quotes, and `tl sync` no key before its folders.
    """
    if name == "advise":
        from tl.advice import several

        args = several(args)
    elif name in {"compare", "register", "promote"}:
        args = plain_names(args)
    elif name == "sync":
        args = plain_folders(args)
    elif name == "search":
        args = spelled_space(args)
    return [*map(quoted_place, args)]


def split_flags(args: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags with their values, and the overrides; they may come in any order."""
    flags: list[str] = []
    overrides: list[str] = []
    for arg in args:
        takes_value = bool(flags) and flags[-1] in VALUE_FLAGS
        (flags if takes_value or arg.startswith("-") else overrides).append(arg)
    return flags, overrides


def _one_value(arg: str, override: Any) -> list[str]:
    """The override, with the first of its values where it has several."""
    if not override.is_sweep_override():
        return [arg]
    from hydra.core.override_parser.types import Transformer, ValueType

    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return []
    first = next(iter(override.sweep_iterator(Transformer.encode)), None)
    return [] if first is None else [f"{arg.partition('=')[0]}={first}"]


def _override_problems(name: str, override: Any, own_files: bool) -> list[str]:
    key = override.key_or_group
    group = key in groups() and (key != "search" or name == "search")
    if group and "." not in key and not isinstance(override.value(), dict):
        return [] if own_files or override.is_delete() else _preset_problems(key, override)
    known = {k: (owner, f) for k, owner, f in schema_keys(PIPELINES[name])}
    if any(key == node or key.startswith(f"{node}.") for node in OPEN_NODES if node in known):
        return []
    parts = key.split(".")
    if parts[:2] == ["finetune", "phases"] and len(parts) > 2:
        key_in_schema = ".".join(["finetune", "phases", "<name>", *parts[3:]])
    else:
        key_in_schema = key
    if key_in_schema in {"experiment", "finetune.phases.<name>"}:
        return []
    if key_in_schema not in known:
        names = [k for k in known if "<name>" not in k]
        if key_in_schema != key:
            names = [k.replace("<name>", parts[2]) for k in known if "<name>" in k]
        return [unknown_key(key, names)]
    if override.is_delete():
        return []
    owner, field = known[key_in_schema]
    prefix = key[: -len(field.name)]
    return [f"{prefix}{p}" for v in _values(override) for p in _value_problems(owner, field, v)]


def _preset_problems(group: str, override: Any) -> list[str]:
    options = groups()[group]
    problems = []
    for value in _values(override):
        # An experiment is the only preset that there need not be.
        if str(value) in options or (value is None and group == "experiment"):
            continue
        problems.append(_no_preset(group, value, options))
    return problems


def _no_preset(group: str, value: Any, options: list[str]) -> str:
    near = difflib.get_close_matches(str(value), options, n=1)
    hint = f"did you mean {group}={near[0]}? " if near else ""
    other = f"; any other timm model: model.name={value}" if group == "model" and value else ""
    shown = "null" if value is None else value
    return f"no preset {group}={shown}; {hint}there are {', '.join(options)}{other}"


def _values(override: Any) -> list[Any]:
    from hydra.core.override_parser.types import ValueType

    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return []  # Hydra knows which presets it means, and takes only those that exist
    if override.is_sweep_override():
        return list(override.sweep_iterator())
    return [override.value()]


def _value_problems(owner: type[Any], field: Any, value: Any) -> list[str]:
    from hydra.core.override_parser.types import QuotedString

    if isinstance(value, QuotedString):
        value = value.text
    if isinstance(value, str) and "${" in value:
        return []
    if is_dataclass(typing.get_type_hints(owner)[field.name]):
        inner = [f.name for f in fields(typing.get_type_hints(owner)[field.name])]
        return (
            []
            if isinstance(value, dict)
            else [f"{field.name} is a group of keys: {', '.join(inner)}"]
        )
    try:
        return limit_problems(field, convert(owner, field.name, value))
    except ConfigError as error:
        return error.problems


def override_keys(overrides: list[str]) -> list[str]:
    """Dotted keys and groups that command-line overrides set."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return [o.key_or_group for o in OverridesParser.create().parse_overrides(list(overrides))]


def composition_error(name: str, error: Exception) -> ConfigError:
    """Hydra's complaint about a config in our words: the file, the key, the nearest right key."""
    text = str(error)
    if refused := no_phase(text):
        return ConfigError(refused)
    if text.startswith("Error merging override") and error.__cause__:
        text += f": {error.__cause__}"
    lines = [line for line in text.split("\n") if line.strip() and line[0] != " "]
    where = re.match(r"In '(.+?)': ", lines[0])
    place = where[1] if where and where[1] != name else ""
    full_key = re.search(r"full_key: (\S+)", text)
    missing = re.search(r"Could not find '((?:hydra/)?\w+)/(.+?)'", text)
    if missing:
        found = re.search(r"Available options in '.*?':\n((?:\t.*\n?)+)", text)
        options = found[1].split() if found else []
        return ConfigError(_no_preset(missing[1], missing[2], options))
    if full_key and re.search(r"Key '.*' not in '", text):
        known = [k for k, _, _ in schema_keys(PIPELINES[name])]
        return ConfigError(f"{_file(place)}{unknown_key(full_key[1], known)}")
    if full_key and "raised while composing" in lines[0]:
        reason = lines[1][:1].lower() + lines[1][1:]
        return ConfigError(f"{_file(place)}{full_key[1]}: {reason}")
    if "\nConfig search path:" in text:
        lines = lines[: lines.index("Config search path:")]
    return ConfigError("\n".join(lines))


def file_error(error: Exception) -> ConfigError:
    """A config file that is no YAML: which one, and where in it."""
    text = " ".join(line.strip() for line in str(error).split("\n") if line.strip())
    return ConfigError(f"a config file cannot be read as YAML: {text}")


def _file(name: str) -> str:
    return f"{name}.yaml: " if name else ""


def batch_name(overrides: list[str]) -> str:
    """Name of a batch's folder: data, and a hash by which the same command finds it again.

    How jobs are run and tracked is no part of it: a batch may go on elsewhere.
    """
    about = sorted(o for o in overrides if not o.lstrip("+~").startswith(RUNNING_ONLY))
    digest = hashlib.sha256("\n".join(about).encode()).hexdigest()[:8]
    roots = [o.split("=", 1)[1] for o in about if o.startswith("data.root=")]
    words = re.findall(r"[\w.-]+", roots[-1]) if roots else []
    return f"{words[-1]}_{digest}" if words and "," not in roots[-1] else digest


def plain_folder(given: list[str]) -> str:
    """The one folder of a batch.

    Raises:
        ConfigError: There are several.
    """
    folder = given[-1]
    if "," in folder and not folder.startswith(("'", '"')):
        msg = f"output_dir={folder}: a batch has one folder, with a numbered one below it for "
        raise ConfigError(f"{msg}each job; name one")
    return folder
