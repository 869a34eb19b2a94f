"""One schema per pipeline, made of the groups in `tl.config.schemas`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from tl.config.batches import BatchConfig
from tl.config.comparing import CompareConfig
from tl.config.data import AuditMode, BadImages, DataConfig
from tl.config.evaluating import EvaluationConfig
from tl.config.registry import PromoteConfig, RegisterConfig
from tl.config.reporting import ReportConfig
from tl.config.schemas import (
    AUTO,
    ActivationsConfig,
    AugmentConfig,
    CacheConfig,
    ExportConfig,
    FinetuneConfig,
    Imbalance,
    ModelConfig,
    TrackingConfig,
)
from tl.config.searching import SearchSettings
from tl.config.settings import Checked, Request, setting
from tl.config.tracking import SyncConfig

AMOUNTS = ("tiny", "small", "medium", "large")
SIMILARITIES = ("similar", "different")
TRUSTED_TARGETS = ("pytorch_lightning.", "tl.")


@dataclass
class TrainConfig(Request):
    """Config of `tl train`."""

    data: DataConfig = setting(factory=DataConfig, help="images")
    model: ModelConfig = setting(factory=ModelConfig, help="backbone and weights")
    augment: AugmentConfig = setting(factory=AugmentConfig, help="augmentation")
    finetune: FinetuneConfig = setting(factory=FinetuneConfig, help="how to transfer")
    tracking: TrackingConfig = setting(factory=TrackingConfig, help="MLflow")
    export: ExportConfig = setting(factory=ExportConfig, help="bundle")
    evaluation: EvaluationConfig = setting(factory=EvaluationConfig, help="how the model is judged")
    cache: ActivationsConfig = setting(factory=ActivationsConfig, help="activation cache")
    trainer: dict[str, Any] = setting(factory=dict, help="arguments of pytorch_lightning.Trainer")
    callbacks: dict[str, Any] = setting(factory=dict, help="further Lightning callbacks, by name")
    logger: dict[str, Any] = setting(factory=dict, help="further Lightning loggers, by name")
    imbalance: Imbalance = setting(
        Imbalance.auto,
        "classes of different sizes: weights in the loss; sampler: draw all classes equally; "
        "focal loss; logit_adjustment; none; auto: by the counts of train, and says so",
        common=True,
    )
    amount: str | None = setting(
        None,
        "finetune=auto: how much data there is, instead of what is counted: tiny (below 5 images a "
        "class), small (below 20), medium (below 100), large",
        choices=AMOUNTS,
        common=True,
    )
    similarity: str | None = setting(
        None,
        "finetune=auto: whether the images are similar to or different from those of the "
        "pretraining, instead of what is measured",
        choices=SIMILARITIES,
        common=True,
    )
    seed: int = setting(0, "seed of everything that is random", low=0, high=2**32 - 1, common=True)
    checkpoint_minutes: float = setting(
        5.0, "the state of training is also written within epochs that last longer; 0: never", low=0
    )
    audit: AuditMode = setting(
        AuditMode.warn,
        "what is wrong with images, labels and splits: warn: say it; fail: stop at errors; fix: "
        "leave out unreadable, doubly labelled and leaked images, in a list; off: do not look",
        common=True,
    )
    output_dir: str | None = setting(
        None, "folder of the run; default: runs/<date>_<data>_<model>_<method>", common=True
    )
    resume: str | None = setting(
        None, "folder of a run that was interrupted: continue it", common=True
    )
    batch: BatchConfig = setting(factory=BatchConfig, help="with -m: how the jobs are run")

    def problems(self) -> list[str]:
        """There is a phase, and third-party objects come from Lightning or tl only."""
        found = []
        method = self.finetune.method
        if method != AUTO and not self.finetune.phases:
            found.append("finetune.phases is empty: choose a method, such as finetune=lp_ft")
        if not method.startswith(AUTO):  # "auto: lp_ft" is what was decided
            found += [
                f"{key}={value} is for finetune=auto; finetune={method} says the method already"
                for key, value in (("amount", self.amount), ("similarity", self.similarity))
                if value is not None
            ]
            if self.finetune.confirm:
                found.append(
                    "finetune.confirm=true is for finetune=auto, which compares its choice with "
                    "the next one"
                )
        for group in ("trainer", "callbacks", "logger"):
            nodes = getattr(self, group)
            for path, target in _targets(nodes, group):
                if not str(target).startswith(TRUSTED_TARGETS):
                    allowed = " or ".join(f"{t}*" for t in TRUSTED_TARGETS)
                    found.append(f"{path} must name {allowed}, got {target}")
        return found


@dataclass
class SearchConfig(TrainConfig):
    """Config of `tl search`: that of the job whose settings are searched, and how to search."""

    search: SearchSettings = setting(factory=SearchSettings, help="how to search")

    def problems(self) -> list[str]:
        """A search goes on by the same command, and has folds of its own."""
        found = super().problems()
        if self.resume is not None:
            found.append("resume: a search goes on by the same command, with its output_dir")
        if self.data.folds is not None:
            found.append(
                f"data.folds: search.folds={self.data.folds} judges each trial by cross-validation"
            )
        if self.finetune.confirm:
            found.append("finetune.confirm: a search compares more than two settings; leave it out")
        return found


@dataclass
class AdviseConfig(Request):
    """Config of `tl advise`."""

    data: DataConfig = setting(factory=DataConfig, help="images")
    model: ModelConfig = setting(factory=ModelConfig, help="backbone and weights")
    models: list[str] = setting(
        factory=list,
        help="several presets or timm names, which are ranked; model=a,b says the same",
        common=True,
    )
    augment: AugmentConfig = setting(factory=AugmentConfig, help="augmentation")
    finetune: FinetuneConfig = setting(
        factory=FinetuneConfig, help="what the plan must keep, such as finetune.epochs"
    )
    cache: ActivationsConfig = setting(factory=ActivationsConfig, help="activation cache")
    amount: str | None = setting(
        None,
        "how much data there is, instead of what is counted: tiny, small, medium or large",
        choices=AMOUNTS,
        common=True,
    )
    similarity: str | None = setting(
        None,
        "whether the images are similar to or different from those of the pretraining, instead of "
        "what is measured",
        choices=SIMILARITIES,
        common=True,
    )
    seed: int = setting(0, "seed of everything that is random", low=0, high=2**32 - 1)
    output_dir: str | None = setting(
        None, "folder of the advice; default: runs/<date>_advise_<data>", common=True
    )

    def problems(self) -> list[str]:
        """The method is what is asked for; several models cannot share one file of weights."""
        found = []
        if self.finetune.method != AUTO:
            found.append(
                f"finetune={self.finetune.method} says the method already: tl train uses it; "
                "leave finetune=auto here"
            )
        if len(self.models) > 1 and self.model.weights.endswith((".safetensors", ".pth", ".pt")):
            found.append(
                "model.weights names one file, and there are several models: name the folder that "
                "holds <name>.safetensors of each"
            )
        return found


@dataclass
class FeaturesConfig(ModelConfig):
    """The network whose features show label errors."""

    name: str = setting(
        "none",
        "any timm model: its features show which labels are likely wrong; none: not looked for",
        common=True,
    )


@dataclass
class AuditConfig(Request):
    """Config of `tl audit`."""

    data: DataConfig = setting(factory=DataConfig, help="images")
    audit: AuditMode = setting(
        AuditMode.warn,
        "warn: write what is found; fail: exit with code 2 at errors, too; fix: list what tl train "
        "audit=fix leaves out in quarantined.csv",
        common=True,
    )
    model: FeaturesConfig = setting(factory=FeaturesConfig, help="network for label errors")
    cache: ActivationsConfig = setting(factory=ActivationsConfig, help="activation cache")
    tracking: TrackingConfig = setting(factory=TrackingConfig, help="MLflow")
    seed: int = setting(0, "seed of everything that is random", low=0, high=2**32 - 1)
    output_dir: str | None = setting(
        None, "folder of the audit; default: runs/<date>_audit_<data>", common=True
    )


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


@dataclass
class CacheToolConfig(Request):
    """Config of `tl cache`."""

    cache: CacheConfig = setting(factory=CacheConfig, help="cache")
    prune: str | None = setting(
        None,
        "limit: remove activations until cache.max_gb holds, the least recently used first; "
        "all: remove all; never what a running job reads",
        choices=("limit", "all"),
    )
    older_than_days: float | None = setting(
        None, "remove activations that no job has used for so many days", low=0
    )


PIPELINES: dict[str, type[Checked]] = {
    "train": TrainConfig,
    "advise": AdviseConfig,
    "audit": AuditConfig,
    "predict": PredictConfig,
    "evaluate": EvaluateConfig,
    "export": ExportRunConfig,
    "demo": DemoConfig,
    "cache": CacheToolConfig,
    "compare": CompareConfig,
    "register": RegisterConfig,
    "promote": PromoteConfig,
    "sync": SyncConfig,
    "report": ReportConfig,
    "search": SearchConfig,
}


def register_schemas() -> None:
    """Make each schema known to Hydra as `<pipeline>_schema`, the root of its primary config."""
    for name, schema in PIPELINES.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)


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
