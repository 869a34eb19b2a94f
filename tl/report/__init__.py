"""The page of one run: what it is, what came out, how sure that is, and what to do next.

Every figure comes from a file of the run's folder, and the page says from which. Torch-free.
"""

from __future__ import annotations

from tl.report.whole import NAME, attach, page, table_of, write

__all__ = ["NAME", "attach", "page", "table_of", "write"]
