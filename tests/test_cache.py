"""Activations on disk: right under every accident, shared, within a limit, flat in memory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from caching import (
    FIELDS,
    IMAGE,
    KEY,
    LARGE,
    arrays,
    assert_right,
    digests,
    fill,
    job,
    right_images,
    store,
)

from tl.cache import ActivationCache, CacheError, Field, Shelf


@pytest.fixture
def cache(tmp_path: Path) -> ActivationCache:
    return store(tmp_path)


def segments(shelf: Shelf) -> list[Path]:
    return sorted(shelf.path.glob("segment-*"))


def hidden(folder: Path) -> list[Path]:
    return [p for p in folder.glob(".*") if p.is_dir()]


# --- what it keeps ------------------------------------------------------------------------------


def test_rows_come_in_the_asked_order_across_segments(cache):
    with cache.shelf(KEY, FIELDS) as shelf:
        assert fill(shelf, range(200)) == 200
        assert len(segments(shelf)) == 5
        assert len(shelf) == 200
        numbers = np.random.default_rng(0).permutation(200)
        rows = shelf.rows(digests(numbers))
        assert len(rows) == 200
        places = np.random.default_rng(1).integers(0, 200, 333)  # with repetitions
        for name, wanted in arrays(numbers[places]).items():
            for indices in (places, torch.from_numpy(places)):
                found = rows.gather(name, indices)
                assert found.dtype == torch.float32
                assert np.array_equal(found.numpy(), wanted)
        assert rows.gather("map", np.array([], int)).shape == (0, 3, 2, 2)
        for wrong in ([200], [-1]):
            with pytest.raises(IndexError, match=r"in \[0, 200\)"):
                rows.gather("pooled", np.array(wrong))


def test_rows_are_copies(cache):
    with cache.shelf(KEY, FIELDS) as shelf:
        fill(shelf, range(5))
        shelf.rows(digests(range(5))).gather("pooled", np.arange(5)).zero_()
        assert_right(shelf, range(5))


def test_a_later_job_finds_what_an_earlier_one_wrote(tmp_path, cache):
    first = job(tmp_path, "print(fill(shelf, range(100)))")
    assert first.communicate(timeout=60)[0] == "100\n"
    with cache.shelf(KEY, FIELDS) as shelf:
        assert shelf.present(digests(range(50, 150))).tolist() == [True] * 50 + [False] * 50
        assert fill(shelf, range(150)) == 50
        assert_right(shelf, range(150))
        with pytest.raises(CacheError, match="1 of 3 images are not in "):
            shelf.rows(digests([1, 2, 150]))


def test_whatever_the_values_depend_on_has_a_shelf_of_its_own(cache):
    with cache.shelf(KEY, FIELDS) as shelf:
        fill(shelf, range(3))
    others = [
        ({**KEY, "weights": "1" * 64}, FIELDS),
        ({**KEY, "view": 1}, FIELDS),
        (KEY, [FIELDS[0]]),
        (KEY, [FIELDS[0], Field("map", (3, 2, 2), "float32")]),
        (KEY, [FIELDS[0], Field("map", (3, 4), "float16")]),
    ]
    for key, fields in others:
        with cache.shelf(key, fields) as shelf:
            assert not shelf.present(digests(range(3))).any()
    assert len(cache.shelves()) == 1, "a shelf that is only looked at leaves nothing"
    with cache.shelf(dict(reversed(KEY.items())), FIELDS) as shelf:
        assert shelf.present(digests(range(3))).all()


def test_an_image_is_stored_once(cache):
    with cache.shelf(KEY, FIELDS) as shelf:
        with shelf.writing() as writer:
            for numbers in ([0, 1, 0, 2, 1], [2, 3, 3], [0, 1, 2, 3]):
                writer.append(digests(numbers), arrays(numbers))
        with shelf.writing() as writer:
            writer.append(digests([3, 4]), arrays([3, 4]))
        assert len(shelf) == 5
        assert_right(shelf, [4, 0, 3, 1, 2, 0])


def test_digests_with_zero_bytes_are_told_apart(cache):
    names = ["00" * 32, "00" * 31 + "01", "01" + "00" * 31, "0100" * 16, "ff" * 32]
    with cache.shelf(KEY, FIELDS) as shelf:
        with shelf.writing() as writer:
            writer.append(names, arrays(range(5)))
        assert shelf.present([*names, "02" + "00" * 31]).tolist() == [True] * 5 + [False]
        found = shelf.rows(names).gather("pooled", np.arange(5))[:, 0]
        assert found.tolist() == [0, 1, 2, 3, 4]


def test_half_precision_is_rounded_and_never_overflows(cache):
    fields = [Field("values", (4,), "float16")]
    values = np.random.default_rng(0).normal(0, 10, (50, 4)).astype(np.float32)
    with cache.shelf(KEY, fields) as shelf:
        with shelf.writing() as writer:
            writer.append(digests(range(50)), {"values": values})
        found = shelf.rows(digests(range(50))).gather("values", np.arange(50)).numpy()
        assert found.dtype == np.float32
        assert np.array_equal(found, values.astype(np.float16).astype(np.float32))
        with shelf.writing() as writer:
            large = np.array([[1, 2, 3, 131072]], np.float32)
            with pytest.raises(CacheError, match=r"values has values beyond 65504"):
                writer.append(digests([50]), {"values": large})
            writer.append(digests([50]), {"values": large / 4})
        assert shelf.rows(digests([50])).gather("values", np.array([0]))[0, 3] == 32768


def test_wrong_calls_are_refused(cache):
    with cache.shelf(KEY, FIELDS) as shelf, shelf.writing() as writer:
        with pytest.raises(ValueError, match="the shelf has the fields"):
            writer.append(digests([1]), {"pooled": arrays([1])["pooled"]})
        with pytest.raises(ValueError, match=r"pooled must be \(2, 64\), got \(1, 64\)"):
            writer.append(digests([1, 2]), arrays([1]))
        with pytest.raises(ValueError, match="64 hexadecimal digits"):
            shelf.present(["abc"])
        with pytest.raises(ValueError, match="non-hexadecimal"):
            shelf.present(["g" * 64])
    for shape, dtype in (((0,), "float32"), ((3,), "int8")):
        with pytest.raises(ValueError, match="field x is"):
            Field("x", shape, dtype)


def test_a_person_can_read_what_a_shelf_is(cache):
    with cache.shelf(KEY, FIELDS) as shelf:
        fill(shelf, range(3))
        facts = json.loads((shelf.path / "shelf.json").read_text())
        assert facts["model"] == "resnet18.a1_in1k"
        assert facts["fields"][1] == {"name": "map", "shape": [3, 2, 2], "dtype": "float16"}
        values = np.fromfile(segments(shelf)[0] / "field00.bin", "<f4").reshape(3, -1)
        assert np.array_equal(values, arrays(range(3))["pooled"])
        (info,) = cache.shelves()
        assert (info.images, info.in_use, info.path) == (3, True, shelf.path)
        assert [info.text(k) for k in ("model", "frontier", "view", "other")] == [
            "resnet18.a1_in1k", "layer4", "clean", "?",
        ]  # fmt: skip
        assert info.bytes == sum(f.stat().st_size for f in shelf.path.rglob("*") if f.is_file())
    assert not cache.shelves()[0].in_use


# --- several jobs -------------------------------------------------------------------------------


def test_a_job_waits_for_another_that_fills_the_same_shelf(tmp_path, cache):
    with cache.shelf(KEY, FIELDS) as shelf:
        with shelf.writing() as writer:
            other = job(tmp_path, "print(fill(shelf, range(120)), flush=True)")
            line = other.stderr.readline()  # it says that it waits, then waits
            assert f"waiting for process {os.getpid()} on " in line
            writer.append(digests(range(100)), arrays(range(100)))
            assert other.poll() is None
        out, err = other.communicate(timeout=60)
        assert (out, err, other.returncode) == ("20\n", "", 0)
        assert not shelf.present(digests([110])).any()
        assert fill(shelf, range(120)) == 0
        assert_right(shelf, range(120))


def test_jobs_that_fill_the_same_shelf_at_once_compute_each_image_once(tmp_path, cache):
    jobs = [job(tmp_path, "print(fill(shelf, range(600), batch=7))") for _ in range(3)]
    done = [one.communicate(timeout=100) for one in jobs]
    assert [one.returncode for one in jobs] == [0, 0, 0], done
    assert sorted(int(out) for out, _ in done) == [0, 0, 600]
    with cache.shelf(KEY, FIELDS) as shelf:
        assert len(shelf) == 600
        assert_right(shelf, range(600))
        assert hidden(shelf.path) == []


def test_a_kill_at_any_moment_leaves_no_wrong_entry(tmp_path, cache):
    """Six jobs are killed, each a little later in its work than the one before."""
    lines = [
        "with shelf.writing() as writer:",
        "    numbers = np.flatnonzero(~shelf.present(digests(range(5000))))",
        "    print(len(numbers), flush=True)",
        "    for part in np.array_split(numbers, len(numbers) // 3):",
        "        writer.append(digests(part), arrays(part))",
    ]
    before, unfinished = 0, 0
    for delay in (0, 0.004, 0.015, 0.03, 0.06, 0.1):
        killed = job(tmp_path, *lines)
        assert int(killed.stdout.readline()) == 5000 - before, "what is there is not done again"
        time.sleep(delay)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        with cache.shelf(KEY, FIELDS) as shelf:
            now = right_images(shelf, 5000)
            assert now == len(shelf) >= before
            before = now
            unfinished += len(hidden(shelf.path))
    assert 0 < before < 5000, "some were killed in the middle"
    assert unfinished, "some were killed in the middle of a segment"
    with cache.shelf(KEY, FIELDS) as shelf:
        assert fill(shelf, range(5000), batch=500) == 5000 - before
        assert hidden(shelf.path) == [], "what dead writers left is removed"
        assert_right(shelf, range(5000))


def test_what_was_computed_before_an_interruption_is_kept(cache):
    with cache.shelf(KEY, FIELDS) as shelf:

        def interrupted() -> None:
            with shelf.writing() as writer:
                writer.append(digests(range(7)), arrays(range(7)))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert_right(shelf, range(7))
        assert fill(shelf, range(9)) == 2


# --- damage -------------------------------------------------------------------------------------


def flip(file: Path, place: int) -> None:
    """One bit, and the file's time as before: as a bad disk does it."""
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def no_json(file: Path) -> None:
    file.write_text('{"images": 40, "checksums')


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "first byte": ("field00.bin", lambda f: flip(f, 0), "checksum of field00.bin is wrong"),
    "last byte": ("field01.bin", lambda f: flip(f, -1), "checksum of field01.bin is wrong"),
    "index": ("index.bin", lambda f: flip(f, 50), "checksum of index.bin is wrong"),
    "cut short": ("field00.bin", cut, "field00.bin has not the size that segment.json says"),
    "empty": ("index.bin", lambda f: os.truncate(f, 0), "index.bin has not the size"),
    "file gone": ("field01.bin", Path.unlink, "field01.bin is missing"),
    "facts gone": ("segment.json", Path.unlink, "segment.json is missing"),
    "no json": ("segment.json", no_json, "segment.json cannot be read"),
    "no object": ("segment.json", lambda f: f.write_text("[1]"), "segment.json cannot be read"),
    "no text": ("segment.json", lambda f: f.write_bytes(b"\xff\xfe"), "cannot be read"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A cache with three segments of 40 images, to be copied and damaged."""
    place = tmp_path_factory.mktemp("whole")
    with store(place).shelf(KEY, FIELDS) as shelf:
        fill(shelf, range(120))
    return place


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_segment_is_found_said_once_and_computed_again(kind, whole, tmp_path, caplog):
    name, damage, message = DAMAGE[kind]
    shutil.copytree(whole, tmp_path / "copy")
    cache = store(tmp_path / "copy")
    with cache.shelf(KEY, FIELDS) as shelf:
        segment = segments(shelf)[1]
    damage(segment / name)
    with cache.shelf(KEY, FIELDS) as shelf:
        there = shelf.present(digests(range(120)))
        assert np.flatnonzero(~there).tolist() == list(range(40, 80))
        assert right_images(shelf, 120) == 80
        assert fill(shelf, range(120)) == 40
        assert_right(shelf, range(120))
        assert not segment.exists()
        assert hidden(shelf.path) == []
    (record,) = caplog.records
    assert f"damaged activations in {segment}: " in record.getMessage()
    assert message in record.getMessage()


def test_damage_found_while_writing_is_removed_by_the_same_writer(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "copy")
    with store(tmp_path / "copy").shelf(KEY, FIELDS) as shelf:
        segment = segments(shelf)[2]
        flip(segment / "field00.bin", 100)
        assert fill(shelf, range(120)) == 40
        assert not segment.exists()
        assert_right(shelf, range(120))


def test_only_segments_that_are_asked_for_are_verified(whole, tmp_path, caplog):
    shutil.copytree(whole, tmp_path / "copy")
    with store(tmp_path / "copy").shelf(KEY, FIELDS) as shelf:
        flip(segments(shelf)[2] / "field00.bin", 100)
        assert shelf.present(digests(range(80))).all()
        assert not caplog.records
        assert not shelf.present(digests([100])).any()
        assert len(caplog.records) == 1


def test_a_shelf_whose_description_is_lost_still_serves(cache):
    with cache.shelf(KEY, FIELDS) as shelf:
        fill(shelf, range(5))
        (shelf.path / "shelf.json").write_bytes(b"\xff{")
        (info,) = cache.shelves()
        assert (info.text("model"), info.images) == ("?", 5)
    with cache.shelf(KEY, FIELDS) as shelf:
        assert_right(shelf, range(5))
        fill(shelf, range(6))
    assert cache.shelves()[0].text("model") == KEY["model"]


# --- where it cannot write ----------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A disk of its own: mounts, or mounts again, with options of tmpfs."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        options = f"remount,{options}" if mounted else options
        kind = [] if mounted else ["-t", "tmpfs", "tmpfs"]
        command = ["mount", "-o", options, *kind, str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
        mounted.append(place)
        return place

    if not shutil.which("mount"):
        pytest.skip("no mount command")
    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_is_one_error_and_keeps_what_was_there(disk):
    cache = store(disk("size=256k"))
    with cache.shelf(KEY, FIELDS) as shelf:
        fill(shelf, range(100))
        with pytest.raises(CacheError) as error:
            fill(shelf, range(1000), announce=False)
        assert "\n" not in str(error.value)
        for part in (f"the disk of the cache {cache.folder} is full", "cache.dir=", "tl cache"):
            assert part in str(error.value)
        assert hidden(shelf.path) == [], "the unfinished segment gives its space back"
        kept = right_images(shelf)
        assert 100 <= kept < 1000
        disk("size=4m")
        assert fill(shelf, range(1000)) == 1000 - kept
        assert_right(shelf, range(1000))


def test_a_disk_that_is_too_small_is_said_before_the_work(disk):
    cache = store(disk("size=256k"))
    with (
        cache.shelf(KEY, FIELDS) as shelf,
        pytest.raises(CacheError, match=r"take 316 kB, and the disk of the cache .* left: free"),
        shelf.writing(images=1000),
    ):
        pytest.fail("the job would have begun")


def test_a_read_only_cache_is_read(disk):
    cache = store(disk("size=1m"))
    with cache.shelf(KEY, FIELDS) as shelf:
        fill(shelf, range(50))
    disk("ro")
    try:
        with cache.shelf(KEY, FIELDS) as shelf:
            assert_right(shelf, range(50))
            with pytest.raises(CacheError, match=r"cannot be written \(read-only file system\)"):
                fill(shelf, range(51))
            assert_right(shelf, range(50))
        assert [info.images for info in cache.shelves()] == [50]
        with pytest.raises(CacheError, match="cannot be written"):
            cache.prune(0)
    finally:
        disk("rw")


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "activations").write_text("a file")
    cache = store(tmp_path)
    with cache.shelf(KEY, FIELDS) as shelf:
        assert not shelf.present(digests([1])).any()
        with pytest.raises(CacheError, match=r"cannot be written \((not a directory|file exists)"):
            fill(shelf, [1])
    assert cache.shelves() == []
    assert (tmp_path / "activations").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(tmp_path):
    cache = store(tmp_path)
    cache.folder.mkdir()
    cache.folder.chmod(0o500)
    with (
        cache.shelf(KEY, FIELDS) as shelf,
        pytest.raises(CacheError, match=r"cannot be written \(permission denied\)"),
    ):
        fill(shelf, [1])


def test_a_file_system_without_locks_is_used_but_never_evicted(cache, monkeypatch):
    def no_locks(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", no_locks)
        with cache.shelf(KEY, FIELDS) as one, cache.shelf(KEY, FIELDS) as two:
            with one.writing() as first, two.writing() as second:
                for part in np.array_split(range(100), 10):
                    first.append(digests(part), arrays(part))
                    second.append(digests(part), arrays(part))
            assert_right(one, range(100))
            assert_right(two, range(100))
        with cache.shelf(KEY, FIELDS) as shelf:
            assert_right(shelf, range(100))
        assert cache.prune(0) == []
    assert len(cache.prune(0)) == 1


# --- the size limit -----------------------------------------------------------------------------


def put(cache: ActivationCache, view: int, images: int = 100) -> None:
    with cache.shelf({**KEY, "view": view}, FIELDS) as shelf:
        fill(shelf, range(images))


def views(cache: ActivationCache) -> list[object]:
    return [info.key["view"] for info in cache.shelves()]


def test_the_least_recently_used_goes_first(tmp_path):
    cache = store(tmp_path, limit_bytes=370 * IMAGE)
    for view in (1, 2, 3):
        put(cache, view)
    assert views(cache) == [1, 2, 3]
    with cache.shelf({**KEY, "view": 1}, FIELDS):
        pass  # a job that only reads
    assert views(cache) == [2, 3, 1]
    put(cache, 4)
    assert views(cache) == [3, 1, 4]
    assert sum(info.bytes for info in cache.shelves()) <= cache.limit_bytes
    assert [info.key["view"] for info in cache.prune(250 * IMAGE)] == [3]
    assert [info.key["view"] for info in cache.prune(LARGE, used_before=time.time() + 1)] == [1, 4]
    assert list(cache.folder.glob("[!.]*")) == hidden(cache.folder) == []


def test_more_than_the_limit_is_refused_before_the_work_and_during_it(tmp_path):
    cache = store(tmp_path, limit_bytes=200 * IMAGE)
    put(cache, 1)
    message = (
        r"the activations take 9\d\.\d kB, and cache.max_gb allows 63.2 kB in .*cache.mode=off"
    )
    with cache.shelf(KEY, FIELDS) as shelf:
        with pytest.raises(CacheError, match=message), shelf.writing(images=300):
            pytest.fail("the job would have begun")
        assert views(cache)[:1] == [1], "nothing is evicted for what cannot fit"
        with pytest.raises(CacheError, match=r"cache\.max_gb allows"):
            fill(shelf, range(300), announce=False)
        assert hidden(shelf.path) == []
        assert 0 < right_images(shelf) < 200


def test_what_another_job_added_meanwhile_needs_no_room(tmp_path):
    """The limit has room for these images once, not for them and as many again."""
    cache = store(tmp_path, limit_bytes=150 * IMAGE)
    with cache.shelf(KEY, FIELDS) as shelf:
        fill(cache.shelf(KEY, FIELDS), range(100))
        with shelf.writing(images=100):
            assert shelf.present(digests(range(100))).all()
        with pytest.raises(CacheError, match=r"cache\.max_gb"), shelf.writing(images=100):
            pytest.fail("the job would have begun")


def test_what_another_job_reads_is_never_evicted(tmp_path):
    cache = store(tmp_path, limit_bytes=250 * IMAGE)
    with cache.shelf(KEY, FIELDS) as shelf:
        fill(shelf, range(100))
    reader = job(tmp_path, "print(right_images(shelf), flush=True)", "input()")
    assert reader.stdout.readline() == "100\n"
    put(cache, 1)
    put(cache, 2)
    assert views(cache) == ["clean", 2], "the older one is in use, so the younger one went"
    assert [info.in_use for info in cache.shelves()] == [True, False]
    assert [info.key["view"] for info in cache.prune(0)] == [2]
    with (
        pytest.raises(CacheError, match=r"take 6\d\.\d kB, 3\d\.\d kB are in use by other jobs"),
        cache.shelf({**KEY, "view": 3}, FIELDS) as shelf,
        shelf.writing(images=200),
    ):
        pytest.fail("the job would have begun")
    reader.kill()
    reader.communicate()
    removed = cache.prune(0)
    assert KEY["view"] in [info.key.get("view") for info in removed], "a dead reader holds nothing"
    assert cache.shelves() == []


def test_a_child_that_was_forked_meanwhile_does_not_keep_a_closed_shelf(cache):
    shelf = cache.shelf(KEY, FIELDS)
    fill(shelf, range(3))
    ends = os.pipe()
    child = os.fork()
    if child == 0:  # as a worker of a data loader; it must not give back its parent's lock either
        shelf.close()
        os.read(ends[0], 1)
        os._exit(0)
    try:
        time.sleep(0.2)
        assert cache.prune(0) == []
        shelf.close()
        assert len(cache.prune(0)) == 1
    finally:
        os.write(ends[1], b"x")
        os.waitpid(child, 0)


def test_a_shelf_that_was_evicted_is_made_again(cache):
    shelf = cache.shelf(KEY, FIELDS)
    fill(shelf, range(30))
    rows = shelf.rows(digests(range(30)))
    shelf.close()
    assert len(cache.prune(0)) == 1
    assert np.array_equal(rows.gather("pooled", np.arange(30)).numpy(), arrays(range(30))["pooled"])
    assert fill(shelf, range(40)) == 40
    assert cache.shelves()[0].in_use
    assert_right(shelf, range(40))
    shelf.close()


def test_jobs_that_open_fill_and_evict_at_once_stay_right(tmp_path):
    """Three jobs fill, read and close shelves while a fourth removes all that it may."""
    lines = [
        "for i in range(8):",
        "    with cache.shelf({**KEY, 'view': i % 2}, FIELDS) as shelf:",
        "        fill(shelf, range(60))",
        "        assert shelf.present(digests(range(60))).all()",
        "        assert len(shelf) == 60",
    ]
    jobs = [job(tmp_path, *lines) for _ in range(3)]
    cache, removed = store(tmp_path), 0
    while any(one.poll() is None for one in jobs):
        removed += len(cache.prune(0))
    for one in jobs:
        _, err = one.communicate()
        assert one.returncode == 0, err
        assert "damaged" not in err
    assert removed


def test_pruning_removes_what_dead_writers_left(tmp_path, cache):
    with cache.shelf(KEY, FIELDS) as shelf:
        fill(shelf, range(10))
    for place in (shelf.path / ".partial-1-x", cache.folder / ".gone-x"):
        place.mkdir()
        (place / "field00.bin").write_bytes(b"1234")
    assert cache.prune(LARGE) == []
    assert hidden(shelf.path) == hidden(cache.folder) == []
    with cache.shelf(KEY, FIELDS) as shelf:
        assert_right(shelf, range(10))


# --- memory and time ----------------------------------------------------------------------------

MEMORY = """
import psutil, torch
import tl.cache.rows
tl.cache.rows.MAPPED = 32 << 20
names, width, memory = digests(range(30_000)), 1280, psutil.Process()
shelf.rows([])
with ActivationCache(cache.folder, limit_bytes=10**9).shelf({}, [Field("x", (width,))]) as shelf:
    before = memory.memory_info().rss
    with shelf.writing(images=len(names)) as writer:
        for i in range(0, len(names), 500):
            values = np.repeat(np.arange(i, i + 500, dtype=np.float32)[:, None], width, 1)
            writer.append(names[i:i + 500], {"x": values})
    print(memory.memory_info().rss - before)
    rows, order, most = shelf.rows(names), np.random.default_rng(0).permutation(len(names)), 0
    before = memory.memory_info().rss
    for part in np.array_split(order, 30):
        found = rows.gather("x", part)
        assert np.array_equal(found[:, -1].numpy(), part)
        most = max(most, memory.memory_info().rss - before)
    print(most)
"""


def test_memory_stays_flat(tmp_path):
    """154 MB are written and read in any order; a process may grow by its buffers, not by them."""
    out, err = job(tmp_path, MEMORY).communicate(timeout=100)
    written, read = (int(line) / 2**20 for line in out.split())
    assert err == ""
    assert written < 40
    assert read < 32 + 48, f"grew by {read:.0f} MB"


def test_the_room_loads_no_torch():
    code = "import sys, tl.cache; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# --- tl cache -----------------------------------------------------------------------------------


def test_the_command_shows_an_empty_cache(tl, tmp_path):
    done = tl("cache", f"cache.dir={tmp_path / 'none'}")
    assert (done.code, done.err) == (0, "")
    assert "no activations are kept: tl train fills the cache" in done.out
    assert "0 bytes of at most 20.0 GB (cache.max_gb)" in done.out
    assert tl("cache", f"cache.dir={tmp_path / 'none'}", "prune=all").code == 0
    assert not (tmp_path / "none").exists()


def test_the_command_shows_and_prunes(tl, tmp_path, cache):
    folder = f"cache.dir={tmp_path}"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "x-v1.parquet").write_bytes(bytes(2500))
    with cache.shelf(KEY, FIELDS) as shelf:
        fill(shelf, range(100))
    with cache.shelf({**KEY, "view": {"number": 7, "seed": 0}}, FIELDS) as other:
        fill(other, range(12))
    done = tl("cache", folder)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[1].split() == ["model", "frontier", "view", "images", "size", "last", "used", "in", "use"]  # fmt: skip  # noqa: E501
    row = lines[3].split()
    assert row[:4] == ["resnet18.a1_in1k", "layer4", "clean", "100"]
    assert row[-1] == "no"
    assert "checks of images  2.5 kB" in done.out

    os.utime(shelf.path / "in-use", (1e9, 1e9))
    done = tl("cache", folder, "older_than_days=30")
    assert "removed resnet18.a1_in1k at layer4, view clean: 3" in done.out
    assert "view 7" not in done.out.split("\n\n")[0]
    assert [info.path for info in cache.shelves()] == [other.path]

    with cache.shelf({**KEY, "view": {"number": 7, "seed": 0}}, FIELDS):
        done = tl("cache", folder, "prune=all")
        assert "kept resnet18.a1_in1k at layer4, view 7: a running job reads it" in done.out
        assert "yes" in done.out
    assert tl("cache", folder, "prune=limit").code == 0
    assert len(cache.shelves()) == 1
    assert "view 7" in tl("cache", folder, "prune=limit", "cache.max_gb=1e-6").out
    assert views(cache) == []


def test_the_command_refuses_what_it_does_not_know(tl):
    tl("cache", "prune=some").refused("prune must be one of limit, all, got some")
    tl("cache", "older_than_days=-1").refused("older_than_days must be at least 0")
    tl("cache", "older_then_days=1").refused("did you mean older_than_days?")


def test_the_command_says_where_it_cannot_prune(tl, disk):
    place = disk("size=1m")
    put(store(place), 1, images=3)
    disk("ro")
    try:
        done = tl("cache", f"cache.dir={place}", "prune=all")
        done.refused("CacheError: the cache", "cannot be written", code=1)
    finally:
        disk("rw")
