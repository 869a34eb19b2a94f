"""One training in several processes on the CPU: what each of them found, as JSON.

`python -m torch.distributed.run --nproc-per-node 2 tests/together.py TASK CACHE FOLDER`
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tl import ranks
from tl.config import Task, TrainConfig, compose
from tl.data import ImageDataModule
from tl.finetuning import build_plan
from tl.models import build_model
from tl.training import judge, prepare, run_plan

sys.path.insert(0, str(Path(__file__).parent))

from test_tasks_training import SIZES, SMALL, tinted

SIZES.update(val=21, test=13)  # neither can be shared out evenly


def main(task: Task, cache: str, folder: Path) -> None:
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    settings = [f"cache.mode={cache}", "data.batch_size=8", "data.num_workers=0"]
    method = ["finetune=lp_ft", "finetune.epochs=2", "finetune.head_lr=0.02", "finetune.patience=0"]
    config = compose("train", [*SMALL, *method, *settings], {"data.root": "x"})
    trainer = {**config.trainer, "accelerator": "cpu", "devices": processes, "strategy": "auto"}
    if processes > 1:
        trainer["strategy"] = "ddp"
    with ranks.joined():
        train(trainer, config, task, folder, rank)
    ranks.leave()


def train(trainer: dict, config: TrainConfig, task: Task, folder: Path, rank: int) -> None:
    prepare(trainer, config.seed)
    table = tinted(folder / f"images{rank}", task)
    built = build_model(config.model, table.classes)
    images = ImageDataModule.from_config(table, built.preprocessing, config)
    plan = build_plan(config.finetune, built, train_images=SIZES["train"], batch_size=8)
    fit = run_plan(
        plan,
        built,
        images,
        folder=folder / "checkpoints",
        trainer=trainer,
        cache=config.cache,
        imbalance=config.imbalance,
        seed=config.seed,
    )
    reports, predictions = judge(fit.predict, images)
    columns = [c for c in fit.history.columns if c.startswith("val/")]
    found = {
        "history": fit.history[columns].to_dict("records"),
        "best": [phase.best_epoch for phase in fit.phases],
        "kept": [phase.kept for phase in fit.phases],
        "metrics": {key: value for report in reports for key, value in report.flat().items()},
        "images": len(predictions),
        "different": int(predictions["sha256"].nunique()),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Task[sys.argv[1]], sys.argv[2], Path(sys.argv[3]))
