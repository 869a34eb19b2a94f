"""Several processes of one job: `tl train` in each of them, started here or by a launcher."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from tl import launching, ranks
from tl.config import TrainConfig
from tl.runs import TrainResult, end_job, read_config

Train = Callable[[TrainConfig], TrainResult]


def together(train: Train) -> Train:
    """Let `train` run in as many processes as the trainer asks for.

    Those that `torchrun` or `srun` started find each other. Otherwise they are started here, before
    anything is read, and this process waits for what they find.
    """

    @wraps(train)
    def alone_or_together(config: TrainConfig) -> TrainResult:
        asked = read_config(Path(config.resume)) if config.resume else config
        number = launching.processes(asked.trainer, asked.data.batch_size)
        if number > 1:
            return launching.launch(config, number)
        with ranks.joined():
            result = train(config)
            end_job(result.output_dir)
            return result

    return alone_or_together


def main() -> None:
    """Entry of each process that `tl.launching` starts."""
    from tl.pipelines.train import train

    sys.exit(launching.serve(Path(sys.argv[1]), train))


if __name__ == "__main__":
    main()
