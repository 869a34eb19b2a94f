from __future__ import annotations

import copy
import dataclasses
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from exporting import (
    CARD,
    CLASSES,
    export,
    files,
    make_photos,
    network,
    preprocessing_of,
    torch_reference,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch import nn

from tl.bundle import Bundle, Preprocessing
from tl.export import ExportError, SealReport, seal


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    return make_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return network("test_resnet")


@pytest.fixture(scope="module")
def sealed(model, photos, tmp_path_factory) -> tuple[Path, SealReport]:
    """A good bundle; tests that change it work on a copy."""
    folder = tmp_path_factory.mktemp("run with spaces") / "bundle"
    return folder, export(folder, model, photos)


@pytest.fixture
def tampered(sealed, tmp_path) -> Path:
    return shutil.copytree(sealed[0], tmp_path / "bundle")


# --- the folder ---------------------------------------------------------------------------------


def test_files_of_a_bundle(sealed):
    folder, report = sealed
    code = {"__init__", "images", "outputs", "preprocessing", "reader", "seal", "serving"}
    assert files(folder) == {
        *("model.safetensors", "config.json", "model.onnx", "classes.txt", "preprocessing.json"),
        "bundle.json",
        *("golden/00.png", "golden/01.jpg", "golden/02.jpeg", "golden/expected.json"),
        *("README.md", "MLmodel", "requirements.txt", "python_env.yaml"),
        *("input_example.json", "serving_input_example.json"),
        *(f"code/tl_bundle/{name}.py" for name in code),
    }
    assert [p.name for p in folder.parent.iterdir()] == ["bundle"]
    assert report.images == 3
    assert report.tolerance == 1e-4
    assert 0 <= report.largest_difference < 1e-5
    assert report.onnx_bytes == (folder / "model.onnx").stat().st_size > 1_000_000
    assert "torch" not in (folder / "requirements.txt").read_text()
    assert (folder / "classes.txt").read_text() == "ant\nbee\nwood wasp\n"


def test_bundle_predicts_what_pytorch_predicts(sealed, model, photos):
    bundle = Bundle.load(sealed[0])
    expected = np.stack([torch_reference(model, p) for p in photos])
    assert np.ptp(expected) > 0.1
    assert expected.max() < 0.999
    np.testing.assert_allclose(bundle.probabilities(photos), expected, atol=1e-5)
    assert bundle.classes == CLASSES
    assert bundle.verify() < 1e-5
    record = json.loads((sealed[0] / "golden" / "expected.json").read_text())
    np.testing.assert_allclose(list(record["images"].values()), expected, atol=1e-6)


def test_timm_loads_the_folder(sealed, model, photos):
    loaded = timm.create_model(f"local-dir:{sealed[0]}", pretrained=True).eval()
    weights = model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in loaded.state_dict().items())
    assert Preprocessing.from_dict(resolve_model_data_config(loaded)) == preprocessing_of(model)
    np.testing.assert_allclose(
        torch_reference(loaded, photos[1]), torch_reference(model, photos[1]), atol=1e-6
    )
    assert loaded.pretrained_cfg["label_names"] == list(CLASSES)


def test_onnx_is_one_file_with_a_dynamic_batch(sealed):
    session = onnxruntime.InferenceSession(sealed[0] / "model.onnx")
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(float)", [3, 160, 160])
    assert isinstance(given.shape[0], str)
    assert [o.name for o in session.get_outputs()] == ["logits", "probabilities"]
    images = np.random.default_rng(0).normal(size=(5, 3, 160, 160)).astype(np.float32)
    logits, probabilities = session.run(None, {"images": images})
    one = session.run(["logits"], {"images": images[3:4]})[0]
    np.testing.assert_allclose(one, logits[3:4], atol=1e-5)
    powers = np.exp(logits)
    np.testing.assert_allclose(probabilities, powers / powers.sum(axis=1, keepdims=True), rtol=1e-4)


def test_second_export_is_silent_replaces_the_first_and_leaves_the_model_alone(
    tampered, model, photos, capfd, caplog
):
    spec = Preprocessing((3, 96, 128), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bilinear", 0.9, "squash")
    card = dataclasses.replace(CARD, licence=None, data={}, metrics={})
    (tampered / "golden" / "99.png").write_bytes(b"left over")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        export(tampered, model, photos[:1], preprocessing=spec, card=card)

    assert capfd.readouterr() == ("", "")
    assert [r for r in caplog.records if r.levelno >= logging.INFO] == []
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert {p.name for p in (tampered / "golden").iterdir()} == {"00.png", "expected.json"}
    assert [p.name for p in tampered.parent.iterdir()] == ["bundle"]
    # The preprocessing that is given wins over the one that timm has for the model.
    loaded = timm.create_model(f"local-dir:{tampered}", pretrained=True)
    assert Preprocessing.from_dict(resolve_model_data_config(loaded)) == spec
    assert Bundle.load(tampered).preprocessing == spec
    text = (tampered / "README.md").read_text()
    assert "| licence of the weights | not stated" in text
    assert "## Data\n\nnot recorded" in text
    assert "## Metrics\n\nnone" in text


# --- the model card -----------------------------------------------------------------------------


def test_card_says_what_a_person_must_know(sealed):
    text = (sealed[0] / "README.md").read_text()
    assert text.startswith("# Insects\n")
    for part in (
        "| licence of the weights | apache-2.0 |",
        "| weights sha256 | none |",
        "| input | 160 x 160 pixels, bilinear, center crop 0.95 |",
        "| classes | 3: ant, bee, wood wasp |",
        "| images | 12 |",
        "| train | ant 5, bee 7 |",
        "1. head: 5 epochs",
        "| val/acc | 0.9167 |",
        "- Trained on twelve images.",
        "| sealed | 3 images, largest difference of a probability",
    ):
        assert part in text
    assert "licence of the weights | not stated" not in text


def test_code_of_the_card_runs(sealed, photos, tmp_path):
    folder = shutil.copytree(sealed[0], tmp_path / "bundle")
    Image.open(photos[0]).save(folder / "photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    command = [sys.executable, "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    label = Bundle.load(folder).predict([folder / "photo.jpg"])["label"][0]
    assert done.stdout.count(label) >= 2


# --- the seal -----------------------------------------------------------------------------------


def check_seal(folder: Path, model: nn.Module) -> SealReport:
    reference = copy.deepcopy(model).eval()
    return seal(folder, model=reference, preprocessing=preprocessing_of(model), tolerance=1e-4)


def test_seal_of_an_honest_bundle_holds(tampered, model):
    assert check_seal(tampered, model).largest_difference < 1e-5


@pytest.mark.parametrize(
    "change", [{"mean": [0.5, 0.5, 0.52]}, {"interpolation": "nearest"}, {"crop_pct": 0.9}]
)
def test_seal_finds_wrong_preprocessing(tampered, model, change):
    path = tampered / "preprocessing.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ExportError, match=r"preprocessing\.json, in ONNX Runtime .* golden/0\d"):
        check_seal(tampered, model)


def test_seal_finds_wrong_preprocessing_of_timm(tampered, model):
    path = tampered / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["crop_pct"] = 0.8
    path.write_text(json.dumps(config))
    with pytest.raises(
        ExportError, match=r"config\.json, in timm, differs .* tolerance of 0\.0001"
    ):
        check_seal(tampered, model)


def test_seal_finds_wrong_weights(tampered, model):
    path = tampered / "model.safetensors"
    weights = load_file(path)
    weights["fc.bias"][0] += 0.01
    save_file(weights, path)
    with pytest.raises(ExportError, match=r"model\.safetensors .* differs from the trained model"):
        check_seal(tampered, model)


def test_seal_finds_a_graph_of_other_weights(tampered, model):
    other = copy.deepcopy(model)
    other.get_classifier().bias.data[1] += 0.01
    save_file(dict(other.state_dict()), tampered / "model.safetensors")
    with pytest.raises(ExportError, match=r"model\.onnx .* differs from the trained model by 0\.0"):
        check_seal(tampered, other)


def test_seal_refuses_a_folder_that_cannot_be_read(tampered, model):
    (tampered / "model.onnx").write_bytes(b"nonsense")
    with pytest.raises(ExportError, match="what was written cannot be read"):
        check_seal(tampered, model)


def other_once_exported(logits):
    """What a seal is for."""
    exporting = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
    return logits + torch.arange(3.0) if exporting else logits


def not_a_number(logits):
    return logits * float("nan")


def without_onnx_form(logits):
    return logits + 0 * torch.linalg.eigvalsh(logits.T @ logits).sum()


def forked_by_value(logits):
    """A branch on a value: torch.export refuses it, tracing takes the branch that it sees."""
    return logits * 2 if float(logits.detach().sum()) > -1e9 else logits


def with_tail(model: nn.Module, tail) -> nn.Module:
    changed = copy.deepcopy(model)
    changed.register_forward_hook(lambda _module, _images, logits: tail(logits))
    return changed


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (other_once_exported, r"sealing failed: model\.onnx .* above the tolerance of 0\.0001"),
        (without_onnx_form, "the model has no ONNX form"),
    ],
)
def test_failed_export_leaves_the_old_bundle_as_it_was(tampered, model, photos, tail, message):
    before = {name: (tampered / name).read_bytes() for name in files(tampered)}
    with pytest.raises(ExportError, match=message):
        export(tampered, with_tail(model, tail), photos)
    assert {name: (tampered / name).read_bytes() for name in files(tampered)} == before
    assert [p.name for p in tampered.parent.iterdir()] == ["bundle"]


def test_failed_export_leaves_nothing_behind(model, photos, tmp_path):
    with pytest.raises(ExportError, match=r"sealing failed: .* by nan"):
        export(tmp_path / "run" / "bundle", with_tail(model, not_a_number), photos)
    assert list((tmp_path / "run").iterdir()) == []


def test_tracing_stands_in_where_torch_export_refuses(model, photos, tmp_path, caplog):
    forked = with_tail(model, forked_by_value)
    # timm rebuilds the network without the branch; zero logits are the same with and without it.
    forked.get_classifier().weight.data.zero_()
    forked.get_classifier().bias.data.zero_()
    report = export(tmp_path / "bundle", forked, photos)
    assert "the graph was traced (TorchScript), because torch.export said" in caplog.text
    assert "data-dependent" in caplog.text
    assert "\x1b" not in caplog.text
    assert report.largest_difference < 1e-6
    assert files(tmp_path / "bundle") & {"model.onnx", "model.onnx.data"} == {"model.onnx"}


def batch_in_another_place(logits):
    """Once only for the batch of the example, unless that size stays open."""
    return logits * (1 + logits.T.shape[1] - logits.shape[0])


def without_traced_form(logits):
    return logits + 0 * nn.functional.rms_norm(logits, (3,))


@pytest.mark.parametrize("tail", [batch_in_another_place, without_traced_form])
def test_torch_export_stands_in_where_tracing_errs(model, photos, tmp_path, tail, caplog, capfd):
    with caplog.at_level(logging.DEBUG, logger="tl"):
        report = export(tmp_path / "bundle", with_tail(model, tail), photos)
    assert [r for r in caplog.records if r.levelno > logging.DEBUG] == []
    assert "by torch.export, because tracing said" in caplog.text
    assert capfd.readouterr() == ("", "")
    assert report.largest_difference < 1e-5


# --- wrong requests -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ("ant", "bee")}, "the model has 3 outputs for 2 classes"),
        ({"classes": ("a", "b", "b")}, "class names must differ"),
        ({"classes": ("a", "b", "c\nd")}, "class names must differ and be one line each"),
        ({"golden": []}, "at least one golden image"),
    ],
)
def test_what_does_not_fit_is_refused(model, photos, tmp_path, changes, message):
    with pytest.raises(ExportError, match=message):
        export(tmp_path / "bundle", model, photos, **changes)
    assert list(tmp_path.iterdir()) == []


def test_other_content_is_never_overwritten(model, photos, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="holds other files than a bundle; choose another place"):
        export(tmp_path, model, photos)
    with pytest.raises(ExportError, match=r"thesis\.tex is a file; choose another place"):
        export(tmp_path / "thesis.tex", model, photos)
    with pytest.raises(ExportError, match="cannot be written"):
        export(tmp_path / "thesis.tex" / "bundle", model, photos)
    assert files(tmp_path) == {"thesis.tex"}
