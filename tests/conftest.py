"""Fixtures that every test may use: generated images, real assets, a clean place to work."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from commands import Command
from PIL import Image

import tl  # noqa: F401  # sets the wait policy of OpenMP before torch is loaded

# Real servers, and runs in a store, for tests that ask for them.
pytest_plugins = ["servers", "registering", "browser"]
REPO = Path(__file__).parents[1]
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40), "grey": (120,) * 3}


@pytest.fixture(autouse=True)
def clean_place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads a user's cache or store, or leaves files in the repository."""
    place = tmp_path_factory.mktemp("place")
    monkeypatch.setenv("TL_CACHE_DIR", str(place / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}")
    monkeypatch.setenv("HF_HOME", str(place / "hub"))
    monkeypatch.chdir(place)


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Factory of folders `<split>/<class>/*.png` with noisy one-coloured images that differ."""

    def make(
        root: Path | None = None,
        splits: dict[str, int] | None = None,
        classes: Sequence[str] = ("blue", "green", "red"),
        size: tuple[int, int] = (40, 32),
    ) -> Path:
        root = root or tmp_path / "images"
        rng = np.random.default_rng(0)
        for split, number in (splits or {"train": 6, "val": 3}).items():
            for i, name in enumerate(classes):
                colour = COLOURS.get(
                    name, (50 + 37 * i % 200, 90 + 71 * i % 150, 200 - 53 * i % 180)
                )
                folder = root / split / name if split else root / name
                folder.mkdir(parents=True, exist_ok=True)
                for n in range(number):
                    noise = rng.normal(0, 12, (size[1], size[0], 3))
                    pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
                    Image.fromarray(pixels).save(folder / f"{n:02d}.png")
        return root

    return make


@pytest.fixture(name="tl")
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The console script, called in this process."""
    return Command(capfd, monkeypatch)


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real weights and photographs; tests that need them are skipped where they are missing."""
    path = Path(os.environ.get("TL_ASSETS", REPO / "../shared/assets")).resolve()
    if not (path / "weights").is_dir():
        pytest.skip(f"no real weights and images at TL_ASSETS={path}")
    return path
