"""Whether the file tells the class: a network may learn that instead of what the image shows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from tl.audit.findings import Finding, Rows, Severity

MOST = 5_000  # rows that are enough to see it
FOLDS, DEPTH, LEAST = 5, 4, 20  # rows of a leaf
# Balanced accuracy above chance, as a share of what there is above chance.
TELLING = 0.4


def file_facts(rows: pd.DataFrame, labels: Rows) -> Iterator[Finding]:
    """Judge a small tree on size, shape, format and mode by cross-validation.

    Args:
        rows: Of the table, of one label each.
        labels: Class index of each row.
    """
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.tree import DecisionTreeClassifier

    few = np.bincount(labels)[labels] < FOLDS
    chosen = np.flatnonzero(~few & (rows["width"].to_numpy() > 0))
    if len(np.unique(labels[chosen])) < 2 or len(chosen) < FOLDS * LEAST:
        return
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(chosen)[:MOST])
    chosen = chosen[np.bincount(labels[chosen])[labels[chosen]] >= FOLDS]
    facts = _facts(rows.iloc[chosen])
    if not (facts.nunique() > 1).any():
        return
    own = labels[chosen]
    tree = DecisionTreeClassifier(
        max_depth=DEPTH, min_samples_leaf=LEAST, class_weight="balanced", random_state=0
    )
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    said = cross_val_predict(tree, facts, own, cv=folds)
    chance = 1 / len(np.unique(own))
    found = balanced_accuracy_score(own, said)
    if (found - chance) / (1 - chance) < TELLING:
        return
    tree.fit(facts, own)
    telling = facts.columns[np.argsort(-tree.feature_importances_)][:2]
    used = [name for name in telling if tree.feature_importances_[facts.columns == name][0] > 0.1]
    yield Finding(
        "file_tells_class",
        Severity.warning,
        f"{' and '.join(used)} alone tell the class with a balanced accuracy of {found:.0%} "
        f"(chance is {chance:.0%}): a network may learn that instead of what is shown",
        "bring all classes into the same size and format, from the same sources",
        names=used,
    )


def _facts(rows: pd.DataFrame) -> pd.DataFrame:
    width, height = rows["width"].to_numpy(float), rows["height"].to_numpy(float)
    facts = pd.DataFrame({"size": np.log(width * height), "shape": np.log(width / height)})
    for name in ("format", "mode") if "format" in rows else ():
        values = rows[name].astype(str).to_numpy()
        marks = {f"{name} {value or '?'}": (values == value) for value in np.unique(values)}
        facts = facts.assign(**{k: v.astype(float) for k, v in marks.items()})
    return facts
