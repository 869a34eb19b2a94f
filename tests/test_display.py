from __future__ import annotations

import io
import math
import subprocess
import sys
import warnings
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tl import display
from tl.display import progress, tables
from tl.display.sections import bar_text
from tl.evaluation import Report, evaluate
from tl.figures import curves


class Section(NamedTuple):
    title: str
    kind: str
    rows: tuple[dict[str, object], ...]
    note: str = ""


def make_report(classes: list[str], images: int = 60, strength: float = 2.0) -> Report:
    rng = np.random.default_rng(0)
    labels = np.arange(images) % len(classes)
    p = np.exp(rng.normal(size=(images, len(classes))) + strength * np.eye(len(classes))[labels])
    return evaluate(p / p.sum(axis=1, keepdims=True), labels, classes, "val")


def make_history(lengths: dict[str, int], **columns: float) -> pd.DataFrame:
    rows = []
    for phase, epochs in lengths.items():
        for epoch in range(epochs):
            loss = 1 / (len(rows) + 1)
            row = {"phase": phase, "epoch": epoch, "train/loss": loss, "val/loss": loss + 0.1}
            rows.append({**row, "val/acc": 1 - loss / 2, "lr-AdamW/head": 1e-3 * loss, **columns})
    return pd.DataFrame(rows)


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


# --- text ---------------------------------------------------------------------------------------


def test_say_prints_one_line_as_it_is(capsys):
    line = "[bold]no markup[/bold] :smile: " + "x" * 300
    display.say(line)
    assert printed(capsys) == line + "\n"


def test_error_goes_to_stderr_and_indents_further_lines(capsys):
    display.error("data.root is required\nseed must be at least 0, got -1\n")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "error: data.root is required\n       seed must be at least 0, got -1\n"
    )


def test_no_colour_codes_outside_a_terminal():
    script = (
        "from tl import display\n"
        "display.results_table('t', [{'a': 1}])\n"
        "display.stage_table('s', [{'stage': 'a', 'parameters': 5, 'trainable': 5, 'lr': 0.1}])\n"
        "display.error('wrong')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stderr == "error: wrong\n"


def test_names_that_the_encoding_of_the_log_lacks_do_not_break_a_job():
    script = "from tl import display; display.results_table('t', [{'class': '蟻', 'n': 1}])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout


def test_importing_display_loads_neither_torch_nor_matplotlib_nor_pandas():
    heavy = {"torch", "matplotlib", "pandas"}
    script = f"import sys, tl.display; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "[]\n"


# --- tables -------------------------------------------------------------------------------------


def test_results_table_formats_by_column_and_aligns_numbers(capsys):
    rows = [
        {"method": "linear probe", "acc": 0.9123, "parameters": 1285, "lr": 1e-3, "ok": True},
        {"method": "scratch", "acc": None, "parameters": 389000, "lr": 2.5e-5, "extra": "x"},
    ]
    display.results_table("six methods", rows)
    title, head, rule, first, second, *rest = [s.rstrip() for s in printed(capsys).split("\n")]
    assert title == "six methods"
    assert head.split() == ["method", "acc", "parameters", "lr", "ok", "extra"]
    assert set(rule) == {"─"}
    assert first.split() == ["linear", "probe", "0.912", "1,285", "1.00e-03", "yes", "–"]
    assert second.split() == ["scratch", "–", "389,000", "2.50e-05", "–", "x"]
    assert first.index("1,285") + 5 == second.index("389,000") + 7 == head.index("parameters") + 10
    assert rest == ["", ""]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.5, 1.0], ["0.500", "1.000"]),
        ([12.345, 3.0], ["12.3", "3.0"]),
        ([9.876], ["9.88"]),
        ([123456.7, math.nan], ["123,457", "–"]),
        ([np.float32(0.25), np.int64(7)], ["0.250", "7"]),
        ([5e-4, 0.0], ["5.00e-04", "0.00e+00"]),
    ],
)
def test_floats_of_a_column_share_their_decimals(values, texts):
    assert tables._formatted(values) == texts


def test_a_wide_table_is_not_squeezed_in_a_log(capsys):
    display.results_table("wide", [{f"a column with a long name {i}": 10**i for i in range(9)}])
    lines = printed(capsys).split("\n")
    assert lines[1].count("a column with a long name") == 9
    assert "100,000,000" in lines[3]


def test_control_characters_of_names_do_not_reach_the_terminal(capsys):
    display.results_table("t", [{"class": "a\x1b[2Jb\nc"}])
    text = printed(capsys)
    assert "\x1b" not in text
    assert "a�[2Jb�c" in text


def test_stage_table_sums_and_marks_frozen_stages(capsys):
    display.stage_table(
        "phase 1 of 2: head",
        [
            {"stage": "0 (stem)", "parameters": 928, "trainable": 0, "lr": None},
            {"stage": "head", "parameters": 2562, "trainable": 2562, "lr": 1e-3},
        ],
    )
    lines = [line.split() for line in printed(capsys).split("\n")]
    assert lines[1] == ["stage", "parameters", "trainable", "lr"]
    assert lines[3] == ["0", "(stem)", "928", "–", "–"]
    assert lines[4] == ["head", "2,562", "2,562", "1.00e-03"]
    assert lines[6] == ["all", "3,490", "2,562"]


def test_stage_table_counts_flags_and_shows_the_audit(capsys):
    row = {"parameters": 10, "lr": None, "buffers": "unchanged"}
    display.stage_table(
        "after",
        [
            {"stage": "1", "trainable": False, "weights": "unchanged", **row},
            {"stage": "2", "trainable": True, "weights": "moved", **row},
        ],
    )
    lines = [line.split() for line in printed(capsys).split("\n")]
    assert lines[3] == ["1", "10", "–", "–", "unchanged", "unchanged"]
    assert lines[6] == ["all", "20", "10"]


def test_report_shows_metrics_classes_and_confusion(capsys):
    p = [[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]]
    display.report(evaluate(p, [0, 0, 1, 1], ["ants", "bees"], "val"))
    lines = [line.rstrip() for line in printed(capsys).split("\n")]
    assert lines[0] == "val: accuracy 75.0 % (95 % interval 30.1 % to 95.4 %), 4 images"
    assert lines[1].startswith("     macro F1 0.733, balanced accuracy 0.750, loss 0.511")
    row = ["ants", "2", "0.667", "1.000", "0.800", "0.34", "to", "1.00"]
    assert row in [line.split() for line in lines]
    title = lines.index("val: confusion (rows: true class, columns: predicted class)")
    assert lines[title + 1].split() == ["ants", "bees"]
    assert lines[title + 3].split() == ["ants", "2", "·"]
    assert lines[title + 4].split() == ["bees", "1", "1"]


def test_report_of_many_classes_shows_the_weakest_and_counts_the_rest(capsys):
    report = make_report([f"c{i}" for i in range(40)], images=400, strength=3)
    display.report(report)
    text = printed(capsys)
    assert "per class, the 20 with the lowest F1 (20 more are not shown)" in text
    assert "confusion" not in text
    shown = [
        line.split()[0] for line in text.split("\n") if line.startswith("c") and "cl" not in line
    ]
    assert shown == report.per_class.sort_values("f1", kind="stable")["class"].head(20).tolist()


def test_columns_of_a_text_matrix_are_numbered_where_names_are_long(capsys):
    display.report(make_report([f"a rather long class name {i}" for i in range(12)], images=24000))
    lines = printed(capsys).split("\n")
    title = next(i for i, line in enumerate(lines) if "confusion" in line)
    assert lines[title + 1].split() == [str(i) for i in range(1, 13)]
    assert lines[title + 3].startswith(" 1 a rather long class name 0")
    assert not any("…" in line for line in lines[title:])


# --- progress -----------------------------------------------------------------------------------


def test_bar_writes_plain_lines_in_a_log_at_most_every_so_many_seconds(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 9.9, 10.0, 15.0, 21.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with display.bar("checking images") as update:
        for done in (100, 990, 1000, 1500, 2100):
            update(done, 2500)
    assert printed(capsys).split("\n") == [
        "checking images: 1,000 of 2,500 images",
        "checking images: 2,100 of 2,500 images",
        "",
    ]


def test_bar_draws_on_a_terminal(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(
        progress, "console", tables.Console(file=screen, force_terminal=True, width=80)
    )
    with display.bar("reading [x]", unit="rows") as update:
        update(3, 10)
    assert "reading [x]" in screen.getvalue()
    assert "3/10" in screen.getvalue()


# --- pictures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10, 40, 130])
def test_confusion_picture_shows_every_class_and_count(tmp_path, monkeypatch, classes):
    drawn = drawn_figures(monkeypatch)
    report = make_report([f"kind {i}" for i in range(classes)], images=3 * classes)
    display.save_confusion(report, tmp_path / "pictures" / "confusion.png")
    (axes, bar) = drawn[0].axes
    assert axes.get_xlabel().startswith("predicted class")
    assert axes.get_ylabel().startswith("true class")
    assert axes.get_title(loc="left").startswith(
        f"val: accuracy {100 * report.metrics['acc']:.1f} %"
    )
    assert bar.get_ylabel() == "share of the true class"
    if classes <= 100:
        assert [t.get_text() for t in axes.get_yticklabels()] == list(report.classes)
    if classes <= 60:
        counts = [int(t.get_text()) for t in axes.texts]
        assert counts == report.confusion[report.confusion > 0].tolist()
    assert_picture(tmp_path / "pictures" / "confusion.png")


def test_numbers_of_the_confusion_picture_stand_out_from_their_cell(tmp_path, monkeypatch):
    drawn = drawn_figures(monkeypatch)
    display.save_confusion(make_report(["a", "b", "c"], images=300), tmp_path / "c.png")
    axes = drawn[0].axes[0]
    for text in axes.texts:
        x, y = text.get_position()
        value = axes.images[0].get_array()[y, x]
        shade = np.dot(axes.images[0].to_rgba(np.array([value]))[0][:3], [0.299, 0.587, 0.114])
        assert (text.get_color() == "white") == (shade < 0.5) or 0.35 < shade < 0.65


@pytest.mark.parametrize(
    "lengths",
    [
        {"head": 1},
        {"head": 4},
        {"head": 3, "all": 5},
        {f"unfreeze stage {i}": 1 + i for i in range(5)},
    ],
)
def test_curves_mark_phases_and_the_epoch_that_was_kept(tmp_path, monkeypatch, lengths):
    drawn = drawn_figures(monkeypatch)
    display.save_curves(make_history(lengths), tmp_path / "curves.png")
    loss, accuracy, rate = drawn[0].axes
    assert [loss.get_ylabel(), accuracy.get_ylabel()] == ["loss", "accuracy"]
    assert rate.get_ylabel() == "learning rate"
    assert rate.get_xlabel() == "epoch"
    assert [t.get_text() for t in loss.texts] == list(lengths)
    ends = np.cumsum(list(lengths.values()))
    circles = [line.get_xdata()[0] for line in loss.lines if line.get_markersize() == 8]
    assert circles == ends.tolist()  # the loss of this history falls in every epoch
    borders = [line.get_xdata()[0] for line in loss.lines if line.get_color() == "black"]
    assert borders == (ends[:-1] + 0.5).tolist()
    assert [t.get_text() for t in loss.get_legend().get_texts()][:2] == ["train", "val"]
    assert_picture(tmp_path / "curves.png")


def test_curves_take_values_of_an_epoch_from_several_rows():
    whole = make_history({"head": 3, "all": 2})
    losses, rest = whole[["phase", "epoch", "train/loss"]], whole.drop(columns="train/loss")
    table, phases = curves._one_axis(pd.concat([losses, rest]))
    assert phases == [("head", 1, 3), ("all", 4, 5)]
    assert table["x"].tolist() == [1, 2, 3, 4, 5]
    assert table["train/loss"].tolist() == whole["train/loss"].tolist()
    assert table["val/loss"].tolist() == whole["val/loss"].tolist()


def test_epochs_that_are_counted_on_over_phases_land_on_the_same_axis():
    history = make_history({"head": 3, "all": 2})
    counted_on = history.assign(epoch=range(5))
    assert curves._one_axis(counted_on)[1] == curves._one_axis(history)[1]


def test_groups_with_equal_learning_rates_share_one_line():
    table = pd.DataFrame(
        {
            "x": [1, 2],
            "lr-AdamW/head/decay": [1e-3, 1e-4],
            "lr-AdamW/head/no_decay": [1e-3, 1e-4],
            "lr-AdamW/stage4": [np.nan, 1e-5],
            "lr-SGD/stage4": [1e-2, np.nan],
            "lr-AdamW/stage3": [0.0, np.nan],
        }
    )
    rates = curves._learning_rates(table)
    assert list(rates) == ["head", "stage4"]
    assert rates["stage4"].tolist() == [1e-2, 1e-5]


def test_groups_without_the_name_of_an_optimizer_are_known_too():
    table = pd.DataFrame({"x": [1], "lr/head": [1e-3], "lr/head/no_decay": [1e-3], "lr/4": [1e-4]})
    assert list(curves._learning_rates(table)) == ["head", "4"]


def test_pictures_bear_names_with_formula_signs_and_foreign_scripts(tmp_path):
    report = make_report(["a $x_1$ \\frac", "蟻", "x" * 90])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        display.save_confusion(report, tmp_path / "c.png")
        display.save_curves(make_history({"50 % $": 2}), tmp_path / "l.png")
    assert_picture(tmp_path / "c.png")


def test_the_suffix_chooses_the_format_and_nothing_else_is_left(tmp_path):
    display.save_confusion(make_report(["a", "b"]), tmp_path / "c.pdf")
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")
    assert [p.name for p in tmp_path.iterdir()] == ["c.pdf"]


def drawn_figures(monkeypatch):
    """Figures in the order in which they are made, to look at what is on them."""
    from matplotlib import figure

    made = []

    class Kept(figure.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(figure, "Figure", Kept)
    return made


def assert_picture(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 400
        pixels = np.asarray(image.convert("L"))
    # Nothing is cut off: the margin is white all around, and there is ink inside.
    edges = (pixels[:4], pixels[-4:], pixels[:, :4], pixels[:, -4:])
    assert all((edge == 255).all() for edge in edges)
    assert (pixels < 128).mean() > 0.002


# --- sections -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "line"),
    [
        ((0.5, 0.3, 0.7), "███━━●━···"),
        ((1.0, 1.0, 1.0), "█████████●"),
        ((0.95, 0.9, 1.2), "█████████●"),
        ((-0.2, -0.4, 0.0), "●·········"),
        ((0.0, -0.9, 0.9), "●━━━━━━━━·"),
    ],
)
def test_a_bar_shows_value_and_interval_and_never_leaves_its_width(score, line):
    assert bar_text(*score, width=10) == line


def test_sections_mark_the_cell_and_fit_a_log(capsys):
    cell = {"similar": "lp_partial", "different": "lp_ft", "marked": ""}
    display.sections(
        [
            Section(
                "how to transfer",
                "grid",
                (
                    {**cell, "amount": "small: 5 to 19"},
                    {**cell, "amount": "medium: 20 to 99", "marked": "different"},
                ),
                "A long rule that says why, with its numbers. " * 5,
            ),
            Section("stages", "bars", ({"name": "stage1", "value": 0.5, "low": 0.4, "high": 0.6},)),
            Section("why", "list", ({"text": "first reason " * 12}, {"text": "second\x1b[31m"})),
            Section("facts", "facts", ({"name": "amount", "text": "12 a class"},)),
            Section("table", "table", ({"model": "a", "quality": 0.5},)),
            Section("later", "hologram", ({"text": "not known here"},)),
        ]
    )
    text = printed(capsys)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split() for line in lines if "medium" in line] == [
        ["medium:", "20", "to", "99", "lp_partial", "[lp_ft]"]
    ]
    assert "0.50 (0.40 to 0.60)" in text
    assert sum(line.startswith("- ") for line in lines) == 2
    assert "amount  12 a class" in text
    assert "hologram" not in text
    assert "not known" not in text
    assert "\x1b" not in text
