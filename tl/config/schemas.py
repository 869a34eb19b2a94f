"""Schemas of the settings: the one place where each has its default, its range and its help."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

from tl.config.settings import Checked, setting


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
        "[low, high] share of the area that a random resized crop keeps; null: centre crop",
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


class Optimizer(Enum):
    """Optimizers; SGD has Nesterov momentum 0.9."""

    adamw = "adamw"
    sgd = "sgd"


class BatchNormMode(Enum):
    """BatchNorm in stages that train: keep the pretraining's statistics, or follow the batch.

    `auto` keeps them where the weights are pretrained and a batch has fewer than 16 images or
    train fewer than 1,000.
    """

    auto = "auto"
    frozen = "frozen"
    train = "train"


class Trains(Enum):
    """What trains in the stages that train: all of it, or little beside the frozen weights.

    `norm` is the scale and shift of normalisation layers, `lora` low-rank adapters of attention
    layers, which are merged into the weights afterwards. The head always trains whole.
    """

    all = "all"
    norm = "norm"
    lora = "lora"


class Select(Enum):
    """Which weights of a phase are kept: those of the least val/loss, or the last ones."""

    best = "best"
    last = "last"


class HeadKind(Enum):
    """What the head reads: the last features, or pooled features of all stages."""

    linear = "linear"
    stages = "stages"


class Budget(Enum):
    """How many epochs `finetune=auto` plans: a quarter, the usual, four times as many."""

    quick = "quick"
    normal = "normal"
    thorough = "thorough"


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
    trains: Trains = setting(
        Trains.all,
        "what trains in these stages: all; norm: scale and shift of normalisation layers; "
        "lora: low-rank adapters of attention layers; the head always trains",
    )
    lora_rank: int = setting(8, "rank of the adapters of trains=lora", low=1, high=256)
    ema: bool | None = setting(None, "keep an exponential moving average of what trains")
    average: bool | None = setting(
        None, "afterwards mix the weights with those before the phase, the share chosen on val"
    )
    select: Select | None = setting(None, "best: weights of the least val/loss; last: the last")


AUTO = "auto"  # the method that is decided from the images; afterwards it is "auto: <method>"
# Settings that it leaves null and decides.
DECIDED = (
    *("epochs", "head_lr", "lr_ratio", "optimizer", "weight_decay", "warmup", "batch_norm"),
    *("patience", "label_smoothing", "ema", "average", "select"),
)


@dataclass
class FinetuneConfig(Checked):
    """How to transfer: a list of phases, and the settings that they share."""

    method: str = setting("custom", "name of the method, for the log")
    pretrained: bool = setting(True, "false: start from random weights (finetune=scratch)")
    phases: dict[str, PhaseConfig] = setting(
        factory=dict, help="name -> phase, run in this order; the group finetune=... fills it"
    )
    epochs: int | None = setting(
        20, "at most so many passes over train in each phase", low=1, common=True
    )
    head_lr: float | None = setting(
        1e-3, "peak learning rate of the head", above=0, high=100, common=True
    )
    lr_ratio: float | None = setting(
        10.0,
        "stage k learns at head_lr / lr_ratio^(distance to the head); 1: one rate",
        low=1,
        high=100,
        common=True,
    )
    optimizer: Optimizer | None = setting(Optimizer.adamw, "adamw or sgd (Nesterov momentum 0.9)")
    weight_decay: float | None = setting(
        0.01, "none on biases, norms and other 1-D parameters", low=0
    )
    warmup: float | None = setting(
        0.1, "share of the steps that warm up linearly before the cosine", low=0, high=1
    )
    batch_norm: BatchNormMode | None = setting(
        BatchNormMode.auto, "auto, frozen or train", common=True
    )
    patience: int | None = setting(
        5, "stop after so many epochs without a better val/loss; 0: never", low=0, common=True
    )
    label_smoothing: float | None = setting(0.0, "label smoothing", low=0, high=0.9)
    gradient_clip: float = setting(1.0, "largest gradient norm; 0: no clipping", low=0)
    accumulate: int = setting(1, "batches per optimizer step", low=1)
    precision: str = setting("32-true", "Lightning's precision", choices=PRECISIONS, common=True)
    ema: bool | None = setting(False, "keep an exponential moving average of what trains")
    average: bool | None = setting(
        False, "afterwards mix the weights with those before the phase, the share chosen on val"
    )
    select: Select | None = setting(
        Select.best, "best: weights of the least val/loss; last: those of the last epoch"
    )
    head: HeadKind = setting(
        HeadKind.linear,
        "what the head reads: linear: the last features; stages: pooled features of all stages, "
        "the most useful of them",
    )
    budget: Budget = setting(
        Budget.normal,
        "finetune=auto: epochs a quarter, as usual, or four times as many",
        common=True,
    )
    confirm: bool = setting(
        False,
        "finetune=auto: train the choice and its neighbour for a quarter of the epochs first, and "
        "go on with the better one",
        common=True,
    )

    def problems(self) -> list[str]:
        """Only `auto` leaves settings open; what a phase asks for must be possible."""
        if self.method == AUTO:
            if self.phases:
                names = ", ".join(self.phases)
                return [f"phases: finetune=auto decides them, got {names}; or choose a method"]
            return []
        found = [
            f"{key} must be given; null is for finetune=auto, which decides it"
            for key in DECIDED
            if getattr(self, key) is None
        ]
        for index, (name, phase) in enumerate(self.phases.items()):
            if phase.average and index == 0:
                found.append(
                    f"phases.{name}.average: there is no phase before the first one to mix with"
                )
            beyond = phase.train_stages != 0 or phase.trains is not Trains.all
            if self.head is HeadKind.stages and beyond:
                found.append(
                    f"phases.{name}: finetune.head=stages trains the head alone; take "
                    "train_stages=0 and trains=all, or finetune.head=linear"
                )
            if phase.trains is not Trains.all and phase.train_stages == 0:
                found.append(
                    f"phases.{name}.trains={phase.trains.value} is about stages that train, and "
                    "train_stages=0 names none; take train_stages=-1 for all"
                )
        return found


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
    run_name: str | None = setting(None, "default: data · model · method · four digits of the job")
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
    """Where results that serve later jobs are kept, and how much of them."""

    dir: str | None = setting(None, "default: TL_CACHE_DIR, else ~/.cache/tl")
    max_gb: float = setting(
        20.0, "activations kept on disk, GB; the least recently used go first", above=0
    )

    def path(self) -> Path:
        """The folder; it need not exist yet."""
        return Path(self.dir or os.environ.get("TL_CACHE_DIR") or "~/.cache/tl").expanduser()


class Imbalance(Enum):
    """What is done about classes of different sizes."""

    auto = "auto"
    none = "none"
    weights = "weights"
    sampler = "sampler"
    focal = "focal"
    logit_adjustment = "logit_adjustment"


class CacheMode(Enum):
    """Whether the frozen part of a network is computed once per image and kept."""

    auto = "auto"
    on = "on"
    off = "off"


ENGINES = ("auto", "eager", "compile", "onnxruntime", "bf16")


@dataclass
class ActivationsConfig(CacheConfig):
    """The cache of what the frozen part of a network says about each image."""

    mode: CacheMode = setting(
        CacheMode.auto,
        "auto: before each phase by its costs; on: wherever something is frozen; off: never",
        common=True,
    )
    views: int | None = setting(
        None,
        "augmented views kept of each training image beside the clean one; each epoch reads "
        "another; 0: clean only; default: 1 for a linear head, 4 where more than that trains",
        low=0,
        high=100,
        common=True,
    )
    engine: str = setting(
        "auto",
        "what computes the frozen part; auto: the fastest for this many images",
        choices=ENGINES,
    )
    tolerance: float = setting(
        1e-4,
        "largest relative difference between that engine and PyTorch in float32",
        above=0,
        high=0.1,
    )
