"""Does the model serve all alike: what it is worth in each group of images, such as a camera."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student

from tl.evaluation.resampling import wilson

SMALL = 10  # images below which a group is no candidate for the worst


def by_group(
    values: NDArray[np.float64], groups: Iterable[object], confidence: float = 0.95
) -> pd.DataFrame | None:
    """The mean of a figure in each group, with an interval; None where no image has a group.

    The intervals hold for all groups together (Bonferroni), as the worst of many is bad by chance,
    too: Wilson's for a share, Student's for the mean of other values.

    Args:
        values: Of each image, (N,): 0 or 1, or any number.
        groups: Of each image; missing where it has none.
        confidence: That all of them hold.

    Returns:
        Columns group, images, value, low, high (NaN for the mean of one image) and small (fewer
        than `SMALL` images), ordered by group.
    """
    table = pd.DataFrame({"group": pd.Series(list(groups), dtype=object), "value": values})
    table = table[table["group"].notna()]
    if table.empty:
        return None
    found = table.groupby("group")["value"].agg(["size", "sum", "mean", "std"]).reset_index()
    images, mean = found["size"].to_numpy(), found["mean"].to_numpy()
    level = 1 - (1 - confidence) / len(found)
    if np.isin(table["value"], (0, 1)).all():
        low, high = wilson(found["sum"].to_numpy(), images, level)
    else:
        reach = student.ppf((1 + level) / 2, np.maximum(images - 1, 1))
        reach = reach * found["std"].to_numpy() / np.sqrt(images)
        low, high = mean - reach, mean + reach
    return pd.DataFrame(
        {
            "group": found["group"].astype(str),
            "images": images,
            "value": mean,
            "low": low,
            "high": high,
            "small": images < SMALL,
        }
    )


def worst_group(table: pd.DataFrame | None, name: str, *, lowest: bool) -> dict[str, float]:
    """Metrics of the worst group that is not small; none where there are not two of them.

    Args:
        table: Of `by_group`.
        name: Of the figure.
        lowest: Whether a low figure is bad.
    """
    if table is None:
        return {}
    large = table[~table["small"]]
    if len(large) < 2:
        return {"groups": float(len(table))}
    worst = large.sort_values("value", ascending=lowest, kind="stable").iloc[0]
    return {
        f"worst_group_{name}": float(worst["value"]),
        f"worst_group_{name}_low": float(worst["low"]),
        f"worst_group_{name}_high": float(worst["high"]),
        "worst_group_images": float(worst["images"]),
        "groups": float(len(table)),
    }
