"""The model card: the README.md of a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tl.bundle import Outputs, Preprocessing
from tl.export.sealing import SealReport

TIMM = """\
With timm, to go on in PyTorch:

```python
import timm
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
image = transform(Image.open("photo.jpg").convert("RGB"))
print(ANSWER)
```
"""
NOT_TIMM = """\
This bundle does not load in timm, whose format has no place for a head on features of all stages.
To go on in PyTorch, give the file to another run of `tl`: it takes the backbone out of it.

```sh
tl train data.root=IMAGES model.name=BACKBONE model.weights=model.safetensors
```
"""
ANSWERS = {
    "single": "model(image[None]).softmax(-1))  # order of classes.txt",
    "multi": "model(image[None]).sigmoid())  # order of classes.txt; thresholds in bundle.json",
    "regression": "model(image[None]) * STD + MEAN)  # in units of TARGET",
}
MOST_THRESHOLDS = 40  # classes whose thresholds the card shows
USE = """\
## Use it

With `tl`, for a file, a folder or a glob pattern:

```sh
tl predict bundle=. source=photo.jpg
```

PYTORCH

With ONNX Runtime, without torch and without `tl`
(`pip install onnxruntime numpy pillow pandas`):

```python
import sys

sys.path.insert(0, "code")
from tl_bundle import Bundle

bundle = Bundle.load(".")
print(bundle.predict(["photo.jpg"]))
bundle.verify()  # the golden images still give the answers of the export
```

With MLflow, in Python or as a server that takes base64 text:

```python
import base64
import mlflow

image = base64.b64encode(open("photo.jpg", "rb").read()).decode()
print(mlflow.pyfunc.load_model(".").predict({"image": [image]}))
```

```sh
mlflow models serve -m . --env-manager local --port 5001
printf '{"dataframe_records": [{"image": "%s"}]}' "$(base64 -w0 photo.jpg)" |
  curl -H 'Content-Type: application/json' --data @- http://127.0.0.1:5001/invocations
```

The commands and code above are meant for this folder as the working directory.
"""


@dataclass(frozen=True)
class ModelCard:
    """What a person must know about a model before using it.

    Attributes:
        title: First line of the card.
        data: What it was trained on: counts, hash; nested mappings become tables.
        backbone: timm name.
        weights: Where the backbone's weights come from.
        weights_sha256: Their hash; None for random weights.
        licence: Of those weights; None where it is not known.
        method: Of transfer.
        plan: The phases in words.
        metrics: Name (as in metrics.json) to value.
        seed: Of the run.
        created: Date and time.
        versions: Package to version.
        limits: One sentence each, besides those that hold for every classifier.
        head: What the head reads, where that is more than the last features.
    """

    title: str
    data: Mapping[str, Any]
    backbone: str
    weights: str
    weights_sha256: str | None
    licence: str | None
    method: str
    plan: str
    metrics: Mapping[str, float]
    seed: int
    created: str
    versions: Mapping[str, str] = field(default_factory=dict)
    limits: Sequence[str] = ()
    head: str = ""


def model_card(
    card: ModelCard,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    report: SealReport,
    outputs: Outputs | None = None,
    *,
    in_timm: bool = True,
) -> str:
    """Markdown text of the card.

    Args:
        card: What a person must know.
        classes: Names in the order of the outputs.
        preprocessing: What the weights expect.
        report: Of the seal.
        outputs: What the outputs mean; default: one class an image.
        in_timm: Whether the bundle loads in timm; the card says how, or that it does not.
    """
    outputs = outputs or Outputs()
    facts = _facts(card, classes, preprocessing, report, outputs)
    limits = [
        *_task_limits(outputs, classes),
        "`golden/` holds images of the training set: mind their rights when you pass it on.",
        *card.limits,
    ]
    answer = ANSWERS[outputs.task]
    if outputs.temperature != 1:
        answer = answer.replace("model(image[None])", "(model(image[None]) / TEMPERATURE)")
        answer = answer.replace("TEMPERATURE", f"{outputs.temperature:.6g}")
    answer = answer.replace("STD", f"{outputs.std:.9g}")
    answer = answer.replace("MEAN", f"{outputs.mean:.9g}").replace("TARGET", classes[0])
    timm = TIMM.replace("ANSWER)", answer)
    pytorch = timm if in_timm else NOT_TIMM.replace("BACKBONE", card.backbone)
    parts = [
        f"# {card.title}",
        _table(facts, ("what", "value")),
        "## Data",
        _data(card.data),
        "## Plan",
        card.plan.strip(),
        "## Metrics",
        _table({k: _number(v) for k, v in card.metrics.items()}, ("metric", "value")),
        *_thresholds(outputs, classes),
        "## Limits",
        "\n".join(f"- {limit}" for limit in limits),
        USE.strip().replace("PYTORCH", pytorch.strip()),
        "## Versions",
        ", ".join(f"{name} {v}" for name, v in card.versions.items()) or "not recorded",
    ]
    return "\n\n".join(parts) + "\n"


def _facts(
    card: ModelCard,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    report: SealReport,
    outputs: Outputs,
) -> dict[str, str]:
    width, height = preprocessing.input_size[2], preprocessing.input_size[1]
    return {
        "backbone": card.backbone,
        "weights": card.weights,
        "weights sha256": card.weights_sha256 or "none",
        "licence of the weights": card.licence or "not stated: ask whoever gave you the weights",
        "input": f"{width} x {height} pixels, {preprocessing.interpolation}, "
        f"{preprocessing.crop_mode} crop {preprocessing.crop_pct:g}",
        **_task_facts(outputs, classes),
        "method": card.method,
        **({"head": card.head} if card.head else {}),
        "seed": str(card.seed),
        "created": card.created,
        "sealed": f"{report.images} images, largest difference of {report.what} "
        f"{report.largest_difference:.1e} (tolerance {report.tolerance:g})",
    }


def _task_facts(outputs: Outputs, classes: Sequence[str]) -> dict[str, str]:
    if outputs.task == "regression":
        return {
            "predicts": f"one number an image: {classes[0]}",
            "numbers of train": f"mean {outputs.mean:.4g}, standard deviation {outputs.std:.4g}",
        }
    if outputs.task == "multi":
        return {
            "predicts": "any number of labels an image: those above their thresholds",
            "labels": f"{len(classes)}: {_shortened(classes)}",
            **_score_facts(outputs),
        }
    return {"classes": f"{len(classes)}: {_shortened(classes)}", **_score_facts(outputs)}


def _score_facts(outputs: Outputs) -> dict[str, str]:
    """What the scores are worth."""
    facts = {"scores": "as the network was trained; not calibrated"}
    if outputs.temperature != 1:
        facts["scores"] = f"calibrated: logits divided by {outputs.temperature:.4g}, chosen on val"
    if outputs.abstain:
        facts["sure answers"] = outputs.abstain.note or f"scores of {outputs.abstain.threshold}"
    return facts


def _task_limits(outputs: Outputs, classes: Sequence[str]) -> list[str]:
    first = {
        "single": f"It knows {len(classes)} classes and answers with one of them for any image "
        "whatever.",
        "multi": f"It knows {len(classes)} labels; what else is on an image it cannot say.",
        "regression": "It answers with a number for any image whatever, and is least sure beyond "
        "the numbers of its training.",
    }[outputs.task]
    what = "Numbers" if outputs.task == "regression" else "Scores"
    return [first, f"{what} are trustworthy only for images like those it was trained on."]


def _thresholds(outputs: Outputs, classes: Sequence[str]) -> list[str]:
    if outputs.task != "multi":
        return []
    shown = dict(zip(classes[:MOST_THRESHOLDS], outputs.thresholds, strict=False))
    rows = {name: f"{value:.3f}" for name, value in shown.items()}
    parts = [
        "## Thresholds",
        "The probability from which a label counts as present, chosen on val.",
    ]
    parts.append(_table(rows, ("label", "threshold")))
    if len(classes) > MOST_THRESHOLDS:
        parts.append(f"And {len(classes) - MOST_THRESHOLDS} more, in `bundle.json`.")
    return parts


def _shortened(names: Sequence[str], most: int = 20) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _table(rows: Mapping[str, object], head: Sequence[str]) -> str:
    if not rows:
        return "none"
    lines = [f"| {_cell(k)} | {_cell(v)} |" for k, v in rows.items()]
    return "\n".join([f"| {' | '.join(head)} |", "| --- " * len(head) + "|", *lines])


def _data(data: Mapping[str, Any]) -> str:
    """Plain values in one table; a mapping of mappings (split -> class -> images) in its own."""
    plain = {
        key: _shortened([str(v) for v in value]) if isinstance(value, (list, tuple)) else value
        for key, value in data.items()
        if not isinstance(value, Mapping)
    }
    parts = [_table(plain, ("data", "value"))] if plain else []
    for key, value in data.items():
        if isinstance(value, Mapping):
            rows = {
                k: _shortened([f"{a} {b}" for a, b in v.items()]) if isinstance(v, Mapping) else v
                for k, v in value.items()
            }
            parts.append(_table(rows, (key, "value")))
    return "\n\n".join(parts) or "not recorded"
