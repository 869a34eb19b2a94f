"""`tl compare` on folders: verdicts on runs that are known to differ or not; what is refused."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from commands import Command
from runs_made import Maker, answers, pictures, values

from tl.comparison.families import Family, family_pairs
from tl.comparison.judging import groups_of
from tl.config import Task
from tl.evaluation import PairSide, sheet_of


@pytest.fixture
def command(capfd, monkeypatch) -> Command:
    return Command(capfd, monkeypatch)


@pytest.fixture
def made(tmp_path) -> Maker:
    return Maker(tmp_path)


def test_a_clear_winner_a_tie_and_what_would_tell(command, made, tmp_path):
    names = ["good", "like", "bad"]
    for name, quality in zip(names, (0.9, 0.895, 0.6), strict=True):
        made(name, quality, f"finetune.lr_ratio={len(name)}")
    out = tmp_path / "out"
    done = command("compare", f"runs={tmp_path / 'runs'}", f"output_dir={out}")
    assert done.code == 0, done.err
    assert " beats 1 (bad)." in done.out.replace("\n  ", " ")
    assert "No difference can be shown" in done.out
    found = values(out)
    by_name = {run["name"].rpartition(" ")[2]: run for run in found["runs"]}
    pair = {(p["a"], p["b"]): p for p in found["pairs"]}
    assert len(pair) == 3
    assert found["best"] in (by_name["good"]["id"], by_name["like"]["id"])
    clear = next(p for p in found["pairs"] if p["b"] == by_name["bad"]["id"])
    assert clear["verdict"] == "a"
    assert clear["low"] > 0.2
    assert clear["p"] < clear["p_adjusted"] < 1e-6
    tie = next(p for p in found["pairs"] if by_name["bad"]["id"] not in (p["a"], p["b"]))
    assert tie["verdict"] == "none"
    assert "no difference can be shown" in tie["words"]
    assert tie["detectable"] > abs(tie["difference"])
    for name in names:
        metrics = json.loads((tmp_path / "runs" / name / "metrics.json").read_text())
        assert by_name[name]["value"] == pytest.approx(metrics["test/acc"])
        assert by_name[name]["low"] == pytest.approx(metrics["test/acc_low"], abs=1e-6)
        assert by_name[name]["curve"]["y"] == [0.5, 0.7]
        assert [m["phase"] for m in by_name[name]["curve"]["marks"]] == ["head", "all"]
        images = sum(by_name[name]["reliability"]["images"])
        assert images == 200
    assert found["varied"] == ["params.finetune.lr_ratio"]
    assert {p.name for p in out.iterdir()} == {"compare.json", "compare.csv", "compare.html"}
    table = pd.read_csv(out / "compare.csv")
    assert sorted(table["verdict"]) == ["no difference shown", "reference", "worse"]
    assert table["acc"].is_monotonic_decreasing
    assert "NaN" not in (out / "compare.json").read_text()


def test_a_baseline_is_the_side_of_every_pair(command, made, tmp_path):
    runs = [made(name, q) for name, q in (("a", 0.9), ("b", 0.7), ("c", 0.9))]
    out = tmp_path / "out"
    asked = f"runs={','.join(map(str, runs))}"
    done = command("compare", asked, f"baseline={runs[1]}", f"output_dir={out}")
    assert done.code == 0, done.err
    found = values(out)
    assert found["reference"] == found["baseline"] == str(runs[1])
    assert [p["a"] for p in found["pairs"]] == [str(runs[1])] * 2
    assert {p["verdict"] for p in found["pairs"]} == {"b"}
    assert "Better than b: 2" in done.out


def test_changed_images_are_shown_where_they_are_still_the_same(command, made, tmp_path):
    a, b = made("a", 0.95), made("b", 0.6)
    out = tmp_path / "out"
    changed = made.rows["path"].iloc[0]
    assert command("compare", f"runs={a},{b}", f"output_dir={out}").code == 0
    found = values(out)
    assert found["pair"] == [str(a), str(b)]
    flip = found["flips"][0]
    one, other = (pd.read_parquet(p / "predictions.parquet") for p in (a, b))
    row = one.index[one["sha256"] == flip["sha256"]][0]
    assert flip["image"] == one["path"][row]
    assert flip["label"] == one["label"][row] == flip["a"]["predicted"]
    assert flip["b"]["predicted"] == other["predicted"][row] != flip["label"]
    assert all(f["thumbnail"].startswith("data:image/jpeg") for f in found["flips"])
    assert len(found["flips"]) == 60
    recalls = {c["class"]: (c["a"], c["b"]) for c in found["classes"]}
    ants = one["label"] == "ant"
    assert recalls["ant"] == pytest.approx(
        (one["correct"][ants].mean(), other["correct"][ants].mean())
    )
    for path in (tmp_path / "images/test").iterdir():
        path.write_bytes(b"another image")
    assert command("compare", f"runs={a},{b}", f"output_dir={tmp_path / 'again'}").code == 0
    assert {f["thumbnail"] for f in values(tmp_path / "again")["flips"]} == {None}
    assert changed


def test_runs_on_other_images_labels_or_classes_are_never_laid_beside_each_other(
    command, made, tmp_path
):
    made("a", 0.9), made("b", 0.9)
    made("images", 0.95, of=pictures(tmp_path / "images", 200, "other"))
    wrong = made.rows.assign(label=(made.rows["label"] + (made.rows.index < 7)) % 3)
    made("labels", 0.95, of=wrong)
    folder = made("classes", 0.95)
    table = pd.read_parquet(folder / "predictions.parquet").rename(columns={"p_wasp": "p_hornet"})
    table = table.replace({"label": {"wasp": "hornet"}, "predicted": {"wasp": "hornet"}})
    table.to_parquet(folder / "predictions.parquet")
    out = tmp_path / "out"
    done = command("compare", f"runs={tmp_path / 'runs'}", f"output_dir={out}")
    assert done.code == 0, done.err
    found = values(out)
    assert sorted(len(g["runs"]) for g in found["groups"]) == [1, 1, 1, 2]
    words = {p["words"].partition("not comparable: ")[2] for p in found["pairs"]} - {""}
    assert any(w.startswith("other images (0 in common, 200 and 200 not)") for w in words)
    assert any(w.startswith("other labels of the same images: test/000.png") for w in words)
    assert any("only one has wasp; only the other has hornet" in w for w in words)
    assert "3 more runs in 3 other groups are not comparable" in done.out.replace("\n  ", " ")
    best = next(run for run in found["runs"] if run["id"] == found["best"])
    assert best["group"] == 0
    assert {p["p"] for p in found["pairs"] if p["verdict"] == "incomparable"} == {None}


@pytest.mark.parametrize(("task", "metric"), [(Task.multi, "map"), (Task.regression, "mae")])
def test_several_labels_and_numbers_are_compared_too(command, made, tmp_path, task, metric):
    a, b = made("a", 0.9, task=task), made("b", 0.6, task=task)
    out = tmp_path / "out"
    done = command("compare", f"runs={a},{b}", f"output_dir={out}")
    assert done.code == 0, done.err
    found = values(out)
    assert found["metric"] == metric
    assert found["best"] == str(a)
    assert found["pairs"][0]["verdict"] == "a"
    assert found["lower_is_better"] is (metric == "mae")
    logged_value = json.loads((a / "metrics.json").read_text())[f"test/{metric}"]
    assert found["runs"][0]["value"] == pytest.approx(logged_value, abs=1e-6)
    assert len(found["flips"]) > 20
    assert found["flips"][0]["a"]["predicted"] != found["flips"][0]["b"]["predicted"]
    assert bool(found["classes"]) is (metric == "map")
    assert "beats" in done.out


def test_seeds_are_one_family_and_say_what_holds_beyond_them(command, made, tmp_path):
    for seed in range(4):
        made(f"x{seed}", 0.9, "finetune.lr_ratio=3", seed=seed)
        made(f"y{seed}", 0.7, "finetune.lr_ratio=10", seed=seed)
    made("twice", 0.7, "finetune.lr_ratio=10", seed=3)
    out = tmp_path / "out"
    done = command("compare", f"runs={tmp_path / 'runs'}", f"output_dir={out}")
    assert done.code == 0, done.err
    found = values(out)
    assert [(f["name"], f["seeds"]) for f in found["families"]] == [
        ("lr_ratio 3.0", [0, 1, 2, 3]), ("lr_ratio 10.0", [0, 1, 2, 3])
    ]  # fmt: skip
    member = {run["id"]: run for run in found["runs"]}
    first = found["families"][0]
    own = [member[run]["value"] for run in first["runs"]]
    assert first["mean"] == pytest.approx(np.mean(own))
    assert first["std"] == pytest.approx(np.std(own, ddof=1))
    assert {member[run]["family"] for run in first["runs"]} == {0}
    (pair,) = found["family_pairs"]
    assert (pair["a"], pair["b"], pair["verdict"]) == (0, 1, "a")
    assert "also beyond these seeds" in done.out.replace("\n", " ")
    assert "9 models were judged on these test images" in done.out.replace("\n  ", " ")
    assert found["optimism"] > 0
    assert found["varied"] == ["params.finetune.lr_ratio", "params.seed"]


def test_families_of_equal_settings_are_told_apart_no_more_often_than_promised(made):
    """Models whose luck is in the seed and in the images; families of three of each."""
    rng = np.random.default_rng(0)
    truth = sheet_of(answers(made.rows, 0.9, 0)[0], "test").truth
    told = held = 0
    for _ in range(300):
        hard = rng.normal(0, 1, 200)
        right = {}
        for number in range(6):
            skill = 1.2 + rng.normal(0, 0.15)
            right[str(number)] = (skill + rng.normal(0, 0.7, 200) > hard).astype(float)
        group = groups_of_sides(truth, right)
        families = [
            Family("a", ("0", "1", "2"), (0, 1, 2)),
            Family("b", ("3", "4", "5"), (0, 1, 2)),
        ]
        (pair,) = family_pairs(families, group, 0.95)
        told += pair["verdict"] != "none"
        held += pair["low"] <= 0 <= pair["high"]
    assert told / 300 <= 0.08
    assert 0.92 <= held / 300 <= 0.995


def groups_of_sides(truth, right):
    from tl.comparison.judging import Group

    ids = tuple(right)
    sides = tuple(PairSide(right[run]) for run in ids)
    means = tuple(float(side.values.mean()) for side in sides)
    return Group(truth, "acc", ids, sides, means, means, means, 0, (), 0.0, None)


def test_the_best_of_many_equal_models_beats_another_no_more_often_than_promised(made):
    """All pairs are counted where the best is chosen by the same images."""
    rng = np.random.default_rng(0)
    base = sheet_of(answers(made.rows, 0.9, 0)[0], "test")
    told = 0
    for _ in range(40):
        hard = rng.normal(0, 1, 200)
        sheets = {}
        for number in range(12):
            right = 1.0 + rng.normal(0, 0.8, 200) > hard
            said = np.where(right, base.truth.truth, (base.truth.truth + 1) % 3)
            sheets[str(number)] = type(base)("test", base.truth, said, base.score)
        (group,) = groups_of(sheets, None, 0.95)
        told += any(pair.p_adjusted <= 0.05 for pair in group.pairs)
    assert told / 40 <= 0.1


def test_without_test_images_val_is_compared_with_a_warning(command, made, tmp_path):
    for name, quality in (("a", 0.9), ("b", 0.7)):
        folder = made(name, quality)
        table = pd.read_parquet(folder / "predictions.parquet").assign(split="val")
        table.to_parquet(folder / "predictions.parquet")
    out = tmp_path / "out"
    done = command("compare", f"runs={tmp_path / 'runs'}", f"output_dir={out}")
    assert done.code == 0, done.err
    assert values(out)["split"] == "val"
    assert "These are val images, on which training chose its epochs" in done.out


def test_folders_that_cannot_be_compared_say_why(command, made, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    command("compare", f"runs={empty},{empty / 'x'}").refused(f"{empty} holds no run")
    old, cut, bare = made("old", 0.9), made("cut", 0.9), made("bare", 0.9)
    table = pd.read_parquet(old / "predictions.parquet").drop(columns="sha256")
    table.to_parquet(old / "predictions.parquet")
    (cut / "predictions.parquet").write_bytes(b"PAR1 and no more")
    (bare / "predictions.parquet").unlink()
    done = command("compare", f"runs={old},{cut},{bare}", f"output_dir={tmp_path / 'out'}")
    done.refused("no column sha256", "predictions.parquet cannot be read", "tl evaluate")
    assert not (tmp_path / "out").exists()
    good = made("good", 0.9)
    command("compare", f"runs={good},{bare}", f"baseline={bare}").refused(
        "baseline:", "cannot be compared"
    )
    (good / "config.yaml").write_text("a: [")
    command("compare", f"runs={good},{bare}").refused("config.yaml cannot be read")


def test_an_output_folder_that_cannot_be_written_is_said(command, made, tmp_path):
    a, b = made("a", 0.9), made("b", 0.8)
    (tmp_path / "file").write_text("")
    done = command("compare", f"runs={a},{b}", f"output_dir={tmp_path / 'file/out'}")
    done.refused("cannot write", "choose another output_dir")


def test_equal_figures_are_shared_and_the_cheaper_run_comes_first(command, made, tmp_path):
    dear, cheap, worse = made("longer", 0.9), made("short", 0.9), made("third", 0.7)
    out = tmp_path / "out"
    done = command("compare", f"runs={dear},{cheap},{worse}", f"output_dir={out}")
    assert done.code == 0, done.err
    assert values(out)["best"] == str(cheap)
    assert "2 runs with" in done.out
    assert "short, longer, the cheapest first" in done.out.replace("\n  ", " ")
    assert "They are right and wrong on the same images" in done.out.replace("\n  ", " ")
