"""Config: schemas of every pipeline, their validation, and the errors a person sees.

A config travels as YAML and command-line overrides to `validate`, which turns it into one of the
dataclasses here or raises a single `ConfigError` that lists every problem at once. Nothing in this
room imports torch: `--help` and config errors are instant.
"""

from __future__ import annotations

from tl.config.errors import NO_YAML, ConfigError, Interrupted, ProblemsError, RequestError, TlError
from tl.config.pipelines import (
    AMOUNTS,
    PIPELINES,
    SIMILARITIES,
    TRUSTED_TARGETS,
    AdviseConfig,
    CacheToolConfig,
    DemoConfig,
    EvaluateConfig,
    ExportRunConfig,
    PredictConfig,
    TrainConfig,
    register_schemas,
)
from tl.config.schemas import (
    ENGINES,
    PRECISIONS,
    ActivationsConfig,
    AugmentConfig,
    AutoAugment,
    BadImages,
    BatchNormMode,
    Budget,
    CacheConfig,
    CacheMode,
    DataConfig,
    ExportConfig,
    FinetuneConfig,
    HeadKind,
    ModelConfig,
    Optimizer,
    PhaseConfig,
    Select,
    TrackingConfig,
    Trains,
)
from tl.config.settings import Checked, Request, limit_problems, setting
from tl.config.validation import compose, convert, schema_keys, to_yaml, unknown_key, validate

__all__ = [
    "AMOUNTS",
    "ENGINES",
    "NO_YAML",
    "PIPELINES",
    "PRECISIONS",
    "SIMILARITIES",
    "TRUSTED_TARGETS",
    "ActivationsConfig",
    "AdviseConfig",
    "AugmentConfig",
    "AutoAugment",
    "BadImages",
    "BatchNormMode",
    "Budget",
    "CacheConfig",
    "CacheMode",
    "CacheToolConfig",
    "Checked",
    "ConfigError",
    "DataConfig",
    "DemoConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ExportRunConfig",
    "FinetuneConfig",
    "HeadKind",
    "Interrupted",
    "ModelConfig",
    "Optimizer",
    "PhaseConfig",
    "PredictConfig",
    "ProblemsError",
    "Request",
    "RequestError",
    "Select",
    "TlError",
    "TrackingConfig",
    "TrainConfig",
    "Trains",
    "compose",
    "convert",
    "limit_problems",
    "register_schemas",
    "schema_keys",
    "setting",
    "to_yaml",
    "unknown_key",
    "validate",
]
