"""Pages that are written from the code agree with it."""

from __future__ import annotations

import runpy
from pathlib import Path

REPO = Path(__file__).parents[1]


def test_configuration_page_is_up_to_date():
    page = runpy.run_path(str(REPO / "docs" / "make_configuration.py"))["page"]()
    assert "| `finetune.lr_ratio` | number, ≥ 1, ≤ 100 |" in page
    written = (REPO / "docs" / "configuration.md").read_text()
    assert written == page, "the schemas or presets changed: run `make docs`"
