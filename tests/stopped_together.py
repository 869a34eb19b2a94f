"""`together.py`, in which one process is asked to stop, as JSON: what became of both.

`python -m torch.distributed.run --nproc-per-node 2 tests/stopped_together.py CACHE FOLDER AT`;
AT is PHASE:EPOCH:BATCH, or nothing.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from tl import stopping
from tl.config import Interrupted, Task
from tl.module import TransferModule

sys.path.insert(0, str(Path(__file__).parent))

import together

from tl.training import within
from tl.training.lightning import Checkpoints


def stop_at(at: str) -> None:
    """The second process gets SIGTERM in the middle of a step; the first one gets none."""
    phase, epoch, batch = at.split(":")
    as_always = TransferModule.on_train_batch_start
    within.ASK_SECONDS = 0  # they ask each other after every step, not after a second's worth
    Checkpoints.affordable = lambda _: False  # nothing is written but by the stop

    def on_train_batch_start(module: TransferModule, values: object, index: int) -> None:
        as_always(module, values, index)
        here = (module.phase.name, module.current_epoch, index)
        if here == (phase, int(epoch), int(batch)) and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    TransferModule.on_train_batch_start = on_train_batch_start


def main(cache: str, folder: Path, at: str) -> None:
    stopping.install()
    if at:
        stop_at(at)
    try:
        together.main(Task.single, cache, folder)
    except Interrupted:
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps("interrupted"))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
