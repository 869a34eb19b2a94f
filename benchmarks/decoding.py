"""Ways from a JPEG file to the input of a network: speed, and distance to the bundle's own pixels.

    python benchmarks/decoding.py                     # the four sets of TL_ASSETS, 224 px
    python benchmarks/decoding.py --size 384 --images 200

The way of the loaders is `tl.data.decoding`, then `eval_transform`. The yardstick is what
an exported bundle computes (`tl.bundle`: Pillow, every pixel decoded, resized and cut). Each way
takes its turn on the same bytes; times are those of one core (CPU time, best of `--repeats`), so
that other programs matter little. Distances are levels of 0 to 255, before the normalisation.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from images import ASSETS, FOUR, every_image
from numpy.typing import NDArray
from PIL import Image
from timm.data.transforms_factory import create_transform
from torchvision.io import ImageReadMode, decode_jpeg

from tl.bundle import Preprocessing, open_image
from tl.bundle.preprocessing import INTERPOLATIONS
from tl.data.decoding import decode
from tl.data.transforms import eval_transform

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
GAPS = (1.0, 2.0, 4.0)  # a reduced decode keeps at least so many pixels a pixel of the result
Way = Callable[[bytes], torch.Tensor]


def ways(preprocessing: Preprocessing) -> dict[str, Way]:
    """Name -> function from the bytes of a file to a normalised tensor (3, H, W)."""
    by_timm = create_transform(**preprocessing.to_dict(), is_training=False)
    by_loader = eval_transform(preprocessing)
    whole = create_transform(**preprocessing.to_dict() | {"crop_pct": 1.0}, is_training=False)

    def bundle(data: bytes) -> torch.Tensor:
        return torch.from_numpy(preprocessing(open_image(data)))

    def turbo(data: bytes) -> torch.Tensor:
        return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), RGB)

    def drafted(data: bytes, gap: float) -> torch.Tensor:
        return by_loader(reduced(data, preprocessing, gap))

    found: dict[str, Way] = {
        "the bundle: Pillow, numpy": bundle,
        "Pillow, timm's transform": lambda data: by_timm(open_image(data)),
        "Pillow, only what the crop keeps resized": lambda data: whole(
            window(open_image(data), preprocessing)
        ),
        "**the loaders: Pillow, torchvision's resize**": lambda data: by_loader(decode(data)),
        "torchvision's decode_jpeg, its resize": lambda data: by_loader(turbo(data)),
    }
    for gap in GAPS:
        found[f"Pillow's draft of {gap:g} x, its resize"] = partial(drafted, gap=gap)
    return found


RGB = ImageReadMode.RGB


def reduced(data: bytes, preprocessing: Preprocessing, gap: float) -> Image.Image:
    """Decoded at 1/2, 1/4 or 1/8 of each side, where `gap` times the resized image remains."""
    with Image.open(io.BytesIO(data)) as image:
        width, height = preprocessing.scaled_size(*image.size)
        image.draft("RGB", (int(width * gap), int(height * gap)))
        return image.convert("RGB")


def window(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize only what the crop keeps: the same filter at the same places."""
    height, width = preprocessing.input_size[1:]
    scaled = preprocessing.scaled_size(*image.size)
    left, top = round((scaled[0] - width) / 2), round((scaled[1] - height) / 2)
    x, y = image.width / scaled[0], image.height / scaled[1]
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    return image.resize((width, height), INTERPOLATIONS[preprocessing.interpolation], box=box)


def levels(tensor: torch.Tensor, preprocessing: Preprocessing) -> NDArray[np.float64]:
    """Pixels of a normalised tensor, 0 to 255."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocessing.mean, preprocessing.std))
    return ((tensor * std + mean) * 255).double().numpy()


def is_plain(file: Path, least: int) -> bool:
    """Whether a file is an upright JPEG in RGB, what all ways read alike, and large enough."""
    with Image.open(file) as image:
        plain = image.format == "JPEG" and image.mode in ("RGB", "L")
        return plain and max(image.size) >= least and image.getexif().get(0x0112, 1) == 1


def table(name: str, files: list[Path], preprocessing: Preprocessing, repeats: int) -> None:
    """Print one row for each way."""
    contents = [file.read_bytes() for file in files]
    side = int(np.median([max(Image.open(file).size) for file in files]))
    found = ways(preprocessing)
    truth = [levels(next(iter(found.values()))(data), preprocessing) for data in contents]
    times: dict[str, list[float]] = {way: [] for way in found}
    for _ in range(repeats):
        for way, run in found.items():
            began = time.process_time()
            for data in contents:
                run(data)
            times[way].append((time.process_time() - began) / len(contents))
    print(f"\n{name}: {len(files)} JPEG files, median longer side {side} px, one core\n")
    print("| way | ms | images/s | mean distance | 99.9 % within | largest |")
    print("| --- | --- | --- | --- | --- | --- |")
    for way, run in found.items():
        gap = [
            np.abs(levels(run(data), preprocessing) - true)
            for data, true in zip(contents, truth, strict=True)
        ]
        every = np.concatenate([g.ravel() for g in gap])
        seconds = min(times[way])
        print(
            f"| {way} | {1e3 * seconds:.2f} | {1 / seconds:.0f} | {every.mean():.3f} | "
            f"{np.quantile(every, 0.999):.1f} | {every.max():.0f} |",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(FOUR))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--least", type=int, default=0, help="longer side of the images, pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--interpolation", default="bicubic", choices=["bilinear", "bicubic"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    preprocessing = Preprocessing((3, given.size, given.size), *IMAGENET, given.interpolation)
    for name in given.sets:
        folder = ASSETS / "data" / name if name in FOUR else Path(name)
        files = [file for file in every_image(folder) if is_plain(file, given.least)]
        if not files:
            print(f"\n{name}: no such JPEG file")
            continue
        rng = np.random.default_rng(0)
        chosen = sorted(rng.permutation(len(files))[: given.images].tolist())
        table(name, [files[i] for i in chosen], preprocessing, given.repeats)


if __name__ == "__main__":
    main()
