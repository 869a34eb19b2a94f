"""What all workers of a search share: images, the job as decided, the space, the judge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from tl import display, models, tracking, training
from tl.config import (
    AUTO,
    ConfigError,
    Sampler,
    SearchConfig,
    SearchSettings,
    Task,
    TrainConfig,
    to_yaml,
    validate,
)
from tl.data import DataError
from tl.runs import audit_lines, audited, brief, decide_or_keep
from tl.search.bench import Bench
from tl.search.errors import SearchError
from tl.search.space import Dimension, applied, job_of, parse, preset, value_of
from tl.search.study import Trials, open_study
from tl.search.team import Team, comparable, refuse_others, write_config
from tl.search.usual import default_space

if TYPE_CHECKING:
    from tl.data import ImageTable

FEW_VAL, FOLDS = 200, 3  # images of val below which trials are judged over so many folds
SHARE = 0.5  # of the epochs of a coarse trial, where more than the head trains


@dataclass(frozen=True)
class Workplace:
    """What a worker needs: the bench, and the trials.

    Args:
        bench: Where settings are tried.
        trials: Of the study.
        base: Config of the job, decided.
        setup: What all workers share.
    """

    bench: Bench
    trials: Trials
    base: TrainConfig
    setup: dict[str, Any]

    @property
    def space(self) -> tuple[Dimension, ...]:
        """What is varied."""
        return self.trials.space

    def config_of(self, values: dict[str, Any]) -> TrainConfig:
        """The config of a trial."""
        return applied(self.base, values)


def prepare(team: Team) -> Workplace:
    """Look at the images, decide, and write the setup down; or do as the leader wrote.

    Raises:
        RequestError: The request was wrong, or others search something else under this name.
    """
    config = team.asked
    known = team.setup()
    job = job_of(config)
    if known is not None:
        refuse_others(comparable(config), known["asked"], f"study {team.name}")
        job = _with_places(_read_job(known["base"]), job)
    training.prepare(job.trainer, job.seed, job.callbacks, job.logger)
    models.check_request(job.model, pretrained=job.finetune.pretrained)
    given = parse(config.search.space, job) if known is None else ()
    _check_models(given, job)
    with display.bar("checking images") as progress:
        table, found = audited(job, progress)
    fingerprint = table.fingerprint()["sha256"]
    if known is not None and known["data"] != fingerprint:
        msg = f"the images of {job.data.root} are not those that study {team.name} began with"
        raise SearchError(f"{msg}; choose another output_dir")
    if known is None:
        display.sections(audit_lines(found))
        if config.tracking.enabled:
            tracking.check_store(config.tracking, resume=team.folder.resumed)
        job = _decided(team, job, table)
    bench_of = {"metric": config.search.metric}
    given = given or default_space(job, labels=table.task is not Task.regression)
    space = given if known is None else [Dimension.from_dict(d) for d in known["space"]]
    team.asked = config = replace(config, search=without_repeats(config.search, space))
    if known is None:
        folds = _folds(config, table)
        bench = Bench(job, table, folds=folds, **bench_of)
        known = _setup(config, job, bench, given, fingerprint)
        write_config(team.folder, config)
    else:
        bench = Bench(job, table, folds=known["folds"], **bench_of)
    trials = open_study(team.storage, team.locks, team.name, config.search, known, config.seed)
    return Workplace(bench, trials, job, known)


def _read_job(text: str) -> TrainConfig:
    return validate(DictConfig(OmegaConf.create(text)), TrainConfig)


def _with_places(job: TrainConfig, own: TrainConfig) -> TrainConfig:
    """The job with this command's places: another host may have the images elsewhere."""
    data = replace(job.data, root=own.data.root, table=own.data.table)
    weights = own.model.weights if own.model.name == job.model.name else job.model.weights
    return replace(
        job,
        data=data,
        model=replace(job.model, weights=weights),
        cache=own.cache,
        tracking=own.tracking,
        export=own.export,
        output_dir=own.output_dir,
    )


def _check_models(space: tuple[Dimension, ...], job: TrainConfig) -> None:
    """Refuse names and weights of models before anything slow begins."""
    problems = []
    for d in space:
        for name in d.choices if d.key in ("model", "model.name") else ():
            model = preset("model", name).name if d.key == "model" else name
            try:
                models.check_request(replace(job.model, name=model))
            except (ConfigError, models.WeightsError) as error:
                problems.append(f"search.space.{d.key}: {error}")
    if problems:
        raise ConfigError(problems)


def _decided(team: Team, job: TrainConfig, table: ImageTable) -> TrainConfig:
    """The job with `finetune=auto` decided: a search is about what was chosen."""
    if job.finetune.method != AUTO:
        return job
    built = models.build_model(job.model, table.classes, pretrained=job.finetune.pretrained)
    config, _, advice = decide_or_keep(team.folder, job, table, built)
    display.sections(brief(advice))
    if advice is not None:
        advice.write(team.folder, f"{table.root.name}: the method whose settings are searched")
    method = config.finetune.method.removeprefix(f"{AUTO}: ")
    tune = replace(config.finetune, method=method, confirm=False)
    return replace(config, finetune=tune, amount=None, similarity=None)


def _folds(config: SearchConfig, table: ImageTable) -> int:
    asked, images = config.search.folds, len(table.split("val"))
    if asked is not None:
        return asked
    if images >= FEW_VAL:
        return 0
    folds = FOLDS
    if table.task is Task.single:
        rows = table.rows[table.rows["split"] != "test"]
        folds = min(folds, int(rows.drop_duplicates("sha256")["label"].value_counts().min()))
    return folds if folds >= 2 else 0


def _setup(
    config: SearchConfig,
    job: TrainConfig,
    bench: Bench,
    space: tuple[Dimension, ...],
    fingerprint: str,
) -> dict[str, Any]:
    _try_all_methods(space, job, bench)
    try:
        for fold in range(bench.folds):
            bench.table_of(fold)
    except DataError as error:
        raise ConfigError(f"search.folds={bench.folds}: {error}") from error
    plan = bench.plan(job, bench.start(job))
    deep = any(phase.train_stages for phase in job.finetune.phases.values())
    deep = deep or any(d.key == "finetune" for d in space)
    values = {d.key: value_of(job, d) for d in space}
    return {
        "asked": comparable(config),
        "base": to_yaml(job),
        "data": fingerprint,
        "space": [d.to_dict() for d in space],
        "folds": bench.folds,
        "metric": bench.monitor,
        "direction": "maximize" if bench.highest else "minimize",
        "epochs": sum(phase.epochs for phase in plan.phases),
        "share": config.search.coarse_epochs or (SHARE if deep else 1.0),
        "given": values if all(v is not None for v in values.values()) else None,
    }


def without_repeats(asked: SearchSettings, space: Sequence[Dimension]) -> SearchSettings:
    """Each cell once, where there are no more of them than trials: twice it would be the same."""
    cells = math.prod(len(d.points(asked.grid_points)) for d in space)
    grid = asked.sampler is Sampler.grid or all(d.choices for d in space)
    if not grid or cells >= asked.trials:
        return asked
    display.say(f"{cells} settings are all that there are: {cells} trials, each of them once")
    return replace(asked, sampler=Sampler.grid, trials=cells)


def _try_all_methods(space: tuple[Dimension, ...], job: TrainConfig, bench: Bench) -> None:
    """Build the plan of each preset in the space, so that no trial fails for what is known now."""
    problems = []
    for d in space:
        for name in d.choices if d.key in ("finetune", "augment", "finetune.head") else ():
            try:
                config = applied(job, {d.key: name})
                bench.plan(config, bench.start(config))
            except ConfigError as error:
                problems += [f"search.space.{d.key}: {name}: {p}" for p in error.problems]
    if problems:
        raise ConfigError(problems)
