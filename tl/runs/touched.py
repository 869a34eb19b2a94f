"""How many models were judged on the same test images: the best of many looks better than it is."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tl import ranks
from tl.runs.folder import CONFIG

if TYPE_CHECKING:
    from tl.data import ImageTable

log = logging.getLogger(__name__)


@ranks.on_first
def note_test(table: ImageTable, cache_dir: Path, model: Path) -> dict[str, str]:
    """Remember that a model was judged on test, and say which others were before.

    To judge one model again tells nothing new, so a model counts once.

    Args:
        table: Its test is known by the contents of the images, wherever they lie.
        cache_dir: Remembers it, one file a test.
        model: Folder of the run, or bundle.

    Returns:
        A line for the summary, where there is something to say.
    """
    rows = table.split("test")
    if not len(rows):
        return {}
    key = hashlib.sha256("\n".join(sorted(rows["sha256"])).encode()).hexdigest()[:16]
    file = cache_dir / "tests" / f"{key}.jsonl"
    model = model.resolve()
    if model.name == "bundle" and (model.parent / CONFIG).exists():
        model = model.parent
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a+", encoding="utf-8") as stream:
            stream.seek(0)
            known = [json.loads(line) for line in stream if line.endswith("\n")]
            others = [look for look in known if look["model"] != str(model)]
            if len(others) == len(known):
                look = {"model": str(model), "time": time.strftime("%Y-%m-%d %H:%M")}
                stream.write(json.dumps(look) + "\n")
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read and written: %s", file, error)
        return {}
    if not others:
        return {}
    many = "1 other model was" if len(others) == 1 else f"{len(others):,} other models were"
    return {
        "test": f"{many} judged on these test images, the first on {others[0]['time']}: the best "
        "of several looks better than it is, so choose by val or data.folds"
    }
