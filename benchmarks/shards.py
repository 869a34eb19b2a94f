"""Ways to read tar shards, on 100,000 small images: ours, webdataset, wids, litdata, datasets.

    python benchmarks/shards.py make build/benchmarks/shards
    python benchmarks/shards.py speed build/benchmarks/shards --python VENV/bin/python
    python benchmarks/shards.py exactness build/benchmarks/shards --python VENV/bin/python

`make` writes JPEGs of 64 x 64 pixels with their labels into tar files of 1,024 images. The others
read them through each tool, from the disk and from an HTTP server on this machine, every time in
fresh processes with two loader workers. VENV holds the tools that are no part of this project:
`pip install webdataset wids litdata datasets torchdata`.

`speed` prints seconds until the first batch (and of processors) with nothing prepared (first) and
with an index or a copy of its own (again); images a second after it, of wall time and of processor
time; the peak of memory of all processes (PSS: shared pages counted once); bytes and requests of
the server; and the share of images that are followed by their neighbour. Nothing is decoded: that
costs the same everywhere. `exactness` prints which images two ranks saw twice or never, and the
same of an epoch that one process leaves in the middle and another goes on with.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from shard_tools import BATCH, LOADERS

IMAGES, PER_SHARD, CLASSES, SIDE = 100_000, 1_024, 10, 64


def make(folder: Path, images: int) -> None:
    """Write the shards; the same bytes each time."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for start in range(0, images, PER_SHARD):
        with tarfile.open(folder / f"{start // PER_SHARD:04d}.tar", "w") as shard:
            for number in range(start, min(start + PER_SHARD, images)):
                label = int(rng.integers(CLASSES))
                small = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
                small[:, :, label % 3] = 20 * label
                data = io.BytesIO()
                Image.fromarray(small).resize((SIDE, SIDE)).save(data, "JPEG", quality=85)
                for suffix, content in (("jpg", data.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))


class Handler(SimpleHTTPRequestHandler):
    """Files with ranges, as object stores give them; counts what it sends."""

    protocol_version = "HTTP/1.1"
    sent: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        """Send a file, or the range that is asked for."""
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            return self.send_error(404)
        size = file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(asked[1]) if asked else 0
        last = min(int(asked[2]) if asked and asked[2] else size - 1, size - 1)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{size:x}-{file.stat().st_mtime_ns:x}"')
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        with file.open("rb") as stream:
            stream.seek(first)
            self.sent.update(requests=1, bytes=last - first + 1)
            self.wfile.write(stream.read(last - first + 1))
        return None

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


# --- A process that reads, and the one that measures it ---


def child(args: argparse.Namespace) -> None:
    """Read an epoch, or a part of one, and print what was seen as JSON."""
    began = time.perf_counter()
    if args.world > 1:
        import torch.distributed as dist

        place = f"tcp://127.0.0.1:{args.port}"
        dist.init_process_group("gloo", place, rank=args.rank, world_size=args.world)
    state = pickle.loads(args.state.read_bytes()) if args.state and args.state.exists() else None
    loader = LOADERS[args.tool](args.urls, args.scratch, args.rank, args.world, state)
    keys: list[str] = []
    first, start = began, 0.0
    for number, (batch, _) in enumerate(loader):
        if not number:
            first, start = time.perf_counter(), processor_seconds()
        keys += batch
        if number + 1 == args.stop:
            break
    seconds = time.perf_counter() - first
    if args.stop and args.state:
        args.state.write_bytes(pickle.dumps(loader.state()))
    print("RESULT" + json.dumps({
        "first": first - began,
        "start": start,
        "rate": (len(keys) - BATCH) / seconds,
        "cpu_rate": (len(keys) - BATCH) / (processor_seconds() - start),
        "resumed": loader.resumed,
        "neighbours": neighbours(keys),
        "keys": keys,
    }))  # fmt: skip
    sys.stdout.flush()
    os._exit(0)  # workers of a loader that was left in mid-epoch take their time


def processor_seconds() -> float:
    """Of this process and its loader workers."""
    import psutil

    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system
    ended = me.cpu_times()
    return total + ended.children_user + ended.children_system


def neighbours(keys: list[str]) -> float:
    """Share of images that are followed by the next one of their shard: 0 is well shuffled."""
    numbers = [int(key) for key in keys]
    return sum(b - a == 1 for a, b in itertools.pairwise(numbers)) / len(numbers)


def memory_of(pid: int) -> int:
    """PSS of a process and its children, bytes."""
    import psutil

    total = 0
    with contextlib.suppress(psutil.Error):  # one may end while it is measured
        process = psutil.Process(pid)
        for each in (process, *process.children(recursive=True)):
            total += each.memory_full_info().pss
    return total


def read(
    python: str, tool: str, urls: list[str], scratch: Path, **more: Any
) -> dict[str, Any] | None:
    """Read with a tool in fresh processes, one a rank."""
    world = more.pop("world", 1)
    port = 20_000 + os.getpid() % 20_000
    listing = scratch / "urls.json"
    scratch.mkdir(parents=True, exist_ok=True)
    listing.write_text(json.dumps(urls))
    started = []
    for rank in range(world):
        options = {"rank": rank, "world": world, "port": port, **more}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        command = [python, __file__, "child", tool, str(listing), str(scratch), *words]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.5):
            peak = max(peak, sum(memory_of(process.pid) for process in started))

    watcher = threading.Thread(target=watch)
    watcher.start()
    results = []
    for process in started:
        out, err = process.communicate(timeout=900)
        line = next((x for x in out.decode().splitlines() if x.startswith("RESULT")), None)
        results.append(json.loads(line.removeprefix("RESULT")) if line else None)
    done.set()
    watcher.join()
    if None in results:
        print(f"{tool} failed: {err.decode()[-1500:]}", file=sys.stderr)
        return None
    keys = Counter(key for result in results for key in result["keys"])
    return {
        **{
            name: results[0][name]
            for name in ("first", "start", "rate", "cpu_rate", "resumed", "neighbours")
        },
        "keys": keys,
        "peak_mb": peak / 1e6,
        "each": [len(result["keys"]) for result in results],
    }


def measure(folder: Path, python: str, tools: list[str], places: list[str], how: Any) -> None:
    """All tools from all places; a line of JSON each."""
    files = sorted(str(file) for file in folder.glob("*.tar"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    for tool in tools:
        for place in places:
            urls = files if place == "disk" else [f"{address}/{Path(f).name}" for f in files]
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                row = how(
                    sys.executable if tool.startswith("tl") else python, tool, urls, Path(scratch)
                )
            print(json.dumps({"tool": tool, "place": place, **row}), flush=True)


def speed(python: str, tool: str, urls: list[str], scratch: Path) -> dict[str, Any]:
    """Two epochs in fresh processes, the first with nothing prepared."""
    row: dict[str, Any] = {}
    for turn in ("first", "again"):
        Handler.sent.clear()
        found = read(python, tool, urls, scratch)
        if found is None:
            return {"failed": turn}
        row |= {f"{turn}_s": round(found["first"], 1), f"{turn}_cpu_s": round(found["start"], 1)}
        row[f"{turn}_sent"] = dict(Handler.sent)
        for name in ("rate", "cpu_rate", "peak_mb"):
            row[name] = round(max(found[name], row.get(name, 0)))
    return row | {"images": len(found["keys"]), "neighbours": round(found["neighbours"], 4)}


def exactness(python: str, tool: str, urls: list[str], scratch: Path) -> dict[str, Any]:
    """What two ranks see, and an epoch that is left in the middle and gone on with."""
    whole = read(python, tool, urls, scratch)
    if whole is None:
        return {"failed": "whole"}
    total, row = len(whole["keys"]), {}
    ranks = read(python, tool, urls, scratch, world=2)
    if ranks is not None:
        row["ranks"] = {"each": ranks["each"], **_missed(ranks["keys"], total)}
    state = scratch / "state.pickle"
    before = read(python, tool, urls, scratch, stop=total // BATCH // 2, state=state)
    after = before and read(python, tool, urls, scratch, state=state)
    if before is None or after is None:
        return row | {"resume": "failed"}
    missed = _missed(before["keys"] + after["keys"], total)
    return row | {"resume": {"resumed": after["resumed"], **missed}}


def _missed(keys: Counter[str], total: int) -> dict[str, int]:
    return {"twice": sum(n > 1 for n in keys.values()), "never": total - len(keys)}


HOW = {"speed": speed, "exactness": exactness}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("folder", type=Path)
    making.add_argument("--images", type=int, default=IMAGES)
    for name in HOW:
        measuring = commands.add_parser(name)
        measuring.add_argument("folder", type=Path)
        measuring.add_argument("--python", default=sys.executable)
        measuring.add_argument("--tools", nargs="+", default=[*LOADERS], choices=LOADERS)
        measuring.add_argument("--places", nargs="+", default=["disk", "http"])
    reading = commands.add_parser("child")
    reading.add_argument("tool")
    reading.add_argument("urls", type=lambda file: json.loads(Path(file).read_text()))
    reading.add_argument("scratch", type=Path)
    for name in ("rank", "world", "port", "stop"):
        reading.add_argument(f"--{name}", type=int, default=0)
    reading.add_argument("--state", type=Path)
    args = parser.parse_args()
    if args.command == "make":
        make(args.folder, args.images)
    elif args.command in HOW:
        measure(args.folder, args.python, list(args.tools), args.places, HOW[args.command])
    else:
        child(args)


if __name__ == "__main__":
    main()
