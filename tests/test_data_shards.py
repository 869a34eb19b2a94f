"""Tar shards: found, indexed, judged, read by place; from a web server, too."""

from __future__ import annotations

import functools
import io
import json
import re
import tarfile
import threading
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
from methods import SIZE
from PIL import Image

from tl.bundle import Preprocessing
from tl.config import AugmentConfig, DataConfig, Task
from tl.data import DataError, read_table
from tl.data.blocks import BlockSampler, sampler_of
from tl.data.datamodule import ImageDataModule
from tl.data.remote import Blocks, RemoteFile, expand_braces, find_files
from tl.data.sampling import EpochSampler
from tl.data.sources.shards import list_shards

CLASSES = ("ant", "bee", "fly")


def image(number: int, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (24, 30, 3)).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, form)
    return data.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def samples(first: int, number: int) -> list[tuple[str, bytes]]:
    """Images with the names of their classes beside them."""
    return [
        member
        for i in range(first, first + number)
        for member in ((f"{i:05d}.png", image(i)), (f"{i:05d}.cls", CLASSES[i % 3].encode()))
    ]


@pytest.fixture
def shards(tmp_path):
    """Three shards of 12 images."""
    folder = tmp_path / "shards"
    for number in range(3):
        write_tar(folder / f"s-{number:03d}.tar", samples(12 * number, 12))
    return folder


def table_of(root, cache=None, **settings):
    return read_table(DataConfig(root=str(root), **settings), seed=0, cache_dir=cache)


def problems_of(members, tmp_path, **settings):
    """What reading one bad shard says, beside a good one."""
    write_tar(tmp_path / "bad" / "0.tar", samples(0, 12))
    write_tar(tmp_path / "bad" / "1.tar", members)
    with pytest.raises(DataError) as error:
        table_of(tmp_path / "bad", **settings)
    return str(error.value)


@pytest.mark.parametrize("names", ["", "/s-{000..002}.tar", "/s-*.tar", "/s-00{0,1,2}.tar"])
def test_shards_become_the_same_table_as_a_folder(shards, tmp_path, names):
    for i in range(36):
        file = tmp_path / "folder" / CLASSES[i % 3] / f"{i:05d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image(i))
    found, folder = table_of(f"{shards}{names}"), table_of(tmp_path / "folder")
    same = ("sha256", "classes", "counts", "images")
    assert {k: found.fingerprint()[k] for k in same} == {k: folder.fingerprint()[k] for k in same}
    assert set(found.rows["path"]) == {f"s-{i // 12:03d}.tar/{i:05d}.png" for i in range(36)}
    images = found.images("train")
    assert {images.read(i) for i in range(len(images))} <= {image(i) for i in range(36)}
    assert images.open(0).size == (30, 24)


def test_an_index_is_remembered_until_a_shard_changes(shards, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = table_of(shards, cache)
    opened = []
    as_always = tarfile.open
    monkeypatch.setattr(
        tarfile, "open", lambda *a, **k: opened.append(k["fileobj"].name) or as_always(*a, **k)
    )
    assert table_of(shards, cache).fingerprint() == first.fingerprint()
    assert opened == []
    monkeypatch.undo()
    write_tar(shards / "s-001.tar", samples(12, 9))
    assert len(table_of(shards, cache).rows) == 33


def test_labels_splits_groups_and_weights_come_from_json(tmp_path):
    members = []
    for i in range(24):
        facts = {
            "label": CLASSES[i % 3], "split": "dev" if i % 4 == 0 else "train",
            "patient": f"p{i}", "weight": 0.5 + i,
        }  # fmt: skip
        members += [(f"{i}.jpg", image(i, "JPEG")), (f"{i}.json", json.dumps(facts).encode())]
    write_tar(tmp_path / "a.tar", members)
    config = DataConfig(root=str(tmp_path / "a.tar"))
    config.columns.group = "patient"
    table = read_table(config, seed=0, cache_dir=None)
    assert table.counts()["val"] == {"ant": 2, "bee": 2, "fly": 2}
    row = table.rows[table.rows["path"] == "a.tar/7.jpg"].iloc[0]
    assert (row["group"], row["weight"], table.classes[row["label"]]) == ("p7", 7.5, "bee")
    assert "label of .json" in " ".join(table.notes)


def test_splits_come_from_names_of_shards_and_classes_from_folders(tmp_path):
    for split, first in (("train", 0), ("val", 30)):
        members = [(f"{CLASSES[i % 3]}/{i}.png", image(i)) for i in range(first, first + 9)]
        write_tar(tmp_path / f"flies-{split}-00.tar", members)
    table = table_of(tmp_path)
    assert table.classes == CLASSES
    assert {k: sum(v.values()) for k, v in table.counts().items()} == {"train": 9, "val": 9}


def test_several_labels_and_numbers(tmp_path):
    several, numbers = [], []
    for i in range(24):
        picture = (f"{i}.png", image(i))
        tags = [name for n, name in enumerate(CLASSES) if (i >> n) & 1]
        several += [picture, (f"{i}.json", json.dumps({"tags": tags}).encode())]
        numbers += [picture, (f"{i}.cls", f"{i / 7:.4f}".encode())]
    config = DataConfig(root=str(write_tar(tmp_path / "several.tar", several)))
    config.columns.label = "tags"
    table = read_table(config, seed=0, cache_dir=None)
    assert (table.task, set(table.classes)) == (Task.multi, set(CLASSES))
    table = table_of(write_tar(tmp_path / "numbers.tar", numbers), task="regression")
    assert table.task is Task.regression
    assert sorted(table.targets("all"))[-1] == pytest.approx(23 / 7, abs=1e-4)


def test_numbers_of_classes_get_their_names_from_a_file(tmp_path):
    members = [
        m for i in range(12)
        for m in ((f"{i}.png", image(i)), (f"{i}.cls", str(i % 3).encode()))
    ]  # fmt: skip
    write_tar(tmp_path / "0.tar", members)
    assert table_of(tmp_path).classes == ("0", "1", "2")
    (tmp_path / "classes.txt").write_text("ant\nbee\nfly\n")
    assert table_of(tmp_path).classes == CLASSES


def special(name: str, kind: bytes, target: str = "") -> bytes:
    """A tar file whose only member is no regular file."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as shard:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        shard.addfile(member)
    return data.getvalue()


ONE = ("x.png", image(99))
BAD = {
    "parent": ([("../x.png", image(1))], "../x.png leads out of the archive"),
    "absolute": ([("/etc/x.png", image(1))], "/etc/x.png leads out of the archive"),
    "no image": ([("x.cls", b"ant")], "1 samples have a label but no image (first: x)"),
    "twice": ([ONE, ONE, ("x.cls", b"ant")], "1 members repeat the name of another: x.png"),
    "json": ([ONE, ("x.json", b"{nope")], "x.json is no JSON"),
    "json list": ([ONE, ("x.json", b"[1]")], "x.json holds no JSON object"),
    "not utf-8": ([ONE, ("x.cls", b"\xff\xfe")], "x.cls is not UTF-8"),
    "long label": ([ONE, ("x.cls", b"a" * (1 << 21))], "x.cls has 2,097,152 bytes"),
    "two images": (
        [ONE, ("x.jpg", image(1, "JPEG")), ("x.cls", b"ant")],
        "1 samples have several images (first: x has png and jpg); name one of them",
    ),
    "no label": ([ONE], "1 of 13 images has no label in cls (1.tar/x)"),
    "broken image": ([("x.png", image(1)[:300]), ("x.cls", b"ant")], "1.tar/x.png: truncated"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_shard_is_refused_by_name(tmp_path, case):
    members, words = BAD[case]
    text = problems_of(members, tmp_path)
    assert words in text
    assert "1.tar" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (special("x.png", tarfile.SYMTYPE, "/etc/passwd"), "x.png is a link to /etc/passwd"),
        (special("x.png", tarfile.LNKTYPE, "y.png"), "x.png is a link to y.png"),
        (special("x.png", tarfile.CHRTYPE), "x.png is a device or a pipe"),
        (special("x.png", tarfile.FIFOTYPE), "x.png is a device or a pipe"),
        (b"", "truncated, damaged or no tar file"),
        (b"<html>not found</html>" * 100, "truncated, damaged or no tar file"),
        (b"\x1f\x8b\x08\x00" + bytes(600), "packed with gzip: unpack it"),
    ],
)
def test_what_is_no_shard_of_files_is_refused(tmp_path, content, words):
    write_tar(tmp_path / "0.tar", samples(0, 12))
    (tmp_path / "1.tar").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(words)) as error:
        table_of(tmp_path)
    assert str(tmp_path / "1.tar") in str(error.value)


@pytest.mark.parametrize("cut", [1500, 512 * 20, 700])
def test_a_truncated_shard_is_refused_wherever_it_ends(shards, cut):
    file = shards / "s-001.tar"
    file.write_bytes(file.read_bytes()[:-10240][: -cut or None])
    with pytest.raises(DataError, match=r"s-001\.tar: truncated, damaged or no tar file after"):
        table_of(shards)


def test_shards_that_are_missing_are_named(shards):
    with pytest.raises(DataError, match=r"2 of the 5 files .* not there: s-003.tar, s-004.tar"):
        table_of(f"{shards}/s-{{000..004}}.tar")
    with pytest.raises(DataError, match=r"t-\*\.tar names no .tar file"):
        table_of(f"{shards}/t-*.tar")
    with pytest.raises(DataError, match="nowhere:// is no place that fsspec knows"):
        find_files("nowhere://bucket/{0..2}.tar", ".tar")


def test_a_wrong_key_is_told_with_those_that_there_are(tmp_path):
    members = [ONE, ("x.json", b'{"species": "ant", "age": 3}')]
    config = DataConfig(root=str(write_tar(tmp_path / "a.tar", members)))
    with pytest.raises(DataError, match=r"no label in \.json .* species, age; name the key"):
        read_table(config, seed=0, cache_dir=None)
    config.columns.label = "specis"
    with pytest.raises(DataError, match=r"specis is no key of \.json \(there: species, age\)"):
        read_table(config, seed=0, cache_dir=None)


def test_braces_are_those_of_a_shell():
    assert expand_braces("a{8..10}b") == ["a8b", "a9b", "a10b"]
    assert expand_braces("{x,y}-{00..01}") == ["x-00", "x-01", "y-00", "y-01"]
    assert expand_braces("plain.tar") == ["plain.tar"]


# --- From a web server ---


class Server(SimpleHTTPRequestHandler):
    """Files with ranges, as object stores give them; counts requests, and fails when told to."""

    asked: ClassVar[Counter[str]] = Counter()
    fail = 0

    def do_GET(self):
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            return self.send_error(404)
        if Server.fail:
            Server.fail -= 1
            return self.send_error(503)
        content = file.read_bytes()
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(span[1]) : int(span[2]) + 1] if span else content
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        Server.asked[file.name] += len(part)
        self.wfile.write(part)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def address(shards, monkeypatch):
    """Where the shards are served; blocks of 4 kB."""
    monkeypatch.setattr("tl.data.remote.BLOCK", 4096)
    monkeypatch.setattr("tl.data.sources.shards.Blocks", functools.partial(Blocks, block=4096))
    monkeypatch.setattr("tl.data.remote.PAUSE", 0.01)
    Server.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Server, directory=shards))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/s-{{000..002}}.tar"
    server.shutdown()
    server.server_close()


def test_remote_shards_are_fetched_once_and_are_the_same_table(shards, address, tmp_path):
    remote = table_of(address, tmp_path / "cache")
    local = table_of(shards)
    assert remote.fingerprint()["sha256"] == local.fingerprint()["sha256"]
    sizes = {file.name: file.stat().st_size for file in shards.glob("*.tar")}
    assert all(Server.asked[name] <= size for name, size in sizes.items())
    before = dict(Server.asked)
    images = table_of(address, tmp_path / "cache").images("all")
    assert len({images.read(i) for i in range(len(images))}) == 36
    assert dict(Server.asked) == before


def test_any_place_that_fsspec_knows_will_do(shards, tmp_path):
    memory = fsspec.filesystem("memory")
    for file in shards.iterdir():
        memory.pipe_file(f"/bucket/photos/{file.name}", file.read_bytes())
    for names in ("photos/s-*.tar", "photos/s-{000..002}.tar", "photos"):
        table = table_of(f"memory://bucket/{names}", tmp_path / "cache")
        assert len(table.rows) == 36
    assert table.fingerprint()["sha256"] == table_of(shards).fingerprint()["sha256"]


def test_loader_processes_read_remote_shards(address, tmp_path):
    table = table_of(address, tmp_path / "cache", check=False)
    preprocessing = Preprocessing.from_dict(SIZE)
    data = ImageDataModule(
        table, preprocessing, AugmentConfig(), batch_size=8, num_workers=2, seed=0
    )
    seen = [int(i) for batch in data.train_dataloader() for i in batch["index"]]
    assert sorted(seen) == list(range(len(table.split("train"))))


def test_a_failing_server_is_asked_again_and_then_named(address, tmp_path, monkeypatch):
    table = table_of(address, tmp_path / "cache")
    for block in (tmp_path / "cache" / "shards" / "blocks").rglob("[0-9]*"):
        if block.is_file():
            block.unlink()
    monkeypatch.setattr(Server, "fail", 2)
    assert len(table.images("all").read(0)) > 100
    monkeypatch.setattr(Server, "fail", 1000)
    with pytest.raises(DataError, match=r"s-002\.tar/.*http://127.*503"):
        table.images("all").read(35)


def test_more_than_is_kept_is_streamed_block_by_block(address, tmp_path):
    table = table_of(address, tmp_path / "cache", remote_gb=20e-6, check=False)
    assert table.store.streamed
    rows = table.split("train")
    assert (np.diff(rows["_shard"]) >= 0).all()
    sampler = sampler_of(table.images("train"), seed=0, shuffle=True)
    assert isinstance(sampler, BlockSampler)
    images = table.images("train")
    Server.asked.clear()
    for _, index in sampler:
        images.read(index)
    fetched = sum(Server.asked.values())
    assert fetched < 2.5 * rows["bytes"].sum() + 3 * 4096 * 3
    kept = sum(f.stat().st_size for f in (tmp_path / "cache/shards/blocks").rglob("*"))
    assert kept < 100_000


# --- Order ---


def blocks_of(images, per_block):
    return np.arange(images) // per_block


@pytest.mark.parametrize("weights", [None, np.arange(1, 501, dtype=float)])
def test_an_epoch_reads_few_blocks_at_a_time_and_mixes_their_images(weights):
    blocks = blocks_of(500, 10)
    sampler = BlockSampler(blocks, window=5, seed=3, shuffle=True, weights=weights)
    first, again = list(sampler), list(sampler)
    assert first == again
    sampler.set_epoch(1)
    assert [i for _, i in sampler] != [i for _, i in first]
    indices = np.array([i for _, i in first])
    if weights is None:
        assert sorted(indices) == list(range(500))
        assert all(len(set(blocks[indices[n : n + 50]])) == 5 for n in range(0, 500, 50))
    else:
        assert indices.mean() == pytest.approx(333, abs=10)
    assert (np.diff(indices) == 1).mean() < 0.1


def test_processes_read_pieces_without_repeats():
    samplers = [
        BlockSampler(blocks_of(500, 10), window=5, seed=3, shuffle=True, num_replicas=4, rank=rank)
        for rank in range(4)
    ]
    pieces = [[i for _, i in sampler] for sampler in samplers]
    assert sorted(i for piece in pieces for i in piece) == list(range(500))
    assert all(len({i // 10 for i in piece}) <= 25 for piece in pieces)


@pytest.mark.parametrize("world", [1, 3])
def test_a_sampler_goes_on_where_it_was(world):
    settings = {"seed": 0, "shuffle": True, "num_replicas": world, "rank": world - 1}
    for make in (
        lambda: EpochSampler(100, **settings),
        lambda: BlockSampler(blocks_of(100, 8), window=3, **settings),
    ):
        whole, rest = list(make()), make()
        rest.skip = 16
        assert list(rest) == whole[16:]
        assert list(rest) == whole  # the next epoch has all


def test_local_shards_are_shuffled_as_files_are(shards):
    images = list_shards(DataConfig(root=str(shards)), None).images()
    assert type(sampler_of(images, seed=0, shuffle=True)) is EpochSampler


def test_a_stamp_changes_with_the_shard_only(shards):
    images = list_shards(DataConfig(root=str(shards)), None).images()
    sizes, stamps = images.stamps()
    assert len(set(stamps.tolist())) == 36
    assert sizes[0] == len(image(0))
    shard = images.store.shards[1]
    other = RemoteFile(shard.url, shard.size, "new")
    store = type(images.store)((images.store.shards[0], other, images.store.shards[2]))
    changed = store.stamps(images.names, images.places)[1] != stamps
    assert changed.tolist() == [False] * 12 + [True] * 12 + [False] * 12
