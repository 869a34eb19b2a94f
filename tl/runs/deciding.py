"""`finetune=auto`: measure, decide, remember; a resumed run goes on as it decided."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tl import ranks
from tl.config import (
    AdviseConfig,
    ConfigError,
    FinetuneConfig,
    HeadKind,
    ModelConfig,
    TrainConfig,
)
from tl.decision.evidence import Evidence
from tl.runs.contents import job_tags
from tl.runs.folder import RunError, RunFolder, run_name, write_model

if TYPE_CHECKING:
    from tl.audit import AuditReport
    from tl.data import ImageDataModule, ImageTable
    from tl.decision import Decision
    from tl.finetuning import Plan
    from tl.models import BuiltModel
    from tl.sections import Section
    from tl.training.confirming import Confirmed

AUTO = "auto"
EVIDENCE, DECISION, PAGE = "evidence.json", "decision.json", "advice.html"
CONFIRMED = "confirmed"  # key of decision.json
CANDIDATES = ("choice", "neighbour")


@dataclass(frozen=True)
class Advice:
    """What `finetune=auto` measured and decided.

    Args:
        evidence: What was measured.
        decision: What follows from it.
        confirmed: How choice and neighbour compared, with `finetune.confirm=true`.
    """

    evidence: Evidence
    decision: Decision
    confirmed: Confirmed | None = None

    @property
    def finetune(self) -> FinetuneConfig:
        """Complete settings of what is trained; its method says that it was chosen."""
        kept = "choice" if self.confirmed is None else self.confirmed.kept
        return self.candidate(kept)

    def candidate(self, name: str) -> FinetuneConfig:
        """Settings of `choice` or `neighbour`."""
        chosen = self.decision.finetune if name == "choice" else self.decision.neighbour_finetune
        return replace(chosen, method=f"{AUTO}: {chosen.method}")

    def config(self, asked: TrainConfig) -> TrainConfig:
        """Config of the job: as the user asked, and as decided where that was left open."""
        from tl.decision.augmenting import augmentation

        return replace(
            asked,
            model=self.decision.model(asked.model),
            augment=augmentation(self.decision, asked.augment),
            finetune=replace(self.finetune, confirm=asked.finetune.confirm),
        )

    def without_choice(self, reason: str) -> Advice:
        """The neighbour in place of a choice that this network cannot have."""
        d = self.decision
        note = f"{d.method} is not possible here, so {d.neighbour} takes its place: {reason}"
        swapped = replace(
            d,
            method=d.neighbour,
            neighbour=d.method,
            finetune=d.neighbour_finetune,
            neighbour_finetune=d.finetune,
            warnings=(*d.warnings, note),
        )
        return replace(self, decision=swapped)

    @ranks.on_first
    def write(self, folder: RunFolder, title: str) -> None:
        """Write `evidence.json`, `decision.json` and, for people, `advice.html`.

        Args:
            folder: Of the run.
            title: Of the page.

        Raises:
            RunError: The folder cannot be written.
        """
        from tl.advice.page import page

        folder.write_json(EVIDENCE, self.evidence.to_dict())
        confirmed = self.confirmed.to_dict() if self.confirmed else None
        folder.write_json(DECISION, {**self.decision.to_dict(), CONFIRMED: confirmed})
        subtitle = "Measured and decided before the training, from the training images."
        footer = f"Written by tl train with finetune=auto; the figures: {EVIDENCE} and {DECISION}."
        folder.write_text(PAGE, page(title, subtitle, brief(self), footer))

    @classmethod
    def read(cls, path: Path) -> Advice:
        """Inverse of `write`.

        Raises:
            RunError: A file is missing or damaged.
        """
        from tl.decision import Decision
        from tl.training.confirming import Confirmed

        try:
            evidence = json.loads((path / EVIDENCE).read_text())
            decision = json.loads((path / DECISION).read_text())
            confirmed = decision.pop(CONFIRMED)
            return cls(
                Evidence.from_dict(evidence),
                Decision.from_dict(decision),
                Confirmed.from_dict(confirmed) if confirmed else None,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            reason = " ".join(str(error).split())
            msg = (
                f"{path} cannot be resumed: its {EVIDENCE} or {DECISION} cannot be read "
                f"({reason}); begin a new run with another output_dir"
            )
            raise RunError(msg) from error

    def metrics(self) -> dict[str, float]:
        """What was measured, for MLflow: `evidence/…`, standard errors as `…_error`."""
        values = dict(_numbers(self.evidence.to_dict(), "evidence"))
        if self.confirmed is not None:
            values |= dict(_numbers(self.confirmed.to_dict(), "confirm"))
        return values

    def tags(self) -> dict[str, str]:
        """What was decided, for MLflow: `tl.cell`, `tl.method`, measured and used values."""
        d = self.decision
        tags = {
            "tl.method": self.finetune.method.removeprefix(f"{AUTO}: "),
            "tl.neighbour": d.neighbour,
            "tl.cell": f"{d.amount}, {d.similarity}",
            "tl.amount": d.amount,
            "tl.similarity": d.similarity,
            **{f"tl.{name}_measured": text for name, text in d.measured.items()},
            "tl.forced": ", ".join(f"{k}={_plain(v)}" for k, v in d.forced.items()) or "nothing",
            "tl.rule": d.rule,
        }
        if self.confirmed is not None:
            tags["tl.confirmed"] = f"{self.confirmed.kept}: {self.confirmed.why}"
        return tags


def decide_or_keep(
    folder: RunFolder, config: TrainConfig, table: ImageTable, built: BuiltModel
) -> tuple[TrainConfig, BuiltModel, Advice | None]:
    """Let the evidence decide what the config leaves open; an explicit method stays as it is.

    Args:
        folder: A resumed run goes on as it decided.
        config: As the user asked.
        table: Images of the job.
        built: The model in its starting weights.

    Returns:
        Config and model of the job, and the advice; None with an explicit method.

    Raises:
        RunError: The run to resume lost what it decided.
    """
    if config.finetune.method != AUTO:
        return config, fitting(built, config.model, config.finetune, table), None
    read = ranks.on_first(Advice.read)
    advice = read(folder.path) if folder.resumed else measured(config, table, built)
    advice, built = fitted(advice, config, config.model, table, built)
    return advice.config(config), built, advice


def measured(config: TrainConfig | AdviseConfig, table: ImageTable, built: BuiltModel) -> Advice:
    """Measure the training images with a backbone, and decide."""
    from tl.data import ImageDataModule
    from tl.decision import decide
    from tl.training import gather_evidence

    images = ImageDataModule.from_config(table, built.preprocessing, config)
    evidence = gather_evidence(built, images, config.cache, seed=config.seed)
    decision = decide(
        evidence,
        config.finetune.budget,
        batch_size=config.data.batch_size,
        amount=config.amount,
        similarity=config.similarity,
        given=config.finetune,
        image_size=config.model.image_size,
    )
    return Advice(evidence, decision)


def fitted(
    advice: Advice,
    asked: TrainConfig | AdviseConfig,
    model: ModelConfig,
    table: ImageTable,
    built: BuiltModel,
) -> tuple[Advice, BuiltModel]:
    """The advice that a network can follow, the neighbour's if need be, and the network for it.

    Raises:
        ConfigError: The network cannot have the head that the user asked for.
    """
    try:
        return advice, fitting(built, advice.decision.model(model), advice.finetune, table)
    except ConfigError as error:
        if asked.finetune.head is advice.finetune.head:
            raise
        advice = advice.without_choice(str(error))
    return advice, fitting(built, advice.decision.model(model), advice.finetune, table)


def fitting(
    built: BuiltModel, model: ModelConfig, finetune: FinetuneConfig, table: ImageTable
) -> BuiltModel:
    """The model as a config wants it: for images of its size, with a head of its kind.

    Raises:
        ConfigError: The network cannot have such a head.
    """
    from tl.models import build_model

    size, head = model.image_size, finetune.head
    other_size = size not in (None, built.preprocessing.input_size[-1])
    if other_size or built.head not in (HeadKind.linear.value, head.value):
        built = build_model(model, table.classes, pretrained=finetune.pretrained)
    if built.head == head.value:
        return built
    from tl.training import with_head

    return with_head(built, head)


def brief(advice: Advice | None) -> tuple[Section, ...]:
    """What a person should know before the training; nothing with an explicit method."""
    if advice is None:
        return ()
    from tl.advice import brief as reasons
    from tl.sections import Section

    parts = reasons(advice.evidence, advice.decision)
    if (done := advice.confirmed) is None:
        return parts
    kept = f"kept: {done.choice if done.kept == 'choice' else done.neighbour}"
    rows = ({"text": f"{kept}; {done.why}"},)
    return (*parts, Section("choice and neighbour compared", "list", rows))


def records(
    config: TrainConfig,
    built: BuiltModel,
    plan: Plan,
    advice: Advice | None = None,
    found: AuditReport | None = None,
) -> tuple[dict[str, float], dict[str, str]]:
    """Metrics and tags for MLflow: of the job, what was decided, and what the audit found."""
    metrics, tags = (advice.metrics(), advice.tags()) if advice else ({}, {})
    metrics |= found.metrics() if found else {}
    return metrics, job_tags(config, built, plan) | tags


def confirm(
    folder: RunFolder,
    config: TrainConfig,
    built: BuiltModel,
    images: ImageDataModule,
    plan: Plan,
    advice: Advice | None,
) -> tuple[TrainConfig, BuiltModel, Plan, Advice | None]:
    """Try choice and neighbour where `finetune.confirm` is set; returns what to go on with.

    Args:
        folder: Of the run; `checkpoints/confirm-*` keep what was tried.
        config: As decided.
        built: The model in its starting weights; it stays so.
        images: Data of the job.
        plan: Of the choice.
        advice: None with an explicit method; where it is confirmed already, nothing is tried.
    """
    from tl.finetuning import build_plan
    from tl.training.confirming import announce, clear_away, compare, try_plan, uncompared

    if advice is None or not config.finetune.confirm or advice.confirmed is not None:
        return config, built, plan, advice
    table, tried, jobs = images.table, {}, {}
    sizes = {"train_images": len(table.split("train")), "batch_size": config.data.batch_size}
    folders = {name: folder.checkpoints / f"confirm-{name}" for name in CANDIDATES}
    try:
        for name in CANDIDATES:
            finetune = advice.candidate(name)
            own = fitting(built, config.model, finetune, table)
            jobs[name] = own, build_plan(finetune, own, **sizes)
    except ConfigError as error:
        names = advice.decision.method, advice.decision.neighbour
        confirmed = uncompared(*names, reason=str(error))
    else:
        for name, (own, its_plan) in jobs.items():
            tried[name] = try_plan(
                name, its_plan, own, images, folder=folders[name], **fit_settings(config)
            )
        confirmed = compare(tried["choice"], tried["neighbour"])
    announce(confirmed)
    advice = replace(advice, confirmed=confirmed)
    built, plan = jobs[confirmed.kept]
    write_model(folder, table, built, plan)
    advice.write(folder, run_name(config, advice.finetune.method))
    clear_away([*folders.values()])
    return advice.config(config), built, plan, advice


def fit_settings(config: TrainConfig) -> dict[str, Any]:
    """Arguments of `tl.training.run_plan` that no plan changes."""
    names = ("trainer", "callbacks", "cache", "imbalance", "seed", "checkpoint_minutes")
    return {name: getattr(config, name) for name in names}


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Numbers of nested plain values by their path; a score and its error are neighbours."""
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, (int, float)):
        yield name, float(value)
    elif isinstance(value, Mapping) and set(value) == {"value", "error"}:
        yield name, float(value["value"])
        yield f"{name}_error", float(value["error"])
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _numbers(part, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for part in value:
            if isinstance(part, Mapping) and "stage" in part:
                rest = {k: v for k, v in part.items() if k != "stage"}
                yield from _numbers(rest, f"{name}/{part['stage']}")


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)
