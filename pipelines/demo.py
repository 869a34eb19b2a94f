"""Demo: the main job on handwritten digits, in about a minute and without a download."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from tl.config import DemoConfig
from tl.pipelines import run
from tl.runs import RunFolder, TrainResult

# The same number of passes over the images for each method.
EPOCHS = {"linear_probe": 12, "lp_ft": 6, "scratch": 12}


def demo(config: DemoConfig) -> dict[str, TrainResult]:
    """Pretrain on digits 0-4, transfer to digits 5-9 in three ways, compare, use the model."""
    from tl import display
    from tl.bundle import Bundle
    from tl.data.digits import write_digits
    from tl.tracking import default_uri

    folder = Path(config.output_dir or f"runs/{time.strftime('%Y-%m-%d_%H-%M-%S')}_demo").absolute()
    RunFolder(folder).make()
    few = config.images_per_class
    splits = {"train": 140, "val": 30}, {"train": few, "val": few, "test": 0}
    source = write_digits(folder / "data/digits_0-4", range(5), splits[0], seed=config.seed)
    target = write_digits(folder / "data/digits_5-9", range(5, 10), splits[1], seed=config.seed)
    weights = _train(config, folder / "pretraining", source, "scratch").weights
    results = {
        method: _train(config, folder / method, target, method, weights) for method in EPOCHS
    }
    rows = [{"method": method, **result.row("test")} for method, result in results.items()]
    display.results_table(f"digits 5-9 from {few} images a class, test accuracy", rows)
    best = max(results.values(), key=lambda result: result.metrics["val/acc"])
    assert best.bundle is not None
    image = next((target / "test/7").glob("*.png"))
    answer = Bundle.load(best.bundle).predict([image]).iloc[0]
    display.say(f"{image} is a {answer.label}, says {best.bundle} ({answer.score:.1%})")
    display.facts(
        "next",
        {
            "compare the runs": f"mlflow ui --backend-store-uri {default_uri(config.tracking)}",
            "your own images": "tl train data.root=FOLDER (<class>/* or train|val/<class>/*)",
        },
    )
    return results


def _train(
    config: DemoConfig, folder: Path, data: Path, method: str, weights: Path | None = None
) -> TrainResult:
    import tl

    values = {"data.root": str(data), "output_dir": str(folder), "seed": config.seed}
    if weights is None:
        values |= {"finetune.epochs": 8, "finetune.head_lr": 1e-3, "export.enabled": False}
    else:
        values |= {"model.weights": str(weights), "finetune.epochs": EPOCHS[method]}
    if method == "lp_ft":  # 5-9 are unlike 0-4: the backbone has much to learn
        values |= {"finetune.lr_ratio": 1.5, "finetune.phases.all.head_lr": 5e-3}
    job = tl.compose("train", ["experiment=digits", f"finetune={method}"], values)
    job.tracking = replace(config.tracking, experiment="demo", run_name=folder.name)
    return tl.train(job)


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl demo` and of `python pipelines/demo.py`."""
    run("demo", demo, argv)


if __name__ == "__main__":
    main()
