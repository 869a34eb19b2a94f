"""The data of a run in MLflow's own form, so that its pages show what was trained and judged on."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from mlflow import MlflowClient

CONTEXTS = {"train": "training", "val": "validation", "test": "testing"}
DIGEST = 36  # characters, MLflow's limit
COLUMNS = [
    {"type": "string", "name": "image", "required": True},
    {"type": "string", "name": "label", "required": True},
]  # of the table of images, in the form that MLflow's pages read
MOST_CLASSES = 200  # in a profile, which pages show


def dataset_inputs(fingerprint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One data set for each split, as plain values.

    Args:
        fingerprint: Of the data, as `data.json` has it.

    Returns:
        Arguments of MLflow's `Dataset`, and `context`. The digest is of images and labels.
    """
    root = str(fingerprint.get("root", ""))
    name = Path(root).name or "data"
    return [
        {
            "name": f"{name} · {split}",
            "digest": about["sha256"][:DIGEST],
            **_source(root),
            "schema": json.dumps({"mlflow_colspec": COLUMNS}),
            "profile": json.dumps(_profile(fingerprint, split)),
            "context": CONTEXTS[split],
        }
        for split, about in fingerprint.get("splits", {}).items()
    ]


def log_inputs(client: MlflowClient, run_id: str, datasets: list[dict[str, Any]]) -> None:
    """Write the data sets of a run; those that it has already stay as they are."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    inputs = []
    for values in datasets:
        rest = {key: value for key, value in values.items() if key != "context"}
        tags = [InputTag(MLFLOW_DATASET_CONTEXT, values["context"])]
        inputs.append(DatasetInput(Dataset(**rest), tags))
    try:
        client.log_inputs(run_id, datasets=inputs)
    except MlflowException as error:
        # Jobs that begin together make the same data set; the second then finds that of the first.
        if not re.search(r"(?i)unique|duplicate", str(error)):
            raise
        client.log_inputs(run_id, datasets=inputs)


def _source(root: str) -> dict[str, str]:
    """Where the images are: a folder, a data set of the hub, or an address."""
    if root.startswith("hub:"):
        return {"source_type": "hugging_face", "source": json.dumps({"path": root[4:]})}
    kind = urlsplit(root).scheme or "local"
    if kind in ("http", "https"):
        return {"source_type": "http", "source": json.dumps({"url": root})}
    return {"source_type": kind, "source": json.dumps({"uri": root})}


def _profile(fingerprint: Mapping[str, Any], split: str) -> dict[str, Any]:
    counts = dict(fingerprint.get("counts", {}).get(split, {}))
    facts = {"images": fingerprint["splits"][split]["images"], "classes": len(counts)}
    if len(counts) <= MOST_CLASSES:
        facts["images_of_each_class"] = counts
    return facts
