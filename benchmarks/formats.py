"""The four sets of TL_ASSETS in every format: the same table, the same accuracy.

    python benchmarks/formats.py                              # tables only: a minute
    python benchmarks/formats.py --train                      # and a linear probe on each
    python benchmarks/formats.py --sets hymenoptera --train --cold    # each with a cache of its own

Each format is made from the folder, in build/benchmarks/formats, by the libraries that people use
for it. The probe's frozen part is computed once an image content and set, as in any series of jobs,
unless `--cold` is given.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import pandas as pd
from images import ASSETS, FOUR, WORK, every_image

import tl
from tl.config import DataConfig
from tl.data import read_table

MODEL = "mobilenetv2_100"
SHARD = 500  # images
Rows = pd.DataFrame  # columns file, label and, where the folder has splits, split


def rows_of(root: Path) -> Rows:
    """One row an image, in the order of the folder."""
    found = []
    for file in every_image(root):
        *split, label, name = file.relative_to(root).parts
        found.append({"file": str(file), "label": label, "split": (*split, "")[0], "name": name})
    rows = pd.DataFrame(found)
    return rows if rows["split"].any() else rows.drop(columns="split")


def csv(rows: Rows, place: Path, root: Path) -> list[str]:
    """Paths relative to the folder of the images."""
    frame = rows.assign(image=[str(Path(f).relative_to(root)) for f in rows["file"]])
    frame.drop(columns=["file", "name"]).to_csv(place / "table.csv", index=False)
    return [f"data.root={root}", f"data.table={place / 'table.csv'}"]


def jsonl(rows: Rows, place: Path, root: Path) -> list[str]:
    """The same, one JSON object a line."""
    frame = rows.assign(image=[str(Path(f).relative_to(root)) for f in rows["file"]])
    frame = frame.drop(columns=["file", "name"])
    frame.to_json(place / "table.jsonl", orient="records", lines=True)
    return [f"data.root={root}", f"data.table={place / 'table.jsonl'}"]


def parquet(rows: Rows, place: Path, _root: Path) -> list[str]:
    """The bytes of the files in a column."""
    frame = rows.assign(image=[Path(f).read_bytes() for f in rows["file"]])
    frame.drop(columns=["file", "name"]).to_parquet(place / "table.parquet", index=False)
    return [f"data.root={place / 'table.parquet'}"]


def saved(rows: Rows, place: Path, _root: Path) -> list[str]:
    """A data set of Hugging Face, as `save_to_disk` leaves it."""
    names = sorted(rows["label"].unique())
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}

    def made(part: Rows) -> datasets.Dataset:
        columns = {
            "image": [{"bytes": Path(f).read_bytes(), "path": None} for f in part["file"]],
            "label": [names.index(label) for label in part["label"]],
        }
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    if "split" in rows:
        parts = {str(name): made(part) for name, part in rows.groupby("split", sort=False)}
        datasets.DatasetDict(parts).save_to_disk(place / "saved")
    else:
        made(rows).save_to_disk(place / "saved")
    return [f"data.root={place / 'saved'}"]


def shards(rows: Rows, place: Path, _root: Path) -> list[str]:
    """WebDataset: an image and a JSON file of the same name beside each other in tar files."""
    for first in range(0, len(rows), SHARD):
        with tarfile.open(place / f"{first // SHARD:04}.tar", "w") as archive:
            for number, row in rows.iloc[first : first + SHARD].iterrows():
                facts = {key: row[key] for key in ("label", "split") if key in row}
                image = Path(row["file"])
                members = {
                    image.suffix.lower(): image.read_bytes(),
                    ".json": json.dumps(facts).encode(),
                }
                for suffix, content in members.items():
                    member = tarfile.TarInfo(f"{number:06}{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return [f"data.root={place}"]


FORMATS: dict[str, Callable[[Rows, Path, Path], list[str]]] = {
    "folder": lambda _rows, _place, root: [f"data.root={root}"],
    "CSV": csv,
    "JSON Lines": jsonl,
    "Parquet with bytes": parquet,
    "datasets": saved,
    "tar shards": shards,
}


def settings_of(name: str, kind: str) -> list[str]:
    """Make one format of a set; returns the settings that read it."""
    root = ASSETS / "data" / name
    place = WORK / "formats" / name / kind.replace(" ", "_")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    return FORMATS[kind](rows_of(root), place, root)


def fingerprint(settings: list[str]) -> tuple[str, int, float]:
    """Hash of the table, its images, and the seconds of reading and checking it."""
    found = dict(setting.removeprefix("data.").split("=", 1) for setting in settings)
    began = time.perf_counter()
    table = read_table(DataConfig(**found), seed=0, cache_dir=None)
    facts = table.fingerprint()
    return str(facts["sha256"]), int(facts["images"]), time.perf_counter() - began


def accuracy(settings: list[str], folder: Path, cache: Path) -> float:
    """Share of val that a linear probe gets right."""
    shutil.rmtree(folder, ignore_errors=True)
    weights = ASSETS / "weights" / f"{MODEL}.safetensors"
    asked = [
        *(f"model={MODEL}", f"model.weights={weights}", "finetune=linear_probe", "audit=off"),
        *("tracking.enabled=false", "export.enabled=false", f"cache.dir={cache}"),
        *settings,
    ]
    tl.train(tl.compose("train", [*asked, f"output_dir={folder}"]))
    return float(json.loads((folder / "metrics.json").read_text())["val/acc"])


def main() -> None:
    """Print one row a set and format."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=list(FOUR), choices=FOUR)
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--cold", action="store_true", help="a cache for each format")
    given = parser.parse_args()
    datasets.disable_progress_bars()
    lines = []
    for name in given.sets:
        for kind in FORMATS:
            settings = settings_of(name, kind)
            digest, images, seconds = fingerprint(settings)
            row = [name, kind, f"{images:,}", f"`{digest[:12]}`", f"{seconds:.1f}"]
            if given.train:
                place = WORK / "formats" / name
                cache = place / (f"cache-{kind.replace(' ', '_')}" if given.cold else "cache")
                row.append(f"{accuracy(settings, place / 'run', cache):.2%}")
            lines.append(f"| {' | '.join(row)} |")
            print(lines[-1], flush=True)
    heads = ["set", "format", "images", "fingerprint", "s"] + ["val accuracy"] * given.train
    print(f"\n| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
