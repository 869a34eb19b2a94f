"""Bad input: one clear message, exit code 2, nothing half-written. Bad luck: code 1, resumable."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, UNTRACKED, files, script
from PIL import Image

NAMES = ["blue", "green", "red"]
LIGHTNING = "pytorch_lightning"


@pytest.fixture
def refused(tl, image_folder) -> Iterator[Callable[..., str]]:
    """Train with wrong settings on good data; whatever is refused must leave no file behind."""
    data = image_folder()

    def call(*args: object, parts: tuple[str, ...] = (), untracked: bool = True) -> str:
        before = files(Path())
        done = tl("train", f"data.root={data}", *(UNTRACKED if untracked else TINY), *args)
        done.refused(*parts)
        # The outcome of the check of the images is remembered, an empty store is no run.
        left = {f for f in files(Path()) - before if not f.startswith("cache/images/")}
        assert left <= {"mlflow.db"}, f"half-written: {left}"
        assert not Path("runs").exists()
        assert not Path("out").exists()
        return done.err

    return call


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override", ["data.batch_siz=4", "+data.batch_siz=4", "++data.batch_siz=4"]
)
def test_a_misspelt_key_on_the_command_line(refused, override):
    refused(override, parts=("unknown key data.batch_siz; did you mean data.batch_size?",))


@pytest.mark.parametrize(
    ("group", "text", "message"),
    [
        ("experiment", "sed: 4", "experiment/mine.yaml: unknown key sed; did you mean seed?"),
        ("experiment", "data: {batch_siz: 4}", "did you mean data.batch_size?"),
        ("experiment", "finetune: {phases: {head: {epoch: 4}}}", "finetune.phases.head.epoch"),
        ("experiment", "seed: abc", "experiment/mine.yaml: seed: value 'abc'"),
        ("experiment", "seed: -1", "seed must be in [0, "),
        ("experiment", "seed: [", 'mine.yaml", line 2'),
        (
            "experiment",
            "defaults: [{override /model: resnet19}]",
            "no preset model=resnet19; did you mean model=resnet18?",
        ),
        ("augment", "hflipp: 1", "augment/mine.yaml: unknown key augment.hflipp; did you mean"),
        ("finetune", "phases: {a: {epochs: 0}}", "finetune.phases.a.epochs must be at least 1"),
    ],
)
def test_a_wrong_config_file_of_the_user(refused, group, text, message):
    folder = Path("mine") / group
    folder.mkdir(parents=True)
    head = "# @package _global_\n" if group == "experiment" else ""
    (folder / "mine.yaml").write_text(head + text)
    refused("--config-dir=mine", f"{group}=mine", parts=(message,))


def test_all_problems_come_at_once(refused):
    text = refused(
        "sed=1", "seed=-1", "data.batch_size=0", "model=resnet19", "finetune.epochs=many"
    )
    for part in (
        "unknown key sed",
        "seed must be in [0, ",
        "data.batch_size must be at least 1, got 0",
        "no preset model=resnet19; did you mean model=resnet18?",
        "finetune.epochs must be a whole number or null, got 'many'",
    ):
        assert part in text
    assert "is required" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.root="], "data.root is required"),
        (["trainer=null"], "no preset trainer=null; there are cpu, ddp, default, fsdp, gpu"),
        (["seed=1,2"], "seed=1,2 has several values: they need -m"),
        (["seed=${nowhere}"], "seed: Interpolation key 'nowhere' not found"),
        (["--config-dir=nowhere"], "nowhere' not found"),
        (["-m", "data.root=a,b", "sed=1"], "unknown key sed"),
        (["data.root"], "cannot read 'data.root': write key=value"),
        (["finetune.phases.head=null"], "finetune.phases.head"),
        (["+trainer.max_epocs=3"], "argument 'max_epocs'; did you mean max_epochs?"),
        (["trainer.accelerator=qpu"], "accelerator='qpu'"),
        (["trainer.devices=0"], "trainer: pytorch_lightning.Trainer refuses its arguments"),
        (
            [f"+callbacks.x._target_={LIGHTNING}.callbacks.Nope"],
            "callbacks.x._target_: there is no",
        ),
        ([f"+callbacks.x._target_={LIGHTNING}.callbacks.EarlyStopping"], "'monitor'"),
        (["+callbacks.x._target_=os.system"], "must name pytorch_lightning.* or tl.*, got os.sys"),
        ([f"+logger.x._target_={LIGHTNING}.loggers.Nope"], "logger.x._target_: there is no"),
    ],
)
def test_wrong_arguments(refused, arguments, message):
    text = refused(*arguments, parts=(message,))
    assert text.count("ConfigError") == 1
    assert ("data.root is required" in text) == ("data.root is required" in message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(refused):
    refused("trainer=gpu", parts=("ConfigError: trainer: ", "gpu"))


@pytest.mark.parametrize("uri", ["sqlite:////dev/null/mlflow.db", "ftp://127.0.0.1:9", "folder"])
def test_a_store_that_can_never_work(refused, uri):
    parts = ("StoreError: the MLflow store", "tracking.enabled=false")
    refused(f"tracking.uri={uri}", "output_dir=out", parts=parts, untracked=False)


# --- images -------------------------------------------------------------------------------------


@pytest.fixture
def bad_data(tl) -> Callable[..., str]:
    """Train on a wrong folder; nothing may be written."""

    def call(root: Path, *parts: str) -> str:
        done = tl("train", f"data.root={root}", *UNTRACKED, "output_dir=out")
        done.refused("DataError: ", *parts)
        assert not Path("out").exists()
        return done.err

    return call


def test_a_folder_that_is_missing_with_the_nearest_name(bad_data, image_folder):
    root = image_folder(Path("photos").absolute())
    bad_data(root.with_name("photo"), "there is no folder", "did you mean photos?")


def test_a_folder_that_is_empty_or_has_no_images(bad_data):
    Path("empty").mkdir()
    bad_data(Path("empty"), "is empty: put the images into <class>/*")
    Path("empty/train/a").mkdir(parents=True)
    bad_data(Path("empty"), "has folders, but no images in them")
    Path("file").write_text("")
    bad_data(Path("file"), "is a file, not a folder")


def test_one_class_only(bad_data, image_folder):
    bad_data(image_folder(classes=("red",)), "has only one class, red")


def test_a_class_that_misses_in_val(bad_data, image_folder):
    root = image_folder()
    shutil.rmtree(root / "val/red")
    bad_data(root, "val has no readable image of the class red")


def test_a_class_that_misses_in_train(bad_data, image_folder):
    root = image_folder()
    shutil.rmtree(root / "train/red")
    bad_data(root, "val/red is a class that train does not have")


def test_unreadable_images_are_named_all_at_once(bad_data, image_folder):
    root = image_folder()
    whole = (root / "train/red/00.png").read_bytes()
    (root / "train/red/00.png").write_bytes(whole[: len(whole) // 2])
    (root / "train/red/01.png").write_bytes(b"")
    (root / "val/red/02.jpg").write_text("<html>not found</html>")
    Image.open(root / "train/red/02.png").save(root / "train/red/whole.jpg")
    jpeg = (root / "train/red/whole.jpg").read_bytes()
    (root / "train/red/03.jpg").write_bytes(jpeg[: len(jpeg) - 200])
    bad_data(
        root,
        "4 of 30 images cannot be read:",
        "train/red/00.png: truncated",
        "train/red/01.png: 0 bytes",
        "train/red/03.jpg: truncated",
        "val/red/02.jpg: a web page (HTML)",
        "data.bad_images=skip",
    )


def test_unreadable_images_are_left_out_when_told_and_listed(tl, image_folder):
    root = image_folder()
    (root / "train/red/01.png").write_bytes(b"")
    settings = [*UNTRACKED, "data.bad_images=skip", "output_dir=out"]
    done = tl("train", f"data.root={root}", *settings)
    assert done.code == 0, done.err
    assert "17 train, 9 val images" in done.out
    assert "train/red/01.png: 0 bytes" in done.out
    assert "train/red/01.png" in Path("out/quarantined.csv").read_text()


def odd_images() -> dict[str, bytes]:
    """File name -> contents of good images in modes that a network does not take as they are."""
    rng = np.random.default_rng(1)
    rgb = Image.fromarray(rng.integers(0, 255, (36, 44, 3), dtype=np.uint8))
    frames = [rgb, rgb.rotate(90), rgb.rotate(180)]
    deep = Image.fromarray(rng.integers(0, 65535, (36, 44), dtype=np.uint16))
    lying = Image.Exif()
    lying[0x0112] = 6
    made: dict[str, bytes] = {}

    def add(name: str, image: Image.Image, **options: object) -> None:
        stream = io.BytesIO()
        image.save(stream, {"jpg": "JPEG"}.get(name.split(".")[1]) or name.split(".")[1], **options)
        made[name] = stream.getvalue()

    add("cmyk.jpg", rgb.convert("CMYK"))
    add("deep.png", deep)
    add("deep.tiff", deep)
    add("grey.png", rgb.convert("L"))
    add("black_white.png", rgb.convert("1"))
    add("palette.png", rgb.quantize(16))
    add("palette_clear.png", rgb.quantize(16), transparency=3)
    add("rgba.png", rgb.convert("RGBA"))
    add("grey_alpha.png", rgb.convert("LA"))
    add("animated.gif", frames[0], save_all=True, append_images=frames[1:])
    add("animated.webp", frames[0], save_all=True, append_images=frames[1:])
    add("animated.png", frames[0], save_all=True, append_images=frames[1:])
    add("lying.jpg", rgb, exif=lying)
    add("upper.bmp", rgb)
    return made


def test_images_of_every_mode_train_fine(tl, image_folder):
    root = image_folder()
    images = odd_images()
    for split in ("train", "val"):
        for i, (name, content) in enumerate(images.items()):
            (root / split / NAMES[i % 3] / name).write_bytes(content)
    (root / "train/red/upper.BMP").write_bytes(images["upper.bmp"])
    done = tl("train", f"data.root={root}", *UNTRACKED, "output_dir=out")
    assert done.code == 0, done.err
    assert "33 train, 23 val images in 3 classes" in done.out
    assert done.err == ""
    history = (Path("out") / "history.csv").read_text()
    assert "nan" not in history


# --- where to write -----------------------------------------------------------------------------


def test_an_output_folder_that_cannot_be_made(tl, image_folder):
    Path("file").write_text("not a folder")
    root = image_folder()
    done = tl("train", f"data.root={root}", *TINY, "output_dir=file/run")
    done.refused("RunError: cannot make", "file/run", "output_dir=")
    assert Path("file").read_text() == "not a folder"
    tl("demo", "output_dir=file/run").refused("RunError: cannot make")


def test_a_place_where_no_bundle_can_be(tl, run):
    Path("file").touch()
    Path("photos").mkdir()
    Path("photos/1.png").touch()
    for place, message in (
        ("file/bundle", "file/bundle cannot be written"),
        ("file", "is a file; choose another place"),
        ("photos", "holds other files than a bundle"),
    ):
        tl("export", f"run={run}", f"output_dir={place}").refused("BundlePlaceError: ", message)
    assert files(Path("photos")) == {"1.png"}


def test_an_output_folder_that_holds_a_run(tl, image_folder):
    Path("run").mkdir()
    Path("run/config.yaml").write_text("precious")
    done = tl("train", f"data.root={image_folder()}", *UNTRACKED, "output_dir=run")
    done.refused("holds a run already", "resume=")
    assert files(Path("run")) == {"config.yaml"}
    assert Path("run/config.yaml").read_text() == "precious"


# --- weights and models -------------------------------------------------------------------------


def state(name: str, classes: int) -> dict[str, torch.Tensor]:
    import timm

    return timm.create_model(name, num_classes=classes).state_dict()


def test_weights_of_another_architecture_name_the_keys(refused):
    torch.save(state("test_vit", 10), "vit.pth")
    refused(
        "model.weights=vit.pth",
        "output_dir=out",
        parts=(
            "is of another architecture than the model:",
            "the model needs, the file lacks: conv1",
            "the file has, the model lacks: cls_token",
        ),
    )


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("run_by_pickle"),)


def test_pickled_code_is_refused_and_not_run(refused):
    torch.save({"weight": Malice()}, "evil.pth")
    Path("evil.bin").write_bytes(pickle.dumps(Malice()))
    for name in ("evil.pth", "evil.bin"):
        refused(f"model.weights={name}", parts=("holds pickled code", "refused", ".safetensors"))
    assert not Path("run_by_pickle").exists()
    torch.load("evil.pth", weights_only=False)
    assert Path("run_by_pickle").exists(), "the file would have done it"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("junk.safetensors", b"abc" * 100, "cannot be read as weights"),
        ("empty.pth", b"", "cannot be read as weights: 0 bytes"),
        ("list.pth", [1, 2], "cannot be read as weights"),
        ("numbers.pth", {"a": 1}, "holds no tensors by name"),
    ],
)
def test_files_that_are_no_weights(refused, name, content, message):
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    else:
        torch.save(content, name)
    refused(f"model.weights={name}", parts=(message, name))


def test_weights_that_are_missing(refused):
    refused("model.weights=nothing.pth", parts=("there is no file", "nothing.pth"))
    Path("folder").mkdir()
    refused("model.weights=folder", parts=("holds no test_resnet", "it has no weights"))


def test_a_head_of_another_size_is_replaced_and_said(tl, image_folder):
    torch.save(state("test_resnet", 17), "w.pth")
    settings = [*UNTRACKED, "model.weights=w.pth", "output_dir=out"]
    done = tl("train", f"data.root={image_folder()}", *settings)
    assert done.code == 0, done.err
    assert "the file's head has 17 outputs; a new head with 3 outputs starts from zero" in done.out
    model = json.loads(Path("out/checkpoints/model.json").read_text())
    assert model["weights"]["source"] == "w.pth"


def test_a_hub_out_of_reach_is_one_line_and_fast(refused, monkeypatch):
    from huggingface_hub import constants

    for variable in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    text = refused(
        "model.weights=hub",
        parts=("from the hub", "model.weights=path.safetensors", "HF_HOME", "model.weights=none"),
    )
    assert len(text.strip().splitlines()) == 1
    refused("model.name=hf-hub:nobody/nothing", parts=("hf-hub:nobody/nothing",))
    assert time.monotonic() - began < 20


def test_a_model_that_does_not_exist_with_the_nearest_names(refused):
    refused("model.name=resnet8", parts=("timm has no model resnet8; nearest: resnet18",))
    refused("model.name=resnet18.nope", parts=("resnet18 has no weights nope; there are a1_in1k",))
    refused("model.name=local-dir:nowhere", parts=("local-dir:nowhere",))
    refused("model=resnet81", parts=("did you mean model=resnet18?", "model.name=resnet81"))


# --- resume -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory, request) -> Path:
    """A finished run, to be copied and broken."""
    place = tmp_path_factory.mktemp("finished")
    rng = np.random.default_rng(0)
    for split, number in {"train": 4, "val": 2}.items():
        for label in ("a", "b"):
            folder = place / "data" / split / label
            folder.mkdir(parents=True)
            for n in range(number):
                pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    done = script(
        "train",
        f"data.root={place / 'data'}",
        *UNTRACKED,
        f"output_dir={place / 'run'}",
        TL_CACHE_DIR=str(place / "cache"),
    )
    assert done.code == 0, done.err
    return place / "run"


@pytest.fixture
def run(finished) -> Path:
    return Path(shutil.copytree(finished, Path("run").absolute()))


def test_resuming_what_is_no_run(tl):
    tl("train", "resume=nothing").refused("RunError: nothing is no run: it has no config.yaml")
    Path("folder").mkdir()
    tl("train", "resume=folder").refused("RunError: folder is no run")
    assert not files(Path("folder"))


def test_resuming_with_other_settings_names_each(tl, run):
    before = {f: (run / f).stat().st_mtime_ns for f in files(run)}
    done = tl("train", f"resume={run}", "seed=3", "data.batch_size=4", "finetune.epochs=1")
    done.refused(
        "resume: seed was 0 when the run began, and is 3 now",
        "resume: data.batch_size was 8 when the run began, and is 4 now",
        "A resumed run goes on as it began",
    )
    assert "finetune.epochs" not in done.err, "the same value as before is no change"
    assert {f: (run / f).stat().st_mtime_ns for f in files(run)} == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: [", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"- 1", "does not fit this version of tl"),
        (b"", "data.root is required"),
        (b"sed: 1", "unknown key sed; "),
    ],
)
@pytest.mark.parametrize("command", [("train", "resume"), ("export", "run")])
def test_a_run_with_a_corrupted_config(tl, run, content, message, command):
    (run / "config.yaml").write_bytes(content)
    pipeline, key = command
    tl(pipeline, f"{key}={run}").refused("RunError: ", "config.yaml", message)


@pytest.mark.parametrize(
    "file",
    ["checkpoints/progress.json", "checkpoints/2-all/best.ckpt", "checkpoints/1-head/last.ckpt"],
)
def test_a_run_with_a_corrupted_checkpoint(tl, run, file):
    if file.endswith("last.ckpt"):  # as after a kill in the first phase
        (run / "checkpoints/progress.json").unlink()
    (run / file).write_bytes(b"{")
    tl("train", f"resume={run}").refused("TrainingError: ", file, "cannot be read", code=1)


def test_a_run_whose_data_is_gone(tl, run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("/data\n", "/moved\n"))
    tl("train", f"resume={run}").refused("DataError: ", "moved")


# --- bundles ------------------------------------------------------------------------------------


def test_what_is_no_bundle(tl, run, image_folder):
    image_folder(Path("photos"))
    tl("predict", "bundle=nothing", "source=photos").refused("nothing is no bundle")
    tl("predict", "bundle=photos", "source=photos").refused("lacks model.onnx, classes.txt")
    tl("evaluate", f"bundle={run}", "data.root=photos").refused("is no bundle")
    tl("predict").refused("bundle is required", "source is required")
    tl("predict", "bundle=b", "source=s", "top_k=0", "outpt=x").refused(
        "top_k must", "did you mean output?"
    )
    assert files(Path()) == files(Path("photos")) or not Path("runs").exists()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """A sealed bundle of an untrained network with three classes."""
    from tl.config import ModelConfig
    from tl.export import ModelCard, write_bundle
    from tl.models import build_model

    place = tmp_path_factory.mktemp("bundle")
    Image.new("RGB", (32, 32), "red").save(place / "golden.png")
    built = build_model(ModelConfig(name="test_resnet", weights="none", image_size=32), 3)
    card = ModelCard(
        title="t", data={}, backbone="test_resnet", weights="none", weights_sha256="0" * 64,
        licence="none", method="none", plan="", metrics={}, seed=0, created="now", versions={},
    )  # fmt: skip
    write_bundle(
        place / "bundle",
        model=built.model.eval(),
        classes=["blue", "green", "red"],
        preprocessing=built.preprocessing,
        golden=[place / "golden.png"],
        card=card,
    )
    return place / "bundle"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=nothing"], "source: no file, folder or pattern with images: nothing"),
        (["source=empty"], "source: no images in the folder empty"),
        (["source=photos", "output=p.txt"], "must end in .parquet, .csv, .json"),
        (["source=photos", "output=file/p.csv"], "output: cannot make file"),
        (["source=photos", "output=empty.csv"], "output: cannot write empty.csv: Is a directory"),
        (["source=bad.png"], "bad.png: not an image"),
    ],
)
def test_wrong_sources_and_outputs_of_predict(tl, bundle, image_folder, arguments, message):
    image_folder(Path("photos"))
    Path("empty").mkdir()
    Path("empty.csv").mkdir()
    Path("file").touch()
    Path("bad.png").write_text("text")
    before = files(Path())
    tl("predict", f"bundle={bundle}", *arguments).refused(message)
    assert files(Path()) == before


def test_evaluating_on_classes_that_the_model_does_not_have(tl, bundle, image_folder):
    root = image_folder(splits={"": 1}, classes=("gren", "red"))
    done = tl("evaluate", f"bundle={bundle}", f"data.root={root}", "output_dir=out")
    done.refused("gren is a class that the model does not have; did you mean green?")
    assert not Path("out").exists()
    good = image_folder(Path("good"), splits={"": 1}, classes=("green", "red"))
    done = tl("evaluate", f"bundle={bundle}", f"data.root={good}", "split=test", "output_dir=out")
    done.refused("has no test images")
    Path("file").touch()
    done = tl("evaluate", f"bundle={bundle}", f"data.root={good}", "output_dir=file/out")
    done.refused("RunError: cannot make")


def test_a_damaged_bundle(tl, bundle, image_folder):
    image_folder(Path("photos"))
    for name, content, message in (
        ("model.onnx", b"x", "model.onnx cannot be read"),
        ("classes.txt", b"a\n", "model.onnx knows 3 classes"),
        ("preprocessing.json", b"{", "preprocessing.json"),
    ):
        broken = Path(shutil.copytree(bundle, f"broken_{name}"))
        (broken / name).write_bytes(content)
        tl("predict", f"bundle={broken}", "source=photos", "output=p.csv").refused(message)
    assert not Path("p.csv").exists()


# --- bad luck -----------------------------------------------------------------------------------


@contextmanager
def small_disk(path: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A disk of so many kilobytes; yields a function that gives it another size."""
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")

    def resize(now: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={now}k", str(path)], check=True)

    try:
        yield resize
    finally:
        # Lazily: MLflow keeps its connection to a database there open.
        subprocess.run(["umount", "--lazy", str(path)], check=True)


# Checkpoints hold what trains: some kB in the phase of the head; in that of all weights 6.1 MB for
# last.ckpt (weights, two moments, the best weights) and 1.5 MB each for best.ckpt and the model.
@pytest.mark.skipif(not shutil.which("mount"), reason="no mount command")
@pytest.mark.parametrize(
    ("kilobytes", "good", "message"),
    [
        (3300, {"1-head/last.ckpt", "1-head/best.ckpt"}, "2-all/last.ckpt"),
        (6800, {"1-head/best.ckpt", "2-all/last.ckpt"}, "2-all/best.ckpt"),
        (8300, {"1-head/best.ckpt", "2-all/last.ckpt", "2-all/best.ckpt"}, "model.safetensors"),
    ],
)
def test_a_full_disk_leaves_the_last_good_checkpoint(tl, image_folder, kilobytes, good, message):
    settings = [*UNTRACKED, "finetune.epochs=1"]
    root = image_folder()
    with small_disk(Path("disk"), kilobytes) as resize:
        done = tl("train", f"data.root={root}", *settings, "output_dir=disk/run")
        done.refused("cannot write", message, "space", code=1)
        assert "resume=" in done.err
        found = files(Path("disk/run/checkpoints"))
        assert good <= found
        assert not [f for f in found if f.endswith(".part")]
        for name in found:
            if name.endswith(".ckpt"):
                torch.load(f"disk/run/checkpoints/{name}", weights_only=True)
        resize(60_000)
        again = tl("train", "resume=disk/run")
        assert again.code == 0, again.err
        ours = json.loads(Path("disk/run/metrics.json").read_text())
    assert tl("train", f"data.root={root}", *settings, "output_dir=whole").code == 0
    theirs = json.loads(Path("whole/metrics.json").read_text())
    assert {k: v for k, v in ours.items() if "seconds" not in k} == {
        k: v for k, v in theirs.items() if "seconds" not in k
    }


def test_a_file_size_limit_is_said_too(image_folder):
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    root = image_folder()
    done = script("train", f"data.root={root}", *UNTRACKED, "output_dir=run", preexec=limit)
    done.refused("cannot write the checkpoint", "File too large", code=1)
    assert not [f for f in files(Path("run")) if f.endswith(".part")]


def test_a_loss_that_is_not_finite(tl, image_folder):
    settings = [*UNTRACKED, "finetune=full", "finetune.head_lr=100", "finetune.lr_ratio=1"]
    broken = {
        k: v * float("nan") for k, v in state("test_resnet", 3).items() if v.is_floating_point()
    }
    torch.save(state("test_resnet", 3) | broken, "nan.pth")
    done = tl(
        "train", f"data.root={image_folder()}", *settings, "model.weights=nan.pth", "output_dir=out"
    )
    done.refused("TrainingError: ", "not finite", "finetune.head_lr", code=1)


@pytest.mark.skipif(not shutil.which("mount"), reason="no mount command")
def test_a_full_store_is_said_in_lines_and_gets_all_when_it_has_space(tl, image_folder, caplog):
    root = image_folder()
    with small_disk(Path("disk"), 1000) as resize:
        store = f"tracking.uri=sqlite:///{Path('disk/mlflow.db').absolute()}"
        done = tl("train", f"data.root={root}", *TINY, store, "output_dir=run")
        assert done.code == 0, done.err  # the job itself needs no store
        assert "(database or disk is full); the job goes on" in caplog.text
        assert f"tl sync {Path('run').absolute()}" in caplog.text
        resize(60_000)
        again = tl("sync", "run")
        assert again.code == 0, again.out
        assert json.loads(Path("run/run.json").read_text())["status"] == "FINISHED"
