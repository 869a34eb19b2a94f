"""What a batch asks Slurm for, and what is refused before there is a job; no Slurm is needed."""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import pytest
from commands import UNTRACKED, Command

from tl.batches.driving import Call
from tl.batches.engines.slurm import SlurmEngine
from tl.batches.engines.slurm_node import worker_name
from tl.batches.engines.slurm_site import Partition, chosen, megabytes, minutes, plain
from tl.batches.errors import BatchError, FullError
from tl.batches.jobs import DONE, LOST, Job, Rules
from tl.batches.ledger import Ledger
from tl.batches.worker import Task, work
from tl.config import ConfigError, compose
from tl.config.launchers import launcher_config
from tl.config.slurm import SlurmConfig

SITE = [
    Partition("cpu", default=True, up=True, minutes=60, memory_mb=8192),
    Partition("gpu", default=False, up=True, minutes=None, memory_mb=None),
    Partition("old", default=False, up=False, minutes=None, memory_mb=4096),
]


@pytest.fixture
def batch(capfd, monkeypatch, image_folder, tmp_path):
    data, place = image_folder(), tmp_path / "batch"
    command = Command(capfd, monkeypatch)

    def run(*args):
        given = [f"data.root={data}", "seed=1,2", f"output_dir={place}", *UNTRACKED]
        done = command("train", "-m", "hydra/launcher=slurm", *given, *args)
        assert not list(place.glob("[0-9]*")), "a job was begun"
        return done

    return run


# --- refused before anything is started ---------------------------------------------------------


def test_a_machine_without_slurm_is_refused(batch, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    batch().refused(
        "hydra/launcher=slurm needs Slurm, and this machine has no sbatch", "hydra/launcher=local"
    )


def test_without_submitit_the_extra_to_install_is_named(batch, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("submitit")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "tl.batches.engines.slurm", raising=False)
    monkeypatch.setitem(sys.modules, "submitit", None)
    batch().refused('hydra/launcher=slurm needs submitit: pip install "tl[slurm]"')


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("mem_gb=-1", "hydra.launcher.mem_gb must be above 0, got -1"),
        ("cpus_per_task=two", "hydra.launcher.cpus_per_task must be a whole number, got 'two'"),
        ("nodes=0", "hydra.launcher.nodes must be at least 1, got 0"),
        ("timeout_min=1", "hydra.launcher.signal_s must be below the 60 s of timeout_min=1"),
    ],
)
def test_wrong_settings_are_refused(batch, setting, words):
    batch(f"hydra.launcher.{setting}").refused(words)


def test_an_unknown_setting_is_refused(batch):
    done = batch("hydra.launcher.partitionn=gpu")
    done.refused("partitionn")


def test_unknown_settings_of_a_file_of_ones_own_are_refused_at_once():
    with pytest.raises(ConfigError) as error:
        launcher_config(SlurmConfig, {"partitions": "gpu", "mem_gb": 0})
    assert error.value.problems[0].startswith(
        "hydra.launcher.partitions is unknown; did you mean hydra.launcher.partition?"
    )


# --- what a site offers -------------------------------------------------------------------------


def test_a_job_goes_to_the_partition_that_is_named_else_to_the_default_one():
    assert [p.name for p in chosen(SlurmConfig(), SITE)] == ["cpu"]
    assert [p.name for p in chosen(SlurmConfig(partition="gpu,cpu"), SITE)] == ["gpu", "cpu"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (
            {"partition": "gpuu"},
            "hydra.launcher.partition=gpuu: the cluster has no partition gpuu; did you mean gpu? "
            "there are cpu (the default), gpu, old",
        ),
        ({"partition": "old"}, "partition old takes no jobs now"),
        (
            {"timeout_min": 90},
            "hydra.launcher.timeout_min=90: partition cpu allows at most 60 minutes",
        ),
        (
            {"mem_gb": 9},
            "hydra.launcher.mem_gb=9: the largest node of partition cpu has 8.0 GB",
        ),
    ],
)
def test_what_the_site_does_not_have_is_refused(asked, words):
    with pytest.raises(BatchError) as error:
        chosen(SlurmConfig(**asked), SITE)
    assert words in str(error.value)


def test_a_site_without_a_default_partition_wants_one_named():
    with pytest.raises(BatchError, match="no default partition; choose one of gpu"):
        chosen(SlurmConfig(), SITE[1:2])


@pytest.mark.parametrize(
    ("text", "number"),
    [("30:00", 30), ("2:00:00", 120), ("1-02:30:00", 1590), ("infinite", None), ("n/a", None)],
)
def test_time_limits_are_read(text, number):
    assert minutes(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [("1500M", 1500), ("1.50G", 1536), ("0", None), ("1T", 1 << 20), ("Mc", None)],
)
def test_memory_is_read(text, number):
    assert megabytes(text) == number


def test_complaints_are_told_without_the_program():
    assert (
        plain("sbatch: error: invalid partition: x\nallocation failure") == "invalid partition: x"
    )
    no_config = "sinfo: error: DNS SRV lookup failed\nsinfo: fatal: Could not establish a source"
    assert plain(no_config) == "Could not establish a source"
    assert plain("") == ""


def test_all_processes_of_a_job_know_its_worker_by_one_name():
    assert worker_name({"SLURM_JOB_ID": "7", "SLURM_PROCID": "1"}) == "slurm-7"
    assert worker_name({"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == "slurm-7-2"


# --- a queue that takes no more -----------------------------------------------------------------

PROGRAMS = {
    "sinfo": "echo 'main*|up|infinite|8000'",
    "squeue": "echo '1|RUNNING|0|None'",
    "scancel": "",
    "srun": "",
    # Takes one job, and then says what a site says whose users may have one.
    "sbatch": """\
[ "$1" = --test-only ] && exit
echo once >> "$(dirname "$0")/calls"
[ "$(wc -l < "$(dirname "$0")/calls")" = 1 ] && echo "Submitted batch job 1" && exit
echo "sbatch: error: AssocMaxSubmitJobLimit" >&2
exit 1""",
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    return programs


def test_a_site_that_takes_no_more_jobs_is_not_asked_all_the_time(site, tmp_path):
    engine = SlurmEngine(tmp_path / "batch")
    task = Task(tmp_path / "batch", "s", Rules(1, 0.0), "m:f", "m:g", keys=("a",))
    handle = engine.start(task)
    deadline = time.monotonic() + 10
    while engine.waits(handle):  # until it may ask the queue again
        assert engine.alive(handle)
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for _ in range(2):
        with pytest.raises(FullError, match="Slurm takes no more jobs of yours now"):
            engine.start(replace(task, keys=("b",)))
    assert (site / "calls").read_text().split() == ["once"] * 2


def test_jobs_of_another_call_in_the_queue_are_told(site, tmp_path, capsys):
    SlurmEngine(tmp_path / "my batch")
    assert capsys.readouterr().out == ""
    (site / "squeue").write_text("#!/bin/sh\necho '7|PENDING|0|Priority'\n")
    SlurmEngine(tmp_path / "my batch")
    text = " ".join(capsys.readouterr().out.split())
    assert "1 job of another call of this batch in Slurm's queue" in text
    assert "scancel --state=PENDING --name=tl-my_batch" in text


KILLED = "killed by signal 9 (SIGKILL): out of memory, or killed by hand"
NEEDED = "needed more memory than 2 GB; the next attempt asks for 4 GB"


@pytest.mark.parametrize(
    ("earlier", "errors", "memory"),
    [
        ([], [], "2048M"),
        ([], ["the loss is not finite"], "2048M"),
        ([], ["CUDA out of memory. Tried to allocate 2 GiB"], "2048M"),
        ([], [NEEDED], "4096M"),
        ([], [KILLED], "4096M"),
        ([NEEDED], [], "4096M"),  # what was learned is not forgotten
        ([KILLED], [], "2048M"),  # nobody knows what it had then
        ([], [NEEDED, NEEDED.replace("2 GB", "4 GB"), KILLED], "8000M"),  # as much as there is
    ],
)
def test_an_attempt_that_needed_more_memory_is_followed_by_one_with_twice_as_much(
    site, tmp_path, earlier, errors, memory
):
    place = tmp_path / "batch"
    ledger = Ledger(place)
    (entry,) = ledger.add([Job(0, (), compose("train", ["data.root=x", "model=test_resnet"]))])
    for error in [*earlier, *errors]:
        entry = ledger.end(ledger.begin(entry, "w", "h"), LOST, error)
    rules = Rules(9, 0.0, {entry.key: len(earlier)})
    engine = SlurmEngine(place, mem_gb=2)
    engine.start(Task(place, "s", rules, "m:f", "m:g", keys=(entry.key,)))
    assert f"#SBATCH --mem={memory}\n" in (place / "ledger/slurm/1_submission.sh").read_text()


class OneAtOnce:
    """An engine with room for one worker, which is there until the second look at it."""

    per_job = True

    def __init__(self):
        self.looks = {}
        self.refused = 0

    def start(self, task):
        if any(looks < 2 for looks in self.looks.values()):
            self.refused += 1
            raise FullError("one is there")
        work(task)
        self.looks[task.keys] = 0
        return task.keys

    def alive(self, handle):
        self.looks[handle] += 1
        return self.looks[handle] < 2

    def waits(self, handle):
        return False

    def kill(self, handle):
        """It has ended."""

    def close(self):
        """Nothing is held."""


def nothing():
    """What the jobs below need."""


def quick(settings, folder):
    """A job that is done at once."""
    return 0, ""


def test_a_batch_goes_on_when_there_is_room_again(tmp_path):
    ledger, base = Ledger(tmp_path), compose("train", ["data.root=x", "model=test_resnet"])
    jobs = [Job(n, (f"seed={n}",), replace(base, seed=n)) for n in range(3)]
    rules = Rules(1, 0.0, {entry.key: 0 for entry in ledger.add(jobs)})
    task = Task(tmp_path, "s", rules, f"{__name__}:quick", f"{__name__}:nothing")
    engine = OneAtOnce()
    views = Call(ledger, task, limit=9).run(engine)
    assert [view.state for view in views] == [DONE] * 3
    assert engine.refused >= 2
