"""What makes a bundle an MLflow model: `MLmodel`, its code and its requirements."""

from __future__ import annotations

import base64
import io
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import TYPE_CHECKING, Any

from tl import bundle
from tl.bundle import Outputs, Preprocessing, open_image

if TYPE_CHECKING:
    from mlflow.models import ModelSignature


def write_mlmodel(folder: Path, preprocessing: Preprocessing, outputs: Outputs) -> None:
    """`MLmodel` with signature and input example, its code and its requirements; no torch."""
    from mlflow import pyfunc
    from mlflow.models import Model

    code = folder / "code" / "tl_bundle"
    source = Path(bundle.__file__).parent
    shutil.copytree(source, code, ignore=shutil.ignore_patterns("__pycache__"))
    needs = ("mlflow", "numpy", "onnxruntime", "pandas", "pillow")
    pins = "".join(f"{name}=={version(name)}\n" for name in needs)
    (folder / "requirements.txt").write_text(pins)
    (folder / "python_env.yaml").write_text(
        f"python: {python_version()}\nbuild_dependencies:\n- pip\n"
        "dependencies:\n- -r requirements.txt\n"
    )
    model = Model(
        signature=_signature(outputs),
        saved_input_example_info=_write_example(folder, preprocessing),
    )
    pyfunc.add_to_model(model, loader_module="tl_bundle", code="code", python_env="python_env.yaml")
    model.save(folder / "MLmodel")


def _signature(outputs: Outputs) -> ModelSignature:
    """An image in, and out what `tl.bundle.serving` gives for the task.

    Any type: text (base64, a path) and arrays of every size go into one column, and MLflow's
    protocol knows no type for that. `serving` checks what comes.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import AnyType, Array, Map

    shares = ColSpec(Map(DataType.double), "probabilities")
    columns: dict[str, list[Any]] = {
        "single": [ColSpec(DataType.string, "label"), ColSpec(DataType.double, "score"), shares],
        "multi": [
            ColSpec(Array(DataType.string), "labels"),
            ColSpec(Array(DataType.double), "scores"),
            shares,
        ],
        "regression": [ColSpec(DataType.double, "value")],
    }
    if outputs.abstain is not None:
        columns["single"].insert(2, ColSpec(DataType.boolean, "sure"))
    inputs = Schema([ColSpec(AnyType(), "image")])  # type: ignore[no-untyped-call]
    return ModelSignature(inputs=inputs, outputs=Schema(columns[outputs.task]))


def _write_example(folder: Path, preprocessing: Preprocessing) -> dict[str, str]:
    """One golden image as base64 text, at the size of the network so that it stays small."""
    image = next(p for p in sorted((folder / "golden").iterdir()) if p.name != "expected.json")
    png = io.BytesIO()
    preprocessing.resize(open_image(image)).save(png, "PNG")
    table = {"columns": ["image"], "data": [[base64.b64encode(png.getvalue()).decode()]]}
    (folder / "input_example.json").write_text(json.dumps(table))
    (folder / "serving_input_example.json").write_text(json.dumps({"dataframe_split": table}))
    return {
        "artifact_path": "input_example.json",
        "type": "dataframe",
        "pandas_orient": "split",
        "serving_input_path": "serving_input_example.json",
    }
