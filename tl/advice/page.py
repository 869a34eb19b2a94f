"""An advice as one HTML page: styles and plots inside, nothing from outside, no scripts."""

from __future__ import annotations

from collections.abc import Sequence

from tl.advice.sections import METHODS
from tl.pages import render
from tl.sections import Section

TEMPLATE = "page.html"


def page(title: str, subtitle: str, sections: Sequence[Section], footer: str) -> str:
    """HTML text of all sections; what comes from names of files is escaped."""
    return render(
        "tl.advice", TEMPLATE, title=title, subtitle=subtitle, sections=sections, footer=footer,
        words=METHODS,
    )  # fmt: skip
