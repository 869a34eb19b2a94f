"""Sync: send to MLflow what waits in the folders of runs, and close the runs of killed jobs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tl.config import SyncConfig, TlError
from tl.pipelines import run

if TYPE_CHECKING:
    from tl.tracking import Synced


def sync(config: SyncConfig) -> list[Synced]:
    """Send the records of runs to their stores.

    Args:
        config: Folders of runs, or with runs below them, and the store, if it is another one.

    Returns:
        What became of each run.

    Raises:
        RequestError: A folder holds no run.
        TlError: Records still wait; each line before says why.
    """
    from tl import display, tracking

    folders = tracking.runs_below([Path(folder) for folder in config.folders()])
    done, stores = [], set()
    for folder in folders:
        found = tracking.sync_run(folder, config.tracking.uri)
        display.say(f"{folder}: {found.words}")
        done.append(found)
        stores |= {found.uri} if found.uri and found.answers else set()
    for uri in sorted(stores):
        for line in tracking.repair(uri):
            display.say(line)
    left = [found for found in done if found.waiting and not found.in_use]
    if left:
        count = sum(found.waiting for found in left)
        raise TlError(f"{tracking.counted(count)} of {len(left)} of {len(done)} runs still wait")
    return done


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl sync` and of `python pipelines/sync.py`."""
    run("sync", sync, argv)


if __name__ == "__main__":
    main()
