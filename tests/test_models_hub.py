"""Weights from a hub: a stand-in on loopback that answers as the real one, and a filled cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save

from tl.config import ModelConfig
from tl.models import WeightsError, build_model

NAME = "test_resnet.r160_in1k"
COMMIT = "0" * 40


def pretrained() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return timm.create_model("test_resnet").state_dict()


@pytest.fixture
def hub(monkeypatch) -> Iterator[list[str]]:
    """A server with one repository; yields the list of paths that were asked for."""
    content, asked = save(pretrained()), []
    path = f"/timm/{NAME}/resolve/main/model.safetensors"

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            found = self.path == path
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(content) if found else 0))
            self.send_header("ETag", '"weights"')
            self.send_header("X-Repo-Commit", COMMIT)
            if not found:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            if self.path == path:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield asked
    server.shutdown()


def test_weights_come_from_the_hub_and_then_from_its_cache(hub, tmp_path, monkeypatch):
    config = ModelConfig(name=NAME)
    built = build_model(config, 3, cache_dir=tmp_path)
    state = pretrained()
    assert torch.equal(built.model.state_dict()["conv1.0.weight"], state["conv1.0.weight"])
    assert not built.model.state_dict()["fc.weight"].any()
    assert built.weights.source == NAME
    assert built.weights.licence == "apache-2.0"
    assert built.weights.notes == ("a new head with 3 outputs starts from zero",)
    assert any(path.endswith("model.safetensors") for path in hub)

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    again = build_model(config, 3, cache_dir=tmp_path)
    assert again.weights.sha256 == built.weights.sha256


def test_a_cache_that_was_filled_elsewhere_serves_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    repository = tmp_path / f"models--timm--{NAME}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(save(pretrained()))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    built = build_model(ModelConfig(name=NAME), 3, cache_dir=tmp_path)
    assert torch.equal(built.model.state_dict()["bn1.weight"], pretrained()["bn1.weight"])


def test_a_hub_without_the_model_is_one_clear_error(hub, tmp_path: Path):
    with pytest.raises(WeightsError, match=r"cannot load the weights of test_vit.r160_in1k"):
        build_model(ModelConfig(name="test_vit.r160_in1k"), 3, cache_dir=tmp_path)
