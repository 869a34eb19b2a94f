"""The ledger of a batch, its rules, and what a call shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache

import pytest

from tl.batches import Batch, BatchError, Job
from tl.batches.calls import headline, read_states
from tl.batches.driving import View
from tl.batches.jobs import DONE, FAILED, INTERRUPTED, LOST, REFUSED, RUNNING, WAITING, Rules
from tl.batches.ledger import Ledger
from tl.batches.showing import last_line, summary
from tl.config import BatchConfig, ConfigError, compose


@cache
def config(*overrides):
    return compose("train", ["data.root=x", "model=test_resnet", *overrides])


def job(number=0, *overrides):
    return Job(number, overrides, config(*overrides))


def attempts(ledger, entry, *states):
    """An entry with attempts that ended so."""
    for state in states:
        entry = ledger.end(ledger.begin(entry, "w", "h"), state, f"it {state}", 10.0)
    return entry


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("45m", 2700), ("1h30m", 5400), ("1.5h", 5400), ("9s", 9)]
)
def test_a_budget_is_a_time(text, seconds):
    assert BatchConfig(budget=text).budget_seconds() == seconds


@pytest.mark.parametrize("text", ["2", "soon", "0s", "h", "-1h", "2h and more"])
def test_other_budgets_are_refused(text):
    with pytest.raises(ConfigError, match="budget must be a time such as 2h"):
        BatchConfig(budget=text)


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/4", "0/0"])
def test_a_shard_is_an_index_below_a_count(text):
    with pytest.raises(ConfigError, match="shard must be INDEX/COUNT"):
        BatchConfig(shard=text)
    assert BatchConfig(shard="3/4").shard_of() == (3, 4)
    assert BatchConfig().shard_of() == (0, 1)


# --- which job is which -------------------------------------------------------------------------


def test_the_key_of_a_job_is_what_decides_its_result():
    same = ["output_dir=there", "tracking.experiment=other", "batch.jobs=3", "tracking.enabled=0"]
    assert {job(i, one).key for i, one in enumerate(same)} == {job().key}
    assert job(0, "seed=1").key != job().key
    assert job(0, "finetune=full").key != job().key


def test_jobs_keep_their_numbers_when_others_join(tmp_path):
    ledger = Ledger(tmp_path)
    first = ledger.add([job(0, "seed=0"), job(1, "seed=1")])
    again = ledger.add([job(0, "seed=5"), job(1, "seed=1"), job(2, "seed=0")])
    assert [entry.number for entry in first] == [0, 1]
    assert [entry.number for entry in again] == [2, 1, 0]
    assert [entry.key for entry in again[1:]] == [first[1].key, first[0].key]
    assert read_states(tmp_path) == {0: WAITING, 1: WAITING, 2: WAITING}


def test_folders_that_hold_something_else_are_left_alone(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/old.txt").write_text("of an older batch")
    (entry,) = Ledger(tmp_path).add([job(0)])
    assert entry.number == 1


def test_a_job_whose_folder_is_gone_is_not_done(tmp_path):
    ledger = Ledger(tmp_path)
    (entry,) = ledger.add([job()])
    (tmp_path / "0").mkdir()
    attempts(ledger, entry, DONE)
    assert ledger.add([job()])[0].state == DONE
    (tmp_path / "0").rmdir()
    assert ledger.add([job()])[0].state == WAITING


def test_all_anew_takes_new_folders_and_keeps_what_was(tmp_path):
    ledger = Ledger(tmp_path)
    (entry,) = ledger.add([job()])
    (tmp_path / "0").mkdir()
    (tmp_path / "0/config.yaml").touch()
    attempts(ledger, entry, DONE)
    (anew,) = ledger.add([job()], anew=True)
    assert (anew.number, anew.state, len(anew.attempts)) == (1, WAITING, 1)


def test_a_damaged_entry_is_named(tmp_path):
    ledger = Ledger(tmp_path)
    (entry,) = ledger.add([job()])
    path = tmp_path / f"ledger/{entry.key}.json"
    path.write_text("{")
    with pytest.raises(BatchError, match=f"{entry.key}.json is no entry of this version of tl"):
        ledger.all()


# --- what runs ----------------------------------------------------------------------------------


def rules_after(entry, *, attempts=2):
    return Rules(attempts, 10.0, {entry.key: len(entry.attempts)})


def test_a_call_tries_what_is_not_done_as_often_as_it_may(tmp_path):
    ledger = Ledger(tmp_path)
    (entry,) = ledger.add([job()])
    rules = rules_after(entry)
    assert rules.may_run(entry, WAITING)
    assert not rules.may_run(entry, DONE)
    once = attempts(ledger, entry, FAILED)
    assert rules.may_run(once, FAILED)
    assert 9 < rules.wait(once) <= 10
    twice = attempts(ledger, once, LOST)
    assert not rules.may_run(twice, LOST)
    assert rules_after(twice).may_run(twice, LOST), "a further call tries again"
    assert rules_after(twice).wait(twice) == 0, "at once"


def test_a_wrong_request_is_not_tried_twice_in_a_call(tmp_path):
    ledger = Ledger(tmp_path)
    (entry,) = ledger.add([job()])
    refused = attempts(ledger, entry, REFUSED)
    assert not rules_after(entry).may_run(refused, REFUSED)
    assert rules_after(refused).may_run(refused, REFUSED)


def test_an_interruption_is_no_failure(tmp_path):
    ledger = Ledger(tmp_path)
    (entry,) = ledger.add([job()])
    stopped = attempts(ledger, entry, INTERRUPTED, INTERRUPTED, INTERRUPTED)
    assert rules_after(entry, attempts=1).may_run(stopped, INTERRUPTED)


def test_back_off_doubles():
    assert [Rules(5, 10.0).pause(n) for n in (1, 2, 3)] == [10, 20, 40]


HOLDER = """
import sys, time
from pathlib import Path
from tl.batches.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
(entry,) = ledger.all()
assert ledger.lock(entry.key)
ledger.begin(entry, "w", "h")
print("runs", flush=True)
time.sleep(60)
"""


def test_a_killed_process_leaves_its_job_lost(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add([job()])
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "runs\n"
        (entry,) = ledger.all()
        assert ledger.state(entry) == RUNNING
        assert ledger.lock(entry.key) is None
        assert ledger.settle(entry.key, "not yet", 0) is None
        process.send_signal(signal.SIGKILL)
    assert ledger.state(entry) == LOST
    settled = ledger.settle(entry.key, "its process is gone", 0)
    assert (settled.state, settled.error) == (LOST, "its process is gone")
    assert ledger.lock(entry.key) is not None


def test_without_locks_signs_of_life_count(tmp_path, monkeypatch):
    """Some network file systems refuse flock; then the age of a file tells who lives."""
    import fcntl

    def refuse(*_):
        raise OSError(os.errno.ENOLCK if hasattr(os, "errno") else 37, "no locks")

    ledger = Ledger(tmp_path)
    (entry,) = ledger.add([job()])
    monkeypatch.setattr(fcntl, "flock", refuse)
    lock = ledger.lock(entry.key)
    assert lock is not None
    assert not lock.held
    entry = ledger.begin(entry, "w", "h")
    assert ledger.state(entry) == RUNNING
    assert ledger.lock(entry.key) is None
    old = time.time() - 3600
    os.utime(tmp_path / f"ledger/{entry.key}.lock", (old, old))
    assert ledger.state(entry) == LOST
    ledger.beat(entry.key)
    assert ledger.state(entry) == RUNNING
    ledger.free(entry.key, lock)
    assert ledger.state(entry) == LOST


# --- what is refused ----------------------------------------------------------------------------


def test_a_batch_of_nothing_is_refused(tmp_path):
    with pytest.raises(BatchError, match="the batch has no jobs"):
        Batch([], tmp_path, BatchConfig())


def test_the_same_job_twice_is_refused(tmp_path):
    with pytest.raises(BatchError, match=r"jobs 0 and 2: seed=1"):
        Batch([job(0, "seed=1"), job(1, "seed=2"), job(2, "seed=1")], tmp_path, BatchConfig())
    assert not (tmp_path / "ledger").exists()


def test_the_folder_of_a_single_run_is_refused(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(BatchError, match="holds a run, not a batch; choose another output_dir"):
        Batch([job()], tmp_path, BatchConfig())


def test_a_place_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BatchError, match=r"cannot make .*file.*; choose another with output_dir="):
        Batch([job()], tmp_path / "file", BatchConfig())


def test_a_missing_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    for module in ("local", "slurm"):
        monkeypatch.delitem(sys.modules, f"tl.batches.engines.{module}", raising=False)
    with pytest.raises(BatchError, match=r'needs submitit: pip install "tl\[slurm\]"'):
        Batch([job()], tmp_path, BatchConfig(), engine="local")


# --- what is shown ------------------------------------------------------------------------------


def test_the_first_line_says_what_is_to_be_done():
    assert headline(1, 0, 1, "") == "batch of 1 job"
    assert headline(4, 4, 2, "2 cores") == "batch of 4 jobs, all of them done before"


def test_the_summary_counts_states_and_estimates_what_is_left(tmp_path):
    ledger = Ledger(tmp_path)
    entries = ledger.add([job(i, f"seed={i}") for i in range(5)])
    done = [attempts(ledger, entry, DONE) for entry in entries[:2]]
    done = [
        replace(e, attempts=(replace(e.attempts[0], ended=e.attempts[0].began + 60),)) for e in done
    ]
    failed = attempts(ledger, entries[2], FAILED)
    views = [
        *(View(entry, DONE) for entry in done),
        View(failed, FAILED),
        *(View(entry, WAITING, open=True) for entry in entries[3:]),
    ]
    assert summary(views, 2) == "2 of 5 jobs done, 2 waiting, 1 failed; about 1 min left"
    assert summary(views[:3], 2) == "2 of 3 jobs done, 1 failed"


def test_progress_is_the_last_line_of_a_log(tmp_path):
    log = tmp_path / "0.txt"
    assert last_line(log) == ""
    log.write_text("x" * 10_000 + "\nmeasuring 12 images\n\n")
    assert last_line(log) == "measuring 12 images"
    log.write_text("all   2/75  val acc 0.8\nall   3/75  val acc 0.9\nwarning: slow\n")
    assert last_line(log) == "all   3/75  val acc 0.9"


def test_the_ledger_is_readable(tmp_path):
    ledger = Ledger(tmp_path)
    (entry,) = ledger.add([job(0, "seed=3")])
    attempts(ledger, entry, FAILED)
    (path,) = (tmp_path / "ledger").glob("*.json")
    found = json.loads(path.read_text())
    assert found["overrides"] == ["seed=3"]
    assert (found["state"], found["attempts"][0]["error"]) == (FAILED, "it failed")
