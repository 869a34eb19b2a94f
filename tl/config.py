"""Schemas of every pipeline: the one place where a setting has its default, its range and its help.

A config travels as YAML and command-line overrides to `validate`, which turns it into one of the
dataclasses below or raises a single `ConfigError` that lists every problem at once. Nothing here
imports torch: `--help` and config errors are instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")

TRUSTED_TARGETS = ("pytorch_lightning.", "tl.")


class TlError(Exception):
    """Base of every error that is meant for a person: what is wrong, where, and what to do next.

    `exit_code` is that of the console script: 1 the job failed, 2 the request was wrong.
    """

    exit_code = 1


class RequestError(TlError):
    """The request was wrong (config, data, weights); nothing was written."""

    exit_code = 2


class ConfigError(RequestError):
    """One or more problems of a config.

    Args:
        problems: One sentence each; all are shown together.
    """

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM: unwinds like KeyboardInterrupt, but Lightning re-raises it unchanged."""


def setting(
    default: Any = NO_DEFAULT,
    help: str = "",
    *,
    factory: Any = NO_DEFAULT,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    choices: tuple[Any, ...] | None = None,
    common: bool = False,
) -> Any:
    """Dataclass field with help and limits (`low <= x <= high`, `x > above`, or one of `choices`).

    `common` marks the settings that `tl PIPELINE --help` shows.
    """
    limits = {"low": low, "high": high, "above": above, "choices": choices}
    metadata = {
        "help": help,
        "common": common,
        **{k: v for k, v in limits.items() if v is not None},
    }
    if factory is not NO_DEFAULT:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


class Checked:
    """Base of all schemas: limits and cross-field rules are checked when an object is made."""

    def problems(self) -> list[str]:
        """Rules that involve more than one field; each message begins with the field's name."""
        return []

    def __post_init__(self) -> None:
        found = [p for f in fields(self) for p in limit_problems(f, getattr(self, f.name))]  # type: ignore[arg-type]
        found = found or self.problems()
        if found:
            raise ConfigError(found)


class Request(Checked):
    """Base of the schemas that a pipeline takes whole: required settings must be there, too."""

    def __post_init__(self) -> None:
        # A resumed run takes its settings from its own folder.
        missing = [] if getattr(self, "resume", None) else list(_missing(self, ""))
        try:
            super().__post_init__()
        except ConfigError as error:
            missing += error.problems
        if missing:
            raise ConfigError(missing)


def _missing(node: Any, path: str) -> Iterator[str]:
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value):
            yield from _missing(value, f"{path}{f.name}.")
        elif isinstance(value, str) and value == MISSING:
            yield f"{path}{f.name} is required: {f.metadata['help']}"


def limit_problems(f: dataclasses.Field[Any], value: Any) -> list[str]:
    """Sentences about a value that is outside the limits of its field; empty when it is inside."""
    if value is None or isinstance(value, dict) or value == MISSING:
        return []
    if isinstance(value, (list, tuple)):
        return [p for v in value for p in limit_problems(f, v)]
    m = f.metadata
    if "choices" in m and value not in m["choices"]:
        return [f"{f.name} must be one of {', '.join(map(str, m['choices']))}, got {value}"]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        bad = (
            ("low" in m and value < m["low"])
            or ("high" in m and value > m["high"])
            or ("above" in m and value <= m["above"])
            or value != value
        )
        if bad:
            return [f"{f.name} must be {_limits_text(m)}, got {value:g}"]
    return []


def _limits_text(m: Mapping[str, Any]) -> str:
    if "low" in m and "high" in m:
        return f"in [{m['low']:g}, {m['high']:g}]"
    if "above" in m and "high" in m:
        return f"in ({m['above']:g}, {m['high']:g}]"
    if "above" in m:
        return f"above {m['above']:g}"
    if "low" in m:
        return f"at least {m['low']:g}"
    return f"at most {m['high']:g}" if "high" in m else "a number"


# --- data ---------------------------------------------------------------------------------------


class BadImages(Enum):
    """What to do with a file that cannot be decoded."""

    fail = "fail"
    skip = "skip"


@dataclass
class DataConfig(Checked):
    """Where the images are and how they are read."""

    root: str = setting(MISSING, "folder with <class>/* or train|val[|test]/<class>/*", common=True)
    val_fraction: float = setting(
        0.2,
        "share of train taken for val where the folder has no val",
        above=0,
        high=0.9,
        common=True,
    )
    batch_size: int = setting(32, "images per step, over all devices", low=1, common=True)
    num_workers: int | None = setting(
        None, "loader processes; default: the cores that this process may use, at most 8", low=0
    )
    check: bool = setting(True, "decode every image once before training (remembered in the cache)")
    bad_images: BadImages = setting(
        BadImages.fail,
        "fail: stop and list unreadable files; skip: leave them out and list them",
        common=True,
    )
    max_pixels: int = setting(
        178_956_970, "refuse larger images (decompression bombs), pixels", low=1
    )


# --- model --------------------------------------------------------------------------------------


@dataclass
class ModelConfig(Checked):
    """Backbone, head and where the pretrained weights come from."""

    name: str = setting(MISSING, "any timm model, with its tag: convnext_tiny.fb_in1k", common=True)
    weights: str = setting(
        "hub",
        "hub, none, a .safetensors/.pth file, or a folder that holds <name>.safetensors",
        common=True,
    )
    image_size: int | None = setting(
        None,
        "side of the square input in pixels; default: that of the weights",
        low=8,
        high=4096,
        common=True,
    )
    drop_rate: float = setting(0.0, "dropout before the head", low=0, high=0.95)
    drop_path_rate: float = setting(
        0.0, "stochastic depth, where the family has it", low=0, high=0.95
    )


# --- augmentation -------------------------------------------------------------------------------


class AutoAugment(Enum):
    """Learned or random augmentation policies of torchvision."""

    none = "none"
    trivial = "trivial"
    rand = "rand"


@dataclass
class AugmentConfig(Checked):
    """Random changes of the training images; 0 or none switches one off."""

    name: str = setting("none", "name of the preset, for the log")
    hflip: float = setting(0.0, "probability of a left-right flip", low=0, high=1)
    vflip: float = setting(0.0, "probability of an up-down flip", low=0, high=1)
    crop_scale: list[float] | None = setting(
        None,
        "[low, high] share of the area that a random resized crop keeps; null: resize and centre crop",
        factory=NO_DEFAULT,
        above=0,
        high=1,
    )
    crop_ratio: list[float] = setting(
        factory=lambda: [0.75, 1.3333], help="[low, high] width/height of that crop", above=0
    )
    color_jitter: float = setting(
        0.0, "strength of brightness, contrast, saturation; hue a quarter", low=0, high=1
    )
    rotate: float = setting(0.0, "affine: rotation up to ± degrees", low=0, high=180)
    translate: float = setting(0.0, "affine: shift up to ± this share of the side", low=0, high=1)
    zoom: float = setting(0.0, "affine: scale in [1 - zoom, 1 + zoom]", low=0, high=0.9)
    shear: float = setting(0.0, "affine: shear up to ± degrees", low=0, high=90)
    auto: AutoAugment = setting(
        AutoAugment.none, "none, trivial (TrivialAugment), rand (RandAugment)"
    )
    rand_magnitude: int = setting(9, "strength of RandAugment", low=0, high=30)
    erasing: float = setting(0.0, "probability of random erasing", low=0, high=1)
    mixup: float = setting(0.0, "alpha of mixup", low=0, high=10)
    cutmix: float = setting(0.0, "alpha of cutmix", low=0, high=10)

    def problems(self) -> list[str]:
        """Intervals have two ordered ends."""
        return [
            f"{key} must be two numbers [low, high], got {value}"
            for key, value in (("crop_scale", self.crop_scale), ("crop_ratio", self.crop_ratio))
            if value is not None and (len(value) != 2 or value[0] > value[1])
        ]


# --- how to transfer ----------------------------------------------------------------------------


class Optimizer(Enum):
    """Optimizers; SGD has Nesterov momentum 0.9."""

    adamw = "adamw"
    sgd = "sgd"


class BatchNormMode(Enum):
    """What BatchNorm does in stages that train: keep the pretraining's statistics or follow the batch.

    `auto` keeps them where a batch or the training set is small (batch < 16 or train < 1,000 images)
    and the weights are pretrained.
    """

    auto = "auto"
    frozen = "frozen"
    train = "train"


PRECISIONS = ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true")


@dataclass
class PhaseConfig(Checked):
    """One phase = one `Trainer.fit`. What is null comes from `finetune.*`."""

    train_stages: int = setting(
        0, "last stages of the backbone that train beside the head: 0 none, -1 all", low=-1, high=5
    )
    epochs: int | None = setting(None, "at most so many passes over train", low=1)
    head_lr: float | None = setting(None, "peak learning rate of the head", above=0, high=100)
    lr_ratio: float | None = setting(
        None, "stage k learns at head_lr / lr_ratio^(distance to the head)", low=1, high=100
    )
    optimizer: Optimizer | None = setting(None, "adamw or sgd")
    weight_decay: float | None = setting(
        None, "none on biases, norms and other 1-D parameters", low=0
    )
    warmup: float | None = setting(
        None, "share of the steps that warm up linearly before the cosine", low=0, high=1
    )
    batch_norm: BatchNormMode | None = setting(None, "auto, frozen or train")
    patience: int | None = setting(
        None, "stop after so many epochs without a better val/loss; 0: never", low=0
    )
    label_smoothing: float | None = setting(None, "label smoothing", low=0, high=0.9)
    gradient_clip: float | None = setting(None, "largest gradient norm; 0: no clipping", low=0)
    accumulate: int | None = setting(None, "batches per optimizer step", low=1)
    precision: str | None = setting(None, "Lightning's precision", choices=PRECISIONS)


@dataclass
class FinetuneConfig(Checked):
    """How to transfer: a list of phases, and the settings that they share."""

    method: str = setting("custom", "name of the method, for the log")
    pretrained: bool = setting(True, "false: start from random weights (finetune=scratch)")
    phases: dict[str, PhaseConfig] = setting(
        factory=dict, help="name -> phase, run in this order; the group finetune=... fills it"
    )
    epochs: int = setting(20, "at most so many passes over train in each phase", low=1, common=True)
    head_lr: float = setting(1e-3, "peak learning rate of the head", above=0, high=100, common=True)
    lr_ratio: float = setting(
        5.0,
        "stage k learns at head_lr / lr_ratio^(distance to the head); 1: one rate",
        low=1,
        high=100,
        common=True,
    )
    optimizer: Optimizer = setting(Optimizer.adamw, "adamw or sgd (Nesterov momentum 0.9)")
    weight_decay: float = setting(0.01, "none on biases, norms and other 1-D parameters", low=0)
    warmup: float = setting(
        0.1, "share of the steps that warm up linearly before the cosine", low=0, high=1
    )
    batch_norm: BatchNormMode = setting(BatchNormMode.auto, "auto, frozen or train", common=True)
    patience: int = setting(
        5, "stop after so many epochs without a better val/loss; 0: never", low=0, common=True
    )
    label_smoothing: float = setting(0.0, "label smoothing", low=0, high=0.9)
    gradient_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", low=0)
    accumulate: int = setting(1, "batches per optimizer step", low=1)
    precision: str = setting("32-true", "Lightning's precision", choices=PRECISIONS, common=True)


# --- tracking, export, cache --------------------------------------------------------------------


@dataclass
class TrackingConfig(Checked):
    """The MLflow run of a job."""

    enabled: bool = setting(True, "log to MLflow")
    uri: str | None = setting(
        None, "MLflow store; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db", common=True
    )
    experiment: str | None = setting(
        None, "MLflow experiment; default: the data folder's name", common=True
    )
    run_name: str | None = setting(None, "default: data · model · method")
    tags: dict[str, str] = setting(factory=dict, help="further tags of the run")
    system_metrics: bool = setting(True, "log CPU, memory and GPU use")


@dataclass
class ExportConfig(Checked):
    """The bundle that a run hands back."""

    enabled: bool = setting(True, "write bundle/")
    golden_images: int = setting(
        8, "training images kept in the bundle as its own test", low=1, high=64
    )
    tolerance: float = setting(
        1e-4,
        "largest difference of a probability between PyTorch and ONNX Runtime",
        above=0,
        high=0.1,
    )


@dataclass
class CacheConfig(Checked):
    """Where results that serve later jobs are kept."""

    dir: str | None = setting(None, "default: TL_CACHE_DIR, else ~/.cache/tl")

    def path(self) -> Path:
        """The folder; it need not exist yet."""
        return Path(self.dir or os.environ.get("TL_CACHE_DIR") or "~/.cache/tl").expanduser()


# --- one schema per pipeline --------------------------------------------------------------------


@dataclass
class TrainConfig(Request):
    """Config of `tl train`."""

    data: DataConfig = setting(factory=DataConfig, help="images")
    model: ModelConfig = setting(factory=ModelConfig, help="backbone and weights")
    augment: AugmentConfig = setting(factory=AugmentConfig, help="augmentation")
    finetune: FinetuneConfig = setting(factory=FinetuneConfig, help="how to transfer")
    tracking: TrackingConfig = setting(factory=TrackingConfig, help="MLflow")
    export: ExportConfig = setting(factory=ExportConfig, help="bundle")
    cache: CacheConfig = setting(factory=CacheConfig, help="cache")
    trainer: dict[str, Any] = setting(factory=dict, help="arguments of pytorch_lightning.Trainer")
    callbacks: dict[str, Any] = setting(factory=dict, help="further Lightning callbacks, by name")
    logger: dict[str, Any] = setting(factory=dict, help="further Lightning loggers, by name")
    seed: int = setting(0, "seed of everything that is random", low=0, high=2**32 - 1, common=True)
    output_dir: str | None = setting(
        None, "folder of the run; default: runs/<date>_<data>_<model>_<method>", common=True
    )
    resume: str | None = setting(
        None, "folder of a run that was interrupted: continue it", common=True
    )

    def problems(self) -> list[str]:
        """There is a phase, and third-party objects come from Lightning or tl only."""
        found = []
        if not self.finetune.phases:
            found.append("finetune.phases is empty: choose a method, such as finetune=lp_ft")
        for group in ("trainer", "callbacks", "logger"):
            nodes = getattr(self, group)
            for path, target in _targets(nodes, group):
                if not str(target).startswith(TRUSTED_TARGETS):
                    allowed = " or ".join(f"{t}*" for t in TRUSTED_TARGETS)
                    found.append(f"{path} must name {allowed}, got {target}")
        return found


@dataclass
class PredictConfig(Request):
    """Config of `tl predict`."""

    bundle: str = setting(MISSING, "bundle folder of a run")
    source: str = setting(MISSING, "an image, a folder (searched in depth) or a glob pattern")
    output: str | None = setting(
        None, "file to write: .parquet, .csv or .json; default: the screen only"
    )
    batch_size: int = setting(32, "images per call of the network", low=1)
    top_k: int = setting(3, "classes to name per image", low=1)
    bad_images: BadImages = setting(
        BadImages.fail, "fail: stop; skip: report unreadable files in the column error"
    )
    output_dir: str | None = setting(None, "folder for `output` where that is a relative path")


@dataclass
class EvaluateConfig(Request):
    """Config of `tl evaluate`."""

    bundle: str = setting(MISSING, "bundle folder of a run", common=True)
    data: DataConfig = setting(factory=DataConfig, help="images with labels")
    split: str | None = setting(
        None,
        "split to evaluate; default: test, else val, else all",
        choices=("train", "val", "test", "all"),
        common=True,
    )
    output_dir: str | None = setting(
        None, "folder for the results; default: runs/<date>_evaluate_<data>", common=True
    )
    cache: CacheConfig = setting(factory=CacheConfig, help="cache")


@dataclass
class ExportRunConfig(Request):
    """Config of `tl export`."""

    run: str = setting(MISSING, "folder of a finished run", common=True)
    export: ExportConfig = setting(factory=ExportConfig, help="bundle")
    output_dir: str | None = setting(
        None, "where to write the bundle; default: <run>/bundle", common=True
    )


@dataclass
class DemoConfig(Request):
    """Config of `tl demo`."""

    output_dir: str | None = setting(
        None, "folder of the demo's runs; default: runs/<date>_demo", common=True
    )
    images_per_class: int = setting(
        10, "training images of each target digit", low=2, high=100, common=True
    )
    tracking: TrackingConfig = setting(factory=TrackingConfig, help="MLflow")
    seed: int = setting(0, "seed", low=0, high=2**32 - 1, common=True)


PIPELINES: dict[str, type[Checked]] = {
    "train": TrainConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateConfig,
    "export": ExportRunConfig,
    "demo": DemoConfig,
}


def register_schemas() -> None:
    """Make each schema known to Hydra as `<pipeline>_schema`, the root of its primary config."""
    for name, schema in PIPELINES.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)


# --- validation ---------------------------------------------------------------------------------


def validate(config: DictConfig, schema: type[T]) -> T:
    """Turn a composed config into its dataclass.

    Args:
        config: What Hydra composed, keys added with `+` included.
        schema: Dataclass of the pipeline.

    Raises:
        ConfigError: Unknown keys (with the nearest right name), values of a wrong type or out of range,
            required keys that are missing: all of them in one error.
    """
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
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
    node = OmegaConf.structured(schema)
    try:
        node[key] = value.name if isinstance(value, Enum) else value
        result = OmegaConf.to_container(node[key]) if OmegaConf.is_config(node[key]) else node[key]
    except OmegaConfBaseException as error:
        hint = typing.get_type_hints(schema)[key]
        raise ConfigError(f"{key} must be {_type_text(hint)}, got {value!r}") from error
    return result


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
    try:
        with initialize_config_module("tl.conf", version_base="1.3"):
            config = hydra_compose(pipeline, overrides=list(overrides))
        for key, value in (values or {}).items():
            OmegaConf.update(config, key, value, force_add=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(str(error)) from error
    finally:
        GlobalHydra.instance().hydra = outer
    return validate(config, PIPELINES[pipeline])


def schema_keys(
    schema: type[Any], path: str = ""
) -> Iterator[tuple[str, type[Any], dataclasses.Field[Any]]]:
    """All dotted keys of a schema with the dataclass and the field behind each; nodes come before leaves."""
    hints = typing.get_type_hints(schema)
    for f in fields(schema):
        node = hints[f.name]
        yield path + f.name, schema, f
        if is_dataclass(node):
            yield from schema_keys(typing.cast(type, node), f"{path}{f.name}.")
        elif typing.get_origin(node) is dict and is_dataclass(element := typing.get_args(node)[1]):
            yield from schema_keys(typing.cast(type, element), f"{path}{f.name}.<name>.")


def _targets(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key == "_target_":
                yield f"{path}._target_", value
            else:
                yield from _targets(value, f"{path}.{key}")
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _targets(value, f"{path}.{i}")


def to_yaml(config: Any) -> str:
    """YAML of a validated config, every key explicit."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
