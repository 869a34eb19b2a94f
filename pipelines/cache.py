"""Cache: show the activations that are kept on disk, and remove old ones."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tl.config import CacheToolConfig
from tl.pipelines import run

if TYPE_CHECKING:
    from tl.cache import ShelfInfo

DAY = 24 * 3600.0  # seconds


def cache(config: CacheToolConfig) -> list[ShelfInfo]:
    """Show what is in the cache, after removing what the config says.

    Args:
        config: The folder, its limit, and what to remove.

    Returns:
        The shelves that are left, the least recently used first.

    Raises:
        CacheError: Something is to be removed, and the folder cannot be written.
    """
    from tl import display
    from tl.cache import ActivationCache, folder_bytes, free_bytes, size_text

    root, limit = config.cache.path(), int(config.cache.max_gb * 1e9)
    store = ActivationCache(root / "activations", limit_bytes=limit)
    days = config.older_than_days
    before = 0.0 if days is None else time.time() - days * DAY
    down_to = {"all": 0, "limit": limit, None: 2**63}[config.prune]
    removing = config.prune is not None or days is not None
    removed = store.prune(down_to, used_before=before) if removing else []
    shelves = store.shelves()
    total = sum(shelf.bytes for shelf in shelves)
    for shelf in removed:
        display.say(f"removed {shelf}: {size_text(shelf.bytes)}")
    for shelf in shelves if removing else ():
        if shelf.in_use and (total > down_to or shelf.last_used < before):
            display.say(f"kept {shelf}: a running job reads it")
    if removing:
        display.say(f"{size_text(sum(shelf.bytes for shelf in removed))} removed\n")
    if shelves:
        display.results_table("activations", [_row(shelf) for shelf in shelves])
    else:
        display.say("no activations are kept: tl train fills the cache where a part is frozen\n")
    places = {
        "activations": f"{size_text(total)} of at most {size_text(limit)} (cache.max_gb)",
        "checks of images": size_text(folder_bytes(root / "images")),
        "free on the disk": size_text(free_bytes(root)),
        "folder": str(root),
    }
    display.facts("cache", places)
    return shelves


def _row(shelf: ShelfInfo) -> dict[str, object]:
    from tl.cache import size_text

    return {
        **{name: shelf.text(name) for name in ("model", "frontier", "view")},
        "images": shelf.images,
        "size": size_text(shelf.bytes),
        "last used": time.strftime("%Y-%m-%d %H:%M", time.localtime(shelf.last_used)),
        "in use": shelf.in_use,
    }


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl cache` and of `python pipelines/cache.py`."""
    run("cache", cache, argv)


if __name__ == "__main__":
    main()
