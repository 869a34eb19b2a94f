"""The space of a search: which settings are varied, within which limits, and what a point means."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from tl.config import (
    AUTO,
    ConfigError,
    TrainConfig,
    compose,
    convert,
    limit_problems,
    schema_keys,
    unknown_key,
)

GROUPS = ("model", "augment", "finetune")  # presets that a space may name, in the order of use
PHASES = "finetune.phases."
# What a trial may differ in: all trials must be judged on the same images.
FREE = ("model.", "augment.", "finetune.", "imbalance", "data.batch_size", "cache.views")
DECIDED_WAY = 10.0  # a range is searched by its logarithm where its ends are so far apart
KEYS = ("low", "high", "log", "step", "choices")


@dataclass(frozen=True)
class Dimension:
    """One setting and its values: choices, or a range.

    Args:
        key: A group of presets, or a dotted key of `tl train`.
        choices: Values; empty for a range.
        low: Lower end.
        high: Upper end.
        log: Whether the range is searched by its logarithm.
        whole: Whether it holds whole numbers.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between the ends, from 0 to 1."""
        low, high, at = self.low, self.high, float(value)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return (at - low) / (high - low) if high > low else 0.0

    def at(self, share: float) -> float | int:
        """Inverse of `share`, to four digits."""
        value = self.low + (self.high - self.low) * share
        if self.log:
            value = math.exp(math.log(self.low) + math.log(self.high / self.low) * share)
        if self.whole:
            return round(value)
        return min(max(float(f"{value:.4g}"), self.low), self.high)

    def points(self, number: int) -> list[Any]:
        """Values of a grid."""
        if self.choices:
            return [*self.choices]
        shares = (i / (number - 1) for i in range(number))
        return list(dict.fromkeys(self.at(share) for share in shares))

    @property
    def short(self) -> str:
        """Name for a column: `head_lr`, `all.head_lr`."""
        if self.key.startswith(PHASES):
            return self.key.removeprefix(PHASES)
        return self.key.rpartition(".")[2]

    @property
    def words(self) -> str:
        """The values for people."""
        if self.choices:
            return ", ".join(map(shown, self.choices))
        return f"{self.low:g} to {self.high:g}" + (", by its logarithm" if self.log else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        if self.choices:
            return {"key": self.key, "choices": [*self.choices]}
        values = dataclasses.asdict(self)
        del values["choices"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Dimension:
        """Inverse of `to_dict`."""
        return cls(**{**values, "choices": tuple(values.get("choices", ()))})


def shown(value: Any) -> str:
    """A value for people, short."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# --- from the config ------------------------------------------------------------------------------


def parse(space: Mapping[str, Any], config: TrainConfig) -> tuple[Dimension, ...]:
    """The dimensions that a config names.

    Args:
        space: `search.space`: dotted or nested keys; null takes a preset's dimension out.
        config: Of the job; its phases are those that a key may name.

    Raises:
        ConfigError: All that is wrong with it.
    """
    problems: list[str] = []
    found: list[Dimension] = []
    known = {key: (owner, field) for key, owner, field in schema_keys(TrainConfig)}
    for key, node in _leaves(space):
        if node is None:
            continue
        try:
            found.append(_dimension(key, node, known, config))
        except ConfigError as error:
            problems += [f"search.space.{key}: {p}" for p in error.problems]
    if not problems:
        problems += _clashes(found, config)
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def _leaves(node: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and what they hold; nested mappings are paths as long as they are no range."""
    for key, value in node.items():
        inner = isinstance(value, Mapping) and not set(value) & set(KEYS)
        if inner and value:
            yield from _leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _dimension(
    key: str, node: Any, known: Mapping[str, tuple[type[Any], Any]], config: TrainConfig
) -> Dimension:
    values = node.get("choices") if isinstance(node, Mapping) else node
    if key in GROUPS:
        return _presets(key, values)
    owner, field = _setting(key, known, config)
    if isinstance(values, (list, tuple)):
        choices = [_plain(_converted(owner, field, value)) for value in values]
        if len(choices) < 2 or len({str(c) for c in choices}) < len(choices):
            raise ConfigError(f"needs at least two different choices, got {shown_list(values)}")
        return Dimension(key, tuple(choices))
    if not isinstance(node, Mapping):
        raise ConfigError(f"write [{node}, …] or {{low: …, high: …, log: true}}, got {node}")
    return _range(key, node, owner, field)


def _range(key: str, node: Mapping[str, Any], owner: type[Any], field: Any) -> Dimension:
    if extra := sorted(set(map(str, node)) - {"low", "high", "log"}):
        raise ConfigError([unknown_key(k, ["low", "high", "log", "choices"]) for k in extra])
    if missing := [end for end in ("low", "high") if node.get(end) is None]:
        raise ConfigError(f"a range needs low and high; {' and '.join(missing)} is missing")
    hints = {*typing.get_args(typing.get_type_hints(owner)[field.name])}
    hints.add(typing.get_type_hints(owner)[field.name])
    if not hints & {int, float}:
        raise ConfigError("is no number: give choices, as in [a, b]")
    low, high = (_converted(owner, field, node[end]) for end in ("low", "high"))
    if not low < high:
        raise ConfigError(f"low must be below high, got {low:g} and {high:g}")
    far = low > 0 and high / low >= DECIDED_WAY
    log = bool(node["log"]) if node.get("log") is not None else far and float in hints
    if log and low <= 0:
        raise ConfigError(f"log needs a low above 0, got {low:g}")
    return Dimension(key, (), float(low), float(high), log, whole=float not in hints)


def _setting(
    key: str, known: Mapping[str, tuple[type[Any], Any]], config: TrainConfig
) -> tuple[type[Any], Any]:
    """Where the setting of a key is declared."""
    generic = key
    if key.startswith(PHASES) and key.count(".") >= 3:
        phase, rest = key.removeprefix(PHASES).split(".", 1)
        generic = f"{PHASES}<name>.{rest}"
        if phase not in config.finetune.phases and config.finetune.method != AUTO:
            have = ", ".join(config.finetune.phases)
            raise ConfigError(
                f"finetune={config.finetune.method} has no phase {phase}; it has {have}"
            )
    if generic not in known:
        names = [k for k in known if "<name>" not in k and k.startswith(FREE)]
        raise ConfigError(unknown_key(key, [*names, *GROUPS]))
    owner, field = known[generic]
    if not key.startswith(FREE) or key in ("model.weights", "finetune.confirm", "finetune.budget"):
        raise ConfigError(
            "cannot be searched: all trials must be judged on the same images and differ in how "
            f"they learn; there are {', '.join(f'{k}*' if k[-1] == '.' else k for k in FREE)}"
        )
    if is_dataclass(typing.get_type_hints(owner)[field.name]) or field.name == "phases":
        raise ConfigError(f"is a group of keys: name one of them, as in {key}.…")
    return owner, field


def _converted(owner: type[Any], field: Any, value: Any) -> Any:
    found = convert(owner, field.name, value)
    if problems := limit_problems(field, found):
        raise ConfigError(problems)
    if found is None:
        raise ConfigError(f"{field.name}: null is no value to try")
    return found


def _plain(value: Any) -> Any:
    return value.name if isinstance(value, Enum) else value


def shown_list(values: Sequence[Any]) -> str:
    """Values in brackets."""
    return f"[{', '.join(map(shown, values))}]"


def _presets(group: str, names: Any) -> Dimension:
    if not isinstance(names, (list, tuple)) or len({*map(str, names)}) < 2:
        raise ConfigError(f"needs at least two presets, as in [a, b]; got {names}")
    problems = []
    for name in names:
        if group == "finetune" and name == AUTO:
            problems.append("auto decides a method; name the methods to compare")
            continue
        try:
            preset(group, str(name))
        except ConfigError as error:
            problems += [p.split("\n")[0] for p in error.problems]
    if problems:
        raise ConfigError(problems)
    return Dimension(group, tuple(map(str, names)))


def _clashes(found: Sequence[Dimension], config: TrainConfig) -> Iterator[str]:
    keys = [d.key for d in found]
    for key in sorted({k for k in keys if keys.count(k) > 1}):
        yield f"search.space.{key} is there twice"
    methods = next((d.choices for d in found if d.key == "finetune"), ())
    for d in found:
        if methods and d.key.startswith(PHASES):
            phase = d.key.removeprefix(PHASES).split(".")[0]
            lacking = [m for m in methods if phase not in preset("finetune", m).phases]
            if lacking:
                yield f"search.space.{d.key}: {', '.join(lacking)} has no phase {phase}"
        if d.key == "model.name" and "model" in keys:
            yield "search.space.model and search.space.model.name are the same thing: keep one"
    several = {"model", "model.name"} & {*keys}
    if several and config.model.weights.endswith((".safetensors", ".pth", ".pt")):
        yield (
            "model.weights names one file, and the space has several models: name the folder that "
            "holds <name>.safetensors of each"
        )


@cache
def preset(group: str, name: str) -> Any:
    """What a preset of a group says.

    Raises:
        ConfigError: There is none.
    """
    from importlib.resources import files

    folder = files("tl.conf").joinpath(group)
    options = sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml"))
    if name not in options:
        if group == "model":
            return dataclasses.replace(preset("model", options[0]), name=name)  # any timm name
        raise ConfigError(f"no preset {group}={name}; there are {', '.join(options)}")
    return getattr(compose("train", ["data.root=x", f"{group}={name}"]), group)


# --- what a point means ---------------------------------------------------------------------------


def job_of(config: TrainConfig) -> TrainConfig:
    """The config of the job alone, without what is about the search."""
    return TrainConfig(**{f.name: getattr(config, f.name) for f in fields(TrainConfig)})


def applied(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """The config of a trial: presets first, then single settings; what the user set stays.

    Args:
        config: Of the job, complete (`finetune=auto` is decided).
        values: Key of a dimension -> value.

    Raises:
        ConfigError: They do not go together.
    """
    for group in GROUPS:
        if group in values:
            config = _with_preset(config, group, str(values[group]))
    for key, value in values.items():
        if key not in GROUPS:
            config = _with(config, key.split("."), value, key)
    return config


def _with(node: Any, path: Sequence[str], value: Any, key: str) -> Any:
    """A copy of a dataclass or of a dict of them with one setting changed; all rules are checked.

    Raises:
        ConfigError: There is no such phase, or a rule is broken.
    """
    name, rest = path[0], path[1:]
    if isinstance(node, dict):
        if name not in node:
            raise ConfigError(f"{key}: there is no phase {name}; there are {', '.join(node)}")
        return {**node, name: _with(node[name], rest, value, key)}
    if rest:
        return dataclasses.replace(node, **{name: _with(getattr(node, name), rest, value, key)})
    kinds = typing.get_type_hints(type(node))[name]
    for kind in (kinds, *typing.get_args(kinds)):
        if isinstance(kind, type) and issubclass(kind, Enum) and isinstance(value, str):
            value = kind[value]
    return dataclasses.replace(node, **{name: value})


def _with_preset(config: TrainConfig, group: str, name: str) -> TrainConfig:
    """A preset in place of another; what differs from that one was set by the user, and stays."""
    old, new = getattr(config, group), preset(group, name)
    if group == "model":
        return dataclasses.replace(config, model=dataclasses.replace(old, name=new.name))
    before = getattr(old, "method", None) or old.name
    try:
        origin = preset(group, before)
    except ConfigError:
        origin = old  # a preset of the user's own, or what was decided
    kept = {
        f.name: getattr(old, f.name)
        for f in fields(old)
        if f.name not in {"phases", "name", "method"}
        and getattr(old, f.name) != getattr(origin, f.name)
    }
    return dataclasses.replace(config, **{group: dataclasses.replace(new, **kept)})


def value_of(config: TrainConfig, dimension: Dimension) -> Any:
    """What a config has for a dimension, for the trial of the settings as given.

    Returns:
        None where the dimension does not have that value.
    """
    if dimension.key == "finetune":
        value: Any = config.finetune.method.removeprefix(f"{AUTO}: ")
    elif dimension.key == "augment":
        value = config.augment.name
    elif dimension.key == "model":
        names = {preset("model", name).name: name for name in dimension.choices}
        value = names.get(config.model.name)
    else:
        value = _plain(OmegaConf.select(OmegaConf.structured(config), dimension.key))
        if value is None and dimension.key.startswith(PHASES):
            value = getattr(config.finetune, dimension.key.rpartition(".")[2], None)
    if dimension.choices:
        return value if value in dimension.choices else None
    inside = value is not None and dimension.low <= value <= dimension.high
    return value if inside else None


def limits(key: str) -> tuple[float, float]:
    """The least and the most that a setting may be at all; a lower end above which it must be."""
    if key.startswith(PHASES):
        key = f"{PHASES}<name>.{key.removeprefix(PHASES).split('.', 1)[1]}"
    field = next((f for name, _, f in schema_keys(TrainConfig) if name == key), None)
    meta = field.metadata if field is not None else {}
    return meta.get("low", meta.get("above", -math.inf)), meta.get("high", math.inf)
