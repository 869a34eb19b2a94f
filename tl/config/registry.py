"""Schemas of the model registry: `tl register` and `tl promote`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from omegaconf import MISSING

from tl.config.settings import Checked, Request, setting

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
# What MLflow takes: letters, digits, _ and -; "latest" and v1, v2, … mean something of their own.
ALIAS = re.compile(r"[\w-]{1,255}", re.ASCII)
RESERVED = re.compile(r"latest|v\d+", re.IGNORECASE)


@dataclass
class StoreConfig(Checked):
    """Where runs and registered models are."""

    uri: str | None = setting(
        None,
        "MLflow store; default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db; tl register takes "
        "that of the run's folder before",
        common=True,
    )


@dataclass
class RegisterConfig(Request):
    """Config of `tl register`."""

    run: str = setting(MISSING, "run: its MLflow id, its name, or its folder", common=True)
    name: str = setting(MISSING, "name of the registered model", common=True)
    alias: str = setting(CHALLENGER, "what the version is called from now on", common=True)
    tracking: StoreConfig = setting(factory=StoreConfig, help="MLflow")

    def problems(self) -> list[str]:
        """MLflow takes name and alias, and nobody becomes champion by the back door."""
        found = _name_problems(self.name) + _alias_problems("alias", self.alias)
        if self.alias in {CHAMPION, PREVIOUS}:
            found.append(
                f"alias={self.alias} is given by tl promote alone: register as {CHALLENGER}, then "
                f"tl promote name={self.name}"
            )
        return found


@dataclass
class ImagesConfig(Checked):
    """Where images are."""

    root: str | None = setting(
        None,
        "where the champion's test images are, if the challenger has to look at some; default: "
        "where they were when the champion was trained",
        common=True,
    )


@dataclass
class PromoteConfig(Request):
    """Config of `tl promote`."""

    name: str = setting(MISSING, "name of the registered model", common=True)
    candidate: str = setting(CHALLENGER, "alias or number of the version to promote", common=True)
    margin: float = setting(
        0.01,
        "how much worse it may be at most, with 95 % certainty: 0.01 is one image in a hundred; of "
        "a predicted number as a share of the champion's error",
        low=0,
        high=0.5,
        common=True,
    )
    rollback: bool = setting(False, "go back to the former champion instead", common=True)
    data: ImagesConfig = setting(factory=ImagesConfig, help="images")
    tracking: StoreConfig = setting(factory=StoreConfig, help="MLflow")

    def problems(self) -> list[str]:
        """MLflow takes name and alias, and the champion does not replace itself."""
        found = _name_problems(self.name)
        if not self.candidate.isdigit():
            found += _alias_problems("candidate", self.candidate)
        if self.candidate == CHAMPION:
            found.append(f"candidate={CHAMPION} is what it would replace: name another version")
        return found


def _name_problems(name: str) -> list[str]:
    if name != MISSING and (not name.strip() or set("/:") & set(name)):
        return [f"name must have neither / nor :, and not be empty; got {name!r}"]
    return []


def _alias_problems(key: str, alias: str) -> list[str]:
    if not ALIAS.fullmatch(alias) or RESERVED.fullmatch(alias):
        return [f"{key} must be letters, digits, _ and -, and neither latest nor v1; got {alias!r}"]
    return []
