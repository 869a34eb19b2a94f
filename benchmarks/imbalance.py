"""What each way to treat classes of different sizes gains and costs, on long-tailed real sets.

Of each image set a training set is drawn whose largest class has RATIO times as many images as its
smallest, the others in a geometric series between them; test has as many of each class. From the
recall of each class on test follow the accuracy on evenly mixed classes (their mean) and on classes
as in train (weighted by their shares there).

    python benchmarks/imbalance.py --work DIR [--quick]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from images import ASSETS, FOUR
from regret_cells import read_set

from tl.config import Imbalance, compose
from tl.data import ImageDataModule, ImageTable
from tl.finetuning import build_plan
from tl.models import build_model
from tl.training import prepare, run_plan

RATIOS, SEEDS = (2, 5, 10, 30), 2
METHODS = ("none", "weights", "sampler", "focal", "logit_adjustment")
MOST, TEST, VAL_SHARE = 90, 30, 0.2  # images of the largest class; of each class in test


def long_tailed(table: ImageTable, ratio: float, seed: int) -> ImageTable:
    """Train and val with classes of falling size, in a random order; test with even ones."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(len(table.classes))
    sizes = MOST * ratio ** -(np.arange(len(classes)) / max(len(classes) - 1, 1))
    parts = []
    for label, size in zip(classes, sizes, strict=True):
        rows = table.rows[table.rows["label"] == label]
        rows = rows.iloc[rng.permutation(len(rows))]
        number = min(round(size), len(rows) - TEST)
        val = max(round(number * VAL_SHARE), 1)
        parts += [
            rows[:TEST].assign(split="test"),
            rows[TEST : TEST + val].assign(split="val"),
            rows[TEST + val : TEST + number].assign(split="train"),
        ]
    return ImageTable(table.root, table.classes, pd.concat(parts, ignore_index=True))


def fit(table: ImageTable, args: argparse.Namespace, method: str, seed: int) -> dict[str, float]:
    """Train; accuracy on evenly mixed classes, as in train, and the least recall."""
    settings = (
        *(f"finetune={args.finetune}", "finetune.epochs=20", "augment=none", f"seed={seed}"),
        *(f"model={args.model}", "model.image_size=112", "trainer=cpu", "cache.mode=on"),
    )
    places = {
        "data.root": str(table.root),
        "model.weights": str(ASSETS / "weights"),
        "cache.dir": str(args.work / "cache"),
    }
    config = compose("train", [*settings], places)
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        prepare(config.trainer, seed)
        built = build_model(config.model, table.classes)
        images = ImageDataModule.from_config(table, built.preprocessing, config)
        counts = np.bincount(table.targets("train"), minlength=len(table.classes))
        sizes = {"train_images": int(counts.sum()), "batch_size": config.data.batch_size}
        found = run_plan(
            build_plan(config.finetune, built, **sizes),
            built,
            images,
            folder=Path(folder),
            trainer=config.trainer,
            cache=config.cache,
            imbalance=Imbalance(method),
            seed=seed,
        )
        probabilities, labels = (values.numpy() for values in found.predict("test"))
        found.predict.close()
    right = probabilities.argmax(axis=1) == labels
    recall = np.bincount(labels, right) / np.bincount(labels)
    return {
        "even": float(recall.mean()),
        "as in train": float(recall @ counts / counts.sum()),
        "least": float(recall.min()),
    }


def main() -> None:
    """Run the grid; results that are there already are not run again."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for copies and results")
    parser.add_argument("--model", default="regnetx_002")
    parser.add_argument("--finetune", default="linear_probe")
    parser.add_argument("--sets", nargs="*", default=[*FOUR])
    parser.add_argument("--ratios", nargs="*", type=float, default=[*RATIOS])
    parser.add_argument("--methods", nargs="*", default=[*METHODS], help="none among them")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="one set, one ratio, one seed")
    args = parser.parse_args()
    if args.quick:
        args.sets, args.ratios, args.seeds = args.sets[:1], args.ratios[-1:], 1
    file = args.work / "imbalance.jsonl"
    args.work.mkdir(parents=True, exist_ok=True)
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed in range(args.seeds):
        for name in args.sets:
            whole = read_set(name, args.work)
            for ratio in args.ratios:
                table = long_tailed(whole, ratio, seed)
                for method in args.methods:
                    key: dict[str, Any] = {"set": name, "ratio": ratio, "seed": seed}
                    key |= {"method": method, "model": args.model, "finetune": args.finetune}
                    if any(key.items() <= row.items() for row in done):
                        continue
                    done.append({**key, **fit(table, args, method, seed)})
                    with file.open("a") as out:
                        out.write(json.dumps(done[-1]) + "\n")
    rows = pd.DataFrame(done)
    rows = rows[(rows["model"] == args.model) & (rows["finetune"] == args.finetune)]
    figures = ["even", "as in train", "least"]
    means = rows.groupby(["ratio", "method"])[figures].mean() * 100
    print(means.unstack("method").reindex(args.methods, axis=1, level=1).round(1).to_string())
    plain = rows[rows["method"] == "none"].set_index(["set", "ratio", "seed"])[figures]
    gains = []
    others = [method for method in args.methods if method != "none"]
    for method in others:
        own = rows[rows["method"] == method].set_index(["set", "ratio", "seed"])[figures]
        gains.append(100 * (own - plain).groupby("ratio").agg(["mean", "sem"]))
    print("\nPoints more than without, with standard error over sets and seeds")
    table = pd.concat(gains, keys=others, names=["method"])
    print(table.swaplevel().sort_index().round(1).to_string())


if __name__ == "__main__":
    main()
