"""From YAML and overrides to a validated config, or to one error with every problem."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tl.config.data import quoted_place
from tl.config.errors import ConfigError
from tl.config.pipelines import PIPELINES, register_schemas
from tl.config.searching import spelled_space

T = TypeVar("T")


def validate(config: DictConfig, schema: type[T]) -> T:
    """Turn a composed config into its dataclass.

    Args:
        config: What Hydra composed, keys added with `+` included.
        schema: Dataclass of the pipeline.

    Raises:
        ConfigError: Unknown keys (with the nearest right name), values of a wrong type or range,
            required keys that are missing: all of them in one error.
    """
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        lines = str(error).split("\n")
        raise ConfigError(f"{getattr(error, 'full_key', None) or 'config'}: {lines[0]}") from error
    if not isinstance(values, dict):
        msg = f"a config is a mapping of keys to values, got {type(values).__name__}"
        raise ConfigError(msg)
    problems: list[str] = []
    result = _build(schema, values, "", problems)
    if problems:
        raise ConfigError(problems)
    return typing.cast(T, result)


def _build(schema: type[Any], values: Mapping[Any, Any], path: str, problems: list[str]) -> Any:
    """Dataclass from plain values; problems are collected, not raised."""
    hints = typing.get_type_hints(schema)
    names = [f.name for f in fields(schema)]
    kwargs: dict[str, Any] = {}
    for key, value in values.items():
        full = f"{path}{key}"
        if key not in names:
            problems.append(unknown_key(full, [path + n for n in names]))
            continue
        node = hints[key]
        if is_dataclass(node):
            kwargs[key] = _build(typing.cast(type, node), value or {}, f"{full}.", problems)
        elif typing.get_origin(node) is dict and is_dataclass(element := typing.get_args(node)[1]):
            kwargs[key] = {
                name: _build(typing.cast(type, element), sub or {}, f"{full}.{name}.", problems)
                for name, sub in (value or {}).items()
            }
        else:
            try:
                kwargs[key] = convert(schema, key, value)
            except ConfigError as error:
                problems += [f"{path}{p}" for p in error.problems]
    try:
        # Where a value is broken its default stands in, so that the others are still checked.
        return schema(**kwargs)
    except ConfigError as error:
        problems += [f"{path}{p}" for p in error.problems]
        unchecked = object.__new__(schema)
        for f in fields(schema):
            default = f.default if f.default_factory is NO_DEFAULT else f.default_factory()
            setattr(unchecked, f.name, kwargs.get(f.name, default))
        return unchecked


def convert(schema: type[Any], key: str, value: Any) -> Any:
    """One plain value in the type of its field.

    Raises:
        ConfigError: The value does not fit; says what would.
    """
    if isinstance(value, str) and value == MISSING:
        return value
    node = _node(schema)
    try:
        node[key] = value.name if isinstance(value, Enum) else value
        result = OmegaConf.to_container(node[key]) if OmegaConf.is_config(node[key]) else node[key]
    except OmegaConfBaseException as error:
        hint = typing.get_type_hints(schema)[key]
        raise ConfigError(f"{key} must be {_type_text(hint)}, got {value!r}") from error
    return result


_nodes: dict[type[Any], DictConfig] = {}


def _node(schema: type[Any]) -> DictConfig:
    """One node of a schema, in which values are converted one after the other."""
    if schema not in _nodes:
        _nodes[schema] = OmegaConf.structured(schema)
    return _nodes[schema]


def _type_text(hint: Any) -> str:
    options = [a for a in typing.get_args(hint) if a is not type(None)]
    if isinstance(hint, types.UnionType) and len(options) == 1:
        return f"{_type_text(options[0])} or null"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(hint.__members__)}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(hint, str(hint).replace("typing.", ""))


def unknown_key(key: str, known: list[str]) -> str:
    """Sentence about a key that no schema has, with the nearest one that exists."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if near:
        return f"unknown key {key}; did you mean {near[0]}?"
    return f"unknown key {key}; known here: {', '.join(sorted(known))}"


def compose(
    pipeline: str, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> Any:
    """Config of a pipeline from its presets and overrides, as the console script makes it.

    Args:
        pipeline: `train`, `predict`, `evaluate`, `export` or `demo`.
        overrides: `key=value` and `group=option`, as on the command line.
        values: Dotted key -> value, set afterwards and as they are: paths need no quoting here.

    Returns:
        The validated dataclass of that pipeline.

    Raises:
        ConfigError: All problems in one message.

    Example:
        >>> config = compose("train", ["data.root=photos", "finetune=linear_probe"])
        >>> config.finetune.method, list(config.finetune.phases)
        ('linear_probe', ['head'])
    """
    register_schemas()
    # Inside a pipeline Hydra is at work already; it is put aside meanwhile.
    outer, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    overrides = spelled_space(overrides) if pipeline == "search" else overrides
    try:
        with initialize_config_module("tl.conf", version_base="1.3"):
            config = hydra_compose(pipeline, overrides=[*map(quoted_place, overrides)])
        for key, value in (values or {}).items():
            OmegaConf.update(config, key, value, force_add=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(no_phase(str(error)) or str(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer
    return validate(config, PIPELINES[pipeline])


def no_phase(text: str) -> str | None:
    """What to do where Hydra refused a setting of a phase, for the method has no such phase.

    Args:
        text: Hydra's message.
    """
    found = re.match(
        r"(?:Could not override '|Error merging override \+*)(finetune\.phases\.(\w+)[\w.]*)", text
    )
    if found is None:
        return None
    return (
        f"{found[1]}: this method has no phase {found[2]} (finetune=auto decides its phases "
        "itself). Choose a method that has it, as in finetune=lp_ft finetune.phases.all.epochs=5, "
        "or write a preset of your own: --config-dir DIR finetune=NAME reads DIR/finetune/NAME.yaml"
    )


def schema_keys(
    schema: type[Any], path: str = ""
) -> Iterator[tuple[str, type[Any], dataclasses.Field[Any]]]:
    """Dotted keys of a schema, each with its dataclass and field; nodes come before leaves."""
    hints = typing.get_type_hints(schema)
    for f in fields(schema):
        node = hints[f.name]
        yield path + f.name, schema, f
        if is_dataclass(node):
            yield from schema_keys(typing.cast(type, node), f"{path}{f.name}.")
        elif typing.get_origin(node) is dict and is_dataclass(element := typing.get_args(node)[1]):
            yield from schema_keys(typing.cast(type, element), f"{path}{f.name}.<name>.")


def to_yaml(config: Any) -> str:
    """YAML of a validated config, every key explicit."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
