"""fastai's `vision_learner` on a timm backbone: frozen epochs, or `fine_tune`."""

from __future__ import annotations

import time

from fastai.vision.all import ImageDataLoaders, Resize, accuracy, set_seed, vision_learner
from shared import BATCH, arguments, report, weights_of


def main() -> None:
    """Train the head for `--frozen` epochs; with `--unfrozen`, `fine_tune` for that many more."""
    args = arguments(__doc__, frozen=5, unfrozen=0)
    set_seed(args.seed)
    began = time.perf_counter()
    images = ImageDataLoaders.from_folder(
        args.data, train="train", valid="val", item_tfms=Resize(args.size), bs=BATCH
    )
    learner = vision_learner(images, args.model, metrics=accuracy, **weights_of(args))
    built = time.perf_counter()
    with learner.no_bar(), learner.no_logging():
        if args.unfrozen:
            learner.fine_tune(args.unfrozen, freeze_epochs=args.frozen)
        else:
            learner.freeze()
            learner.fit_one_cycle(args.frozen)
        fitted = time.perf_counter()
        _, val_accuracy = learner.validate()
    number = len(images.train_ds) + len(images.valid_ds)
    name = "fastai fine_tune" if args.unfrozen else "fastai frozen"
    report(name, number, {"build": built - began, "fit": fitted - built}, float(val_accuracy))


if __name__ == "__main__":
    main()
