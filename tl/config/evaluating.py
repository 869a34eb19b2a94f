"""How a trained model is judged, and what its bundle promises of its scores."""

from __future__ import annotations

from dataclasses import dataclass

from tl.config.settings import Checked, setting


@dataclass
class EvaluationConfig(Checked):
    """Calibration and abstention, both chosen on val."""

    calibrate: bool = setting(
        True, "fit a temperature on val, so that scores are probabilities; false: as trained"
    )
    precision: float | None = setting(
        0.95,
        "share of right answers wanted among those that are called sure, for which val gives a "
        "score with 95 % confidence; null: no answer is called sure or unsure",
        above=0,
        high=0.9999,
        common=True,
    )
