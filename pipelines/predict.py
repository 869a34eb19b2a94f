"""Predict: say with a bundle what is on images; needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tl.config import BadImages, PredictConfig
from tl.cores import usable_cores
from tl.pipelines import run

if TYPE_CHECKING:
    import pandas as pd


def predict(config: PredictConfig) -> pd.DataFrame:
    """Predict a file, a folder or a glob pattern.

    Args:
        config: Bundle, source, and the file to write.

    Returns:
        Columns source, label, score, top (list of [class, probability]) and error; with several
        labels an image labels and scores in place of label and score, with a number value alone.

    Raises:
        BundleError: `config.bundle` is no bundle.
        PredictError: There are no images at the source, or the output cannot be written.
        ImageError: An image cannot be used, with `bad_images=fail`.
    """
    from tl import display
    from tl.bundle import Bundle
    from tl.predictions import find_images, output_path, write_predictions

    output = output_path(config.output, config.output_dir)
    bundle = Bundle.load(config.bundle, threads=usable_cores())
    images = find_images(config.source)
    with display.bar("predicting") as progress:
        table = bundle.predict(
            images,
            batch_size=config.batch_size,
            top_k=config.top_k,
            skip_bad=config.bad_images is BadImages.skip,
            progress=progress,
        )
    display.predictions(table)
    if output is not None:
        write_predictions(table, output)
        display.say(f"{len(table):,} predictions: {output}")
    return table


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl predict` and of `python pipelines/predict.py`."""
    run("predict", predict, argv)


if __name__ == "__main__":
    main()
