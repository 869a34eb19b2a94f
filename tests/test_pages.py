"""The frame of all pages: escaped, whole, with nothing from outside; small pictures."""

from __future__ import annotations

import base64
import io

import pytest
from jinja2 import UndefinedError
from PIL import Image

from tl.audit.writing import Section
from tl.config import TlError
from tl.pages import address, render, thumbnail, thumbnails

ADVICE = {"title": "t", "subtitle": "s", "sections": (), "footer": "f", "words": {}}


def opened(picture: str) -> Image.Image:
    head, data = picture.split(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16", "1", "LA"])
def test_a_thumbnail_is_a_small_jpeg_of_any_mode_and_leaves_the_image_alone(mode):
    image = Image.new(mode, (400, 100))
    small = opened(thumbnail(image, side=64))
    assert (small.size, small.mode) == ((64, 16), "RGB")
    assert (image.size, image.mode) == ((400, 100), mode)


def test_a_small_image_is_not_made_larger():
    assert opened(thumbnail(Image.new("RGB", (8, 4)))).size == (8, 4)


def test_thumbnails_of_many_images_are_empty_where_one_is_gone():
    class Some:
        def __len__(self):
            return 3

        def open(self, index):
            if index == 1:
                raise TlError("gone")
            return Image.new("RGB", (10 + index, 10))

    first, second, third = thumbnails(Some())
    assert second == ""
    assert [opened(p).size for p in (first, third)] == [(10, 10), (12, 10)]


def test_values_are_escaped_and_a_missing_one_is_an_error():
    bad = "<script>alert(1)</script>"
    text = render("tl.advice", "page.html", **ADVICE | {"title": bad, "footer": bad})
    assert "<script" not in text
    assert text.count("&lt;script&gt;") == 3  # title, heading, footer
    with pytest.raises(UndefinedError, match="subtitle"):
        render("tl.advice", "page.html", **{k: v for k, v in ADVICE.items() if k != "subtitle"})


def test_a_page_may_load_nothing_and_has_what_readers_need():
    text = render("tl.advice", "page.html", **ADVICE)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in text
    for part in ("<!DOCTYPE html>", '<html lang="en">', "<main", 'name="viewport"', "@media print"):
        assert part in text
    assert "prefers-color-scheme: dark" in text
    assert "url(" not in text
    assert "Skip to" not in text, "nothing stands between the heading and the content"


def test_contents_bring_a_way_around_them():
    contents = [{"id": "a", "title": "First & last"}]
    text = render("tl.advice", "page.html", **ADVICE, contents=contents)
    assert '<a class="skip" href="#content">' in text
    assert '<a href="#a">First &amp; last</a>' in text


def test_parts_of_an_advice_and_of_an_audit_look_alike():
    rows = ({"severity": "error", "count": 3},)
    parts = (Section("found", "table", rows), Section("do", "list", ({"text": "this"},), "so"))
    text = render("tl.advice", "page.html", **ADVICE | {"sections": parts})
    assert '<th scope="col">severity</th>' in text
    assert "<li>this</li>" in text
    assert '<p class="soft">so</p>' in text


def test_an_address_holds_the_bytes():
    kind, data = address(b"\x00\xff", "image/png").split(";base64,")
    assert (kind, base64.b64decode(data)) == ("data:image/png", b"\x00\xff")
