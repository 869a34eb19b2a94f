"""Workers as jobs of Slurm, submitted by submitit: one a job of the batch."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from tl.batches.engines import slurm_site as site
from tl.batches.engines.slurm_node import run
from tl.batches.errors import EngineError, FullError
from tl.batches.jobs import Entry
from tl.batches.ledger import LEDGER, Ledger
from tl.batches.worker import Task
from tl.config.launchers import launcher_config
from tl.config.slurm import SlurmConfig
from tl.display import say

FOLDER = "slurm"
LINES = 3
PATIENCE_SECONDS = 60.0  # for a controller that does not take a job
AGAIN_SECONDS = 5.0
FULL = re.compile(r"submit limit|MaxSubmit|MaxJobs", re.IGNORECASE)
FULL_SECONDS = 30.0  # between two tries at a queue that takes no more
NO_MORE = "Slurm takes no more jobs of yours now; batch.jobs= keeps fewer in the queue"
GONE_LOOKS = 2  # that do not find a job before it counts as gone
# How Slurm's logs, and the ledger, tell that a job needed more memory than it had.
MEMORY_LOG = re.compile(r"exceeded memory limit|oom.kill", re.IGNORECASE)
NEEDED = re.compile(r"needed more memory than ([\d.]+) GB")
MAYBE = re.compile(r"SIGKILL|^(?!.*CUDA).*out of memory|MemoryError|by signal: Killed", re.I)
ENDS = {
    "TIMEOUT": "reached Slurm's time limit before its checkpoint was written (signal_s)",
    "CANCELLED": "was cancelled in Slurm",
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "had to make room for another job of Slurm",
}


@dataclass
class Handle:
    """A job of Slurm.

    Args:
        job: As submitit knows it.
        memory_gb: That it asked for; None: what the site gives.
        known: As the queue saw it last.
        looks: At the queue, when it was seen last or was put there.
        gone: Looks in a row that did not find it.
    """

    job: Any
    memory_gb: float | None
    looks: int = 0
    known: site.Queued | None = None
    gone: int = 0


class SlurmEngine:
    """Submits workers and watches the queue.

    Args:
        place: Folder of the batch; all machines of the cluster see it.
        settings: See `SlurmConfig`.

    Raises:
        ConfigError: A setting is unknown or out of its range.
        BatchError: There is no cluster, or it would refuse the jobs.
    """

    per_job = True

    def __init__(self, place: Path, **settings: Any) -> None:
        self.asked = launcher_config(SlurmConfig, settings)
        self.partitions = site.chosen(self.asked, site.partitions())
        self.place = place.absolute()
        self.name = "tl-" + re.sub(r"[^\w.-]", "_", self.place.name)
        self.queue = site.Queue(self.name)
        self._last: dict[str, Handle] = {}
        self._full_until = float("-inf")
        self.executor = _executor(self.asked, self.place / LEDGER / FOLDER)
        self.executor.update_parameters(**self._parameters(self.asked.mem_gb))
        self._check()
        self.queue.look()
        if waiting := sum(job.state in site.WAITS for job in self.queue.jobs.values()):
            say(
                f"{waiting} job{'s' * (waiting != 1)} of another call of this batch in Slurm's "
                f"queue; scancel --state=PENDING --name={self.name} takes out what that call left"
            )

    def _parameters(self, memory_gb: float | None) -> dict[str, Any]:
        """What submitit takes, for one job."""
        asked = self.asked
        limit = asked.timeout_min or site.most_minutes(self.partitions) or site.DAY_MINUTES
        minutes = limit if asked.timeout_min else min(limit, site.DAY_MINUTES)
        # SIGTERM, not submitit's SIGUSR2: a worker that is asked to end writes a checkpoint, and
        # the batch submits it again.
        signal = f"TERM@{min(asked.signal_s, minutes * 30)}"
        also = {"requeue": True, "signal": signal, **asked.options}
        also = {k.replace("_", "-"): v for k, v in also.items() if v not in (None, False)}
        return {
            "job_name": self.name,
            "partition": asked.partition,
            "account": asked.account,
            "qos": asked.qos,
            "constraint": asked.constraint,
            "time": minutes,
            "nodes": asked.nodes,
            "ntasks_per_node": asked.tasks_per_node,
            "cpus_per_task": asked.cpus_per_task,
            "gpus_per_node": asked.gpus_per_node,
            "mem": f"{round(memory_gb * 1024)}M" if memory_gb else None,
            "setup": asked.setup or None,
            "wckey": None,
            "additional_parameters": also,
            # Since 22.05 srun no longer takes the cores of a task from sbatch. The processes of a
            # job on several nodes are nothing without each other.
            "srun_args": [
                *(f"--cpus-per-task={asked.cpus_per_task}", "--kill-on-bad-exit=1"),
                *asked.srun,
            ],
        }

    def _check(self) -> None:
        """Let Slurm judge a job of this batch.

        Raises:
            BatchError: It would refuse it.
        """
        folder = self.executor.folder
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "job.sh"
        script.write_text(
            self.executor._make_submission_file_text(self.executor._submitit_command_str, "check"),
            encoding="utf-8",
        )
        site.check_request(script)

    def start(self, task: Task) -> Handle:
        """Put a worker into the queue; with more memory where an attempt needed more.

        Raises:
            FullError: The site lets nobody have more jobs in the queue.
            EngineError: Slurm does not take it.
        """
        if time.monotonic() < self._full_until:
            raise FullError(NO_MORE)
        (key,) = task.keys or ("",)
        entry = Ledger(self.place).read(key)
        tries = 1 + (task.rules.failures(entry) if entry else 0)
        memory_gb = self.asked.mem_gb
        if entry and memory_gb:
            memory_gb = self._memory(entry, memory_gb, task.rules.before.get(key, 0))
        self.executor.update_parameters(**self._parameters(memory_gb))
        cores = str(self.asked.cpus_per_task)
        environment = task.environment | {"TL_CORES": cores, "OMP_NUM_THREADS": cores}
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # which of a node's GPUs, Slurm decides
        task = replace(task, place=self.place, environment=environment, stay=False)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                job = self.executor.submit(run, task, tries, self.executor.folder)
                break
            except (FailedJobError, FailedSubmissionError, OSError) as error:
                if FULL.search(str(error)):
                    self._full_until = time.monotonic() + FULL_SECONDS
                    raise FullError(f"{NO_MORE}: {site.plain(str(error))}") from error
                if time.monotonic() > deadline:
                    msg = f"Slurm does not take a job: {site.plain(str(error))}"
                    raise EngineError(msg) from error
                time.sleep(AGAIN_SECONDS)
        handle = Handle(job, memory_gb, self.queue.looks)
        self._last[key] = handle
        return handle

    def _more_memory(self, had: float | None) -> str:
        if had is None:
            return "needed more memory than the site gives: ask for some by hydra.launcher.mem_gb="
        more = self._at_most(had * 2)
        then = f"the next attempt asks for {more:g} GB" if more > had else "no node has more"
        return f"needed more memory than {had:g} GB; {then}"

    def _at_most(self, memory_gb: float) -> float:
        """GB, but no more than a node has."""
        most = site.most_memory(self.partitions)
        return memory_gb if most is None else min(memory_gb, most / 1024)

    def _memory(self, entry: Entry, asked: float, before: int) -> float:
        """GB to ask for: twice as much as an attempt had that needed more.

        Args:
            entry: Of the job.
            asked: By the user.
            before: Attempts of earlier calls, which may have asked for another amount.
        """
        told = [float(m[1]) for a in entry.attempts if (m := NEEDED.search(a.error))]
        wanted = max([asked, *(2 * gb for gb in told)])
        guessed = sum(_guessed(attempt.error) for attempt in entry.attempts[before:])
        last = self._last.get(entry.key)
        if last and _short_of_memory(last) and not NEEDED.search(entry.error):
            guessed = max(guessed, 1)  # nobody knew when its loss was written down
        return self._at_most(wanted * 2.0**guessed)

    def alive(self, handle: Handle) -> bool:
        """Whether the job is in the queue, or runs; one of a dead node will run again."""
        looks = self.queue.look()
        if looks == handle.looks:
            return handle.gone < GONE_LOOKS
        handle.looks = looks
        found = self.queue.jobs.get(handle.job.job_id)
        handle.known = found or handle.known
        if found is not None and found.state in site.ENDED:
            handle.gone = GONE_LOOKS
        elif found is None or found.state in site.OVER:
            handle.gone += 1
        else:
            handle.gone = 0
        return handle.gone < GONE_LOOKS

    def waits(self, handle: Handle) -> bool:
        """Whether it waits for a node."""
        return handle.known is None or handle.known.state in site.WAITS

    def said(self, handle: Handle) -> str:
        """The last lines of its log."""
        text = handle.job.stderr() or handle.job.stdout() or ""
        if not text:
            folder = self.executor.folder
            return f"job {handle.job.job_id} of Slurm left no word: do all nodes see {folder}?"
        return "\n".join(text.strip().splitlines()[-LINES:])

    def why(self, handle: Handle) -> str:
        """Why Slurm ended it, to be put behind "job 3"; empty where it is not known."""
        if _short_of_memory(handle):
            return self._more_memory(handle.memory_gb)
        return ENDS.get(handle.known.state, "") if handle.known else ""

    def kill(self, handle: Handle) -> None:
        """Take it out of the queue; a job that runs gets SIGTERM, and writes its checkpoint."""
        site.run("scancel", handle.job.job_id)

    def close(self) -> None:
        """Nothing is held."""


def _executor(asked: SlurmConfig, folder: Path) -> Any:
    executor = submitit.SlurmExecutor(folder=folder, python=asked.python)
    executor._throttling = 0.0  # 0.2 s between two jobs: a minute for a few hundred
    return executor


def _guessed(error: str) -> bool:
    """Whether what the job itself or its worker said points to a want of memory."""
    return bool(MAYBE.search(error)) and not NEEDED.search(error)


def _short_of_memory(handle: Handle) -> bool:
    """Whether Slurm, or the kernel in its name, killed it at its limit of memory."""
    if handle.known is not None and handle.known.state == "OUT_OF_MEMORY":
        return True
    return bool(MEMORY_LOG.search(handle.job.stderr() or ""))
