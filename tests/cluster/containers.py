"""Images built and run without a Docker engine, on a base image that debootstrap makes.

    with engine(folder) as e:
        e.base("localhost/python:test")
        e.build("localhost/tl:test", BASE="localhost/python:test")
        e.run("localhost/tl:test", "--version")

buildah builds without namespaces, podman runs with runc; both are Debian's. Debian's mirror, pip's
indexes and certificates are those of this machine, as apt and pip have them configured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

REPO = Path(__file__).parents[2]
PROGRAMS = ("buildah", "podman", "runc", "debootstrap")
NEEDED_GB = 25
BUILD_SECONDS = 2400  # a busy machine with two cores; five minutes on an idle one
CA = "/run/secrets/ca.crt"
BASE = """\
FROM scratch
ADD base.tar /
RUN ln -sf /usr/bin/python3 /usr/local/bin/python && rm -f /usr/lib/python3*/EXTERNALLY-MANAGED
"""


def missing(folder: Path) -> str:
    """Why no image can be built here; empty: nothing."""
    if os.geteuid() != 0:
        return "images are built and run as root here"
    if lacking := [p for p in PROGRAMS if not shutil.which(p)]:
        return f"{', '.join(lacking)} missing: tests/cluster/install.sh installs them"
    free = shutil.disk_usage(folder).free / 1e9
    return f"{free:.0f} GB free for {NEEDED_GB} GB" if free < NEEDED_GB else ""


@dataclass(frozen=True)
class Done:
    """What a container left behind."""

    code: int
    out: str


@dataclass(frozen=True)
class Engine:
    """Builds and runs images; everything it makes is in its folder."""

    folder: Path

    @property
    def store(self) -> list[str]:
        """Where images and containers are."""
        places = ["--root", str(self.folder / "storage"), "--runroot", str(self.folder / "run")]
        return [*places, "--storage-driver", "overlay"]

    # --- build ----------------------------------------------------------------------------------

    def base(self, name: str) -> None:
        """Make a small Debian with Python; once a folder."""
        place = self.folder / "base"
        if not (place / "base.tar").exists():
            root = self.folder / "rootfs"
            mirror, release = debian()
            packages = "python3,python3-venv,python3-pip,ca-certificates"
            command = ["debootstrap", "--variant=minbase", f"--include={packages}"]
            _checked([*command, release, str(root), mirror])
            place.mkdir(exist_ok=True)
            (place / "Dockerfile").write_text(BASE)
            _checked(["tar", "-C", str(root), "-cf", str(place / "base.tar"), "."])
            shutil.rmtree(root)
        _checked(["buildah", *self.store, "bud", *LAYERS, "-t", name, str(place)])

    def build(
        self, name: str, *options: str, folders: Sequence[Path] = (), **arguments: str
    ) -> Done:
        """Build the Dockerfile of this repository, with the lines of `docs/containers.md`.

        Args:
            name: Of the image.
            options: Of the engine.
            folders: Of this machine that the build may read.
            arguments: Those of the build.
        """
        pip = self.folder / "pip.conf"
        text, local, certificates = pip_settings()
        pip.write_text(text)
        secrets = ["--secret", f"id=pip,src={pip}"]
        if certificates:
            secrets += ["--secret", f"id=ca,src={certificates}"]
        mounts = [f"--volume={f}:{f}:ro" for f in (*local, *folders)]
        given = [f"--build-arg={key}={value}" for key, value in arguments.items()]
        command = ["buildah", *self.store, "bud", *LAYERS, *secrets, *mounts, *given, *options]
        return _done([*command, "-t", name, str(REPO)], BUILD_SECONDS)

    # --- run ------------------------------------------------------------------------------------

    def run(self, image: str, *arguments: object, options: Sequence[str] = ()) -> Done:
        """Run a container to its end, without a network."""
        return self.podman("run", "--rm", *RUN, *options, image, *arguments)

    def start(self, image: str, *arguments: object, options: Sequence[str] = ()) -> str:
        """Start a container; returns its id."""
        done = self.podman("run", "-d", *RUN, *options, image, *arguments)
        assert done.code == 0, done.out
        return done.out.split()[-1]

    def podman(self, *arguments: object) -> Done:
        """Call podman."""
        return _done(["podman", *self.store, "--runtime", "runc", *map(str, arguments)], 900)


LAYERS = ("--layers", "--isolation", "chroot", "--pull-never")
# Without a process limit podman asks for more than a container may have that runs in another one.
RUN = ("--ulimit", "nofile=4096:4096", "--ulimit", "nproc=4096:4096", "--network=none")


@contextlib.contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    """An engine whose containers end with it, and whose images stay as long as the folder."""
    found = Engine(folder)
    try:
        yield found
    finally:
        found.podman("rm", "--all", "--force", "--time", "5")
        # Which the programs leave mounted, and which nobody could delete then.
        subprocess.run(["umount", "--recursive", folder / "storage/overlay"], capture_output=True)


def debian() -> tuple[str, str]:
    """This machine's mirror of Debian and its release, as apt has them."""
    release = Path("/etc/os-release").read_text(encoding="utf-8")
    name = release.partition("VERSION_CODENAME=")[2].split()[0].strip('"')
    form = "$(CODENAME) $(COMPONENT) $(REPO_URI)"
    command = ["apt-get", "indextargets", "--format", form, "Created-By: Packages"]
    lines = [line.split() for line in _checked(command).splitlines()]
    return next(uri for code, part, uri in lines if (code, part) == (name, "main")), name


def pip_settings() -> tuple[str, list[Path], str]:
    """A pip.conf with this machine's settings, the folders that it names, and its certificates."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    values: dict[str, list[str]] = {}
    for line in _checked(command).splitlines():
        key, _, value = line.partition("=")
        name = key.rpartition(".")[2]
        if name in {"index-url", "extra-index-url", "find-links", "trusted-host", "cert"}:
            values.setdefault(name, []).extend(value.strip("'\"").replace("\\n", " ").split())
    certificates = next(iter(values.pop("cert", [])), "")
    lines = [f"{name} = {' '.join(dict.fromkeys(found))}" for name, found in values.items()]
    if certificates:
        lines.append(f"cert = {CA}")
    named = [urlparse(v) for found in values.values() for v in found]
    local = {Path(v.path) for v in named if v.scheme in {"", "file"} and Path(v.path).is_dir()}
    # An index has its files beside it.
    folders = {p.parent if p.name == "simple" else p for p in local}
    return "\n".join(["[global]", *lines, ""]), sorted(folders), certificates


def _done(command: Sequence[str], seconds: float) -> Done:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
    )
    return Done(done.returncode, done.stdout)


def _checked(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS)
    assert done.returncode == 0, f"{command[0]}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout
