"""Images one by one: what cannot be read, and what differs from the others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tl.audit.findings import Finding, Severity, images, named
from tl.data.looks import ANIMATED, PAGES

# Kind -> words of the reason by which the check of the table tells it, and a remedy.
UNREADABLE = {
    "empty": (("0 bytes",), "delete it, or copy it again"),
    "truncated": (("truncated",), "copy it again from where it came"),
    "too_many_pixels": (("over the limit",), "scale it down, or raise data.max_pixels"),
    "not_an_image": (
        ("not an image", "hold no pixels", "web page"),
        "delete it, or save it as PNG or JPEG",
    ),
    "unreadable": ((), "mend or delete it"),
}
TAKEN = "audit: "  # how the reason begins where `audit=fix` took an image out
HEAD = 512  # bytes that tell what a file is
CONTENTS = (
    (b"<?xml", "an XML file"),
    (b"<svg", "an SVG drawing"),
    (b"%pdf", "a PDF"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"{", "JSON"),
    (b"version https://git-lfs", "a pointer of Git LFS: run git lfs pull"),
)
HEIC = (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc")
# Format -> endings of the name that fit it; other formats are not compared.
ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "MPO": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
}
ALL_ENDINGS = tuple(sorted({ending for endings in ENDINGS.values() for ending in endings}))
BLANK = 2.0  # grey levels of contrast; the flattest of 6,009 photographs has 4.1
SMALL_SIDE = 32  # pixels; networks are trained at 160 and more
# Robust outliers: so many times the usual deviation from the median (median absolute deviation),
# and a factor of so much, as sets of one size have no deviation at all.
DEVIATIONS, AREA_FACTOR, ASPECT_FACTOR = 5.0, 4.0, 2.0


def unreadable(quarantined: pd.DataFrame, root: Path) -> Iterator[Finding]:
    """Files that the table left out, by what is wrong with them."""
    kinds = ["" if reason.startswith(TAKEN) else _kind(reason) for reason in quarantined["reason"]]
    for kind, (_, remedy) in UNREADABLE.items():
        found = quarantined[[k == kind for k in kinds]]
        if not len(found):
            continue
        reasons = [
            _sniffed(root / path, reason) if "not an image" in reason else reason
            for path, reason in zip(found["path"], found["reason"], strict=True)
        ]
        examples = [re.split(r" \(|;", reason)[0] for reason in reasons]
        yield Finding(
            kind,
            Severity.error,
            f"{images(len(found))} cannot be read: {named(examples, 3)}",
            f"{remedy}; data.bad_images=skip and audit=fix leave it out",
            notes=reasons,
            names=found["path"].tolist(),
        )


def _kind(reason: str) -> str:
    found = (kind for kind, (words, _) in UNREADABLE.items() if any(w in reason for w in words))
    return next(found, "unreadable")


def _sniffed(file: Path, reason: str) -> str:
    """What a file really is, where its first bytes tell."""
    try:
        with file.open("rb") as stream:
            head = stream.read(HEAD)
    except (OSError, ValueError):
        return reason
    if head[4:12] in HEIC:
        return "a HEIC photograph: convert it to JPEG"
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return next((what for mark, what in CONTENTS if start.startswith(mark)), reason)


def odd_images(rows: pd.DataFrame) -> Iterator[Finding]:
    """Images that can be read, and may not be what they seem.

    Args:
        rows: Of the table, with the columns of `tl.data.looks.LOOK` where images were looked at.
    """
    yield from _sizes(rows)
    if "phash" not in rows:
        return
    looked = (rows["phash"] != "").to_numpy(bool)
    formats, modes = rows["format"].astype(str), rows["mode"].astype(str)
    blank = looked & (rows["contrast"].to_numpy(float) < BLANK)
    if blank.any():
        yield _finding(
            "blank", Severity.warning, blank,
            f"{images(int(blank.sum()))} of one colour: there is nothing to see",
            "look at them; delete what is not meant",
        )  # fmt: skip
    frames = rows["frames"].to_numpy()
    for kind, value, what in (("animated", ANIMATED, "animated"), ("pages", PAGES, "of pages")):
        if (found := looked & (frames == value)).any():
            yield _finding(
                kind, Severity.warning, found,
                f"{images(int(found.sum()))} {what}: only the first is used",
                "save the one that is meant as an image of its own",
            )  # fmt: skip
    yield from _files(rows, looked, formats, modes)


def _files(
    rows: pd.DataFrame, looked: NDArray[np.bool_], formats: pd.Series[str], modes: pd.Series[str]
) -> Iterator[Finding]:
    turned = looked & (rows["orientation"].to_numpy() != 1)
    if turned.any():
        yield _finding(
            "exif_rotated", Severity.note, turned,
            f"{images(int(turned.sum()))} stored turned, with an EXIF tag that says so: they are "
            "set upright here, everywhere alike; other programs may ignore the tag",
            "nothing to do; save them upright where other programs read them too",
        )  # fmt: skip
    counts = modes[looked].value_counts()
    if len(counts) > 1:
        rare = looked & (modes != counts.index[0]).to_numpy()
        yield _finding(
            "modes", Severity.note, rare,
            f"{named(modes[looked])}: {images(int(rare.sum()))} of another mode than most",
            "all become RGB of 8 bits; see that the mode does not tell the class",
            notes=modes[rare].tolist(),
        )  # fmt: skip
    names = rows["path"].str.lower()
    an_image = names.str.endswith(ALL_ENDINGS).to_numpy(bool)
    wrong = np.zeros(len(rows), bool)
    for kind, endings in ENDINGS.items():
        own = (formats == kind).to_numpy(bool)
        wrong[own] = an_image[own] & ~names[own].str.endswith(endings).to_numpy(bool)
    if wrong.any():
        yield _finding(
            "wrong_ending", Severity.note, wrong,
            f"{images(int(wrong.sum()))} with the ending of another format; the contents count",
            "rename them where other programs go by the name",
            notes=[f"is {kind}" for kind in formats[wrong]],
        )  # fmt: skip


def _sizes(rows: pd.DataFrame) -> Iterator[Finding]:
    width, height = (rows[c].to_numpy(np.float64) for c in ("width", "height"))
    known = (width > 0) & (height > 0)
    if not known.any():
        return
    side, area = np.minimum(width, height), np.log2(np.where(known, width * height, 1))
    aspect = np.log2(np.where(known, width / np.maximum(height, 1), 1))
    middle = np.median(side[known])
    tiny = known & (side < SMALL_SIDE) & (middle >= 2 * SMALL_SIDE)
    odd = known & ~tiny & _outliers(area, known, AREA_FACTOR)
    # What matters is how far from a square: a centre crop loses the ends.
    long = known & _outliers(aspect, known, ASPECT_FACTOR) & (np.abs(aspect) > 1)
    usual = f"the usual one is {_usual(width[known])} × {_usual(height[known])} pixels"
    for kind, severity, found, what, remedy in (
        ("tiny", Severity.warning, tiny, f"with a side below {SMALL_SIDE} pixels", "look at them"),
        (
            *("aspect_outliers", Severity.warning, long),
            *("far longer or higher than the others", "a centre crop loses their ends: cut them"),
        ),
        (
            *("size_outliers", Severity.note, odd, "of quite another size"),
            "see that they show the same kind of thing",
        ),
    ):
        if found.any():
            yield _finding(
                kind, severity, found,
                f"{images(int(found.sum()))} {what}; {usual}", remedy,
                notes=_sides(width[found], height[found]),
            )  # fmt: skip


def _outliers(
    values: NDArray[np.float64], known: NDArray[np.bool_], factor: float
) -> NDArray[np.bool_]:
    """Far from the median, by logarithms to base 2."""
    middle = np.median(values[known])
    usual = 1.4826 * np.median(np.abs(values[known] - middle))
    found: NDArray[np.bool_] = np.abs(values - middle) > max(DEVIATIONS * usual, np.log2(factor))
    return found


def _usual(values: NDArray[np.float64]) -> int:
    return int(np.median(values))


def _finding(
    kind: str,
    severity: Severity,
    mask: NDArray[np.bool_],
    text: str,
    remedy: str,
    notes: list[str] | None = None,
) -> Finding:
    return Finding(kind, severity, text, remedy, rows=np.flatnonzero(mask), notes=notes or ())


def _sides(width: NDArray[np.float64], height: NDArray[np.float64]) -> list[str]:
    return [f"{w:.0f} × {h:.0f}" for w, h in zip(width, height, strict=True)]
