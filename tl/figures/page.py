"""A page for a picture: style, colours, size, and how it is written."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
DPI = 200
MARGIN = 0.06  # inches around a picture
COMPRESSION = 3  # of PNG: higher levels take several times as long for a few per cent
STYLE: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


@contextmanager
def page(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure that is written to `path` in one step, without a display, with a thin margin.

    Axes have their places in inches of a page of so many; what stands around them (names, legends)
    may reach beyond it, and the picture is cut where the ink ends. That is found out once and drawn
    once: matplotlib's own layouts do both several times.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE), warnings.catch_warnings():
        # A class name in a script that the font lacks is drawn as boxes; the tables have it right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width, height), dpi=DPI)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            kind = path.suffix.lstrip(".") or "png"
            canvas: Any = FigureCanvasAgg(figure)
            ink = figure.get_tightbbox(canvas.get_renderer())
            png = {"pil_kwargs": {"compress_level": COMPRESSION}}
            options: dict[str, Any] = png if kind == "png" else {}
            figure.savefig(partial, format=kind, bbox_inches=ink.padded(MARGIN), **options)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def short(name: str, most: int = 28) -> str:
    """The name, cut where it is longer than `most` characters."""
    return name if len(name) <= most else f"{name[: most - 1]}…"
