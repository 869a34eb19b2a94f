"""The regret benchmark: who may be in which split, what regret is, and what the report says."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tl.data import ImageTable
from tl.decision import Thresholds, decide, table_rows
from tl.decision.evidence import Amount, Backbone, Evidence, Score, Similarity, StageScore

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PAGE = BENCHMARKS.parent / "docs" / "decision-table.md"
METHODS = ("linear_probe", "stage_probe", "lp_partial_1", "lp_partial_2", "wise_ft", "lp_ft")
RATES = (1.0, 0.333, 3.0)
TEST = 100


@pytest.fixture
def module(monkeypatch):
    """Import of a program as it sees itself: from its own folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return import_module


def table(classes, each, name="{label}/{number:04d}.jpg"):
    rows = [
        {
            "path": name.format(label=label, number=number, shot=10 * number + label),
            **{"label": label, "split": "train", "sha256": f"{label} {number}"},
            **{"width": 200, "height": 100, "bytes": 10},
        }
        for label in range(classes)
        for number in range(each)
    ]
    return ImageTable(Path("images"), tuple(map(str, range(classes))), pd.DataFrame(rows))


def test_larger_samples_hold_the_smaller_ones_and_test_stays(module):
    cells = module("regret_cells")
    images = table(5, 350)
    found = {
        (amount, seed): cells.sample(images, cells.Cell("flowers5", amount, "net", seed))
        for amount in cells.AMOUNTS
        for seed in (0, 1)
    }
    assert found[5, 0].counts() == {
        "train": dict.fromkeys("01234", 5),
        "val": dict.fromkeys("01234", 1),
        "test": dict.fromkeys("01234", 80),
    }
    assert found[100, 0].counts()["val"] == dict.fromkeys("01234", 25)
    names = {
        key: {split: set(t.split(split)["path"]) for split in ("train", "val", "test")}
        for key, t in found.items()
    }
    for small, large in ((2, 5), (5, 10), (10, 25), (25, 100)):
        assert names[small, 0]["train"] < names[large, 0]["train"]
        assert names[small, 0]["val"] <= names[large, 0]["val"]
        assert names[small, 0]["test"] == names[large, 0]["test"]
    assert names[5, 0]["test"] != names[5, 1]["test"]
    for splits in names.values():
        assert not splits["test"] & (splits["train"] | splits["val"])
        assert not splits["train"] & splits["val"]


def test_a_small_class_keeps_the_share_of_val(module):
    cells = module("regret_cells")
    counts = cells.sample(table(2, 60), cells.Cell("hymenoptera", 100, "net", 0)).counts()
    assert counts["train"]["0"] == 4 * counts["val"]["0"] == 40
    assert counts["test"]["0"] == 10


def test_nobody_who_signs_digits_is_in_train_and_in_test(module):
    cells = module("regret_cells")
    images = table(10, 80, "{label}/IMG_{shot:05d}.jpg")
    sample = cells.sample(images, cells.Cell("sign_digits", 5, "net", 0))
    persons = sample.rows["path"].str.extract(r"(\d+)\.jpg")[0].astype(int) // 10
    seen = {s: set(persons[sample.rows["split"] == s]) for s in ("train", "val", "test")}
    assert len(seen["train"]) == 5
    assert not seen["test"] & (seen["train"] | seen["val"])
    groups = pd.Series(cells.groups("sign_digits", images.rows))
    assert groups.nunique() == 80
    assert groups.groupby(images.rows["path"].str[-9:-5]).nunique().max() == 1


def test_copies_are_small_and_made_once(module, image_folder, tmp_path):
    cells = module("regret_cells")
    image_folder(
        tmp_path / "data" / "flowers5", {"": 4}, classes=["rose", "tulip"], size=(300, 200)
    )
    found = cells.read_set("flowers5", tmp_path / "work", tmp_path)
    assert found.classes == ("rose", "tulip")
    assert set(found.rows["height"]) == {cells.SIDE}
    assert set(found.rows["width"]) == {round(300 * cells.SIDE / 200)}
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "work").rglob("*.bmp")}
    cells.read_set("flowers5", tmp_path / "work", tmp_path)
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "work").rglob("*.bmp")}


def test_the_quick_grid_is_a_part_of_the_grid(module):
    cells = module("regret_cells")
    whole, quick = cells.grid(), cells.grid(quick=True)
    assert len(whole) == len(set(whole)) == 4 * 5 * 3 * 2
    assert set(quick) < set(whole)
    assert {cell.set for cell in whole[:4]} == {cell.set for cell in whole}


# --- the report ---------------------------------------------------------------------------------


def evidence(per_class, quality=0.9, images=None):
    none = Score(0.0, 0.01)
    stages = tuple(
        StageScore(name, 8, Score(value, 0.01), Score(value, 0.01))
        for name, value in (("stage4", quality / 2), ("features", quality))
    )
    return Evidence(
        Amount(images or 10 * per_class, 10, per_class, per_class, per_class, 60, 6),
        Backbone("net", 1000, ("stage0", "stage4", "head"), True, False, True, 112),
        Similarity(stages, Score(quality, 0.01), none, none, drift=0.1, drift_floor=0.01),
    )


def rows_of(name, per_class, quality, accuracy):
    """Results of one cell; a method that is better is right on more of the same images."""
    key = {"set": name, "per_class": per_class, "backbone": "net", "seed": 0}
    about = {"evidence": evidence(per_class, quality).to_dict(), "counts": {"test": TEST}}
    rows = [{"kind": "cell", **key, **about}]
    for method in METHODS:
        for rate in RATES:
            right = np.arange(TEST) < accuracy[method] - (rate != 1)
            rows.append(
                {
                    **{"kind": "fit", **key, "method": method, "rate": rate},
                    **{"acc": right.mean(), "val_acc": 0.5, "seconds": 1.0},
                    "hits": np.packbits(right).tobytes().hex(),
                }
            )
    return rows


@pytest.fixture
def results():
    similar = dict(zip(METHODS, (88, 88, 90, 89, 90, 90), strict=True))
    different = dict(zip(METHODS, (50, 55, 60, 65, 70, 80), strict=True))
    return [
        row
        for name in ("a", "b")
        for row in (
            *rows_of(name, 50, 0.9, similar),
            *rows_of(name, 10, 0.2, different),
            *rows_of(name, 3, 0.9, similar),
        )
    ]


def test_regret_counts_what_is_beyond_two_paired_errors(module, results):
    report = module("regret_report")
    [cell] = report.judged(
        rows_of("a", 50, 0.9, dict.fromkeys(METHODS, 80) | {"lp_ft": 95}), METHODS
    )
    assert cell.best == ("lp_ft", 1.0)
    assert cell.regret("linear_probe") == pytest.approx(15)
    assert cell.regret("lp_ft") == 0
    [near] = report.judged(
        rows_of("a", 50, 0.9, dict.fromkeys(METHODS, 80) | {"lp_ft": 83}), METHODS
    )
    # 3 of 100 images: a difference of 0.03 with a paired standard error of 0.0171.
    assert near.regret("linear_probe") == 0
    assert near.regret("linear_probe", counted=False) == pytest.approx(3)


def test_the_choice_is_asked_of_the_decision_anew(module, results):
    report = module("regret_report")
    cells = report.judged(results, METHODS)
    chosen = {cell.cell.per_class: cell.choice(Thresholds()) for cell in cells}
    assert chosen == {50: "lp_ft", 10: "lp_ft", 3: "wise_ft"}
    for cell in cells:
        assert cell.choice(Thresholds()).startswith(decide(cell.evidence).method)
    # Had the first row more of them, a few images more would be in it.
    moved = [c.choice(Thresholds(tiny=12)) for c in cells if c.cell.per_class == 10]
    assert set(moved) == {"wise_ft"}
    found = report.policies(cells, METHODS)
    auto = report.regrets(cells, found["auto"])
    assert auto.mean() == pytest.approx(0)
    assert report.regrets(cells, found["always linear_probe"]).max() == pytest.approx(30)
    assert len(found["at random"]) == len(cells) * len(METHODS)


def test_thresholds_are_fitted_without_the_set_that_judges(module, results, monkeypatch):
    report = module("regret_report")
    monkeypatch.setattr(report, "GRID", {"tiny": (5, 12)})
    cells = report.judged(results, METHODS)
    assert {t.tiny for t in report.leave_one_set_out(cells).values()} == {5}
    # Where different images gain nothing by fine-tuning, the other sets say so.
    flat = [
        row
        for name in ("a", "b")
        for row in rows_of(name, 10, 0.2, dict.fromkeys(METHODS, 80) | {"lp_ft": 40})
    ]
    cells = report.judged(
        [*flat, *rows_of("c", 10, 0.2, dict.fromkeys(METHODS, 40) | {"lp_ft": 80})], METHODS
    )
    fitted = report.leave_one_set_out(cells)
    assert fitted["c"].tiny == 12


def test_a_cell_with_a_missing_fit_does_not_count(module, results):
    report = module("regret_report")
    last = max(i for i, row in enumerate(results) if row["kind"] == "fit")
    assert len(report.judged(results[:last], METHODS)) == len(report.judged(results, METHODS)) - 1
    missing = {k: v for k, v in results[last].items() if k not in {"acc", "hits", "val_acc"}}
    refused = [*results[:last], {**missing, "error": "no such head"}]
    assert len(report.judged(refused, METHODS)) == len(report.judged(results, METHODS))


def test_a_fit_of_a_former_recipe_stands_in_for_the_oracle_alone(module):
    report, rates = module("regret_report"), module("regret_rates")
    rows = rows_of("a", 10, 0.2, dict.fromkeys(METHODS, 60))
    config = rates.method_config("lp_ft", evidence(10, 0.2), "quick")
    head = {"epochs": 2 * config.phases["head"].epochs, "head_lr": config.head_lr}
    right = np.arange(TEST) < 90

    def former(rate):
        phases = [head, {"head_lr": rate * rates.last_rate(config)}]
        hits = np.packbits(right).tobytes().hex()
        return {**rows[-1], "phases": phases, "acc": right.mean(), "hits": hits}

    def best(rows, **options):
        return [cell.best for cell in report.judged(rows, METHODS, **options)]

    assert best([*rows, former(1.0)])[0][0] in METHODS
    assert best([*rows, former(1.0)], every_fit=True) == [("former lp_ft", 1.0)]
    others = [row for row in rows if (row.get("method"), row.get("rate")) != ("lp_ft", 3.0)]
    assert best(others) == []
    assert best([*others, former(3.0)]) == [("former lp_ft", 3.0)]
    # At its own rate a policy needs a fit as today's recipe makes it.
    others = [row for row in rows if (row.get("method"), row.get("rate")) != ("lp_ft", 1.0)]
    assert best([*others, former(1.0)]) == []
    same = former(1.0) | {"phases": [{**head, "epochs": head["epochs"] // 2}, {"head_lr": 3e-3}]}
    assert rates.of_today(same, evidence(10, 0.2))
    assert best([*others, same]) == [("lp_ft", 1.0)]


def test_the_report_reads_a_file_and_draws(results, tmp_path):
    file, picture = tmp_path / "results.jsonl", tmp_path / "regret.png"
    command = [sys.executable, BENCHMARKS / "regret.py", "report", "--results", file]
    empty = subprocess.run(command, capture_output=True, text=True, check=False)
    assert empty.returncode == 1
    assert "has no fits" in empty.stderr
    assert "Traceback" not in empty.stderr
    file.write_text("".join(json.dumps(row) + "\n" for row in results))
    done = subprocess.run(
        [*command, "--picture", picture], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "6 complete cells with 108 fits" in done.stdout
    assert "| auto | 0.00 | 0.00 | 0.00 |" in done.stdout
    assert "always lp_ft" in done.stdout
    assert "| small, different | 2 | 80.0 | lp_ft × 1 | 80.0 | 0.0 ± 0.0 |" in done.stdout
    assert picture.stat().st_size > 10_000


def test_the_page_has_the_table_of_the_code():
    lines = PAGE.read_text().splitlines()
    for row in table_rows():
        [line] = [line for line in lines if line.startswith(f"| {row['amount']} |")]
        cells = [cell.strip() for cell in line.split("|")[2:4]]
        assert [cell.split("`")[1] for cell in cells] == [row["similar"], row["different"]]
