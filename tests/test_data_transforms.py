"""Transforms: evaluation is that of timm; each augmentation does what its name says, no more."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from tl.bundle import Preprocessing
from tl.config import AugmentConfig, AutoAugment
from tl.data import batch_mix, eval_transform, train_transform

SIZE = 32
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
RESIZE_TOLERANCE = 2  # levels of 255 between torchvision's resize and Pillow's


@pytest.fixture
def preprocessing():
    return Preprocessing((3, SIZE, SIZE), MEAN, STD, "bilinear", 1.0, "squash")


@pytest.fixture
def image():
    """A ramp: red grows to the right, green downwards; blue is constant. Of the input's size."""
    ramp = np.linspace(40, 200, SIZE).round().astype(np.uint8)
    pixels = np.full((SIZE, SIZE, 3), 90, np.uint8)
    pixels[..., 0], pixels[..., 1] = ramp[None, :], ramp[:, None]
    return Image.fromarray(pixels)


def draw(transform, image, count):
    torch.manual_seed(0)
    return torch.stack([transform(image) for _ in range(count)])


def pixels(tensor):
    """Back to the 0-255 of the image, (..., H, W, 3)."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((tensor * std + mean) * 255).movedim(-3, -1)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos", "nearest"])
@pytest.mark.parametrize(("height", "width"), [(61, 97), (300, 211), (20, 33), (48, 48)])
def test_eval_transform_is_the_preprocessing_of_the_bundle_but_for_rounding(
    crop_mode, interpolation, height, width
):
    preprocessing = Preprocessing((3, 48, 48), MEAN, STD, interpolation, 0.875, crop_mode)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)  # harder than any photograph
    tensor = eval_transform(preprocessing)(Image.fromarray(noise))
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    bundle = torch.from_numpy(preprocessing(Image.fromarray(noise)))
    distance = (pixels(tensor) - pixels(bundle)).abs()
    assert distance.max() < RESIZE_TOLERANCE + 0.1
    assert distance.mean() < 0.06  # photographs: 0.01 (benchmarks/decoding.py)
    if interpolation in ("lanczos", "nearest"):
        assert distance.max() < 0.01  # Pillow does those


def test_transforms_take_tensors_as_they_take_images(preprocessing, image):
    pixels_of_it = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for augment in (AugmentConfig(), everything()):
        transform = train_transform(augment, preprocessing)
        assert torch.equal(draw(transform, image, 3), draw(transform, pixels_of_it, 3))
    assert np.array_equal(pixels_of_it.permute(1, 2, 0).numpy(), np.array(image)), "left as it was"


def test_every_filter_can_be_augmented(image):
    for name in ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"):
        preprocessing = Preprocessing((3, 24, 24), MEAN, STD, name)
        augment = AugmentConfig(crop_scale=[0.5, 1.0], hflip=0.5)
        assert draw(train_transform(augment, preprocessing), image, 2).shape == (2, 3, 24, 24)


def test_no_augmentation_is_the_eval_transform(preprocessing, image):
    changed = train_transform(AugmentConfig(mixup=1.0, cutmix=1.0), preprocessing)(image)
    assert torch.equal(changed, eval_transform(preprocessing)(image))


@pytest.mark.parametrize(("setting", "axis"), [("hflip", -1), ("vflip", -2)])
def test_flips(preprocessing, image, setting, axis):
    plain = eval_transform(preprocessing)(image)
    always = train_transform(AugmentConfig(**{setting: 1.0}), preprocessing)(image)
    torch.testing.assert_close(always, plain.flip(axis))
    half = draw(train_transform(AugmentConfig(**{setting: 0.5}), preprocessing), image, 200)
    flipped = (half - plain).abs().amax(dim=(1, 2, 3)) > 0.1
    assert 70 < flipped.sum() < 130


def test_random_resized_crop_keeps_the_share_of_the_area(preprocessing, image):
    augment = AugmentConfig(crop_scale=[0.2, 0.3], crop_ratio=[1.0, 1.0])
    crops = pixels(draw(train_transform(augment, preprocessing), image, 100))
    across = (crops[:, 16, -1, 0] - crops[:, 16, 0, 0]) / 160
    down = (crops[:, -1, 16, 1] - crops[:, 0, 16, 1]) / 160
    area = across * down
    assert area.min() > 0.14
    assert area.max() < 0.32
    assert crops[:, 0, 0, 0].std() > 10  # the place changes too


def test_colour_jitter_changes_all_four_but_moves_no_pixel(preprocessing):
    flat = Image.new("RGB", (SIZE, SIZE), (150, 100, 80))
    changed = pixels(
        draw(train_transform(AugmentConfig(color_jitter=0.3), preprocessing), flat, 50)
    )
    assert (changed.std(dim=(1, 2)) < 1e-3).all()
    colours = changed[:, 0, 0]
    assert colours.mean(dim=1).std() > 10  # brightness
    spread = colours.amax(1) - colours.amin(1)
    assert spread.std() > 5  # saturation
    order = colours[:, 1] - colours[:, 2]
    assert order.min() < 0 < order.max()  # hue


def corner_share(tensors):
    """Share of the pixels that affine uncovered: those of exactly the mean colour."""
    fill = torch.tensor([round(255 * m) for m in MEAN], dtype=torch.float32)
    return ((pixels(tensors) - fill).abs().amax(-1) < 0.1).float().mean(dim=(1, 2))


@pytest.mark.parametrize(
    "setting", [{"rotate": 45}, {"translate": 0.4}, {"shear": 40}, {"zoom": 0.5}]
)
def test_affine_moves_the_image_and_fills_with_the_mean(preprocessing, image, setting):
    tensors = draw(train_transform(AugmentConfig(**setting), preprocessing), image, 40)
    shares = corner_share(tensors)
    assert 0.04 < shares.mean() < 0.5
    assert shares.std() > 0.02
    assert corner_share(eval_transform(preprocessing)(image)[None]).item() < 0.01


def test_affine_corners_have_the_mean_colour_after_any_colour_change(preprocessing, image):
    augment = AugmentConfig(rotate=45, color_jitter=0.5, auto=AutoAugment.rand)
    tensors = draw(train_transform(augment, preprocessing), image, 20)
    turned = corner_share(tensors) > 0
    assert turned.sum() >= 15


@pytest.mark.parametrize("auto", [AutoAugment.trivial, AutoAugment.rand])
def test_learned_policies(preprocessing, image, auto):
    tensors = draw(train_transform(AugmentConfig(auto=auto), preprocessing), image, 40)
    assert torch.isfinite(tensors).all()
    assert len({tensor.numpy().tobytes() for tensor in tensors}) > 15


def test_strength_of_rand_augment(preprocessing, image):
    plain = eval_transform(preprocessing)(image)
    change = []
    for magnitude in (1, 25):
        augment = AugmentConfig(auto=AutoAugment.rand, rand_magnitude=magnitude)
        tensors = draw(train_transform(augment, preprocessing), image, 60)
        change.append((tensors - plain).abs().mean().item())
    assert change[1] > 1.5 * change[0]


def test_erasing_leaves_one_rectangle_of_the_mean(preprocessing, image):
    augment = AugmentConfig(erasing=1.0)
    tensors = draw(train_transform(augment, preprocessing), image, 40)
    erased = (tensors == 0).all(dim=1)
    shares = erased.float().mean(dim=(1, 2))
    assert shares.min() > 0.01
    assert shares.max() < 0.36
    rows, columns = erased.any(2).sum(1), erased.any(1).sum(1)
    assert torch.equal(rows * columns, erased.sum(dim=(1, 2)))
    never = train_transform(AugmentConfig(erasing=1e-9), preprocessing)(image)
    torch.testing.assert_close(never, eval_transform(preprocessing)(image))


def everything():
    return AugmentConfig(
        hflip=0.5,
        vflip=0.5,
        crop_scale=[0.3, 1.0],
        color_jitter=0.4,
        rotate=20,
        translate=0.1,
        zoom=0.1,
        shear=10,
        auto=AutoAugment.trivial,
        erasing=0.5,
    )


def test_all_together_draw_from_torch_alone(preprocessing, image):
    transform = train_transform(everything(), preprocessing)
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tobytes()
    one = draw(transform, image, 20)
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == states
    random.seed(2)
    np.random.seed(2)
    assert torch.equal(one, draw(transform, image, 20))
    assert one.shape == (20, 3, SIZE, SIZE)
    assert one.dtype == torch.float32
    assert type(one[0]) is torch.Tensor


def test_input_that_is_not_square(image):
    preprocessing = Preprocessing((3, 24, 40), MEAN, STD, "bicubic", 0.9, "center")
    for augment in (everything(), AugmentConfig(hflip=1.0), AugmentConfig()):
        assert train_transform(augment, preprocessing)(image).shape == (3, 24, 40)


# --- batches ------------------------------------------------------------------------------------


@pytest.fixture
def batch():
    """Image i is constant i, its label i % 3."""
    images = torch.arange(6.0)[:, None, None, None].expand(6, 3, 16, 16).clone()
    return images, torch.arange(6) % 3


def test_tables_of_targets_are_mixed_as_they_are(batch):
    images, _ = batch
    targets = torch.tensor([[1.0, 1.0, 0.5]] * 3 + [[0.0, 1.0, 2.0]] * 3)
    torch.manual_seed(0)
    mixed, soft = batch_mix(AugmentConfig(mixup=1.0))(images, targets)
    share = 1 - mixed[1, 0, 0, 0].item()  # of image 0 in image 1
    torch.testing.assert_close(soft[3], (1 - share) * targets[3] + share * targets[2])
    torch.testing.assert_close(soft[:, 1], torch.ones(6))


def test_mix_is_none_without_mixup_and_cutmix():
    assert batch_mix(AugmentConfig(hflip=0.5), 3) is None


def test_mixup_blends_images_and_labels_alike(batch):
    images, labels = batch
    torch.manual_seed(0)
    mixed, soft = batch_mix(AugmentConfig(mixup=1.0), 3)(images, labels)
    weight = soft[1, 1].item()  # of the image itself; its partner has another label
    assert 0.01 < weight < 0.99
    expected = weight * images + (1 - weight) * images.roll(1, 0)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(soft.sum(1), torch.ones(6))
    assert labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_cutmix_pastes_a_rectangle_and_weighs_labels_by_its_area(batch):
    images, labels = batch
    torch.manual_seed(0)
    mixed, soft = batch_mix(AugmentConfig(cutmix=1.0), 3)(images, labels)
    pasted = (mixed[1, 0] == 0).float().mean()
    assert 0 < pasted < 1
    assert set(mixed[1].unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(soft[1], torch.tensor([pasted, 1 - pasted, 0.0]))


def test_mixup_and_cutmix_take_turns(batch):
    mix = batch_mix(AugmentConfig(mixup=1.0, cutmix=1.0), 3)
    torch.manual_seed(0)
    cut = [len(mix(*batch)[0][1].unique()) == 2 for _ in range(40)]
    assert 8 < sum(cut) < 32
