"""How to transfer: phases and plans, freezing, discriminative learning rates, and their audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tl.config import (
    AUTO,
    BatchNormMode,
    ConfigError,
    FinetuneConfig,
    Optimizer,
    PhaseConfig,
    Select,
    TlError,
    Trains,
)
from tl.models import HEAD, RANDOM, BuiltModel, Stage, tensors_sha256

SMALL_TRAIN = (
    1_000  # images; below, the batch statistics of BatchNorm are worse than the pretraining's
)
SMALL_BATCH = 16
ADAPTER = "lora_"  # how the names of the parts of an adapter begin


class FreezeError(TlError):
    """What was frozen moved, or a parameter belongs to no group: a bug, never the user's fault."""


@dataclass(frozen=True)
class Phase:
    """One `Trainer.fit`: which stages train, and how; units as in `tl.config.FinetuneConfig`."""

    name: str
    trainable: tuple[str, ...]
    epochs: int
    head_lr: float
    lr_ratio: float
    optimizer: str
    weight_decay: float
    warmup: float
    freeze_batch_norm: bool
    patience: int
    label_smoothing: float
    gradient_clip: float
    accumulate: int
    precision: str
    trains: str = "all"
    lora_rank: int = 8
    ema: bool = False
    average: bool = False
    select: str = "best"


@dataclass(frozen=True)
class Plan:
    """The phases of a transfer method, in order, with sentences about how they were chosen."""

    method: str
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `plan.json` keeps them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Inverse of `to_dict`."""
        phases = tuple(Phase(**{**p, "trainable": tuple(p["trainable"])}) for p in values["phases"])
        return cls(values["method"], phases, tuple(values["notes"]))


def build_plan(
    config: FinetuneConfig, built: BuiltModel, *, train_images: int, batch_size: int
) -> Plan:
    """Resolve the phases of a config for one model and one data set.

    Args:
        config: Method, shared settings, phases.
        built: The model; random weights have no BatchNorm statistics that one would keep.
        train_images: Size of train; decides `batch_norm=auto`.
        batch_size: Images per step; decides `batch_norm=auto`.

    Returns:
        Phases with every setting filled in. A phase that would train the same stages as the one
        before (a backbone with fewer stages) is left out, and a note says so. The first phase has
        none before it to average with.

    Raises:
        ConfigError: The method is still to be decided.
    """
    if config.method == AUTO:
        msg = "finetune=auto has no phases before it is decided: tl.decision.decide(evidence)"
        raise ConfigError(msg)
    pretrained = built.weights.source != RANDOM
    small = train_images < SMALL_TRAIN or batch_size < SMALL_BATCH
    phases: list[Phase] = []
    notes: list[str] = []
    for name, asked in config.phases.items():
        trainable = trainable_stages(built.stages, asked.train_stages)
        phase = _resolve(config, name, trainable, small=small and pretrained, first=not phases)
        if phases and (trainable, phase.trains) == (phases[-1].trainable, phases[-1].trains):
            notes.append(
                f"phase {name} is left out: it trains the same stages as {phases[-1].name}"
            )
            continue
        phases.append(phase)
    return Plan(config.method, tuple(phases), tuple(notes))


def _resolve(
    config: FinetuneConfig, name: str, trainable: tuple[str, ...], *, small: bool, first: bool
) -> Phase:
    """A phase with what it does not say taken from the shared settings.

    Args:
        config: Shared settings, and the phase.
        name: Of the phase.
        trainable: Stages that it trains.
        small: Too few images or too small batches to learn statistics anew, for `batch_norm=auto`.
        first: No phase before it trained weights to average with.
    """
    phase = config.phases[name]
    shared = {f.name for f in fields(config)} & {f.name for f in fields(PhaseConfig)}
    own = {key: getattr(phase, key) for key in shared}
    settings = {k: getattr(config, k) if v is None else v for k, v in own.items()}
    mode = settings.pop("batch_norm")
    optimizer: Optimizer = settings.pop("optimizer")
    select: Select = settings.pop("select")
    average: bool = settings.pop("average")
    return Phase(
        name=name,
        trainable=trainable,
        optimizer=optimizer.value,
        select=select.value,
        trains=phase.trains.value,
        lora_rank=phase.lora_rank,
        freeze_batch_norm=mode is BatchNormMode.frozen or (mode is BatchNormMode.auto and small),
        average=average and not first,
        **settings,
    )


def trainable_stages(stages: Sequence[Stage], last: int) -> tuple[str, ...]:
    """Names of the `last` stages of the backbone and the head; -1 names all.

    Example:
        >>> names = ["stage0", "stage1", "stage2", "head"]
        >>> trainable_stages([Stage(name, ("w",)) for name in names], 1)
        ('stage2', 'head')
    """
    names = [stage.name for stage in stages]
    body = [name for name in names if name != HEAD]
    kept = body if last < 0 else body[max(len(body) - last, 0) :]
    return (*kept, *(name for name in names if name == HEAD))


# --- freezing -----------------------------------------------------------------------------------


def trained_names(model: nn.Module, stages: Sequence[Stage], phase: Phase) -> set[str]:
    """Names of the parameters that train: of the phase's stages all, or what `trains` leaves.

    Scale and shift of normalisation layers alone (Frankle et al. 2021, arXiv:2003.00152), or
    adapters alone; the head always whole.
    """
    names = {n for s in stages if s.name in phase.trainable for n in s.parameters}
    if phase.trains == Trains.all.value:
        return names
    head = {n for s in stages if s.name == HEAD for n in s.parameters}
    if phase.trains == Trains.norm.value:
        return names & (head | norm_names(model))
    return names & (head | {n for n in names if f".{ADAPTER}" in n})


def norm_names(model: nn.Module) -> set[str]:
    """Names of the scales and shifts of normalisation layers, of torch, timm or a model's own.

    Example:
        >>> sorted(norm_names(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
        ['1.bias', '1.weight']
    """
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if any("norm" in kind.__name__.lower() for kind in type(module).__mro__)
        for name, _ in module.named_parameters(recurse=False)
    }


def check_norms(model: nn.Module, stages: Sequence[Stage], phase: Phase) -> None:
    """Refuse a phase of normalisation layers where its stages have none.

    Raises:
        ConfigError: Says what would train instead.
    """
    head = {n for s in stages if s.name == HEAD for n in s.parameters}
    if phase.trains == Trains.norm.value and not trained_names(model, stages, phase) - head:
        where = ", ".join(name for name in phase.trainable if name != HEAD)
        msg = (
            f"finetune.phases.{phase.name}.trains=norm: {where} has no normalisation layers with a "
            "scale or shift. Take more stages (train_stages=-1: all), or trains=all"
        )
        raise ConfigError(msg)


def state_names(model: nn.Module, stages: Sequence[Stage], phase: Phase) -> set[str]:
    """Names of all that a phase may change: what trains, and the buffers of its stages."""
    buffers = {n for s in stages if s.name in phase.trainable for n in s.buffers}
    return trained_names(model, stages, phase) | buffers


def freeze(model: nn.Module, stages: Sequence[Stage], phase: Phase) -> None:
    """Let exactly what the phase names train: `requires_grad` of all parameters, and all modes."""
    trainable = trained_names(model, stages, phase)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    set_modes(model, freeze_batch_norm=phase.freeze_batch_norm)


def set_modes(model: nn.Module, *, freeze_batch_norm: bool) -> None:
    """Put what is frozen into eval mode and the rest into train mode.

    A module is frozen when it has parameters and none of them trains; its dropout, stochastic depth
    and BatchNorm buffers are then still, too.

    Args:
        model: Model whose parameters already say by `requires_grad` what trains.
        freeze_batch_norm: Also keep the running statistics of BatchNorm layers that train.
    """
    model.train()
    _still(model, {})
    for module in model.modules():
        if freeze_batch_norm and isinstance(module, _BatchNorm):
            module.eval()


def _still(module: nn.Module, trains: dict[int, bool | None]) -> None:
    """Put the frozen parts of a module into eval mode; every epoch does it, so each is seen once.

    Args:
        module: To begin with.
        trains: Whether a part has parameters that train; None: it has no parameters.
    """
    if not trains:
        for part in reversed([*module.modules()]):
            flags = [p.requires_grad for p in part.parameters(recurse=False)]
            flags += [t for c in part.children() if (t := trains.get(id(c))) is not None]
            trains[id(part)] = any(flags) if flags else None
    if trains[id(module)] is False:
        module.eval()
    elif trains[id(module)]:
        for child in module.children():
            _still(child, trains)


# --- learning rates -----------------------------------------------------------------------------


def stage_rates(stages: Sequence[Stage], phase: Phase) -> dict[str, float]:
    """Peak learning rate of each stage that trains: `head_lr / lr_ratio ** (distance to the head)`.

    Discriminative learning rates after Howard and Ruder 2018 (ULMFiT, section 3.2), between stages
    instead of layers.
    """
    last = len(stages) - 1
    return {
        stage.name: phase.head_lr / phase.lr_ratio ** (last - index)
        for index, stage in enumerate(stages)
        if stage.name in phase.trainable
    }


def parameter_groups(
    model: nn.Module, stages: Sequence[Stage], phase: Phase
) -> list[dict[str, Any]]:
    """Optimizer groups of a phase, each with `params`, `lr`, `weight_decay` and `name`.

    Every stage makes one group that decays and one that does not (biases, norm weights and other
    1-D parameters, and what the family names in `no_weight_decay()`).

    Raises:
        FreezeError: A trainable parameter is in no stage, or in two.
    """
    parameters = dict(model.named_parameters())
    trained = trained_names(model, stages, phase)
    no_weight_decay: Any = getattr(model, "no_weight_decay", set)
    still = set(no_weight_decay())
    groups: list[dict[str, Any]] = []
    for name, rate in stage_rates(stages, phase).items():
        stage = next(s for s in stages if s.name == name)
        own = [n for n in stage.parameters if n in trained]
        decayed = [n for n in own if parameters[n].ndim > 1 and n not in still]
        others = [n for n in own if n not in set(decayed)]
        for label, names, decay in (
            (name, decayed, phase.weight_decay),
            (f"{name}/no_decay", others, 0.0),
        ):
            if names:
                groups.append(
                    {
                        "params": [parameters[n] for n in names],
                        "lr": rate,
                        "weight_decay": decay,
                        "name": label,
                    }
                )
    grouped = [id(p) for group in groups for p in group["params"]]
    wanted = {id(p): n for n, p in parameters.items() if p.requires_grad}
    lost = [n for i, n in wanted.items() if grouped.count(i) != 1]
    if lost or len(grouped) != len(wanted):
        what = ", ".join(lost) or "frozen ones are in one"
        msg = f"parameters must be in exactly one optimizer group: {what}"
        raise FreezeError(msg)
    return groups


# --- tables and audit ---------------------------------------------------------------------------


def stage_hashes(
    model: nn.Module, stages: Sequence[Stage], phase: Phase | None = None
) -> dict[str, dict[str, str]]:
    """SHA-256 of the weights and of the buffers of every stage.

    Args:
        model: The model.
        stages: Its stages.
        phase: In the stages that it trains, `weights` is what trains, and `frozen` the rest.
    """
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    trained = trained_names(model, stages, phase) if phase else set()
    hashes = {}
    for stage in stages:
        part = set(stage.parameters)
        if phase and stage.name in phase.trainable:
            part &= trained
        rest = set(stage.parameters) - part
        hashes[stage.name] = {
            "weights": tensors_sha256((n, parameters[n]) for n in part),
            "frozen": tensors_sha256((n, parameters[n]) for n in rest),
            "buffers": tensors_sha256((n, buffers[n]) for n in stage.buffers),
        }
    return hashes


def stage_rows(model: nn.Module, stages: Sequence[Stage], phase: Phase) -> list[dict[str, Any]]:
    """Rows of the table before a phase: stage, parameters, trainable (counts), peak lr or None."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = trained_names(model, stages, phase)
    rates = stage_rates(stages, phase)
    counts = {s.name: sum(sizes[n] for n in s.parameters if n in trained) for s in stages}
    return [
        {
            "stage": stage.name,
            "parameters": sum(sizes[n] for n in stage.parameters),
            "trainable": counts[stage.name],
            "lr": rates.get(stage.name) if counts[stage.name] else None,
        }
        for stage in stages
    ]


def audit(
    before: Mapping[str, Mapping[str, str]],
    after: Mapping[str, Mapping[str, str]],
    phase: Phase,
    stages: Sequence[Stage],
) -> list[dict[str, Any]]:
    """Compare the hashes around a phase.

    Returns:
        One row a stage: `stage`, and in `weights` and `buffers` the words `moved`, `still` or
        `none`.

    Raises:
        FreezeError: Something frozen moved: weights or buffers of a frozen stage, or the weights
            beside those that train in a stage that trains in part.
    """
    rows = []
    for stage in stages:
        row: dict[str, Any] = {"stage": stage.name}
        if before[stage.name]["frozen"] != after[stage.name]["frozen"]:
            msg = f"phase {phase.name}: weights of {stage.name} that were frozen moved"
            raise FreezeError(msg)
        for kind, names in (("weights", stage.parameters), ("buffers", stage.buffers)):
            moved = before[stage.name][kind] != after[stage.name][kind]
            row[kind] = ("moved" if moved else "still") if names else "none"
            if moved and stage.name not in phase.trainable:
                msg = f"phase {phase.name}: {stage.name} was frozen, but its {kind} moved"
                raise FreezeError(msg)
        rows.append(row)
    return rows
