"""Schema of `tl sync`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tl.config.settings import Checked, Request, setting


@dataclass
class SyncStoreConfig(Checked):
    """Where the records go."""

    uri: str | None = setting(None, "MLflow store; default: that of each run", common=True)


@dataclass
class SyncConfig(Request):
    """Config of `tl sync`."""

    run: str | None = setting(
        None, "folder of a run, or one with runs below; tl sync DIR … says the same", common=True
    )
    runs: list[str] = setting(factory=list, help="several such folders", common=True)
    tracking: SyncStoreConfig = setting(factory=SyncStoreConfig, help="MLflow")

    def folders(self) -> list[str]:
        """All that are asked for."""
        return [*([self.run] if self.run else []), *self.runs]

    def problems(self) -> list[str]:
        """There is a folder."""
        return [] if self.folders() else ["which run? tl sync runs/NAME, or tl sync runs for all"]


def plain_folders(args: Sequence[str]) -> list[str]:
    """Arguments of `tl sync` with the folders that have no key in front as the setting `runs`."""
    plain = [a for a in args if not a.startswith("-") and ("=" not in a or Path(a).exists())]
    if not plain:
        return [*args]
    quoted = ",".join('"' + a.replace("\\", "\\\\").replace('"', '\\"') + '"' for a in plain)
    return [*(a for a in args if a not in plain), f"runs=[{quoted}]"]
