"""The frozen frontier: prefix and suffix are the model, for 50 families and any trainable part."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from tl.finetuning import set_modes
from tl.graph import Split, SplitError, prove, split
from tl.models import HEAD, Stage, find_stages

SMALL = {"layers": (1, 1, 1, 1)}
SWIN = {"depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
TINY = {"embed_dim": 48, "depth": 5, "num_heads": 3}
# Family -> timm model, side of the images, arguments that make it smaller. All weights are random.
FAMILIES: dict[str, tuple[str, int, dict[str, object]]] = {
    "resnet": ("resnet10t", 64, {}),
    "resnetv2": ("resnetv2_18", 64, {}),
    "resnext": ("resnext26ts", 64, {}),
    "seresnet": ("seresnet18", 64, {}),
    "legacy_senet": ("legacy_seresnet18", 64, {}),
    "wide_resnet": ("wide_resnet50_2", 64, SMALL),
    "res2net": ("res2net50_48w_2s", 64, SMALL),
    "vgg": ("vgg11_bn", 64, {"mlp_ratio": 0.02}),
    "densenet": ("densenet121", 64, {"block_config": (2, 2, 2, 2)}),
    "dla": ("dla46x_c", 64, {}),
    "dpn": ("dpn48b", 64, {}),
    "inception_v3": ("inception_v3", 96, {}),
    "inception_v4": ("inception_v4", 96, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 96, {}),
    "xception": ("xception41", 64, {}),
    "nasnet": ("nasnetalarge", 96, {}),
    "mobilenetv1": ("mobilenetv1_100", 64, {}),
    "mobilenetv2": ("mobilenetv2_035", 64, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "mobilenetv4": ("mobilenetv4_conv_small_035", 64, {}),
    "efficientnet": ("test_efficientnet", 64, {}),
    "efficientnetv2": ("tf_efficientnetv2_b0", 64, {}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "hardcorenas": ("hardcorenas_a", 64, {}),
    "regnet": ("regnety_002", 64, {}),
    "repvgg": ("repvgg_a0", 64, {}),
    "mobileone": ("mobileone_s0", 64, {}),
    "nfnet": ("test_nfnet", 64, {}),
    "convnext": ("test_convnext", 64, {}),
    "convnextv2": ("convnextv2_atto", 64, {}),
    "cspnet": ("cspresnet50", 64, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "levit": ("levit_128s", 224, {}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "poolformer": ("poolformer_s12", 64, {}),
    "caformer": ("caformer_s18", 64, {}),
    "vit": ("vit_tiny_patch16_224", 64, {"img_size": 64, **TINY}),
    "deit": ("deit_tiny_distilled_patch16_224", 64, {"img_size": 64, **TINY}),
    "beit": ("beit_base_patch16_224", 64, {"img_size": 64, **TINY}),
    "eva02": ("eva02_tiny_patch14_224", 56, {"img_size": 56, **TINY}),
    "dinov2": ("vit_small_patch14_dinov2", 56, {"img_size": 56, **TINY}),
    "clip vit": ("vit_base_patch32_clip_224", 64, {"img_size": 64, **TINY}),
    "swin": ("swin_tiny_patch4_window7_224", 64, {"img_size": 64, "embed_dim": 24, **SWIN}),
    "maxvit": ("test_maxvit", 160, {}),
    "coatnet": ("test_coatnet", 160, {}),
    "mixer": ("mixer_s32_224", 64, {"img_size": 64}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": 64}),
}
# One of each kind of model; most of the other combinations are `slow`.
QUICK = {"resnet", "efficientnet", "densenet", "convnext", "vit", "swin", "levit"}
HEAVY = {
    "vgg",
    "inception_v3",
    "inception_v4",
    "inception_resnet_v2",
    "nasnet",
    "xception",
    "cspnet",
}
PARTS = ("head", "last", "middle", "norm")


def make(family: str, **more: object) -> tuple[nn.Module, tuple[Stage, ...], Tensor]:
    name, size, args = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **{**args, **more})
    model.to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, size, size).contiguous(memory_format=torch.channels_last)
    return model, find_stages(model), images


def train_only(model: nn.Module, names: set[str], *, freeze_batch_norm: bool = False) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    set_modes(model, freeze_batch_norm=freeze_batch_norm)


def names_of(model: nn.Module, stages: tuple[Stage, ...], part: str) -> set[str]:
    if part == "norm":
        norms = [m for m in model.modules() if "norm" in type(m).__name__.lower()]
        own = {id(p) for m in norms for p in m.parameters(recurse=False)}
        return {n for n, p in model.named_parameters() if id(p) in own} | set(stages[-1].parameters)
    chosen = {"head": stages[-1:], "last": stages[-2:], "middle": [stages[len(stages) // 2]]}[part]
    return {name for stage in chosen for name in stage.parameters}


def cut(family: str, part: str, **more: object) -> tuple[Split, nn.Module, Tensor]:
    model, stages, images = make(family, **more)
    train_only(model, names_of(model, stages, part))
    return split(model, stages, images), model, images


def values_of(parts: Split, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(parts.prefix(images)[: len(parts.nodes)])


def combinations() -> list[object]:
    def slow(family: str, part: str) -> bool:
        return family not in QUICK and (part != "head" or family in HEAVY)

    return [
        pytest.param(f, p, marks=[pytest.mark.slow] if slow(f, p) else [], id=f"{f}-{p}")
        for f in FAMILIES
        for p in PARTS
    ]


# --- any family, any part -----------------------------------------------------------------------


@pytest.mark.parametrize(("family", "part"), combinations())
def test_prefix_and_suffix_are_the_model(family, part):
    parts, model, images = cut(family, part)
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    proof = prove(parts, model, images)
    assert proof.forward <= 1e-6
    assert proof.gradient <= 1e-5
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    outputs = parts.prefix(images)
    assert [tuple(v.shape[1:]) for v in outputs[: len(parts.nodes)]] == list(parts.shapes)
    assert all(v.dtype == torch.float32 and len(v) == len(images) for v in outputs)
    assert [v.shape[1] for v in outputs[len(parts.nodes) :]] == list(parts.pooled_sizes)
    if part != "norm":
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(parts.suffix(proof.values), model(images))


def test_fifty_families_are_covered():
    assert len(FAMILIES) == 50


# --- what trains through the suffix -------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "part", "more"),
    [
        ("resnet", "last", {}),
        ("resnet", "head", {"drop_rate": 0.3}),
        ("vit", "last", {"drop_path_rate": 0.3, "attn_drop_rate": 0.2}),
        ("swin", "last", {"drop_path_rate": 0.3}),
        ("convnext", "middle", {"drop_path_rate": 0.3}),
        ("efficientnet", "norm", {"drop_rate": 0.2, "drop_path_rate": 0.2}),
    ],
)
def test_training_through_the_suffix_gives_the_weights_of_training_the_model(family, part, more):
    parts, model, images = cut(family, part, **more)
    whole = copy.deepcopy(model)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    target = torch.tensor([0, 1, 2, 3])

    def steps(model: nn.Module, forward: Callable[[], Tensor]) -> list[float]:
        torch.manual_seed(1)
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.05, momentum=0.9)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(forward(), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    values = values_of(parts, images)
    losses = steps(model, lambda: parts.suffix(values))
    assert losses == pytest.approx(steps(whole, lambda: whole(images)), rel=1e-4)
    assert len(set(losses)) == len(losses)
    expected = whole.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
    model.eval(), whole.eval()
    with torch.no_grad():  # batch statistics and weights as they are now
        torch.testing.assert_close(parts.suffix(values), whole(images), rtol=1e-3, atol=1e-4)


def test_suffix_has_no_weights_of_its_own_and_leaves_modes_alone():
    model, stages, images = make("resnet")
    keys, count = list(model.state_dict()), len(list(model.parameters()))
    train_only(model, names_of(model, stages, "last"))
    modes = {name: module.training for name, module in model.named_modules()}
    parts = split(model, stages, images)
    statistics = {n: b.clone() for n, b in model.named_buffers() if n in stages[0].buffers}
    parts.suffix(values_of(parts, images)).sum().backward()
    assert list(model.state_dict()) == keys
    assert len(list(model.parameters())) == count
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(dict(model.named_buffers())[n], b) for n, b in statistics.items())
    assert not any(module.training for module in parts.prefix.modules())
    assert not any(parameter.requires_grad for parameter in parts.prefix.parameters())


def test_converting_the_prefix_leaves_the_model_as_it_is():
    parts, model, images = cut("resnet", "last")
    parts.prefix.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert parts.prefix(images.bfloat16())[0].dtype == torch.bfloat16


def test_suffix_follows_weights_and_buffers_that_are_replaced():
    parts, model, images = cut("resnet", "last")
    values = values_of(parts, images)
    model.double()
    model.eval()
    with torch.no_grad():
        logits = parts.suffix([value.double() for value in values])
        assert logits.dtype == torch.float64
        torch.testing.assert_close(logits, model(images.double()), rtol=1e-4, atol=1e-5)


# --- where the cut is ---------------------------------------------------------------------------


def test_head_alone_is_a_linear_layer_on_pooled_features():
    parts, model, images = cut("resnet", "head")
    assert parts.linear is model.get_classifier()
    assert parts.shapes == ((512,),)
    assert parts.bytes_per_image == 4 * 512
    (values,) = values_of(parts, images)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(parts.linear(values), model(images))


@pytest.mark.parametrize("family", ["resnet", "vit", "mobilenetv3"])
def test_active_dropout_before_the_head_stays_in_the_suffix(family):
    parts, model, images = cut(family, "head", drop_rate=0.5)
    assert parts.linear is None
    values = values_of(parts, images)
    assert not torch.equal(parts.suffix(values), parts.suffix(values))
    model.eval()
    assert torch.equal(parts.suffix(values), parts.suffix(values))
    assert cut(family, "head")[0].linear is not None


def test_norm_affine_only_is_cut_below_the_first_norm():
    parts, _, _ = cut("efficientnet", "norm")
    assert len(parts.nodes) == 1
    assert "conv_stem" in parts.nodes[0]
    assert parts.pooled == ()


def test_tokens_and_channels_last_maps_are_pooled_over_their_places():
    for family, size in (("vit", 48), ("resnet", 64)):
        parts, _, images = cut(family, "last")
        pooled = dict(zip(parts.pooled, parts.prefix(images)[len(parts.nodes) :], strict=True))
        value = values_of(parts, images)[0]
        places = 1 if family == "vit" else (2, 3)
        torch.testing.assert_close(pooled[parts.pooled[-1]], value.mean(places))
        assert pooled["stage0"].shape == (len(images), size)
    parts, _, images = cut("swin", "last")
    value = values_of(parts, images)[0]
    assert parts.pooled == ("stage0", "stage1", "stage2", "stage3")
    assert parts.pooled_sizes[-1] == value.shape[-1]
    torch.testing.assert_close(parts.prefix(images)[-1], value.flatten(1, -2).mean(1))


def test_pooled_stages_end_below_the_first_stage_that_trains():
    assert cut("resnet", "head")[0].pooled == ("stage0", "stage1", "stage2", "stage3", "stage4")
    assert cut("resnet", "last")[0].pooled == ("stage0", "stage1", "stage2", "stage3")
    assert cut("resnet", "middle")[0].pooled == ("stage0", "stage1", "stage2")


def test_a_value_that_follows_from_another_one_is_not_stored():
    parts, _, _ = cut("resnet", "last")  # its shortcut pools what the first convolution reads
    assert parts.nodes == ("layer3_0_act2",)


# --- models of one's own ------------------------------------------------------------------------


class Toy(nn.Module):
    """Frozen `below`, something in between, trainable `head`."""

    def __init__(self, between: Callable[[Tensor], Tensor], head: nn.Module | None = None) -> None:
        super().__init__()
        self.below = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.between = between
        self.head = head or nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.below(x)))


def toy(
    between: Callable[[Tensor], Tensor], head: nn.Module | None = None
) -> tuple[nn.Module, tuple[Stage, ...], Tensor]:
    torch.manual_seed(0)
    model = Toy(between, head)
    names = [n for n, _ in model.named_parameters()]
    below, top = ([n for n in names if n.startswith(start)] for start in ("below", "head"))
    train_only(model, set(top))
    stages = (Stage("stage0", tuple(below)), Stage(HEAD, tuple(top)))
    return model, stages, torch.randn(4, 3, 8, 8)


def windows(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)


class PerWindow(nn.Module):
    def __init__(self, *, images_first: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 5)
        self.images_first = images_first

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).mean(1)
        if self.images_first:
            return x.reshape(-1, 4, 5).mean(1)
        return x.reshape(4, -1, 5).mean(0)


def test_windows_are_stored_as_rows_of_their_images():
    model, stages, images = toy(windows, PerWindow(images_first=True))
    parts = split(model, stages, images)
    assert parts.shapes == ((4, 16, 8),)
    assert prove(parts, model, images).forward <= 1e-6


def test_a_batch_that_is_not_in_front_is_moved_there():
    model, stages, images = toy(lambda x: x.flatten(2).permute(2, 0, 1), nn.Linear(8, 5))
    model.head = nn.Sequential(nn.Linear(8, 5), Mean0())
    train_only(model, {n for n, _ in model.named_parameters() if n.startswith("head")})
    parts = split(model, stages, images)
    assert parts.shapes == ((64, 8),)
    assert prove(parts, model, images).forward <= 1e-6


class Mean0(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0)


@pytest.mark.parametrize(
    ("between", "head", "words"),
    [
        (lambda x: (x - x.mean(0)).mean((2, 3)), None, "other logits"),
        (
            lambda x: torch.cat([windows(x)[i::4] for i in range(4)]),
            PerWindow(images_first=False),
            "other logits",
        ),
        (lambda x: x.mean((0, 2, 3))[None], None, "no batch dimension"),
        (lambda x: x.mean((2, 3)) if x.sum() > 0 else x.amax((2, 3)), None, "cannot trace Toy"),
    ],
    ids=["mixed", "reordered", "no batch", "control flow"],
)
def test_what_cannot_be_cached_is_refused_in_one_line(between, head, words):
    model, stages, images = toy(between, head)
    with pytest.raises(SplitError, match=words) as caught:
        prove(split(model, stages, images), model, images)
    assert "\n" not in str(caught.value)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.abs().sum()) > 1 else x


def test_a_module_that_cannot_be_traced_into_is_taken_whole():
    model, stages, images = toy(
        lambda x: x.mean((2, 3)), nn.Sequential(Branches(), nn.Linear(8, 5))
    )
    parts = split(model, stages, images)
    assert parts.shapes == ((8,),)
    assert prove(parts, model, images).gradient <= 1e-5


class Centred(nn.Module):
    """A norm whose statistics are a buffer that its own code reads and moves."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 5)
        self.register_buffer("centre", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.centre.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.layer(x - (self.centre + 0.5))


def test_buffers_that_training_moves_are_read_when_the_suffix_runs():
    model, stages, images = toy(lambda x: x.mean((2, 3)), Centred())
    parts = split(model, stages, images)
    prove(parts, model, images)
    values = values_of(parts, images)
    parts.suffix(values)
    assert model.head.centre.abs().sum() > 0
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(parts.suffix(values), model(images))


def test_the_suffix_does_not_overwrite_cached_values():
    model, stages, images = toy(
        lambda x: x.mean((2, 3)) - 1, nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(8, 5))
    )
    parts = split(model, stages, images)
    values = values_of(parts, images)
    before = [value.clone() for value in values]
    parts.suffix(values)
    assert all(torch.equal(a, b) for a, b in zip(values, before, strict=True))


def test_proof_leaves_zero_weights_and_random_numbers_as_they_were():
    model, stages, images = toy(lambda x: x.mean((2, 3)))
    nn.init.zeros_(model.head.weight)
    parts = split(model, stages, images)
    prove(parts, model, images)
    assert not model.head.weight.any()
    state = torch.get_rng_state()
    prove(parts, model, images)
    assert torch.equal(state, torch.get_rng_state())


def test_nothing_frozen_below_is_refused():
    model, stages, images = make("resnet")
    train_only(model, {name for name, _ in model.named_parameters()})
    with pytest.raises(SplitError, match="nothing is frozen below the first trainable layer"):
        split(model, stages, images)
    train_only(model, set())
    with pytest.raises(SplitError, match="no layer trains"):
        split(model, stages, images)


# --- identity -----------------------------------------------------------------------------------


def test_sha256_is_that_of_the_cold_part_only():
    model, stages, images = make("resnet")

    def sha256(part: str, **how: bool) -> str:
        train_only(model, names_of(model, stages, part), **how)
        return split(model, stages, images).sha256

    head = sha256("head")
    assert sha256("head", freeze_batch_norm=True) == head
    assert sha256("last") != head
    with torch.no_grad():
        model.get_classifier().weight.add_(1)
    assert sha256("head") == head
    with torch.no_grad():
        model.layer1[0].conv1.weight[0, 0, 0, 0] += 1e-3
    changed = sha256("head")
    assert changed != head
    model.layer1[0].bn1.running_var.mul_(1.01)
    assert sha256("head") not in {head, changed}


def test_sha256_is_the_same_in_another_process():
    families = ["vit", "resnet"]
    code = f"import test_graph; [print(test_graph.cut(f, 'head')[0].sha256) for f in {families}]"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent), "PYTHONHASHSEED": "7"},
    )
    assert done.stdout.split() == [cut(family, "head")[0].sha256 for family in families]
