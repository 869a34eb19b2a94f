"""One pass over a sample of train, and what else the evidence needs of the network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tl import display, ranks
from tl.cache import CacheError
from tl.config import ActivationsConfig, CacheMode, FinetuneConfig, PhaseConfig
from tl.data.datamodule import ImageDataModule
from tl.data.views import CLEAN, ViewDataset, view_loader
from tl.decision.evidence import Evidence
from tl.evidence import FLIPPED, Drift, StageFeatures, measure, sample
from tl.files import replacing
from tl.finetuning import Phase, build_plan, freeze
from tl.graph import SplitError
from tl.models import BuiltModel, pretrained_head
from tl.training.activations import Activations
from tl.training.cached import Clean
from tl.training.drift import batch_norm_drift
from tl.training.plain_facts import amount, backbone, copies, native_side
from tl.training.probing import evaluating
from tl.training.standins import NOTES, classes_of

VERSION = 3  # of what is remembered; raise it when figures change their meaning
DRIFT_IMAGES = 128
BATCH = 32
MOST_STAGES = 5
FLIPS = {"horizontal": 3, "vertical": 2}  # name -> dimension of (N, 3, H, W)

Rows = NDArray[np.float32]
# Images (N, 3, H, W) -> what the head reads (N, D), and the pooled stages
Forward = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]


def gather_evidence(
    built: BuiltModel,
    images: ImageDataModule,
    cache: ActivationsConfig,
    *,
    seed: int,
    device: torch.device | None = None,
) -> Evidence:
    """Measure a data set with a backbone, from train only; val is counted.

    The pass goes through the activation cache, where the phases find it again, and the figures are
    remembered beside it: a job with the same weights and images measures nothing.

    Args:
        built: Model in its starting weights; left as it is.
        images: Its train split is read without augmentation.
        cache: `cache.*`.
        seed: Of the sample, the folds and the permutations.
        device: Where to compute; default: the GPU where there is one.

    Returns:
        Evidence, with `similarity=None` and `unmeasured` where nothing can be measured.
    """
    table = images.table
    evidence = Evidence(
        amount=amount(table),
        backbone=backbone(built),
        native_side=native_side(table),
        warnings=(*copies(table), *([NOTES[table.task]] if table.task in NOTES else [])),
    )
    if not evidence.backbone.pretrained:
        reason = "the weights are random: there is no pretraining to be similar to"
        return replace(evidence, unmeasured=reason)
    file = cache.path() / "evidence" / f"{_key(built, images, seed)}.json"
    if (known := _known(file, cache)) is not None:
        return known
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = table.split("train").drop_duplicates("sha256")
    rows = rows.iloc[sample(classes_of(table, rows), seed)]
    display.say(f"measuring {len(rows):,} training images with {built.name}")
    found, seconds = _Pass(built, images, cache, device).run(rows)
    return _measured(found, seconds, evidence, seed, file, cache)


@ranks.on_first
def _known(file: Path, cache: ActivationsConfig) -> Evidence | None:
    """What an earlier job measured."""
    if cache.mode is not CacheMode.off:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return Evidence.from_dict(json.loads(file.read_text()))
    return None


@ranks.on_first
def _measured(
    found: StageFeatures,
    seconds: dict[str, float],
    evidence: Evidence,
    seed: int,
    file: Path,
    cache: ActivationsConfig,
) -> Evidence:
    """Figures of features, beside those that need none; remembered in a file."""
    measured = measure(
        found, evidence.amount, evidence.backbone, seed=seed, native_side=evidence.native_side
    )
    evidence = replace(
        measured,
        seconds={**seconds, **measured.seconds},
        warnings=(*evidence.warnings, *measured.warnings),
    )
    if cache.mode is not CacheMode.off:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as part:
                part.write_text(json.dumps(evidence.to_dict(), indent=1))
    return evidence


def features_of(
    built: BuiltModel, images: ImageDataModule, cache: ActivationsConfig, rows: pd.DataFrame
) -> Rows:
    """What the head reads of some rows of the table, (N, D), through the activation cache.

    Args:
        built: Model; left as it is.
        images: Give preprocessing and files.
        cache: `cache.*`.
        rows: Of the table, each content once.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    once = _Pass(built, images, cache, device)
    activations = Activations(cache, built, images)
    with _left_as_it_is(built.model), contextlib.closing(activations):
        freeze(built.model, built.stages, phase := once.phase())
        return once.features(activations, phase, rows)[0]


def _key(built: BuiltModel, images: ImageDataModule, seed: int) -> str:
    table = images.table
    known = {"label", "labels", "target"} & {*table.rows}
    rows = table.rows[["sha256", *sorted(known), "split", "width", "height"]]
    facts = {
        "version": VERSION,
        "model": built.name,
        "weights": built.weights.sha256,
        "model_args": built.model_args,
        "preprocessing": images.preprocessing.to_dict(),
        "images": rows.sort_values(["sha256", "split"]).to_csv(index=False),
        "classes": len(images.table.classes),
        "seed": seed,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


# --- the pass -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pass:
    """All that needs the network.

    Args:
        built: Model; left as it is.
        images: Give preprocessing and files.
        cache: `cache.*`.
        device: Where to compute.
    """

    built: BuiltModel
    images: ImageDataModule
    cache: ActivationsConfig
    device: torch.device

    def run(self, rows: pd.DataFrame) -> tuple[StageFeatures, dict[str, float]]:
        """Features of some rows of the table, and the seconds that it took."""
        seconds: dict[str, float] = {}
        activations = Activations(self.cache, self.built, self.images)
        with _left_as_it_is(self.built.model), contextlib.closing(activations):
            freeze(self.built.model, self.built.stages, phase := self.phase())
            began = time.perf_counter()
            features, stages, forward = self.features(activations, phase, rows)
            seconds["pass"] = time.perf_counter() - began
            drift, flipped = ranks.on_first(self._of_few)(rows, forward, seconds)
        stages = {k: v for k, v in stages.items() if not _same(v, features)}
        found = StageFeatures(
            labels=classes_of(self.images.table, rows),
            stages=stages,
            features=features,
            flipped=flipped,
            logits=self._logits(features),
            drift=drift,
        )
        return found, {part: round(value, 3) for part, value in seconds.items()}

    def _of_few(
        self, rows: pd.DataFrame, forward: Forward, seconds: dict[str, float]
    ) -> tuple[Drift | None, dict[str, Rows]]:
        """What some images tell: the drift of BatchNorm, and features of their mirror images."""
        began = time.perf_counter()
        batches = self._batches(rows[:DRIFT_IMAGES])
        drift = batch_norm_drift(self.built.model, batches, self.device)
        seconds["drift"] = time.perf_counter() - began
        began = time.perf_counter()
        flipped = self._flipped(rows[:FLIPPED], forward)
        seconds["flipped images"] = time.perf_counter() - began
        return drift, flipped

    def phase(self) -> Phase:
        """That of a linear probe: what is cached for it is found again by every first phase."""
        config = FinetuneConfig(phases={"head": PhaseConfig(train_stages=0)})
        sizes = {"train_images": len(self.images.table.split("train"))}
        plan = build_plan(config, self.built, **sizes, batch_size=self.images.batch_size)
        return plan.phases[0]

    def features(
        self, activations: Activations, phase: Phase, rows: pd.DataFrame
    ) -> tuple[Rows, dict[str, Rows], Forward]:
        """Features of rows, those of each stage, and how to compute more."""
        if self.cache.mode is not CacheMode.off:
            try:
                clean = activations.clean(phase, self.device, rows, more=2 * FLIPPED)
            except CacheError as error:
                display.say(f"warning: {error}")
            except SplitError:
                pass  # the hooks see the same
            else:
                features, stages = _read(clean)
                return features, stages, _traced(clean)
        share = ranks.world() if len(rows) >= ranks.world() else 1
        own = rows[ranks.rank() % share :: share]
        parts = [self._hooked(batch) for batch in self._batches(own)]
        features = torch.cat([f for f, _ in parts]).numpy()
        stages = {n: torch.cat([s[n] for _, s in parts]).numpy() for n in parts[0][1]}
        found = ranks.gather((features, stages))[:share]
        whole = {n: _dealt([s[n] for _, s in found]) for n in stages}
        return _dealt([f for f, _ in found]), whole, self._hooked

    def _batches(self, rows: pd.DataFrame) -> Iterator[Tensor]:
        """Clean images (B, 3, H, W) of rows of the table."""
        data = self.images
        dataset = ViewDataset(
            data.table.images(rows),
            rows["sha256"].tolist(),
            [CLEAN],
            augment=data.augment,
            preprocessing=data.preprocessing,
            seed=data.seed,
            max_pixels=data.max_pixels,
        )
        for batch in view_loader(dataset, batch_views=BATCH, workers=data.num_workers):
            yield batch["images"][:, 0].contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def _hooked(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features of a model that cannot be traced, or whose cache is off: hooks catch them."""
        model: Any = self.built.model
        read: list[Tensor] = []
        stages: dict[str, Tensor] = {}
        classifier = model.get_classifier()
        heads = classifier if isinstance(classifier, (tuple, list)) else [classifier]
        hooks = [
            head.register_forward_pre_hook(lambda _, args: read.append(_pooled(args[0])))
            for head in heads
            if isinstance(head, nn.Module)
        ]
        info = getattr(model, "feature_info", None)
        entries = info if isinstance(info, list) else []
        some = np.linspace(0, len(entries) - 1, min(len(entries), MOST_STAGES)).round().astype(int)
        for number, index in enumerate(some):
            with contextlib.suppress(AttributeError, KeyError):  # no such module: one stage less
                module = model.get_submodule(entries[index]["module"])
                hook = _keeping(stages, f"stage{number}", entries[index]["num_chs"])
                hooks.append(module.register_forward_hook(hook))
        try:
            with evaluating(model, self.device):
                model(images.to(self.device))
        finally:
            for handle in hooks:
                handle.remove()
        return torch.cat(read, dim=1).float().cpu(), {k: stages[k] for k in sorted(stages)}

    def _flipped(self, rows: pd.DataFrame, forward: Forward) -> dict[str, Rows]:
        found: dict[str, list[Tensor]] = {name: [] for name in FLIPS}
        for batch in self._batches(rows):
            for name, dim in FLIPS.items():
                found[name].append(forward(batch.flip(dim))[0])
        return {name: torch.cat(parts).numpy() for name, parts in found.items()}

    def _logits(self, features: Rows) -> Rows | None:
        """What the pretraining's own head says of the features."""
        head = pretrained_head(self.built)
        if head is None or head[0].shape[1] != features.shape[1]:
            return None
        weight, bias = head
        logits: Rows = nn.functional.linear(torch.from_numpy(features), weight, bias).numpy()
        return logits


def _dealt(parts: Sequence[Rows]) -> Rows:
    """Rows that were dealt out in turn, in their order again."""
    found = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), np.float32)
    for place, part in enumerate(parts):
        found[place :: len(parts)] = part
    return found


def _read(clean: Clean) -> tuple[Rows, dict[str, Rows]]:
    every = np.arange(len(clean.rows))
    values = [_pooled(clean.rows.gather(name, every)) for name in clean.values]
    stages = {stage: clean.rows.gather(f, every).numpy() for stage, f in clean.pooled.items()}
    return torch.cat(values, dim=1).numpy(), stages


def _traced(clean: Clean) -> Forward:
    def forward(images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        (outputs,) = clean.engine.run([images.contiguous(memory_format=torch.channels_last)])
        return torch.cat([_pooled(v) for v in outputs[: len(clean.values)]], dim=1), {}

    return forward


def _pooled(values: Tensor) -> Tensor:
    """(N, D) of what a head reads: some convolve maps, or read all tokens."""
    if values.ndim == 4:
        return values.mean(dim=(2, 3))
    return values.mean(dim=1) if values.ndim == 3 else values


def _keeping(stages: dict[str, Tensor], name: str, channels: int) -> Callable[..., None]:
    """A hook that keeps the mean over space or tokens of a module's output."""

    def hook(_: nn.Module, _args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or channels not in output.shape[1:]:
            return
        first = output.ndim == 4 and output.shape[1] == channels
        dims = [d for d in range(1, output.ndim) if d != (1 if first else output.ndim - 1)]
        stages[name] = (output.mean(dims) if dims else output).float().cpu()

    return hook


def _same(a: Rows, b: Rows) -> bool:
    """Whether a stage is what the head reads: it would count twice."""
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-3, atol=1e-5)


@contextmanager
def _left_as_it_is(model: nn.Module) -> Iterator[None]:
    """What trains and all modes are afterwards as they were."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training
