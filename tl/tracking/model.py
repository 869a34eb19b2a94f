"""A bundle as an MLflow model that anybody can load, without tl and without torch."""

from __future__ import annotations

import base64
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from types import MappingProxyType

from tl.bundle import seal_sha256

CODE = "tl_bundle"
SEAL = "tl.bundle_sha256"  # tag of a logged model: hash of the bundle's files
SERVING_PACKAGES = ("mlflow", "numpy", "onnxruntime", "pandas", "pillow")


def log_bundle(
    bundle: Path,
    example: Path | None = None,
    name: str = "bundle",
    tags: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Log a bundle into MLflow's active run.

    Args:
        bundle: Folder of the bundle.
        example: An image file as the input example; None takes the bundle's own, a small one.
        name: Name of the model in the run.
        tags: Of the model.

    Returns:
        Address of the model, `models:/<id>`, as `mlflow.pyfunc.load_model` takes it.
    """
    import mlflow
    import pandas as pd
    from mlflow.models import Model

    if example is None:
        own = json.loads((bundle / "input_example.json").read_text(encoding="utf-8"))
        text = own["data"][0][0]
    else:
        text = base64.b64encode(example.read_bytes()).decode("ascii")
    signature = Model.load(str(bundle)).signature
    logger = logging.getLogger("mlflow")
    level = logger.level
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            info = mlflow.pyfunc.log_model(
                name=name,
                tags={SEAL: seal_sha256(bundle), **tags},
                loader_module=CODE,
                data_path=str(bundle),
                code_paths=[str(_code(bundle, Path(folder)))],
                signature=signature,
                input_example=pd.DataFrame({"image": [text]}),
                pip_requirements=[f"{p}=={metadata.version(p)}" for p in SERVING_PACKAGES],
            )
        finally:
            logger.setLevel(level)
    return str(info.model_uri)


def _code(bundle: Path, folder: Path) -> Path:
    """The reader's code under the name that MLflow imports: the bundle's own, else this one's."""
    own = bundle / "code" / CODE
    if own.is_dir():
        return own
    source = Path(__file__).resolve().parents[1] / "bundle"
    ignored = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(source, folder / CODE, ignore=ignored))
