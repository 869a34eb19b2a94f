"""What tracking costs a job: `python benchmarks/tracking.py [--rounds N] [--seconds S]`.

The same fit of a small network, by Lightning and with three metrics every tenth step, runs without
tracking, into a database in a file, and with a server that takes requests and never answers; in
turn, so that all see the same load. Given are the ratios of wall time and of processor time to the
fit without tracking (medians over the rounds), what begin and end of a job add, and what that is
of a job of five minutes. The goal is 2 % for each kind.
"""

from __future__ import annotations

import argparse
import logging
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tl  # isort: skip  # noqa: F401  # sets OpenMP's wait policy before torch is loaded
import pytorch_lightning as pl
import torch
from torch.nn import functional as F

from tl.config import TrackingConfig
from tl.display import facts, results_table
from tl.tracking import TrackedRun, run, sending, start_run
from tl.tracking import load as load_mlflow

JOB_SECONDS = 300
GOAL = 0.02


class Small(pl.LightningModule):
    """A network whose step takes some milliseconds, as one on a frozen backbone's features."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(1280, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 100)
        )

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _index: int) -> torch.Tensor:
        """Loss of a batch; three metrics."""
        logits = self.layers(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        share = (logits.argmax(1) == batch[1]).float().mean()
        self.log_dict({"train/loss": loss, "train/acc": share, "norm": logits.norm()}, on_step=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW, as tl uses it."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(tracked: TrackedRun, steps: int) -> None:
    """One fit of so many steps."""
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(4096, 1280), torch.randint(100, (4096,)))
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=tracked.loggers(0),
        log_every_n_steps=10,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Small(), torch.utils.data.DataLoader(data, batch_size=64))


def timed(uri: str | None, steps: int, folder: Path) -> dict[str, float]:
    """Seconds of a fit, of the processor in it, and of begin and end of its job."""
    config = TrackingConfig(enabled=uri is not None, uri=uri)
    for thread in threading.enumerate():  # of the job before, in a request without an answer
        if thread.name == "tl.tracking":
            thread.join(30)
    run._away.clear()
    began = time.perf_counter()
    job = {"experiment": "benchmark", "run_name": "fit", "output_dir": folder, "resume": False}
    with start_run(config, **job) as tracked:
        inside, processor = time.perf_counter(), time.process_time()
        fit(tracked, steps)
        fitted, used = time.perf_counter(), time.process_time()
        if uri:  # a job of five minutes would have noticed long ago
            while not tracked.run_id and not tracked._sender.failure:
                time.sleep(0.1)
        noticed = time.perf_counter()
    done = time.perf_counter()
    return {
        "wall": fitted - inside,
        "processor": used - processor,
        "ends": inside - began + done - noticed,
    }


@contextmanager
def hanging() -> Iterator[str]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def main() -> None:
    """Entry of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a fit without tracking")
    asked = parser.parse_args()
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "tl.tracking"):
        logging.getLogger(name).setLevel(logging.ERROR)
    sending.LONG_SECONDS = 1.0  # these fits are shorter than a job that has known it for long
    load_mlflow(TrackingConfig())
    torch.set_num_threads(1)  # so that the threads of tracking have a core of their own
    with tempfile.TemporaryDirectory() as place, hanging() as silent:
        work = Path(place)
        kinds = {"none": None, "database": f"sqlite:///{work}/mlflow.db", "hanging server": silent}
        print("warm-up", flush=True)
        for kind, uri in kinds.items():  # warm-up, and the tables of the database
            timed(uri, 50, work / f"warm {kind}")
        steps = max(50, round(500 * asked.seconds / timed(None, 500, work / "pace")["wall"]))
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for number in range(asked.rounds):
            for kind, uri in [*kinds.items()][:: 1 if number % 2 else -1]:
                found[kind].append(timed(uri, steps, work / f"{kind} {number}"))
                shown = {name: round(value, 2) for name, value in found[kind][-1].items()}
                print(number, kind, shown, flush=True)
    rows = []
    for kind in [*kinds][1:]:
        pairs = [*zip(found[kind], found["none"], strict=True)]
        wall = statistics.median(own["wall"] / plain["wall"] for own, plain in pairs) - 1
        processor = statistics.median(o["processor"] / p["processor"] for o, p in pairs) - 1
        ends = statistics.median(own["ends"] for own, _ in pairs)
        share = max(processor, 0) + ends / JOB_SECONDS
        rows.append(
            {
                "store": kind,
                "wall time, fit": f"{wall:+.2%}",
                "processor, fit": f"{processor:+.2%}",
                "begin and end, s": round(ends, 2),
                "of 5 minutes": f"{share:.2%}",
                "goal": "met" if share <= GOAL else "missed",
            }
        )
    results_table("tracking", rows)
    facts("measured", {"steps of a fit": str(steps), "rounds": str(asked.rounds)})


if __name__ == "__main__":
    main()
