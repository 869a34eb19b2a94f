"""A search from the command line: its trials, its winner, its files, and how it goes on."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from commands import TINY, Command
from mlflow import MlflowClient
from optuna.trial import TrialState

from tl.config import SearchSettings
from tl.search.space import Dimension
from tl.search.study import open_storage, open_study

SPACE = (
    "search.space={finetune.head_lr:{low:1e-3,high:1.0},finetune.weight_decay:{low:1e-3,high:0.1}}"
)
JOB = [
    *(*TINY, "finetune=linear_probe", "finetune.epochs=4", "search.folds=0", SPACE),
    "finetune.optimizer=adamw",
]


@pytest.fixture
def command(capfd, monkeypatch) -> Command:
    return Command(capfd, monkeypatch)


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return [*csv.DictReader(file)]


@pytest.mark.slow
def test_a_search_its_winner_and_how_it_goes_on(command, image_folder, tmp_path):
    out, root = tmp_path / "s", image_folder(splits={"train": 8, "val": 6, "test": 4})
    words = [*JOB, f"data.root={root}", f"output_dir={out}"]
    done = command("search", *words, "search.trials=5")
    assert done.code == 0, done.err
    assert "1/5  trial 0  given" in done.out
    assert "18 images of val; test is not looked at" in " ".join(done.out.split())
    found = rows(out)
    assert [r["kind"] for r in found] == ["given", "coarse", "coarse", "fine", "fine"]
    summary = read(out / "search.json")
    best = summary["best"]
    # The winner's own run is the trial once more: the same figures, and a look at test.
    metrics = read(out / "best/metrics.json")
    assert metrics["val/acc"] == pytest.approx(best["value"])
    assert metrics["val/loss"] == pytest.approx(best["loss"], rel=1e-4)
    assert "test/acc" in metrics
    assert not [name for name in (out / "trials").rglob("*") if name.suffix in {".ckpt"}]
    # MLflow: one run for the search, one for each trial and for the winner below it.
    client, top = MlflowClient(), read(out / "run.json")["run_id"]
    run = client.get_run(top)
    assert run.data.tags["tl.kind"] == "search"
    assert run.data.metrics["search/best_val_acc"] == pytest.approx(best["value"])
    below = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{top}'")
    assert sorted(r.data.tags["tl.kind"] for r in below) == ["train", *["trial"] * 5]
    assert {f.path for f in client.list_artifacts(top)} >= {"search.html", "search.json"}

    # The printed command trains with these settings.
    again = [f"output_dir={tmp_path / 'again'}", f"data.root={root}", "experiment=best"]
    done = command("train", "--config-dir", out, *again, "tracking.enabled=false", "trainer=cpu")
    assert done.code == 0, done.err
    assert read(tmp_path / "again/metrics.json")["val/loss"] == metrics["val/loss"]

    # The same command goes on; it begins nothing anew, and is no other search.
    done = command("search", *words, "search.trials=6", "search.finish=false")
    assert done.code == 0, done.err
    assert "6, 5 of them done before" in done.out
    assert [r["finetune.head_lr"] for r in rows(out)][:5] == [r["finetune.head_lr"] for r in found]
    assert len(rows(out)) == 6
    command("search", *words, "seed=3").refused("seed was 0 when the search began, and is 3 now")
    command("train", *TINY, f"data.root={root}", f"output_dir={out / 'best'}").refused(
        "holds a run"
    )
    command("search", *words[:-1], f"output_dir={out / 'best'}").refused("holds a run of tl train")


@pytest.mark.slow
def test_cross_validation_methods_and_workers(command, image_folder, tmp_path):
    out, root = tmp_path / "s", image_folder(splits={"train": 9, "val": 3})
    words = [*TINY, "finetune.epochs=2", f"data.root={root}", f"output_dir={out}"]
    space = ["finetune=linear_probe,full", "search.space.augment=[none,light]"]
    grid = ["search.sampler=grid", "search.trials=4", "search.workers=2", "search.pruner=none"]
    done = command("search", *words, *space, *grid)
    assert done.code == 0, done.err
    assert "mean of 3 folds (val has 9 images, fewer than 200" in " ".join(done.out.split())
    found = rows(out)
    cells = {(r["finetune"], r["augment"]) for r in found}
    assert cells == {(m, a) for m in ("linear_probe", "full") for a in ("none", "light")}
    assert read(out / "search.json")["images"] == 36
    assert read(out / "best/plan.json")["method"] in ("linear_probe", "full")
    assert {p.name for p in (out / "workers").iterdir()} == {"1.log", "2.log"}


DYING = """
import os, sys
from pathlib import Path
from tl.config import SearchSettings
from tl.search.study import open_storage, open_study
folder, space = Path(sys.argv[1]), {space}
storage, locks = open_storage("journal", folder, "s")
trials = open_study(storage, locks, "s", SearchSettings(trials=3), {setup}, 0)
trial = trials.next()
trial.suggest_float("finetune.head_lr", 0.001, 0.1, log=True)
print(trial.number, flush=True)
os._exit(9)
"""


def test_the_trial_of_a_dead_process_is_tried_again_and_then_left(tmp_path):
    d = Dimension("finetune.head_lr", (), 0.001, 0.1, log=True)
    setup = {"space": [d.to_dict()], "direction": "maximize", "epochs": 3, "folds": 0}
    setup["given"] = None
    code = DYING.format(space=[d.to_dict()], setup=setup)

    def die() -> int:
        args = [sys.executable, "-c", code, str(tmp_path)]
        return int(subprocess.run(args, capture_output=True, text=True, check=False).stdout)

    assert die() == 0
    storage, locks = open_storage("journal", tmp_path, "s")
    trials = open_study(storage, locks, "s", SearchSettings(trials=3), setup, 0)
    assert [t.number for t in trials.running()] == [0]
    with (tmp_path / "study/journal.log").open("ab") as journal:
        journal.write(b'{"op_code": 4, "half a li')  # a writer that died within its line
    assert die() == 1  # it took the settings of the first one, and died of them, too
    assert trials.reap() == [1]
    first, second = trials.study.get_trials()
    assert (first.state, second.state) == (TrialState.FAIL, TrialState.FAIL)
    assert first.params == second.params
    assert "its worker died (process" in first.user_attrs["error"]
    # The first does not count, the second does: a third would die of the same settings.
    assert [t.number for t in trials.lost()] == [0]
    assert [t.number for t in trials.done()] == [1]
    for _ in range(2):
        trial = trials.next()
        trial.suggest_float("finetune.head_lr", 0.001, 0.1, log=True)
        assert trials.tell(trial, {}, 0.5, TrialState.COMPLETE)
    assert trials.next() is None
    assert trials.enough()


def test_a_trial_of_another_machine_is_lost_when_it_stops_beating(tmp_path, monkeypatch):
    from tl.search import study as room

    storage, locks = open_storage("journal", tmp_path, "s")
    d = Dimension("finetune.head_lr", (), 0.001, 0.1, log=True)
    setup = {"space": [d.to_dict()], "direction": "maximize", "epochs": 3, "folds": 0}
    setup["given"] = None
    trials = open_study(storage, locks, "s", SearchSettings(trials=2), setup, 0)
    trial = trials.next()
    trial.set_user_attr("worker", "another/machine 12 345")
    clock = [1000.0]
    monkeypatch.setattr(room.time, "monotonic", lambda: clock[0])
    assert trials.reap() == []
    clock[0] += 60
    trial.set_user_attr("beat", 1)
    assert trials.reap() == []
    clock[0] += 80  # since the last beat that was seen
    assert trials.reap() == []
    clock[0] += 11
    assert trials.reap() == [0]
    assert optuna.load_study(study_name="s", storage=storage).trials[1].state == TrialState.WAITING
