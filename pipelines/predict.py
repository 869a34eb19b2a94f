"""Predict: name the class of images with a bundle, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tl.config import BadImages, ConfigError, PredictConfig
from tl.pipelines import run

if TYPE_CHECKING:
    import pandas as pd

SHOWN = 20


def predict(config: PredictConfig) -> pd.DataFrame:
    """Predict an image, a folder or what a pattern matches, and write the table.

    Args:
        config: As `tl.compose` makes it.

    Returns:
        Columns source, label, score, top and error, one row an image, as `Bundle.predict` gives.

    Raises:
        ConfigError: Nothing to predict, or an image that cannot be used.
        BundleError: The bundle is wrong, or the output cannot be written.
    """
    import pandas as pd

    from tl import display
    from tl.bundle import Bundle, ImageError, check_table_path, find_images, write_table

    output = Path(config.output_dir or ".", config.output) if config.output else None
    if output:
        check_table_path(output)
    sources = find_images(config.source)
    if not sources:
        msg = f"source: no images in {config.source} (a file, a folder or a quoted glob pattern)"
        raise ConfigError(msg)
    bundle = Bundle.load(config.bundle)
    skip, size = config.bad_images is BadImages.skip, config.batch_size
    parts = []
    with display.bar("predicting") as progress:
        for start in range(0, len(sources), size):
            batch = sources[start : start + size]
            try:
                parts.append(
                    bundle.predict(batch, batch_size=size, top_k=config.top_k, skip_bad=skip)
                )
            except ImageError as error:
                msg = f"{error}\nbad_images=skip reports such files in the table and goes on"
                raise ConfigError(msg) from error
            progress(start + len(batch), len(sources))
    table = pd.concat(parts, ignore_index=True)
    _show(table)
    if output:
        write_table(table, output)
        display.say(f"{len(table)} rows in {output}")
    return table


def _show(table: pd.DataFrame) -> None:
    from tl import display

    bad = int(table["error"].notna().sum())
    columns = ["source", "label", "score", *(["error"] if bad else [])]
    shown = table[columns].head(SHOWN).astype(object)
    display.results_table("Predictions", shown.where(shown.notna(), None).to_dict("records"))
    if len(table) > SHOWN:
        display.say(f"and {len(table) - SHOWN} more")
    if bad:
        display.say(f"{bad} of {len(table)} images could not be used: see the column error")


def main(argv: list[str] | None = None) -> None:
    """Entry of `tl predict`."""
    run("predict", predict, argv)


if __name__ == "__main__":
    main()
