"""The image, built and run: as any user, with a read-only root, stopped, within limits.

A build takes minutes and 15 GB. TL_IMAGES=FOLDER keeps its layers there for the next time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from compose import composed
from containers import REPO, Engine, engine, missing

pytestmark = pytest.mark.cluster

BASE = "localhost/tl-tests/python:3.11"
IMAGE = "localhost/tl-tests/tl:cuda"
USER = "4242:4343"  # nobody whom the image knows
VALUES = ("DATABASE_PASSWORD", "STORE_KEY", "STORE_SECRET", "ADMIN_PASSWORD", "FORM_SECRET")
# A job that would take minutes, on images of the demo.
LONG = [
    *("train", "data.root=/data", "model=test_resnet", "model.weights=none", "finetune=full"),
    *("finetune.epochs=40", "finetune.patience=0", "cache=off", "trainer=cpu"),
    "output_dir=/output/run",
]


@pytest.fixture(scope="module")
def images() -> Iterator[Engine]:
    kept = os.environ.get("TL_IMAGES")
    folder = Path(kept or tempfile.mkdtemp(prefix="tl-images-", dir="/var/tmp"))
    try:
        if why := missing(folder):
            pytest.skip(why)
        with engine(folder) as found:
            yield found
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def base(images: Engine) -> str:
    images.base(BASE)
    return BASE


@pytest.fixture(scope="module")
def image(images: Engine, base: str) -> str:
    built = images.build(IMAGE, BASE=base, VERSION="1.2.3", REVISION="abc")
    assert built.code == 0, built.out[-4000:]
    return IMAGE


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images a class of the digits 5 to 9, as the demo makes them."""
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    folder.chmod(0o755)
    pixels, labels = load_digits(return_X_y=True)
    for label in range(5, 10):
        place = folder / str(label)
        place.mkdir()
        for i, row in enumerate(pixels[labels == label][:20]):
            picture = Image.fromarray((row.reshape(8, 8) * 15).astype("uint8")).resize((32, 32))
            picture.save(place / f"{i}.png")
    return folder


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A folder that the user of the container may write to."""
    folder = tmp_path / "output"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    return folder


def locked(output: Path, *volumes: str) -> list[str]:
    """The options of compose.yaml's job: nothing but its volumes can be written to."""
    job = composed(dict.fromkeys(VALUES, "x"))["services"]["train"]
    assert job["read_only"] is True
    options = ["--read-only", "--user", USER, "--shm-size", job["shm_size"].replace("gb", "g")]
    options += [f"--cap-drop={c}" for c in job["cap_drop"]]
    options += [f"--security-opt={o.partition(':')[0]}" for o in job["security_opt"]]
    options += [f"--tmpfs={t}" for t in job["tmpfs"]]
    mounts = (f"{output}:/output", *volumes)
    return [*options, *(part for mount in mounts for part in ("-v", mount))]


def until(images: Engine, container: str, text: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while text not in (said := images.podman("logs", container).out):
        assert time.monotonic() < deadline, said
        time.sleep(0.3)


def test_the_demo_runs_as_any_user_and_writes_to_its_volumes_alone(images, image, output):
    done = images.run(image, "demo", "output_dir=/output/demo", options=locked(output))
    assert done.code == 0, done.out[-3000:]
    assert re.search(r"linear_probe +0\.[6-9]", done.out)
    assert "says /output/demo/linear_probe/bundle" in done.out
    assert (output / "demo/lp_ft/bundle/model.onnx").is_file()
    assert {f.stat().st_uid for f in output.rglob("*")} == {int(USER.partition(":")[0])}
    options = [*locked(output), "--entrypoint", "touch"]
    assert "Read-only file system" in images.run(image, "/opt/tl/x", options=options).out
    assert images.run(image, "/cache/x", options=options).code == 0


def test_a_stopped_job_writes_a_checkpoint_and_the_same_command_goes_on(
    images, image, digits, output
):
    options = [*locked(output, f"{digits}:/data:ro"), "-e", "TL_JOB_ID=one"]
    first = images.start(image, *LONG, options=options)
    until(images, first, "all   2/40")
    began = time.monotonic()
    images.podman("stop", "--time", "60", first)
    assert time.monotonic() - began < 50, "it was killed"
    assert images.podman("wait", first).out.strip() == "130"
    said = images.podman("logs", first).out
    assert "interrupted; continue with: tl train resume=/output/run" in said
    assert json.loads((output / "run/run.json").read_text())["status"] == "KILLED"
    again = images.run(image, *LONG, options=options)
    assert again.code == 0, again.out[-3000:]
    assert "all   1/40" not in again.out
    assert "all  40/40" in again.out
    assert json.loads((output / "run/run.json").read_text())["status"] == "FINISHED"
    other = images.run(image, *LONG, options=[*options, "-e", "TL_JOB_ID=two"])
    assert other.code == 2
    assert "/output/run holds a run already" in other.out


def test_a_stop_is_heard_from_the_first_moment(images, image, digits, output):
    """As process 1, Python would not hear it while it imports."""
    container = images.start(image, *LONG, options=locked(output, f"{digits}:/data:ro"))
    began = time.monotonic()
    images.podman("stop", "--time", "60", container)
    assert time.monotonic() - began < 30
    assert images.podman("wait", container).out.strip() in {"130", "143"}


def test_images_that_the_user_may_not_read_are_refused(images, image, output, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o700)
    done = images.run(image, *LONG, options=locked(output, f"{folder}:/data:ro"))
    assert done.code == 2
    assert "data.root: user 4242 may not read /data" in done.out
    assert "Traceback" not in done.out


def test_limits_of_the_container_are_seen(images, image, output):
    code = (
        "from tl.cores import *; import torch; keep_to_share();"
        "print(usable_cores(), memory_limit(), torch.get_num_threads())"
    )
    options = [*locked(output), "--cpus", "1", "--memory", "2g", "--entrypoint", "python"]
    done = images.run(image, "-c", code, options=options)
    assert done.out.split() == ["1", str(2 * 1024**3), "1"], done.out


def test_a_batch_runs_in_processes_of_its_own(images, image, digits, output):
    batch = [w for w in LONG if "epochs" not in w and "output" not in w]
    batch += ["-m", "seed=1,2", "finetune.epochs=1", "hydra/launcher=local"]
    options = locked(output, f"{digits}:/data:ro")
    done = images.run(image, *batch, "output_dir=/output/batch", options=options)
    assert done.code == 0, done.out[-3000:]
    assert (output / "batch/0/metrics.json").is_file()
    assert (output / "batch/1/metrics.json").is_file()
    assert (
        len({json.loads((output / f"batch/{i}/run.json").read_text())["run_id"] for i in (0, 1)})
        == 2
    )


def test_the_list_of_its_packages_is_in_the_image(images, image, output):
    done = images.run(image, "/opt/tl/sbom.cdx.json", options=["--entrypoint", "cat"])
    found = json.loads(done.out)
    assert found["bomFormat"] == "CycloneDX"
    assert found["metadata"]["component"]["name"] == "tl"
    listed = {(c["name"].lower().replace("_", "-"), c.get("version")) for c in found["components"]}
    versions = (REPO / "constraints.txt").read_text().splitlines()
    wanted = {tuple(v.split("==")) for v in versions if re.match("(torch|timm|submitit|s3fs)==", v)}
    assert len(wanted) == 4
    assert wanted <= listed


def test_its_labels_say_what_it_is(images, image):
    form = "{{json .Labels}}"
    labels = json.loads(images.podman("image", "inspect", "--format", form, image).out)
    assert labels["org.opencontainers.image.version"] == "1.2.3"
    assert labels["org.opencontainers.image.revision"] == "abc"
    assert labels["tl.variant"] == "cuda"


# --- the variant without CUDA ---------------------------------------------------------------------


def wheel(folder: Path, name: str, version: str) -> None:
    """A package of a name and a version alone, in the place of what only torch's index has."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")


def test_the_cpu_variant_takes_builds_without_cuda_from_the_index_that_is_named(
    images, base, tmp_path
):
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pair = dict(v.split("==") for v in lines if re.match("torch(vision)?==", v))
    for name, version in pair.items():
        folder = tmp_path / "index" / name
        folder.mkdir(parents=True)
        wheel(folder, name, f"{version}+cpu")
        (folder / "index.html").write_text(
            "".join(f'<a href="{f.name}">{f.name}</a>' for f in folder.glob("*.whl"))
        )
    name = "localhost/tl-tests/torch:cpu"
    options = ("--target", "torch")
    index = f"file://{tmp_path}/index"
    built = images.build(
        name, *options, folders=[tmp_path], BASE=base, VARIANT="cpu", TORCH_INDEX=index
    )
    assert built.code == 0, built.out[-3000:]
    listed = images.run(name, "/opt/tl/bin/pip", "list", "--format=freeze").out.splitlines()
    assert {f"{n}=={v}+cpu" for n, v in pair.items()} <= set(listed)
    assert not [line for line in listed if re.match("nvidia|cuda|triton", line)]


def test_the_cpu_variant_without_an_index_says_what_is_missing(images, base):
    built = images.build("localhost/tl-tests/none", "--target", "torch", BASE=base, VARIANT="cpu")
    assert built.code != 0
    assert re.search(
        r"No torch==\S+\+cpu torchvision==\S+\+cpu for VARIANT=cpu: name an index", built.out
    )


def test_an_unknown_variant_is_refused(images, base):
    built = images.build("localhost/tl-tests/none", "--target", "torch", BASE=base, VARIANT="rocm")
    assert built.code != 0
    assert "is neither cpu nor cuda" in built.out  # in the step; buildah may lose the last words
    assert "exit status 2" in built.out
