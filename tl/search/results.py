"""The folder of a search at its end: the winner as a config, all trials, a page."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from optuna.trial import FrozenTrial

from tl.config import SearchConfig, TrainConfig
from tl.runs import RunFolder
from tl.search.errors import SearchError
from tl.search.judging import Judged
from tl.search.space import Dimension, shown

BEST = "experiment/best.yaml"
RUN = "best"
# Groups of a job that the winner's file spells out.
SPELLED = ("model", "augment", "finetune")
KEPT = ("scores", "worker", "beat", "curve")  # of the attributes of a trial that no table shows


def best_yaml(config: TrainConfig, base: TrainConfig, judged: Judged, folder: Path) -> str:
    """The winner as an experiment of `tl train`, every choice spelled out.

    Args:
        config: Of the winner.
        base: Of the job, whose images and seed it had.
        judged: What the search found.
        folder: Of the search.
    """
    values: dict[str, Any] = {name: _plain(getattr(config, name)) for name in SPELLED}
    values["finetune"] = _without_nulls(values["finetune"])
    values["data"] = {"batch_size": config.data.batch_size}
    values["imbalance"] = config.imbalance.name
    values["seed"] = config.seed
    if config.cache.views is not None:
        values["cache"] = {"views": config.cache.views}
    shown_values = ", ".join(
        f"{d.key}={shown(judged.best.params.get(d.key))}" for d in judged.space
    )
    head = [
        "# @package _global_",
        f"# The best of {sum(_counted(judged))} trials: {train_command(folder, base)}",
        f"# {judged.metric} {judged.best.value:.4f} with {shown_values}",
    ]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=96)
    return "\n".join(head) + f"\n{text}"


def _counted(judged: Judged) -> list[int]:
    return [judged.counts[k] for k in ("complete", "given up", "failed")]


def train_command(folder: Path, config: TrainConfig) -> str:
    """The command that trains with the settings of the winner."""
    return f"tl train --config-dir {folder} experiment=best data.root={config.data.root}"


def _plain(node: Any) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.structured(node), enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _without_nulls(values: Any) -> Any:
    """A phase's nulls mean the shared setting: saying so needs no line."""
    if not isinstance(values, Mapping):
        return values
    return {k: _without_nulls(v) for k, v in values.items() if v is not None}


def trials_csv(trials: Sequence[FrozenTrial], space: Sequence[Dimension]) -> str:
    """All trials, those that were lost too, one a row."""
    rows = []
    for t in trials:
        attrs = {k: v for k, v in t.user_attrs.items() if k not in KEPT}
        rows.append(
            {
                "trial": t.number,
                "state": "lost" if attrs.pop("lost", False) else t.state.name.lower(),
                "value": t.value,
                **{d.key: t.params.get(d.key) for d in space},
                **attrs,
            }
        )
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def summary(
    judged: Judged, asked: SearchConfig, setup: Mapping[str, Any], best: Mapping[str, float] | None
) -> dict[str, Any]:
    """What `search.json` holds."""
    pair = judged.against_given
    return {
        "metric": judged.metric,
        "direction": setup["direction"],
        "images": judged.images,
        "folds": setup["folds"],
        "space": [d.to_dict() for d in judged.space],
        "sampler": asked.search.sampler.name,
        "pruner": asked.search.pruner.name,
        "trials": judged.counts,
        "best": {
            "trial": judged.best.number,
            "value": judged.best.value,
            "corrected": judged.corrected,
            "loss": judged.best.user_attrs.get("loss"),
            "settings": dict(judged.best.params),
        },
        "given": None
        if judged.given is None
        else {"trial": judged.given.number, "value": judged.given.value},
        "best_against_given": asdict(pair) if pair else None,
        "told_from_the_best": {str(n): not tied for n, tied in judged.tied.items()},
        "importance": judged.importance,
        "warnings": [*judged.warnings],
        "metrics": best,
    }


def make_room(folder: RunFolder, config: TrainConfig) -> tuple[Path, bool]:
    """Where the winner is trained, and whether that began already.

    A run of a former winner, of a search that went on, is moved aside.
    """
    from tl.runs import read_config

    place = folder.path / RUN
    if not (place / "config.yaml").is_file():
        shutil.rmtree(place, ignore_errors=True)
        return place, False
    known = read_config(place)
    names = (*SPELLED, "imbalance", "seed", "data")
    if all(getattr(known, n) == getattr(config, n) for n in names):
        return place, True
    number = next(n for n in range(1, 10_000) if not (folder.path / f"former-{n}").exists())
    try:
        place.rename(folder.path / f"former-{number}")
    except OSError as error:
        raise SearchError(f"cannot move {place}: {error.strerror}") from error
    return place, False


def write(folder: RunFolder, texts: Mapping[str, str]) -> None:
    """Write files of the search, each in one move."""
    for name, text in texts.items():
        (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
        folder.write_text(name, text)


def as_json(values: Mapping[str, Any]) -> str:
    """Plain values as text."""
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"
