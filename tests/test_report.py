"""The page of a run: true to its files, whole without them, and of use."""

from __future__ import annotations

import html
import json
import logging
import re
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
from browser import PHONE, complaints, opened
from commands import TINY, Command, script
from mlflow import MlflowClient
from PIL import Image

from tl import report
from tl.config import Task
from tl.report import first, judging, mistakes, training
from tl.report.files import Judged, RunFiles
from tl.runs import RunError

COLOURS = {"red": (200, 50, 40), "green": (40, 180, 60), "NA": (40, 60, 200)}
BAD = "<b>x</b> & y"
COUNTS = {"train": 10, "val": 14, "test": 14}


def coloured(colour, rng) -> Image.Image:
    noise = rng.normal(0, 12, (32, 40, 3))
    return Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8))


def images_of(root, task):
    """Images of three colours in a table; the labels of two, one in val and one in test, lie."""
    rng = np.random.default_rng(0)
    root.mkdir()
    rows = []
    for split, count in COUNTS.items():
        for name, colour in COLOURS.items():
            for i in range(count):
                file = f"{split}-{name}-{i:02d}.png"
                coloured(colour, rng).save(root / file)
                lies = split != "train" and name == "red" and i == 3
                label = BAD if name == "green" else "NA" if lies else name
                value = 100.0 * list(COLOURS).index(name) + i + 900 * lies
                labels = f"{label}|any" if i % 2 else label
                known = {"single": label, "multi": labels, "regression": value}[task]
                camera = "007" if i % 2 else "08"
                rows.append({"path": file, "label": known, "split": split, "camera": camera})
    pd.DataFrame(rows).to_csv(root / "images.csv", index=False)
    return root / "images.csv"


def trained(command, table, out, task, *more):
    done = command(
        *("train", *TINY, f"data.root={table}", f"output_dir={out}", f"data.task={task}"),
        *("data.columns.label=label", "data.columns.group=camera", "augment=none"),
        *("finetune=linear_probe", "finetune.epochs=40", "finetune.head_lr=0.05", *more),
    )
    assert done.code == 0, done.err
    return done


@pytest.fixture
def command(capfd, monkeypatch) -> Command:
    return Command(capfd, monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of classes beside its images, and what it printed; the tests get copies."""
    root = tmp_path_factory.mktemp("made")
    env = {"TL_CACHE_DIR": str(root / "cache"), "MLFLOW_TRACKING_URI": f"sqlite:///{root}/m.db"}
    done = trained(
        partial(script, **env), images_of(root / "data", "single"), root / "run", "single"
    )
    return root, done.out


@pytest.fixture
def single(made, tmp_path):
    """Folder of the run, and what it printed."""
    root, printed = made
    run = tmp_path / "run"
    shutil.copytree(root / "run", run)
    shutil.copytree(root / "data", tmp_path / "data")
    for name in ("config.yaml", "checkpoints/model.json"):
        file = run / name
        file.write_text(file.read_text().replace(str(root), str(tmp_path)))
    return run, printed.replace(str(root / "run"), str(run))


def words(page: str) -> str:
    """What a reader sees, in one line."""
    text = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def test_a_run_ends_with_a_page_that_says_what_its_files_say(single, command):
    run, printed = single
    page = (run / "report.html").read_text()
    assert f"page      {run}/report.html" in printed
    seen, metrics = words(page), json.loads((run / "metrics.json").read_text())
    figures = [f"{100 * metrics[f'test/acc{end}']:.1f} %" for end in ("", "_low", "_high")]
    assert f"On 42 test images it is right {figures[0]} of the time" in seen
    assert f"expect {figures[1]} to {figures[2]}" in seen
    assert "always saying the most frequent class gives 35.7 %" in seen, "15 of 42 are called NA"
    headings = ("Result", "What to do next", "Images to look at", "Metrics", "Classes", "Training",
                "How sure, how right", "The data", "Settings and places", "Groups")  # fmt: skip
    assert [h for h in headings if h not in seen] == []
    assert "The method was asked for (finetune=linear_probe)" in seen
    assert "30 training, 42 validation, 42 test" in seen
    # Whole, escaped, and every figure can be looked up in a file that is there.
    assert "<script" not in page
    assert BAD not in page
    assert BAD in seen
    links = set(re.findall(r'href="([^"#]+)"', page))
    assert {"metrics.json", "predictions.parquet", "plan.json", "audit.json"} <= links
    assert [link for link in links if not (run / link).exists()] == []
    places = set(re.findall(r'href="#([^"]+)"', page))
    assert places - set(re.findall(r'id="([^"]+)"', page)) == set()
    sources = set(re.findall(r'src="(.{11})', page))
    assert sources == {"data:image/"}
    record = json.loads((run / "run.json").read_text())
    title = f"images.csv · test_resnet · linear_probe · {record['job'][:4]}"
    assert f"<h1>{title}</h1>" in page
    client = MlflowClient(record["tracking_uri"])
    run_id = record["run_id"]
    assert client.get_run(run_id).info.run_name == title
    assert "report.html" in {f.path for f in client.list_artifacts(run_id)}


def test_the_page_is_readable_for_all_in_a_real_browser(single, browser):
    run, _ = single
    for options in ({}, {"color_scheme": "dark"}, {"viewport": PHONE}):
        with opened(browser, run / "report.html", **options) as page:
            assert complaints(page) == []
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.className") == "skip"
            page.get_by_role("link", name="How sure, how right").click()
            assert page.evaluate("location.hash") == "#calibration"
    with opened(browser, run / "audit.html", color_scheme="dark") as page:
        assert complaints(page) == []


def test_labels_that_lie_are_found_and_shown(single):
    run, _ = single
    files = RunFiles(run)
    found = {f"{s.judged.rows['path'][s.row]}" for s in mistakes.suspects(files)}
    assert found == {"val-red-03.png", "test-red-03.png"}
    page = (run / "report.html").read_text()
    assert "Look at 2 labels that may be wrong" in words(page)
    cards = page[page.index("<h3>labels that may be wrong") :]
    card = cards[: cards.index("</ul>")]
    assert card.count("data:image/jpeg;base64,") == 2
    assert re.search(r"<b>labelled NA</b><span>model: red, \d+% sure</span><span>test", card)


def test_the_page_is_written_again_from_the_files_alone(single, made, command):
    run, _ = single
    before = (run / "report.html").read_text()
    (run / "report.html").unlink()
    done = command("report", f"run={run}")
    assert (done.code, done.err) == (0, "")
    assert f"page: {run}/report.html" in done.out
    after = (run / "report.html").read_text()
    here, there = str(run.parent), str(made[0])
    assert words(after).replace(here, there) == words(before)
    code = (
        "import sys; from pathlib import Path; from tl import report\n"
        f"report.write(Path({str(run)!r}))\n"
        "print(sorted({'torch', 'torchvision', 'timm', 'mlflow'} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_images_that_are_gone_or_others_now_are_names_only(single, command):
    run, _ = single
    data = run.parent / "data"
    coloured((9, 9, 9), np.random.default_rng(1)).save(data / "test-red-03.png")
    (data / "train-green-00.png").write_bytes(b"broken since")
    command("report", f"run={run}")
    page = (run / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 1, "the other one is no longer what was judged"
    assert "cannot be read any more" in page
    shutil.rmtree(data)
    assert command("report", f"run={run}").code == 0
    page = (run / "report.html").read_text()
    assert "data:image/jpeg" not in page
    assert "The images are not at hand, so no small pictures: names only." in page
    assert "test-red-03.png" in page


def test_a_run_without_some_files_still_has_its_page(single, caplog):
    run, _ = single
    whole = words((run / "report.html").read_text())
    for name in ("history.csv", "per_class.csv", "calibration.json", "groups.csv", "run.json"):
        (run / name).unlink()
    (run / "audit.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        seen = words(report.page(run))
    assert f"This part cannot be shown: RunError: {run}/audit.json cannot be read (" in seen
    assert "the data of" in caplog.text
    result = re.search(r"On 42 test images .*? % \.", whole)
    assert (result is None) or result.group() in seen
    for part in ("Metrics", "Classes", "How sure, how right", "Training"):
        assert part in seen
    assert "Groups" not in seen


def test_what_is_no_finished_run_is_refused(command, tmp_path, single):
    run, _ = single
    command("report", f"run={tmp_path / 'none'}").refused("RunError", "is no run", "config.yaml")
    (run / "metrics.json").write_text("{")
    command("report", f"run={run}").refused("RunError", "metrics.json cannot be read (")
    (run / "metrics.json").unlink()
    command("report", f"run={run}").refused(
        "RunError", "no finished run: it has no metrics.json", f"tl train resume={run}"
    )


def test_a_page_that_cannot_be_written_fails_no_job_but_tl_report(single, command, caplog):
    run, _ = single
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    with caplog.at_level(logging.WARNING):
        assert report.attach(run) == []
    assert "no report.html: RunError: cannot write" in caplog.text
    command("report", f"run={run}").refused("RunError", "cannot write")


def test_the_page_of_several_labels(command, tmp_path):
    trained(command, images_of(tmp_path / "data", "multi"), tmp_path / "run", "multi")
    seen = words((tmp_path / "run/report.html").read_text())
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert f"its mean average precision is {metrics['test/map']:.3f}" in seen
    assert f"all labels right {100 * metrics['test/exact_match']:.1f} %" in seen
    assert "guessing by how frequent each label is" in seen
    assert "how often it is present" not in seen
    assert "the label is present so often" in seen


def test_the_page_of_numbers(command, tmp_path):
    table = images_of(tmp_path / "data", "regression")
    trained(command, table, tmp_path / "run", "regression")
    seen = words((tmp_path / "run/report.html").read_text())
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    shown = first.number(metrics["test/mae"])
    assert f"it is off by {shown} on average" in seen
    found = {
        f"{s.judged.rows['path'][s.row]}" for s in mistakes.suspects(RunFiles(tmp_path / "run"))
    }
    assert found == {"val-red-03.png", "test-red-03.png"}
    assert "far beyond its others" in seen
    assert "How sure, how right" not in seen
    assert "Largest errors" in seen or "largest errors" in seen


def test_the_page_of_a_cross_validation_leads_to_those_of_its_folds(command, tmp_path):
    table = images_of(tmp_path / "data", "single")
    more = ("data.folds=2", "tracking.enabled=false")
    trained(command, table, tmp_path / "run", "single", *more)
    page = (tmp_path / "run/report.html").read_text()
    folds = json.loads((tmp_path / "run/folds.json").read_text())["metrics"]["val/acc"]
    assert f"accuracy on val {100 * folds['mean']:.1f} %" in words(page)
    for number in (0, 1):
        assert f'href="fold-{number}/report.html"' in page
        assert (tmp_path / f"run/fold-{number}/report.html").is_file()
    assert command("report", f"run={tmp_path / 'run'}").code == 0
    (tmp_path / "run/metrics.json").unlink()
    command("report", f"run={tmp_path / 'run'}").refused("RunError", "is not finished")


# --- what it says -------------------------------------------------------------------------------


def steps(run) -> dict[str, str]:
    """What to do next -> why."""
    part = first.next_steps(RunFiles(run))
    return {s["head"]: s["text"] for b in part.blocks if b.kind == "steps" for s in b.content}


def test_a_class_and_a_group_that_fail_are_named_with_their_figures(single):
    run, _ = single
    table = pd.read_csv(run / "per_class.csv", keep_default_na=False)
    at = (table["split"] == "test") & (table["class"] == "red")
    table.loc[at, ["images", "recall", "recall_low", "recall_high"]] = [40, 0.5, 0.35, 0.65]
    table.to_csv(run / "per_class.csv", index=False)
    groups = pd.read_csv(run / "groups.csv", dtype={"group": str})
    at = (groups["split"] == "test") & (groups["group"] == "007")
    groups.loc[at, ["value", "low", "high"]] = [0.4, 0.2, 0.6]
    groups.to_csv(run / "groups.csv", index=False)
    found = steps(run)
    assert found["Label more images of red"].startswith(
        "It finds 50.0 % (35.0 % to 65.0 %) of its 40 test images, and "
    )
    assert found["Label more images of red"].endswith("; it learned from 10 images.")
    assert "this share right: 40.0 % (20.0 % to 60.0 %)" in found["Look at group 007"]
    assert "Look at group 08" not in found
    assert "Keep test images apart" not in found


def test_a_model_that_learned_nothing_is_called_that(single):
    run, _ = single
    metrics = json.loads((run / "metrics.json").read_text())
    metrics |= {"test/acc": 0.4, "test/acc_low": 0.3, "test/acc_high": 0.5}
    (run / "metrics.json").write_text(json.dumps(metrics))
    found = [*steps(run)]
    assert found[0] == "Find out why it has learned nothing"
    assert not [head for head in found if "label" in head.lower()], "it knows nothing of labels"
    assert "the model has learned nothing of use" in first.verdict(RunFiles(run))[-1]


def test_without_test_images_val_speaks_and_is_no_evidence(single):
    run, _ = single
    metrics = json.loads((run / "metrics.json").read_text())
    kept = {k: v for k, v in metrics.items() if not k.startswith("test/")}
    (run / "metrics.json").write_text(json.dumps(kept))
    predictions = pd.read_parquet(run / "predictions.parquet")
    predictions[predictions["split"].astype(str) == "val"].to_parquet(run / "predictions.parquet")
    seen = words(report.page(run))
    assert "On 42 validation images it is right" in seen
    assert "There are no test images" in seen
    assert "Keep test images apart" in seen


def test_a_run_on_a_server_is_a_link(single):
    run, _ = single
    record = json.loads((run / "run.json").read_text()) | {"tracking_uri": "http://h:5000/"}
    (run / "run.json").write_text(json.dumps(record))
    address = f"http://h:5000/#/experiments/{record['experiment_id']}/runs/{record['run_id']}"
    assert f'<a href="{address}">' in report.page(run)


def judged(truth, said, sure, split="test") -> Judged:
    """Predictions for two classes."""
    truth, said, sure = np.array(truth), np.array(said), np.array(sure, float)
    p = np.stack([np.where(said == 0, sure, 1 - sure), np.where(said == 1, sure, 1 - sure)], 1)
    names = np.array(["ant", "bee"])
    rows = pd.DataFrame(
        {"path": [f"{i}" for i in range(len(truth))], "label": names[truth],
         "predicted": names[said], "correct": truth == said, "score": sure, "split": split}
    )  # fmt: skip
    return Judged(split, Task.single, ("ant", "bee"), rows, p, truth)


def test_a_model_is_asked_only_where_it_is_good():
    sure = np.array([0.99] * 60 + [0.7] * 40)
    right = np.array([True] * 59 + [False] + [True] * 20 + [False] * 20)
    assert mistakes.contradicted(sure, right) == [59], "59 of 60 agree with the sure ones"
    assert mistakes.contradicted(sure[:9], right[51:60]) == [], "8 of 9 are too few"
    assert mistakes.contradicted(np.array([]), np.array([], bool)) == []
    truth = np.array([0] * 20 + [1] * 20)
    said = truth.copy()
    said[3] = 1
    (one,) = mistakes._of_classes(judged(truth, said, [0.95] * 40))
    assert (one.row, one.words) == (3, ("labelled ant", "model: bee, 95% sure"))
    guess = judged(truth, np.resize([0, 1], 40), [0.9] * 40)
    assert mistakes._of_classes(guess) == [], "a coin contradicts no label"


def test_the_most_wrong_comes_first():
    some = judged([0, 0, 1], [0, 1, 0], [0.9, 0.6, 0.99])
    assert mistakes.losses(some) == pytest.approx(-np.log([0.9, 0.4, 0.01]))


def test_classes_are_poor_only_beyond_chance():
    table = pd.DataFrame(
        {"class": ["a", "b", "c"], "images": [100, 10, 100], "recall": [0.5, 0.7, 0.95]}
    )
    names = [r["class"] for r in judging.names_below(table, 0.8, ("a", "b", "c"))]
    assert names == ["a"], "7 of 10 may be chance"


def test_a_phase_has_not_settled_while_the_loss_of_val_falls(tmp_path, single):
    run, _ = single
    files = RunFiles(run)
    files.plan["phases"][0]["epochs"] = 20
    files.done[0].update(epochs=20, best_epoch=20)
    name = files.done[0]["name"]
    for losses, expected in ((np.linspace(1, 0.4, 20), [name]), (np.full(20, 0.5), [])):
        files.history = pd.DataFrame({"phase": name, "epoch": range(1, 21), "val/loss": losses})
        assert training.unsettled(files) == expected
    files.done[0]["epochs"] = 12  # patience ended it
    assert training.unsettled(files) == []


def test_rates_are_the_highest_of_each_group_of_each_phase():
    history = pd.DataFrame(
        {"phase": ["head", "head", "all"], "lr-AdamW/head/decay": [0.1, 0.2, 0.05],
         "lr-AdamW/head/no_decay": [0.1, 0.2, 0.05], "lr/stage4": [0, 0, 0.01]}
    )  # fmt: skip
    assert training.phase_rates(history) == {
        "head": {"head": 0.2},
        "all": {"head": 0.05, "stage4": 0.01},
    }
    assert training.phase_rates(None) == {}


def test_no_run_is_no_page(tmp_path):
    with pytest.raises(RunError, match="is no run"):
        report.write(tmp_path)
