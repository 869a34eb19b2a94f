"""What was varied between runs, and which runs are the same but for their seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from functools import cache
from pathlib import PurePath

from tl.comparison.records import Record
from tl.config import TrainConfig, schema_keys

# Settings that change where things are kept and nothing of what is learnt.
IGNORED = ("tracking.", "cache.", "export.", "logger.", "output_dir", "resume", "data.root",
           "data.table", "data.num_workers", "data.remote_gb", "checkpoint_minutes", "audit",
           "trainer._target_", "trainer.log_every_n_steps", "trainer.enable")  # fmt: skip
# What a job made of its settings: named only where no setting explains it.
DERIVED = ("phase.", "model.parameters", "model.weights",
           "data.sha256", "data.images", "data.classes", "data.task")  # fmt: skip
SEED = "seed"
FIRST = ("model.name", "finetune.method")
MOST_NAMED = 4  # settings in the name of a family

Key = tuple[str | None, ...]


def varied(records: Sequence[Record]) -> list[str]:
    """Names of the settings in which runs differ, seed last.

    Args:
        records: The runs.
    """
    keys = sorted({key for record in records for key in record.params}, key=_importance)
    settings = [k for k in keys if not k.startswith((*IGNORED, *DERIVED)) and k != SEED]
    differ = [key for key in settings if _values(records, key) > 1]
    seeds = [SEED] if _values(records, SEED) > 1 else []
    groups: dict[Key, list[Record]] = {}
    for record in records:
        groups.setdefault(_key(record, [*differ, *seeds]), []).append(record)
    unexplained = [
        key
        for key in keys
        if key.startswith(DERIVED) and any(_known(group, key) > 1 for group in groups.values())
    ]
    return [*differ, *unexplained, *seeds]


def families_of(records: Sequence[Record], settings: Sequence[str]) -> list[list[Record]]:
    """Runs that differ in nothing but the seed, at least two together, by seed.

    Of runs with the same seed, too, the newest counts: a repetition says nothing of other seeds.

    Args:
        records: The runs.
        settings: What `varied` gives.
    """
    keys = [key for key in settings if key != SEED]
    groups: dict[Key, list[Record]] = {}
    for record in records:
        groups.setdefault(_key(record, keys), []).append(record)
    families = [[*_one_a_seed(group).values()] for group in groups.values()]
    return [family for family in families if len(family) > 1]


def _one_a_seed(records: Sequence[Record]) -> dict[str, Record]:
    newest = {record.params.get(SEED, record.id): record for record in sorted(records, key=_age)}
    return dict(sorted(newest.items(), key=lambda item: (len(item[0]), item[0])))


def _age(record: Record) -> float:
    return record.started


def family_name(record: Record, settings: Sequence[str]) -> str:
    """What tells a family from others: `resnet18.a1_in1k · lp_ft · lr_ratio 10`."""
    keys = [key for key in settings if key != SEED]
    texts = [_text(key, record.params.get(key)) for key in keys[:MOST_NAMED]]
    return " · ".join(texts) or "the same settings"


def seed_of(params: Mapping[str, str]) -> int | None:
    """The seed of a run; None where it says none."""
    text = params.get(SEED, "")
    return int(text) if text.isdigit() else None


def _text(key: str, value: str | None) -> str:
    if key in ("model.name", "finetune.method"):
        return str(value)
    if value is not None and "/" in value:  # a file says more by its name than by all its folders
        value = PurePath(value).name
    return f"{key.split('.')[-1]} {'–' if value is None else value}"


def _key(record: Record, keys: Sequence[str]) -> Key:
    return tuple(record.params.get(key) for key in keys)


def _importance(key: str) -> tuple[int, str]:
    return (FIRST.index(key) if key in FIRST else len(FIRST)), key


def _values(records: Sequence[Record], key: str) -> int:
    """Different values; that a run has none is one where the setting may be null."""
    if key in _always_set():  # else the run is of a version that did not know the setting
        return _known(records, key)
    return len({record.params.get(key) for record in records})


@cache
def _always_set() -> frozenset[str]:
    """Settings whose default is a value, so that each run of this version has one."""
    known = schema_keys(TrainConfig)
    return frozenset(key for key, _, field in known if field.default not in (None, NO_DEFAULT))


def _known(records: Sequence[Record], key: str) -> int:
    """Different values of those that have one: folders know less than MLflow."""
    return len({record.params[key] for record in records if key in record.params})
