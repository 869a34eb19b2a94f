"""Makers of bad data: each puts files into a folder and gives the settings that read them."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from tl.config import ColumnsConfig, DataConfig
from tl.config.data import DataFormat

Settings = dict[str, Any]
Maker = Callable[[Path], Settings]
NAMES = ("ant", "bee")


def picture(number: int, kind: str = "PNG") -> bytes:
    """A small image with colours of its own."""
    rng = np.random.default_rng(number)
    data = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(data, kind)
    return data.getvalue()


GOOD = {f"{name}/{i}.png": picture(10 * n + i) for n, name in enumerate(NAMES) for i in range(5)}


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def folder(**more: bytes | str | None) -> Maker:
    """A good folder `<class>/*`, with files added, replaced or (None) taken away."""

    def make(place: Path) -> Settings:
        files = {**GOOD, **{n.replace("__", "/"): c for n, c in more.items()}}
        return {"root": put(place, {n: _bytes(c) for n, c in files.items() if c is not None})}

    return make


def _bytes(content: bytes | str) -> bytes:
    return content if isinstance(content, bytes) else content.encode()


def only(*files: str) -> Maker:
    """A folder of these files alone, each a good image where its name says so."""
    content = {name: picture(i) if name.endswith("png") else b"x" for i, name in enumerate(files)}
    return lambda place: {"root": put(place, content)}


def table(change: Callable[[pd.DataFrame], object], file: str = "m.csv", **settings: Any) -> Maker:
    """The good folder with a manifest, changed: a frame, or the file's content."""

    def make(place: Path) -> Settings:
        put(place, GOOD)
        frame = pd.DataFrame({"image": list(GOOD), "label": [n.split("/")[0] for n in GOOD]})
        content = change(frame)
        if isinstance(content, pd.DataFrame) and file.endswith("parquet"):
            content.to_parquet(place / file, index=False)
        elif isinstance(content, pd.DataFrame):
            content.to_csv(place / file, index=False)
        else:
            assert isinstance(content, (str, bytes))
            (place / file).write_bytes(_bytes(content))
        return {"root": place / file, **settings}

    return make


def link_out(place: Path) -> Settings:
    put(place / "photos", GOOD)
    put(place, {"secret.png": picture(99)})
    (place / "photos/ant/link.png").symlink_to(place / "secret.png")
    rows = ["image,label", *(f"{n},{n.split('/')[0]}" for n in GOOD), "ant/link.png,ant"]
    (place / "photos/m.csv").write_text("\n".join(rows))
    return {"root": place / "photos/m.csv"}


def shard(members: list[tuple[str, bytes | None]], cut: int | None = None) -> Maker:
    """Good tar shards and one more with these members; None makes a device of one."""

    def make(place: Path) -> Settings:
        good = [
            (f"{n[4:-4]}{n[:3]}.{kind}", content)
            for n, image in GOOD.items()
            for kind, content in (("png", image), ("cls", n[:3].encode()))
        ]
        for name, found in (("0.tar", good), ("1.tar", members)):
            with tarfile.open(place / name, "w") as archive:
                for member, content in found:
                    info = tarfile.TarInfo(member)
                    info.size = len(content or b"")
                    info.type = tarfile.CHRTYPE if content is None else tarfile.REGTYPE
                    archive.addfile(info, None if content is None else io.BytesIO(content))
        if cut is not None:
            (place / "1.tar").write_bytes((place / "1.tar").read_bytes()[:cut])
        return {"root": place}

    return make


def png_of(width: int, height: int) -> bytes:
    """The header of a PNG that claims so many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 100)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def pipe(place: Path) -> Settings:
    put(place, GOOD)
    os.mkfifo(place / "ant/pipe.png")
    return {"root": place}


def with_bytes(place: Path) -> Settings:
    rows = {"image": list(GOOD), "jpeg": list(GOOD.values()), "label": [n[:3] for n in GOOD]}
    pd.DataFrame(rows).to_parquet(place / "m.parquet", index=False)
    return {"root": place / "m.parquet", "columns": {"image": "image", "bytes": "jpeg"}}


def settings(**found: Any) -> Maker:
    """The manifest that is good, with settings that are not."""
    make = table(lambda frame: frame)
    return lambda place: {**make(place), **found}


def links_that_lead_nowhere(place: Path) -> Settings:
    put(place, GOOD)
    (place / "ant/x.png").symlink_to(place / "gone.png")
    return {"root": place}


def config_of(found: Settings) -> DataConfig:
    plain = {**found, "root": str(found["root"])}
    if "columns" in plain:
        plain["columns"] = ColumnsConfig(**plain["columns"])
    if "format" in plain:
        plain["format"] = DataFormat(plain["format"])
    return DataConfig(**plain)
