"""Evidence: how much data there is, and how much of the pretraining serves it."""

from tl.evidence.measuring import FEATURES, FLIPPED, Drift, StageFeatures, measure, sample

__all__ = ["FEATURES", "FLIPPED", "Drift", "StageFeatures", "measure", "sample"]
