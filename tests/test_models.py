"""Models: weights that fit or say why not, stages of many families, preprocessing."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from tl.config import ConfigError, ModelConfig
from tl.models import WeightsError, build_model, check_name, find_stages, tensors_sha256

FAMILIES = [
    "test_resnet",
    "test_vit",
    "test_convnext",
    "test_efficientnet",
    "mobilenetv2_100",
    "tf_mobilenetv3_small_100",
    "regnetx_002",
    "resnet18",
    "densenet121",
    "vgg11_bn",
    "swin_tiny_patch4_window7_224",
    "deit_tiny_distilled_patch16_224",
    "levit_128s",
    "mixer_s32_224",
    "ghostnet_100",
    "repvgg_a0",
]


def built(name="test_resnet", classes=3, **settings):
    return build_model(ModelConfig(name=name, **{"weights": "none", **settings}), classes)


@pytest.fixture
def resnet_file(tmp_path):
    """A state dict with a head of 7 outputs."""
    torch.manual_seed(0)
    path = tmp_path / "test_resnet.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), path)
    return path


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_cover_everything_once_in_forward_order(name):
    model = timm.create_model(name, num_classes=5)
    stages = find_stages(model)
    names = [stage.name for stage in stages]
    assert names == [*(f"stage{i}" for i in range(len(stages) - 1)), "head"]
    assert 3 <= len(names) <= 6
    parameters = [n for stage in stages for n in stage.parameters]
    buffers = [n for stage in stages for n in stage.buffers]
    assert sorted(parameters) == sorted(n for n, _ in model.named_parameters())
    assert sorted(buffers) == sorted(n for n, _ in model.named_buffers())
    assert "stem" in stages[0].parameters[0] or len(stages[0].parameters) <= 12


def test_mobilenet_layers_are_merged_by_resolution():
    stages = find_stages(timm.create_model("mobilenetv2_100", num_classes=5))
    blocks = [sorted({n.split(".")[1] for n in s.parameters if "blocks" in n}) for s in stages]
    assert blocks == [[], ["0", "1"], ["2"], ["3", "4"], ["5", "6"], []]
    assert stages[0].parameters[0] == "conv_stem.weight"
    assert "conv_head.weight" in stages[4].parameters


def test_vit_blocks_are_split_evenly():
    stages = find_stages(timm.create_model("vit_tiny_patch16_224", num_classes=5))
    blocks = [len({n.split(".")[1] for n in s.parameters if "blocks" in n}) for s in stages]
    assert blocks == [0, 3, 3, 3, 3, 0]


def test_weights_of_a_file_replace_all_but_a_head_of_another_size(resnet_file):
    result = built(weights=str(resnet_file))
    state, file = result.model.state_dict(), timm.models.load_state_dict(str(resnet_file))
    assert all(torch.equal(state[k], file[k]) for k in file if not k.startswith("fc."))
    assert result.weights.notes == (
        "the file's head has 7 outputs; a new head with 3 outputs starts from zero",
    )
    assert not state["fc.weight"].any()
    assert result.weights.source == "test_resnet.safetensors"


def test_a_head_is_kept_only_where_it_knows_the_same_classes(resnet_file):
    names = [*"abcdefg"]

    def head(classes):
        config = ModelConfig(name="test_resnet", weights=str(resnet_file))
        result = build_model(config, classes)
        return result.model.state_dict()["fc.weight"], result.weights.notes[0]

    weight, note = head(names)
    assert not weight.any(), "as many outputs are no reason to keep a head of other classes"
    assert "a new head with 7 outputs starts from zero" in note
    resnet_file.with_suffix(".json").write_text(json.dumps({"classes": names}))
    weight, note = head(names)
    assert torch.equal(weight, timm.models.load_state_dict(str(resnet_file))["fc.weight"])
    assert note == "the head comes from the file too: it knows the same classes"
    assert not head(names[::-1])[0].any()


def test_a_folder_of_weights_is_searched_by_model_name(resnet_file):
    assert built("test_resnet.r160_in1k", weights=str(resnet_file.parent)).weights.source == (
        "test_resnet.safetensors"
    )
    with pytest.raises(WeightsError, match=r"holds no test_vit.safetensors; it has test_resnet"):
        built("test_vit", weights=str(resnet_file.parent))


def test_a_file_of_another_architecture_is_refused_with_its_keys(resnet_file):
    with pytest.raises(WeightsError) as caught:
        built("test_vit", weights=str(resnet_file))
    text = str(caught.value)
    assert "is of another architecture" in text
    assert "the model needs, the file lacks: cls_token" in text
    assert "the file has, the model lacks: bn1.bias" in text


def test_pickled_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "weights.pth"
    torch.save({"state_dict": Evil()}, path)
    with pytest.raises(WeightsError, match=r"holds pickled code.*refused"):
        built(weights=str(path))
    assert not (tmp_path / "ran").exists()


def test_a_pth_with_tensors_only_loads(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": timm.create_model("test_resnet", num_classes=3).state_dict()}, path)
    assert built(weights=str(path)).weights.source == "weights.pth"


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"no weights")
    with pytest.raises(WeightsError, match=r"weights.safetensors cannot be read as weights"):
        built(weights=str(path))


def test_the_hub_out_of_reach_is_one_fast_clear_error(monkeypatch):
    from huggingface_hub import constants

    # A port that nothing listens on, instead of the real host.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError) as caught:
        built(weights="hub")
    assert "cannot load the weights of test_resnet from the hub" in str(caught.value)
    assert "model.weights=path.safetensors" in str(caught.value)


def test_preprocessing_is_that_of_timms_tag_and_a_json_beside_outranks_it(resnet_file):
    own = built("test_resnet.r160_in1k").preprocessing
    assert (own.input_size, own.interpolation, own.crop_pct) == ((3, 160, 160), "bilinear", 0.95)
    sidecar = {"licence": "CC0", "preprocessing": {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.5}}
    resnet_file.with_suffix(".json").write_text(json.dumps(sidecar))
    result = built("test_resnet.r160_in1k", weights=str(resnet_file), image_size=64)
    assert result.preprocessing.mean == (0.1, 0.2, 0.3)
    assert result.preprocessing.crop_pct == 0.5
    assert result.preprocessing.std == own.std
    assert result.preprocessing.input_size == (3, 64, 64)
    assert result.weights.licence == "CC0"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", "timm has no model resnet81; nearest: resnet"),
        ("qqq", "timm has no model qqq; timm.list_models"),
        ("test_resnet.nope", "test_resnet has no weights nope; there are r160_in1k"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, message):
    with pytest.raises(ConfigError, match=message):
        check_name(name)


def test_a_setting_that_the_family_lacks_is_named():
    with pytest.raises(ConfigError, match="vgg11 does not take drop_path_rate"):
        built("vgg11", drop_path_rate=0.1)


def test_image_size_reaches_networks_of_fixed_size():
    result = built("test_vit", image_size=64)
    assert result.model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
    assert result.model_args == {"img_size": 64}


def test_hash_tells_values_names_and_types_apart():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5])
    hashes = {
        tensors_sha256([("a", one)]),
        tensors_sha256([("a", two)]),
        tensors_sha256([("b", one)]),
        tensors_sha256([("a", one.double())]),
        tensors_sha256([("a", one.reshape(1, 2))]),
    }
    assert len(hashes) == 5
    assert tensors_sha256([("b", two), ("a", one)]) == tensors_sha256([("a", one), ("b", two)])


def test_real_weights_load_with_the_hash_of_their_backbone(assets):
    result = built("tf_mobilenetv3_small_100", classes=2, weights=str(assets / "weights"))
    assert result.preprocessing.mean == (0.5, 0.5, 0.5)
    assert result.preprocessing.interpolation == "bilinear"
    again = built("tf_mobilenetv3_small_100", classes=5, weights=str(assets / "weights"))
    assert result.weights.sha256 == again.weights.sha256
