"""Pages for people: one frame for all of them, each a file that needs nothing else.

A page of another room is a Jinja template beside its code that begins with
`{% extends "frame.html" %}` and fills the blocks `header`, `content` and `footer`, and, where it
needs them, `style` (CSS), `head`, `policy` (more of the content security policy) and `scripts`.
`tl.pages` has `frame.html` with its styles, and `parts.html` with what several pages show.
"""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from tl.config import TlError
from tl.cores import usable_cores
from tl.pages.learning import chart

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL import Image

SIDE = 128  # pixels of a small picture
QUALITY = 75  # of its JPEG: about 4 kB


class Images(Protocol):
    """Images that can be opened by number."""

    def __len__(self) -> int:
        """How many there are."""

    def open(self, index: int) -> Image.Image:
        """One of them; a `TlError` where it cannot be read."""


def render(package: str, template: str, **values: Any) -> str:
    """HTML text of a page; every value is escaped, as names of files and classes are not ours.

    Args:
        package: Whose folder holds the template, such as `tl.audit`.
        template: Name of the file.
        values: What the template names. One that is missing is an error, not an empty place.
    """
    return _environment(package).get_template(template).render(**values)


@cache
def _environment(package: str) -> Environment:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loaders = [PackageLoader(package, "."), PackageLoader("tl.pages", ".")]
    environment = Environment(
        loader=ChoiceLoader(loaders), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.globals["chart"] = chart
    return environment


def thumbnail(image: Image.Image, side: int = SIDE) -> str:
    """A small JPEG of an image as an address that a page may hold.

    Args:
        image: In any mode; it is not changed.
        side: Pixels of its longer side at most.
    """
    from PIL import Image

    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.BILINEAR)
    data = io.BytesIO()
    small.save(data, "JPEG", quality=QUALITY)
    return address(data.getvalue(), "image/jpeg")


def thumbnails(images: Images, side: int = SIDE) -> list[str]:
    """Small JPEGs of many images; empty for what cannot be read any more.

    Args:
        images: Such as `tl.data.ImageTable.images` gives.
        side: Pixels of the longer side at most.
    """

    def picture(index: int) -> str:
        try:
            return thumbnail(images.open(index), side)
        except TlError:
            return ""

    with ThreadPoolExecutor(usable_cores()) as pool:
        return [*pool.map(picture, range(len(images)))]


def address(contents: bytes, kind: str) -> str:
    """A file's contents as an address that a page may hold.

    Args:
        contents: Bytes of the file.
        kind: Its media type, such as `image/png`.
    """
    return f"data:{kind};base64,{base64.b64encode(contents).decode('ascii')}"
