"""What else an advice tells: the data, the plan, its cost, more images, and how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl.advice import forecast
from tl.advice.ranking import Candidate
from tl.advice.sections import percent, points
from tl.config import AdviseConfig, DataConfig, FinetuneConfig, PhaseConfig
from tl.decision import Cost, Decision
from tl.decision.evidence import Evidence, Score
from tl.sections import Section, duration

ALL = -1
# Full fine-tuning minus linear probe on VTAB-1k (ViT-B/16, 1,000 images each), by the corrected
# accuracy of the probe; computed from the table in the README of V-PETL Bench (Xin et al. 2024).
UNFREEZING = {
    False: "on 9 public sets with such a probe, fine-tuning everything gained 8.5 points or more",
    True: (
        "on 10 public sets with such a probe, fine-tuning everything gained 1.2 points in the "
        "median, between -12.2 and +15.6"
    ),
}


def data_facts(chosen: Candidate) -> Section:
    """Amount, drift, flips, licence: what no other section shows."""
    evidence = chosen.evidence
    amount, similarity = evidence.amount, evidence.similarity
    rows = {
        "training images": f"{amount.images:,} in {amount.classes:,} classes; a class has "
        f"{amount.per_class:g} (median), {amount.least:,} at least, {amount.most:,} at most",
        "validation images": f"{amount.val_images:,}, {amount.val_least:,} of the smallest class",
    }
    if evidence.native_side:
        rows["size of the images"] = (
            f"{evidence.native_side:.0f} pixels (median side); the network sees "
            f"{evidence.backbone.input_size}"
        )
        if chosen.decision.image_size:
            rows["size of the images"] += f", in training {chosen.decision.image_size}"
    if amount.effective_rank is not None:
        rows["effective rank"] = (
            f"{amount.effective_rank:.0f}: in so many directions the last features differ"
        )
    if similarity is not None:
        rows["depth gap"] = (
            f"{points(similarity.depth_gap)} points: the best earlier stage minus the last features"
        )
        rows["gain of all stages"] = (
            f"{points(similarity.concat_gain)} points over the last features"
        )
        if similarity.drift is not None:
            floor, error = similarity.drift_floor, similarity.drift_error
            low, high = Score(similarity.drift, error or 0.0).interval()
            rows["drift"] = (
                f"{similarity.drift:.3f}"
                + (f" ({low:.3f} to {high:.3f})" if error else "")
                + " between these images and the statistics that BatchNorm keeps of the pretraining"
                + (f"; {floor:.3f} is chance" if floor else "")
            )
        if similarity.source_energy is not None:
            energy = similarity.source_energy
            low, high = energy.interval()
            rows["energy"] = f"{energy.value:.1f} ({low:.1f} to {high:.1f}) nats of the old head"
        rows["labels at random"] = (
            f"{100 * similarity.chance:.0f} % of shuffled labels are told apart as well as yours"
        )
    for way, change in (
        ("left-right", evidence.flips.horizontal),
        ("up-down", evidence.flips.vertical),
    ):
        if change is not None:
            rows[f"{way} flip"] = f"{points(change)} points of quality on flipped images"
    rows["weights"] = f"{chosen.weights}; licence: {chosen.licence}"
    for name, value in evidence.scores.items():
        rows[name] = f"{value:.3f} (compares backbones on the same images only)"
    return _facts("the figures", rows)


def plan_table(decision: Decision, stages: Sequence[str]) -> Section:
    """The phases with the settings that differ between methods."""
    config = decision.finetune
    rows = [_phase(name, phase, config, stages) for name, phase in config.phases.items()]
    flips = [
        word for word, safe in (("left-right", decision.hflip), ("up-down", decision.vflip)) if safe
    ]
    note = (
        f"Augmentation: {decision.augment}, flips: {' and '.join(flips) or 'none is safe'}. "
        f"BatchNorm: {_word(config.batch_norm)}. Weight decay: {config.weight_decay:g}."
    )
    if decision.image_size:
        note += f" Images: {decision.image_size} pixels."
    return Section(f"the plan: {decision.method}", "table", tuple(rows), note)


def _phase(
    name: str, phase: PhaseConfig, config: FinetuneConfig, stages: Sequence[str]
) -> dict[str, Any]:
    def of(key: str) -> Any:
        own = getattr(phase, key)
        return getattr(config, key) if own is None else own

    body = [stage for stage in stages if stage != "head"]
    last = phase.train_stages
    trained = body if last == ALL else body[max(len(body) - last, 0) :]
    what = {"all": "", "norm": " (norm layers)", "lora": f" (LoRA, rank {phase.lora_rank})"}
    names = "head" if not trained else f"{_span(trained)}{what[phase.trains.value]} and head"
    keeps = [w for w, on in (("EMA", of("ema")), ("mix with before", of("average"))) if on]
    select = "lowest val loss" if of("select").value == "best" else "last epoch"
    return {
        "phase": name,
        "trains": names,
        "epochs": f"up to {of('epochs')}" if of("patience") else f"{of('epochs')}",
        "rate of the head": f"{of('head_lr'):.0e}".replace("e-0", "e-"),
        "per stage": f"1/{of('lr_ratio'):g}" if trained else "",
        "keeps": ", ".join([select, *keeps]),
    }


def _span(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]}–{names[-1]}"


def more_images(evidence: Evidence) -> Section:
    """What more images and more trained stages may bring."""
    rows = [{"text": forecast.sentence(evidence)}]
    similarity = evidence.similarity
    if similarity is not None:
        good = similarity.quality.value >= 0.5
        change = points(similarity.concat_gain)
        rows.append(
            {
                "text": "Unfreezing: what it adds is not measured before training. All stages "
                f"instead of the last features alone make a linear classifier {change} points "
                f"better here; {UNFREEZING[good]} (VTAB-1k, 1,000 images each, ViT-B/16; from the "
                "tables of V-PETL Bench)."
            }
        )
    return Section("what would bring more", "list", tuple(rows))


def learning_curve(evidence: Evidence) -> Section:
    """Quality of the probe by number of images: measured up to now, expected beyond."""
    line = forecast.curve(evidence)
    if line is None:
        return Section("learning curve", "curve", ())
    half = Score(
        line.quality.value - line.more_data.value, line.more_data.error + line.quality.error
    )
    rows = [_point(line.images // 2, half, measured=True)]
    rows.append(_point(line.images, line.quality, measured=True))
    if (before := line.half_data) is not None:
        quarter = Score(half.value - before.value, half.error + before.error)
        rows.insert(0, _point(line.images // 4, quarter, measured=True))
    if line.more_data.interval()[0] > 0:
        ahead = (line.images * share // 4 for share in (5, 6, 7, 8))
        rows += [_point(n, line.at(n), measured=False) for n in ahead]
    note = "Expected values follow a power law through measured ones, up to twice the images."
    return Section("learning curve", "curve", tuple(rows), "" if rows[-1]["measured"] else note)


def _point(images: int, score: Score, *, measured: bool) -> dict[str, Any]:
    low, high = score.interval()
    return {
        "name": f"{images:,} images",
        "images": images,
        "value": score.value,
        "low": low,
        "high": min(high, 1.0),
        "text": percent(score),
        "measured": measured,
    }


def cost_facts(cost: Cost, evidence: Evidence) -> Section:
    """Time and memory, as an estimate."""
    spent = evidence.seconds
    rows = {
        "time": f"about {duration(cost.seconds)} at most for "
        + ", ".join(f"{name} {duration(s)}" for name, s in cost.phase_seconds.items()),
        "memory": f"about {cost.memory_bytes / 1e9:.1f} GB at the peak",
        "trains": f"{cost.parameters:,} of {evidence.backbone.parameters:,} parameters at most",
        "speed": f"{cost.images_per_second:,.0f} images/s forward, {cost.decode_ms:.1f} ms to read "
        "one image",
    }
    if spent:
        rows["this advice"] = "measured in " + ", ".join(
            f"{duration(seconds)} {part}" for part, seconds in spent.items() if seconds >= 0.05
        )
    return Section(
        "time and memory (estimates)",
        "facts",
        tuple({"name": k, "text": v} for k, v in rows.items()),
        "From a few images on this machine: it may be half or twice as much. An early stop makes "
        "it shorter; reading the images, the verified export and the report come on top.",
    )


def next_steps(config: AdviseConfig, chosen: Candidate, folder: Path) -> Section:
    """The commands that follow."""
    by_plan = f"{train_command(folder)} finetune.epochs=5"
    asked = shlex.join(
        [
            *_data_words(config.data),
            f"model.name={chosen.name}",
            *([] if config.model.weights == "hub" else [f"model.weights={config.model.weights}"]),
        ]
    )
    rows = {
        "train by this plan": train_command(folder),
        "change something": by_plan,
        "check the decision": f"tl train {asked} finetune=auto finetune.confirm=true",
        "files": f"advice.html, advice.md, plan.yaml, evidence.json, decision.json in {folder}",
    }
    return _facts(f"how to go on with {chosen.decision.method}", rows)


def _data_words(data: DataConfig) -> list[str]:
    """What tells the same images on a command line."""
    words = [f"data.root={data.root}"]
    if data.table is not None:
        words.append(f"data.table={data.table}")
    if data.task != "auto":
        words.append(f"data.task={data.task}")
    for name, column in vars(data.columns).items():
        value = f"[{','.join(column)}]" if isinstance(column, list) else column
        words += [] if value is None else [f"data.columns.{name}={value}"]
    return words


def train_command(folder: Path) -> str:
    """The command that trains by the plan in a folder."""
    return shlex.join(["tl", "train", "--config-dir", str(folder), "--config-name", "plan"])


def _facts(title: str, rows: dict[str, str]) -> Section:
    return Section(title, "facts", tuple({"name": k, "text": v} for k, v in rows.items()))


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))
