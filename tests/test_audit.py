from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_digits

from tl.audit import AuditError, Features, Severity, audit, fixed
from tl.audit.labels import confident_errors, held_out_probabilities
from tl.audit.near import TURNS, near_pairs
from tl.config import BadImages, DataConfig, Task
from tl.data import DataError, ImageTable, read_table
from tl.data.looks import SIDE, Look, hash_bits, header, look


def scene(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """Noise with the spectrum of photographs: amplitudes fall as one over the frequency."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(128)[:, None], np.fft.fftfreq(128)[None, :])
    spectrum = np.fft.fft2(rng.normal(size=(3, 128, 128))) / np.maximum(frequency, 1 / 128)
    values = np.fft.ifft2(spectrum).real
    values = 128 + 50 * (values - values.mean()) / values.std()
    pixels = values.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def save(image: Image.Image, file: Path, **options: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of 12 images in train and 6 in val, all different."""
    place = tmp_path_factory.mktemp("data")
    number = 0
    for split, size in (("train", 12), ("val", 6)):
        for name in ("cats", "dogs"):
            for i in range(size):
                save(scene(number), place / split / name / f"{i:02d}.png")
                number += 1
    return place


@pytest.fixture
def root(photos, tmp_path) -> Path:
    """A copy of them to spoil."""
    return Path(shutil.copytree(photos, tmp_path / "photos"))


def read(root: Path, **settings: object) -> ImageTable:
    config = DataConfig(root=str(root), bad_images=BadImages.skip, **settings)
    return read_table(config, seed=0, cache_dir=None, required_splits=())


def findings(table: ImageTable) -> dict[str, object]:
    return {finding.kind: finding for finding in audit(table).findings}


def paths(table: ImageTable, finding) -> set[str]:
    return set(table.rows["path"].iloc[finding.rows])


def test_nothing_is_found_where_nothing_is_wrong(root):
    report = audit(read(root))
    assert report.findings == ()
    assert report.heading == "36 images of 2 classes: nothing found"
    assert set(report.unchecked) == {"groups across splits", "label errors, cut copies"}


# --- files that cannot be read ------------------------------------------------------------------


def test_unreadable_files_are_told_apart(root):
    bad = root / "train" / "cats"
    (bad / "empty.jpg").touch()
    (bad / "page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    (bad / "scan.png").write_bytes(b"%PDF-1.7 and so on")
    (bad / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (bad / "lfs.jpg").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    whole = io.BytesIO()
    scene(99).save(whole, "PNG")
    (bad / "cut.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    save(Image.new("RGB", (300, 300)), bad / "large.png")
    found = findings(read(root, max_pixels=80_000))
    assert {kind: finding.names for kind, finding in found.items()} == {
        "empty": ["train/cats/empty.jpg"],
        "truncated": ["train/cats/cut.png"],
        "too_many_pixels": ["train/cats/large.png"],
        "not_an_image": [
            f"train/cats/{n}" for n in ("lfs.jpg", "page.jpg", "phone.jpg", "scan.png")
        ],
    }
    notes = " ".join(found["not_an_image"].notes)
    for text in ("pointer of Git LFS", "a web page (HTML)", "a HEIC photograph", "a PDF"):
        assert text in notes
    assert all(f.severity is Severity.error for f in found.values())


# --- odd images ---------------------------------------------------------------------------------


def test_odd_images_are_named(root):
    cats = root / "train" / "cats"
    save(Image.new("RGB", (90, 90), (200, 30, 30)), cats / "red.png")
    frames = [scene(500 + i).convert("P") for i in range(3)]
    save(frames[0], cats / "moving.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    save(scene(510), cats / "lying.jpg", exif=exif)
    save(scene(511).convert("L"), cats / "grey.png")
    save(scene(512), cats / "png.jpg", format="PNG")
    save(scene(513, (20, 24)), cats / "icon.png")
    save(scene(514, (900, 90)), cats / "strip.png")
    save(scene(515, (900, 800)), cats / "poster.png")
    table = read(root)
    found = findings(table)
    expected = {
        "blank": "red.png",
        "animated": "moving.gif",
        "exif_rotated": "lying.jpg",
        "wrong_ending": "png.jpg",
        "tiny": "icon.png",
        "aspect_outliers": "strip.png",
    }
    for kind, name in expected.items():
        assert paths(table, found.pop(kind)) == {f"train/cats/{name}"}
    assert paths(table, found.pop("modes")) == {"train/cats/grey.png", "train/cats/moving.gif"}
    assert paths(table, found.pop("size_outliers")) == {
        "train/cats/poster.png",
        "train/cats/strip.png",
    }
    assert found == {}


def test_without_a_check_the_audit_says_what_it_did_not_see(root):
    table = read(root, check=False)
    assert "phash" not in table.rows
    report = audit(table)
    assert report.unchecked["looks, near copies"] == "the images were not decoded: data.check=false"
    assert report.findings == ()


# --- copies -------------------------------------------------------------------------------------


def test_copies_are_told_by_where_they_lie(root):
    def copy(source: str, target: str) -> None:
        (root / target).write_bytes((root / source).read_bytes())

    copy("train/cats/00.png", "val/cats/leak.png")
    copy("train/cats/01.png", "train/dogs/both.png")
    copy("train/dogs/02.png", "train/dogs/again.png")
    table = read(root)
    found = findings(table)
    assert {kind: (f.severity.value, paths(table, f)) for kind, f in found.items()} == {
        "copies_across_splits": ("error", {"train/cats/00.png", "val/cats/leak.png"}),
        "copies_with_other_labels": ("error", {"train/cats/01.png", "train/dogs/both.png"}),
        "copies": ("warning", {"train/dogs/02.png", "train/dogs/again.png"}),
    }
    after = fixed(table, audit(table))
    assert set(after.quarantined["path"]) == {
        "train/cats/00.png",
        "train/cats/01.png",
        "train/dogs/both.png",
    }
    assert set(after.quarantined["reason"]) == {
        "audit: copies_across_splits",
        "audit: copies_with_other_labels",
    }
    assert len(after.rows) == len(table.rows) - 3
    assert "audit=fix left out 3 images" in after.notes[-1]
    kinds = {finding.kind for finding in audit(after).findings}
    assert kinds == {"copies"}
    assert all((root / path).is_file() for path in table.rows["path"])


CHANGES = {
    "jpeg": lambda image: image,
    "smaller": lambda image: image.resize((70, 58)),
    "larger": lambda image: image.resize((300, 250)),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "mirrored": ImageOps.mirror,
    "turned by 90°": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "turned by 180°": lambda image: image.transpose(Image.Transpose.ROTATE_180),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_by_their_looks(root, change):
    changed = CHANGES[change](Image.open(root / "train" / "cats" / "03.png"))
    save(changed, root / "val" / "cats" / "leak.jpg", quality=60)
    table = read(root)
    (finding,) = (f for f in audit(table).findings if f.kind.startswith("near"))
    assert finding.kind == "near_copies_across_splits"
    assert paths(table, finding) == {"train/cats/03.png", "val/cats/leak.jpg"}
    assert finding.text.startswith("2 images that differ in at most 40 of 256 bits")
    if "turned" in change or change == "mirrored":
        assert "turned by" in finding.notes[0] or "mirrored" in finding.notes[0]
    after = fixed(table, audit(table))
    assert after.quarantined["path"].tolist() == ["train/cats/03.png"]


def test_where_all_images_show_one_scene_only_the_same_image_counts(tmp_path):
    base = np.asarray(scene(0, (128, 128)), np.float32)
    for i in range(40):  # a fixed camera: little changes from one image to the next
        other = np.asarray(scene(1000 + i, (128, 128)), np.float32)
        image = Image.fromarray((0.8 * base + 0.2 * other).astype(np.uint8))
        save(image, tmp_path / "line" / ("good" if i % 2 else "bad") / f"{i:02d}.png")
    again = Image.open(tmp_path / "line" / "good" / "01.png")
    save(again, tmp_path / "line" / "good" / "same.jpg", quality=90)
    table = read(tmp_path / "line")
    found = findings(table)
    assert paths(table, found["near_copies"]) == {"good/01.png", "good/same.jpg"}
    assert "not 40, as" in found["near_copies"].text


def test_sorted_lists_find_what_comparing_all_pairs_finds():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 256, (4_000, 32), dtype=np.uint8)
    bits = np.unpackbits(hashes[:500], axis=1)
    for number, row in enumerate(bits):
        row[rng.permutation(256)[: number % 41]] ^= 1
    hashes[-500:] = np.packbits(bits, axis=1)
    every = near_pairs(hashes, 40, exact=len(hashes))
    some = near_pairs(hashes, 40, exact=10)
    assert every.complete
    assert not some.complete
    assert every.first.tolist() == list(range(500))
    assert every.second.tolist() == list(range(3_500, 4_000))
    assert every.bits.tolist() == [number % 41 for number in range(500)]
    close = {
        (a, b) for a, b, n in zip(every.first, every.second, every.bits, strict=True) if n < 21
    }
    both = set(zip(some.first.tolist(), some.second.tolist(), strict=True))
    assert {(int(a), int(b)) for a, b in close} <= both
    assert len(both) >= 0.97 * len(every)


def test_hashes_of_turned_images_are_the_same_bits_in_another_order():
    image = scene(1)
    turned = [
        image,
        ImageOps.mirror(image),
        *(image.rotate(a, expand=True) for a in (90, 180, 270)),
    ]
    hashes = hash_bits([look(None, each).phash for each in turned])
    pairs = near_pairs(hashes, 12)
    own = {
        int(b): TURNS[t]
        for a, b, t in zip(pairs.first, pairs.second, pairs.turn, strict=True)
        if a == 0
    }
    assert own[1] == "mirrored"
    assert {own[2], own[4]} == {"turned by 90°", "turned by 270°"}
    assert own[3] == "turned by 180°"


def test_a_reduced_jpeg_looks_like_the_whole_one(tmp_path):
    file = save(scene(3, (1200, 900)), tmp_path / "large.jpg", quality=90)
    with Image.open(file) as image:
        facts = header(image)
        image.draft(image.mode, (SIDE, SIDE))
        small = look(facts, image)
    whole = look(facts, Image.open(file).convert("RGB"))
    assert isinstance(small, Look)
    assert (small.format, small.mode, small.orientation, small.frames) == ("JPEG", "RGB", 1, 0)
    assert small.brightness == pytest.approx(whole.brightness, abs=1)
    apart = np.unpackbits(hash_bits([small.phash]) ^ hash_bits([whole.phash])).sum()
    assert apart <= 6


# --- classes, groups, numbers -------------------------------------------------------------------


def rows_of(counts: dict[str, list[int]], **more: object) -> pd.DataFrame:
    """Rows with so many images of each class in each split, without looks."""
    cells = [(s, c) for s, ns in counts.items() for c, n in enumerate(ns) for _ in range(n)]
    rows = pd.DataFrame(cells, columns=["split", "label"])
    rows["path"] = [f"{i}.png" for i in range(len(rows))]
    rows["sha256"] = [f"{i:064x}" for i in range(len(rows))]
    return rows.assign(width=64, height=64, bytes=100, **more)


def test_missing_tiny_and_rare_classes():
    rows = rows_of({"train": [60, 20, 3], "val": [10, 3, 0]})
    table = ImageTable(Path("/data"), ("a", "b", "c"), rows)
    found = findings(table)
    assert found["class_missing"].text == "c has no image in val"
    assert found["class_missing"].severity is Severity.error
    assert found["tiny_class"].names == ["c (3)"]
    assert found["few_to_judge"].names == ["b (3)"]
    assert found["imbalance"].severity is Severity.warning
    assert found["imbalance"].text.startswith("a has 60 images in train, c 3: 20 times as many")


def test_several_labels_are_counted_each():
    rows = rows_of({"train": [12], "val": [12]}, label=0)
    rows["labels"] = [[0, 1] if i < 12 else [0] for i in range(24)]
    table = ImageTable(Path("/data"), ("day", "rain"), rows, task=Task.multi)
    assert findings(table)["class_missing"].text == "rain has no image in val"


def test_groups_on_two_sides_leave_the_earlier_one():
    group = [f"patient {i // 2}" for i in range(12)] + ["patient 0", "patient 0", "new", "new"]
    rows = rows_of({"train": [6, 6], "val": [2, 2]}, group=group)
    table = ImageTable(Path("/data"), ("a", "b"), rows)
    report = audit(table)
    (finding,) = (f for f in report.findings if f.kind == "groups_across_splits")
    assert finding.text.startswith("1 of 7 groups have images in several splits, 4 images")
    assert fixed(table, report).quarantined["path"].tolist() == ["0.png", "1.png"]


def test_fixing_never_empties_a_class():
    rows = rows_of({"train": [2, 6], "val": [2, 2]}, group=["p"] * 2 + [f"g{i}" for i in range(6)]
                   + ["p", "p", "x", "y"])  # fmt: skip
    table = ImageTable(Path("/data"), ("a", "b"), rows)
    with pytest.raises(DataError, match="audit=fix would leave no training image of a"):
        fixed(table, audit(table))


def test_far_numbers_are_named():
    target = [*np.random.default_rng(0).normal(20, 2, 30).tolist(), 2000.0]
    rows = rows_of({"train": [31]}, label=-1, target=target)
    table = ImageTable(Path("/data"), ("price",), rows, task=Task.regression)
    (finding,) = audit(table).findings
    assert (finding.kind, finding.rows.tolist(), finding.notes) == (
        "target_outliers",
        [30],
        ["2000"],
    )


def test_a_size_that_tells_the_class_is_said():
    rows = rows_of({"train": [60, 60], "val": [20, 20]})
    rows["width"] = np.where(rows["label"] == 0, 640, 800)
    table = ImageTable(Path("/data"), ("a", "b"), rows)
    text = findings(table)["file_tells_class"].text
    assert "alone tell the class" in text
    assert "balanced accuracy of 100% (chance is 50%)" in text
    rows["width"] = np.random.default_rng(0).permutation(rows["width"])
    assert "file_tells_class" not in findings(ImageTable(Path("/data"), ("a", "b"), rows))


# --- labels -------------------------------------------------------------------------------------


def test_wrong_labels_of_digits_are_found():
    digits = load_digits()
    rng = np.random.default_rng(0)
    labels = digits.target.astype(np.int64)
    wrong = rng.permutation(len(labels))[:60]
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, 60)) % 10
    probabilities = held_out_probabilities(digits.data, labels)
    assert probabilities.shape == (len(labels), 10)
    found, said = confident_errors(probabilities, labels)
    planted = np.isin(found, wrong)
    assert planted.sum() >= 54
    assert planted.mean() >= 0.6
    assert (said[planted] == digits.target[found[planted]]).mean() > 0.9
    clean, _ = confident_errors(held_out_probabilities(digits.data, digits.target), digits.target)
    assert len(clean) < 60


def test_confident_learning_by_hand():
    # thresholds are 0.7 and 0.8; the last row's 0.85 for class 1 reaches that of class 1
    probabilities = np.array([[0.95, 0.05], [1.0, 0.0], [0.15, 0.85], [0.05, 0.95], [0.25, 0.75]])
    labels = np.array([0, 0, 0, 1, 1])
    rows, said = confident_errors(probabilities, labels)
    assert (rows.tolist(), said.tolist()) == ([2], [1])


def test_images_that_a_network_finds_alike_are_named_across_splits():
    rng = np.random.default_rng(0)
    rows = rows_of({"train": [20, 20], "val": [10, 10]})
    table = ImageTable(Path("/data"), ("a", "b"), rows)
    values = rng.normal(size=(60, 64)).astype(np.float32)
    values[45] = values[3] + 0.2 * rng.normal(size=64)  # val and train
    values[10] = values[11] + 0.2 * rng.normal(size=64)  # both in train
    report = audit(table, Features(values, np.arange(60), "net"))
    (finding,) = (f for f in report.findings if f.kind == "alike_across_splits")
    assert finding.rows.tolist() == [3, 45]
    assert finding.sets.tolist() == [1, 1]
    assert finding.severity is Severity.note
    assert not len(finding.fix)


# --- the report ---------------------------------------------------------------------------------


def test_errors_are_refused_with_every_finding(root):
    (root / "val" / "cats" / "leak.png").write_bytes((root / "train/cats/00.png").read_bytes())
    report = audit(read(root))
    with pytest.raises(AuditError, match=r"found 1 error:\n  copies_across_splits: 2 images"):
        report.refuse()
    assert report.metrics()["audit/errors"] == 1
    assert report.metrics()["audit/copies_across_splits"] == 2
    replace(report, findings=()).refuse()
