"""The methods of the regret benchmark, and at which share of today's rate a fit was trained.

Recipes change, and a fit keeps its absolute rate: what it counts as is asked anew each time. One
that began from another head than today's recipe trains is for the oracle alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tl.config import BatchNormMode, Budget, FinetuneConfig
from tl.decision import recipe
from tl.decision.evidence import Evidence

# Key of a method -> arguments of `tl.decision.recipe`.
METHODS: dict[str, dict[str, Any]] = {
    "linear_probe": {"method": "linear_probe"},
    "stage_probe": {"method": "stage_probe"},
    "lp_partial_1": {"method": "lp_partial", "last_stages": 1},
    "lp_partial_2": {"method": "lp_partial", "last_stages": 2},
    "norm_affine": {"method": "norm_affine"},
    "lp_ft": {"method": "lp_ft"},
    "wise_ft": {"method": "wise_ft"},  # after lp_ft: at two rates of three it takes its steps
    "full": {"method": "full"},
}
RATES = (1.0, 0.333, 3.0)  # times today's rate of the last phase
SAME = 1.15  # rates nearer than this factor are one


def method_config(
    method: str, evidence: Evidence, budget: str, batch_size: int = 32
) -> FinetuneConfig:
    """Settings of a method as the decision would fill them in."""
    return recipe(
        evidence=evidence, budget=Budget[budget], batch_size=batch_size, **METHODS[method]
    )


def _config_of_today(row: Mapping[str, Any], evidence: Evidence) -> FinetuneConfig:
    batch_size = row.get("batch_size", 32)
    return method_config(row["method"], evidence, row.get("budget", "quick"), batch_size)


def last_rate(config: FinetuneConfig) -> float:
    """Rate of the head in the last phase."""
    rate = list(config.phases.values())[-1].head_lr or config.head_lr
    assert rate is not None
    return rate


def of_today(row: Mapping[str, Any], evidence: Evidence) -> bool:
    """Whether a fit was trained as it is today, but for the rate of its last phase.

    It is where BatchNorm was treated alike, and the head before the last phase trained alike.

    Args:
        row: Of the results.
        evidence: Of its cell.
    """
    phases = row.get("phases", ())
    if not phases:
        return True
    config = _config_of_today(row, evidence)
    frozen = phases[-1].get("freeze_batch_norm")
    if frozen is not None and frozen != (config.batch_norm is BatchNormMode.frozen):
        return False
    if len(phases) < 2:
        return True
    head = next(iter(config.phases.values()))
    rate = head.head_lr or config.head_lr
    assert rate is not None
    same_rate = 1 / SAME < phases[0]["head_lr"] / rate < SAME
    return bool(same_rate and phases[0]["epochs"] == (head.epochs or config.epochs))


def share_of_today(row: Mapping[str, Any], evidence: Evidence) -> float:
    """Rate of a fit as a share of what its method has today: one of `RATES` where it is near.

    Args:
        row: Of the results; without `phases` its `rate` is taken.
        evidence: Of its cell.
    """
    if "phases" not in row:
        return float(row["rate"])
    config = _config_of_today(row, evidence)
    share = float(row["phases"][-1]["head_lr"]) / last_rate(config)
    near = [rate for rate in RATES if 1 / SAME < share / rate < SAME]
    return near[0] if near else share
