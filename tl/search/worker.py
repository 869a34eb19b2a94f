"""Entry of a further worker process: python -m tl.search.worker FOLDER."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

from tl import stopping
from tl.config import Interrupted
from tl.cores import keep_to_share
from tl.search.team import STORAGE, read_config, team


def main(path: Path) -> int:
    """Try settings of the search in a folder until all are given out, or whoever started us ends.

    Returns:
        An exit code.
    """
    from tl.runs import RunFolder

    stopping.install()
    starter = os.getppid()
    asked = read_config(path)
    storage = os.environ.pop(STORAGE, asked.search.storage)
    asked = replace(asked, search=replace(asked.search, storage=storage))
    from tl import tracking
    from tl.search import setup, trying

    keep_to_share()
    tracking.load(asked.tracking)
    try:
        with team(RunFolder(path, resumed=True), asked, join=True) as joined:
            place = setup.prepare(joined)
            trying.try_settings(joined, place, ends=lambda: os.getppid() != starter)
    except Interrupted:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
