"""The folder of an advice: two pages, the figures, and a config that `tl train` takes as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from tl.advice.details import train_command
from tl.advice.page import page
from tl.advice.ranking import Candidate
from tl.advice.text import markdown
from tl.config import AdviseConfig, RequestError, absolute_data
from tl.decision.augmenting import augmentation
from tl.files import write_texts
from tl.sections import Section

DECIDED = ("model", "augment", "finetune")  # groups of tl train that the plan fills
LINE = 96  # characters of a comment


class AdviceError(RequestError):
    """The folder of an advice cannot be written."""


def write(
    folder: Path,
    config: AdviseConfig,
    candidate: Candidate,
    sections: Sequence[Section],
    heading: tuple[str, str],
) -> None:
    """Write `advice.md`, `advice.html`, `plan.yaml`, `evidence.json` and `decision.json`.

    Args:
        folder: Made where it is missing.
        config: What was asked.
        candidate: The backbone that is advised.
        sections: What both pages show.
        heading: Their title, and the line below it.

    Raises:
        AdviceError: The folder cannot be written.
    """
    title, subtitle = heading
    footer = (
        "Written by tl advise before any training. The figures beside it: evidence.json and "
        "decision.json; the config: plan.yaml."
    )
    content = {
        "advice.md": markdown(title, subtitle, sections),
        "advice.html": page(title, subtitle, sections, footer),
        "plan.yaml": plan_yaml(config, candidate, folder),
        "evidence.json": _json(candidate.evidence.to_dict()),
        "decision.json": _json(candidate.decision.to_dict()),
    }
    write_texts(folder, content, AdviceError)


def plan_yaml(config: AdviseConfig, candidate: Candidate, folder: Path) -> str:
    """A primary config of `tl train` that does what was advised, every choice spelled out."""
    decision = candidate.decision
    weights = config.model.weights
    if weights not in ("hub", "none"):
        weights = str(Path(weights).expanduser().absolute())
    model = decision.model(replace(config.model, name=candidate.name, weights=weights))
    values = {
        "data": _changed(absolute_data(config.data)),
        "model": _changed(model),
        "augment": _plain(augmentation(decision, config.augment)),
        "finetune": _without_nulls(_plain(decision.finetune)),
        "cache": _changed(config.cache),
        "seed": config.seed,
    }
    head = [
        f"# Plan of tl advise: {train_command(folder)}",
        f"# {decision.rule}",
        *(f"# - {reason}" for reason in decision.reasons),
    ]
    body = {"defaults": _defaults(), **{k: v for k, v in values.items() if v != {}}}
    hydra = {"hydra": {"run": {"dir": "."}, "output_subdir": None}}
    text = yaml.safe_dump({**body, **hydra}, sort_keys=False, allow_unicode=True, width=LINE)
    return "\n".join(line.replace("\n", " ") for line in head) + f"\n{text}"


def _defaults() -> list[Any]:
    """Defaults list of `tl train` without the groups that the plan spells out."""
    train = yaml.safe_load(files("tl.conf").joinpath("train.yaml").read_text(encoding="utf-8"))
    defaults: list[Any] = train["defaults"]
    return [d for d in defaults if not (isinstance(d, Mapping) and {*d} & set(DECIDED))]


def _plain(node: Any) -> dict[str, Any]:
    """Values as YAML has them: enums by name."""
    values = OmegaConf.to_container(OmegaConf.structured(node), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _changed(node: Any) -> dict[str, Any]:
    """Settings that are not their defaults."""
    assert is_dataclass(node)
    usual = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in fields(node)
    }
    return {k: v for k, v in _plain(node).items() if getattr(node, k) != usual[k]}


def _without_nulls(values: Any) -> Any:
    """A phase's nulls mean the shared setting: saying so needs no line."""
    if not isinstance(values, Mapping):
        return values
    return {k: _without_nulls(v) for k, v in values.items() if v is not None}


def _json(values: Any) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
