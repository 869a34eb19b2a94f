"""How the model came about: data and audit, evidence and decision, phases with rates and curves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from tl.advice.details import learning_curve
from tl.config import Task
from tl.pages import address
from tl.report.files import HISTORY, MODEL, PROGRESS, RunFiles
from tl.report.parts import WORDS, Block, Part, facts, first_up, listed, number, step
from tl.sections import duration

CURVES = "pictures/learning_curves.png"
MOST_COUNTED = 60  # classes whose images are counted
MOST_NAMED = 5  # files of a finding
EARLY = 0.02  # relative fall of the loss in the last quarter of a phase that has not settled


def data(run: RunFiles) -> Part:
    """Images of each split and class, and what the audit found."""
    known = run.model.get("data", {})
    counts: dict[str, dict[str, int]] = known.get("counts", {})
    labels = "labels" if run.task is Task.multi else "classes"
    rows = {
        "folder": str(known.get("root", run.config.data.root)),
        "images": f"{known.get('images', 0):,}",
        labels: "" if run.task is Task.regression else f"{len(run.classes):,}",
        "number": run.classes[0] if run.task is Task.regression and run.classes else "",
        "fingerprint": str(known.get("sha256", ""))[:16],
    }
    blocks = [facts(rows)]
    if counts and run.task is not Task.regression and len(run.classes) <= MOST_COUNTED:
        cells = [[n, *(f"{counts[s].get(n, 0):,}" for s in counts)] for n in run.classes]
        columns = {labels[:-2] if labels == "classes" else "label": False}
        table = {"columns": columns | dict.fromkeys(counts, True), "rows": cells}
        blocks.append(Block("table", table, "images of each " + next(iter(columns))))
    audit = run.json("audit.json")
    findings = [
        step(f"{found['severity']}: {found['kind'].replace('_', ' ')}", _found(found))
        for found in audit.get("findings", [])
    ]
    if findings:
        blocks.append(Block("steps", findings, "what the audit found"))
    texts = [] if findings else [
        "The audit found nothing." if audit else "The images were not audited (audit=off)."
    ]  # fmt: skip
    if run.has("quarantined.csv"):
        left = len(pd.read_csv(run.path / "quarantined.csv"))
        texts.append(f"{left:,} images were left out: quarantined.csv says which, and why.")
    files = [MODEL, *(n for n in ("audit.json", "audit.html", "quarantined.csv") if run.has(n))]
    return Part("data", "the data", texts, blocks, files)


def _found(finding: Mapping[str, Any]) -> str:
    text = f"{finding['text']}. Remedy: {finding['remedy']}."
    names = listed((file["name"] for file in finding["files"]), MOST_NAMED)
    return f"{text} Such as {names}." if names else text


def decision(run: RunFiles) -> Part:
    """Why it was transferred so."""
    reasons = run.reasons()
    if not reasons or run.evidence is None:
        text = (
            f"The method was asked for (finetune={run.method}), so nothing was measured. "
            "finetune=auto measures the images and says why it chooses."
        )
        return Part("decision", "how it was transferred", [text], [], ["plan.json"])
    blocks = [Block("advice", part, part.title) for part in reasons]
    curve = learning_curve(run.evidence)
    if curve.rows:
        blocks.append(Block("advice", curve, curve.title))
    files = ["evidence.json", "decision.json", "advice.html"]
    text = "Measured and decided before the training, from the training images."
    return Part("decision", "evidence and decision", [text], blocks, files)


def phases(run: RunFiles) -> Part:
    """Phases with what each trained, its rates and what came of it; the curves."""
    planned = run.plan.get("phases", [])
    done = {phase["name"]: phase for phase in run.done}
    rates = phase_rates(run.history)
    score = {"acc": "accuracy", "map": "mAP", "mae": "mean error"}[run.headline]
    rows = []
    for phase in planned:
        result: dict[str, Any] = done.get(phase["name"], {})
        found = rates.get(phase["name"], {})
        epochs = (
            f"{result['epochs']} of {phase['epochs']}" if result else f"up to {phase['epochs']}"
        )
        rows.append(
            [phase["name"], listed(phase["trainable"], 6) + _kind(phase),
             f"{result['trainable_parameters']:,}" if result else "–",
             listed((f"{group} {rate:.1e}" for group, rate in found.items()), 6)
             or f"head {phase['head_lr']:.1e}",
             epochs, str(result.get("best_epoch", "–")),
             number(result["best_loss"]) if result else "–",
             number(result["best_score"]) if result else "–",
             duration(result["seconds"]) if result else "–"]
        )  # fmt: skip
    columns = {"phase": False, "trains": False, "parameters": True, "highest learning rates": False,
               "epochs": True, "best": True, "val loss": True, f"val {score}": True,
               "time": True}  # fmt: skip
    blocks = [Block("table", {"columns": columns, "rows": rows})]
    texts = [_kept(run)] + [str(note) for note in run.plan.get("notes", [])]
    files = ["plan.json", PROGRESS]
    if run.has(CURVES):
        text = (
            "Loss, score and learning rates over the epochs of all phases; circles are the best "
            "epoch of each."
        )
        picture = {"address": address((run.path / CURVES).read_bytes(), "image/png"), "text": text}
        blocks.append(Block("picture", picture))
        files += [CURVES, HISTORY]
    return Part("training", "training", texts, blocks, files)


def _kind(phase: dict[str, Any]) -> str:
    return {"norm": " (norm layers)", "lora": f" (LoRA, rank {phase.get('lora_rank')})"}.get(
        str(phase.get("trains")), ""
    )


def _kept(run: RunFiles) -> str:
    lost = [phase["name"] for phase in run.done if not phase.get("kept", True)]
    text = "Each phase keeps its best epoch on val, and the next one starts from there."
    if lost:
        names = f"phase {lost[0]}" if len(lost) == 1 else f"phases {listed(lost)}"
        text += f" {first_up(names)} made val no better, and what it did was taken back."
    return text


def phase_rates(history: pd.DataFrame | None) -> dict[str, dict[str, float]]:
    """Phase -> group of parameters -> highest learning rate that it had."""
    if history is None:
        return {}
    found: dict[str, dict[str, float]] = {}
    columns = [c for c in history.columns if str(c).startswith(("lr/", "lr-"))]
    for name, rows in history.groupby("phase", sort=False):
        groups: dict[str, float] = {}
        for column in columns:
            group = re.sub(r"^lr(?:/|-(?:[A-Za-z]+/)?(?=.))", "", str(column)).split("/")[0]
            highest = rows[column].max()
            if highest > 0:
                groups[group] = max(groups.get(group, 0.0), float(highest))
        found[str(name)] = groups
    return found


def unsettled(run: RunFiles) -> list[str]:
    """Phases that ended with their epochs while val was still getting better."""
    planned = {phase["name"]: phase for phase in run.plan.get("phases", [])}
    names = []
    for phase in run.done:
        plan = planned.get(phase["name"])
        if plan is None or phase["epochs"] < plan["epochs"] or phase["epochs"] < 4:
            continue
        late = phase["best_epoch"] > 0.9 * phase["epochs"]
        if late and run.history is not None and _falls(run.history, phase["name"]):
            names.append(str(phase["name"]))
    return names


def _falls(history: pd.DataFrame, phase: str) -> bool:
    """Whether the loss of val fell by more than a trifle over the last quarter of a phase."""
    losses = history.loc[history["phase"] == phase, "val/loss"].dropna().to_numpy()
    if len(losses) < 4:
        return False
    before = losses[: -max(len(losses) // 4, 1)].min()
    return bool(losses.min() < (1 - EARLY) * before)


def gap(run: RunFiles) -> tuple[float, float] | None:
    """Loss of train and of val at the epoch that was kept; None where it is not known."""
    if run.history is None or not run.done or "train/loss" not in run.history:
        return None
    last = run.done[-1]
    rows = run.history[run.history["phase"] == last["name"]]
    rows = rows[rows["epoch"] == last["best_epoch"]]
    if not len(rows):
        return None
    values = rows[["train/loss", "val/loss"]].max()
    return (float(values.iloc[0]), float(values.iloc[1])) if values.notna().all() else None


def settings(run: RunFiles) -> Part:
    """What it was made of: network, weights, preprocessing, settings; where everything is."""
    model, config = run.model, run.config
    spec, weights = model.get("preprocessing", {}), model.get("weights", {})
    size = spec.get("input_size", [0, 0, 0])
    rows = {
        "network": str(model.get("name", config.model.name)),
        "weights": f"{weights.get('source', '')} (sha256 {str(weights.get('sha256', ''))[:12]})",
        "licence of the weights": str(weights.get("licence") or ""),
        "preprocessing": f"{size[2]} x {size[1]}, {spec.get('interpolation')}, "
        f"{spec.get('crop_mode')} crop {spec.get('crop_pct', 0):g}" if spec else "",
        "seed": str(config.seed),
        "batch size": str(config.data.batch_size),
        "augmentation": str(config.augment.name),
        "made": str(model.get("created", "")),
    }  # fmt: skip
    record = run.json("run.json")
    where = {
        "run": str(run.path),
        "bundle": str(run.path / "bundle") if run.has("bundle") else "",
        "MLflow": _mlflow(record),
    }
    files = [MODEL, "config.yaml", *(["run.json"] if record else [])]
    return Part("settings", "settings and places", [], [facts(rows), facts(where, "where it is")],
                files)  # fmt: skip


def _mlflow(record: dict[str, Any]) -> str:
    uri, run_id = str(record.get("tracking_uri", "")), record.get("run_id")
    if not run_id:
        return ""
    if uri.startswith("http"):
        return f"{uri.rstrip('/')}/#/experiments/{record.get('experiment_id')}/runs/{run_id}"
    return f"run {run_id}: mlflow ui --backend-store-uri {uri}"


def counted(run: RunFiles) -> str:
    """`244 training, 153 validation images`."""
    counts = run.model.get("data", {}).get("counts", {})
    if run.task is Task.single:
        sizes = {s: sum(counts[s].values()) for s in counts}
        return ", ".join(f"{n:,} {WORDS[s]}" for s, n in sizes.items())
    judged = {
        s: int(run.metrics[f"{s}/images"]) for s in ("val", "test") if f"{s}/images" in run.metrics
    }
    rest = run.model.get("data", {}).get("images", 0) - sum(judged.values())
    return ", ".join(f"{n:,} {WORDS[s]}" for s, n in ({"train": rest} | judged).items() if n > 0)
