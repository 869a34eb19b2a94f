"""The page of a comparison: as text, and in a real browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re

import pytest
from browser import PHONE, complaints, opened, until
from commands import Command
from compared import HOSTILE, comparison
from runs_made import answers, pictures, run_folder

from tl.comparison.page import page as written
from tl.comparison.shown import axes, columns, metric_text, number_text, seconds_text
from tl.config import Task


@pytest.fixture
def look(browser, tmp_path):
    def look(values, *, drawn=True, **options):
        file = tmp_path / "compare.html"
        file.write_text(written(values))
        return _Drawn(opened(browser, file, **options), drawn)

    return look


class _Drawn:
    """A page that is ready: its plots are drawn."""

    def __init__(self, page, drawn):
        self.page, self.drawn = page, drawn

    def __enter__(self):
        page = self.page.__enter__()
        if self.drawn:
            page.wait_for_selector("html[data-drawn]", state="attached", timeout=20_000)
        return page

    def __exit__(self, *error):
        return self.page.__exit__(*error)


# Pixels that each plot has drawn.
INK = """[...figures.values()].map(view => {
  const { canvas, ctx } = view.canvas_view.primary;
  const { data } = ctx.getImageData(0, 0, canvas.width, canvas.height);
  return data.filter((value, i) => i % 4 === 3 && value > 0).length;
})"""


def names(page):
    return page.locator("#table tbody th").evaluate_all(
        "cells => cells.map(c => (c.querySelector('a') ?? c.childNodes[1]).textContent.trim())"
    )


def cells(page, key):
    """Texts of a column, as they stand below each other."""
    return page.evaluate(
        """key => { const heads = [...document.querySelectorAll('#table thead th')];
        const at = heads.findIndex(c => (c.dataset.key ?? '') === key);
        return [...document.querySelectorAll('#table tbody tr')].map(r => r.cells[at].textContent);
        }""",
        key,
    )


def test_page_needs_nothing_else_and_names_its_scripts():
    text = written(comparison(4))
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text).group(1)
    assert "default-src 'none'" in policy.replace("&#39;", "'")
    assert "unsafe-eval" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    hashes = re.findall(r"sha256-([A-Za-z0-9+/=]+)", policy.replace("&#43;", "+"))
    assert len(scripts) == 5
    assert hashes == [
        base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts
    ]
    assert not re.search(r"<(link|img|script|iframe)[^>]*(src|href)=\"?(?!data:)[a-z]", text)


def test_names_from_outside_stay_text():
    values = comparison(3)
    values["runs"][0]["name"] = HOSTILE
    values["runs"][1]["params"]["params.model.name"] = HOSTILE
    values["classes"][0]["class"] = HOSTILE
    values["flips"][0]["a"]["predicted"] = HOSTILE
    values["summary"] = values["title"], values["experiment"] = [HOSTILE], HOSTILE
    text = written(values)
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert HOSTILE in [run["name"] for run in json.loads(data.group(1))["runs"]]


def test_a_number_that_is_none_is_refused_not_written():
    values = comparison(2)
    values["runs"][0]["cost"]["fit_seconds"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        written(values)


@pytest.mark.parametrize(
    ("metric", "value", "text", "points"),
    [
        ("acc", 0.9412, "94.1 %", "+94.1 points"),
        ("map", 0.9412, "94.1 %", "+94.1 points"),
        ("loss", 0.9412, "0.941", "+0.941"),
        ("mae", 1234.5, "1234", "+1234"),
        ("mae", None, "–", "–"),
    ],
)
def test_values_read_as_on_the_screen(metric, value, text, points):
    assert metric_text(metric, value) == text
    assert metric_text(metric, value, difference=True) == points


def test_columns_leave_out_what_no_run_has_and_hide_what_is_rarely_asked():
    values = comparison(3)
    for run in values["runs"]:
        run["cost"]["ms_an_image"] = None
        run |= {"verdict": "worse", "full": run["name"]}
    found = {column["key"]: column for column in columns(values, values["runs"])}
    assert "ms_an_image" not in found
    assert found["value"]["texts"][0] == f"{100 * values['runs'][0]['value']:.1f} %"
    assert found["parameters"]["texts"] == ["2.2 M", "11.2 M", "21.7 M"]
    assert found["params.optim.lr"]["kind"] == "number"
    assert [key for key in ("value", "verdict", "seed") if found[key]["shown"]] == [
        "value",
        "verdict",
    ]


def test_a_file_is_named_without_its_folder():
    assert number_text("/data/weights/of/resnet18.a1.safetensors") == "resnet18.a1.safetensors"
    assert number_text("a/short.one") == "a/short.one"
    assert number_text(HOSTILE) == HOSTILE


def test_axes_are_logarithmic_where_values_span_decades():
    values = comparison(6)
    found = {axis["label"]: axis for axis in axes(values, values["runs"])}
    assert found["optim.lr"]["places"] == pytest.approx([1, 1, 0.5, 0.5, 0, 0])
    assert [text for _, text in found["optim.lr"]["ticks"]] == ["0.0001", "0.001", "0.01"]
    places = [1 / 8 + k / 4 for k in (1, 2, 3, 0)]  # by the alphabet
    assert found["model.name"]["places"] == pytest.approx([*places, *places[:2]])
    values["runs"][1]["params"]["params.optim.lr"] = None
    found = {axis["label"]: axis for axis in axes(values, values["runs"])}
    assert found["optim.lr"]["places"][1] is None


def test_a_setting_that_says_the_same_as_another_has_no_axis_and_no_column_at_once():
    values = comparison(6)
    for run in values["runs"]:
        run["params"]["params.weights"] = run["params"]["params.model.name"] + ".safetensors"
        run |= {"verdict": "worse", "full": run["name"]}
    values["varied"].append("params.weights")
    labels = [axis["label"] for axis in axes(values, values["runs"])]
    assert "model.name" in labels
    assert "weights" not in labels
    shown = {c["key"]: c["shown"] for c in columns(values, values["runs"])}
    assert shown["params.model.name"]
    assert not shown["params.weights"]


def test_what_would_lie_on_another_text_of_an_axis_is_left_out():
    values = comparison(3)
    for run, value in zip(values["runs"], (0.5, 0.899, 0.9), strict=True):
        run["value"] = value
    assert [text for _, text in axes(values, values["runs"])[-1]["ticks"]] == ["50.0 %", "90.0 %"]


def test_opens_from_a_file_without_error_or_request(look):
    with look(comparison(24)) as page:
        assert page.title() == "Comparison of flowers"
        assert page.locator("#count").text_content() == "24 runs"
        inks = page.evaluate(INK)
        assert len(inks) == 7  # three plots and four panels
        assert min(inks) > 500, inks


def test_scripts_in_names_do_not_run(look):
    values = comparison(3)
    values["runs"][0]["name"] = values["classes"][0]["class"] = HOSTILE
    values["runs"][1]["params"]["params.model.name"] = HOSTILE
    with look(values) as page:
        assert HOSTILE in names(page)
        page.locator("#colour").select_option("model.name")
        assert HOSTILE in page.locator("[data-legend]").first.text_content()


def test_sorts_by_buttons_that_say_how(look):
    values = comparison(24)
    values["runs"][5]["cost"]["fit_seconds"] = None
    with look(values) as page:
        assert names(page)[0].endswith(max(values["runs"], key=lambda r: r["value"])["name"][-4:])
        head = page.locator("th[data-key=fit_seconds]")
        head.get_by_role("button").focus()
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == "ascending"
        assert "sorted by training, ascending" in page.locator("#count").text_content()
        seconds = [run["cost"]["fit_seconds"] for run in values["runs"]]
        wanted = [seconds_text(s) for s in sorted(s for s in seconds if s is not None)]
        assert cells(page, "fit_seconds") == [*wanted, "–"]
        page.keyboard.press("Enter")
        assert head.get_attribute("aria-sort") == "descending"
        assert cells(page, "fit_seconds") == [*wanted[::-1], "–"]
        page.locator("th[data-key='params.model.name'] button").click()
        assert head.get_attribute("aria-sort") is None
        assert cells(page, "params.model.name") == sorted(
            run["params"]["params.model.name"] for run in values["runs"]
        )


def test_filters_by_words_and_settings(look):
    values = comparison(24)
    cases = {
        "CONVNEXT": lambda r: "convnext" in r["name"],
        "convnext lp_ft": lambda r: "convnext" in r["name"] and "lp_ft" in r["name"],
        "-convnext": lambda r: "convnext" not in r["name"],
        "lr<0.005": lambda r: r["params"]["params.optim.lr"] < 0.005,
        "optim.lr=0.01": lambda r: r["params"]["params.optim.lr"] == 0.01,
        "accuracy>85%": lambda r: r["value"] > 0.85,
        "-model.name=resnet18.a1_in1k": lambda r: "resnet" not in r["name"],
        '"· full ·"': lambda r: "· full ·" in r["name"],
        "nothing-like-this": lambda r: False,
    }
    with look(values, drawn=False) as page:
        for wanted, keeps in cases.items():
            expected = {run["name"] for run in values["runs"] if keeps(run)}
            page.locator("#filter").fill(wanted)
            assert set(names(page)) == expected, wanted
            assert page.locator("#count").text_content() == f"{len(expected)} of 24 runs"
        page.locator("#filter").fill("")
        assert len(names(page)) == 24


def test_a_filter_narrows_the_plots_too(look):
    with look(comparison(24)) as page:
        page.locator("#filter").fill("convnext")
        shown = "[...sources.values()].map(({ view }) => view.filter.indices?.length ?? 24)"
        until(page, f"{shown}.every(n => n === 6)")
        assert "convnext" in page.locator("#front").text_content()
        assert "mobilenet" not in page.locator("#front").text_content()


def test_columns_come_and_go(look):
    values = comparison(6)
    with look(values, drawn=False) as page:
        page.locator("#choose summary").click()
        page.get_by_label("top5").check()
        assert cells(page, "metric top5") == ["99.0 %"] * 6
        page.locator("th[data-key='metric top5'] button").click()
        page.get_by_label("parameters", exact=True).uncheck()
        assert page.locator("th[data-key=parameters]").is_hidden()
        assert page.locator("#table tbody tr").first.locator("td:visible").count() == 10


def test_choosing_runs_links_table_and_plots_and_tells_what_is_known(look):
    values = comparison(12)
    best = max(values["runs"], key=lambda r: r["value"])
    with look(values) as page:
        boxes = page.locator("#table tbody input")
        boxes.nth(0).check()
        boxes.nth(1).check()
        chosen = "[...sources.values()].map(({ source }) => [...source.selected.indices])"
        assert page.evaluate(chosen) == [[0, 1]] * 3
        words = {p["b"]: p["words"] for p in values["pairs"] if p["a"] == best["id"]}
        assert page.locator("#count").text_content().endswith(next(iter(words.values())))
        boxes.nth(0).uncheck()
        boxes.nth(2).check()
        assert "tl compare runs=" in page.locator("#count").text_content()
        page.locator("#clear").click()
        assert page.evaluate(chosen) == [[]] * 3
        page.evaluate("document.documentElement.style.scrollBehavior = 'auto'")
        spot = page.evaluate(  # of the best run's point, in pixels of the window
            """() => { const view = figures.get('cost'); view.el.scrollIntoView();
            const box = view.el.getBoundingClientRect();
            const { data } = sources.get('cost').source;
            const { x_scale, y_scale } = view.frame;
            return [box.x + x_scale.compute(data.cost[0]), box.y + y_scale.compute(data.value[0])];
            }"""
        )
        page.mouse.click(*spot)
        assert (
            page.locator("#table tbody tr.chosen th")
            .all_text_contents()[0]
            .startswith(best["name"])
        )
        assert page.evaluate(chosen) == [[0]] * 3


def test_the_cost_can_be_changed(look):
    with look(comparison(12)) as page:
        page.locator("#cost-of").select_option("bytes of the weights")
        until(page, "figures.get('cost').model.below[0].axis_label.startsWith('bytes')")
        values = page.evaluate("steps.data.x")
        assert values == sorted(values)
        assert min(values) == 9_000_000


def milliseconds(page, script):
    """Processor time of the page's thread: others on the machine do not count."""
    page.evaluate(
        """() => { window.type = text => { const box = document.getElementById('filter');
        box.value = text; box.dispatchEvent(new Event('input', { bubbles: true }));
        document.getElementById('table').offsetHeight; } }"""
    )
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def task():
        metrics = session.send("Performance.getMetrics")["metrics"]
        return next(m["value"] for m in metrics if m["name"] == "TaskDuration")

    before = task()
    page.evaluate(f"() => {{ {script} }}")
    return 1000 * (task() - before)


def test_500_runs_stay_fluid(look):
    with look(comparison(500)) as page:
        assert page.locator("#count").text_content() == "500 runs"
        assert page.locator("#table tbody tr").count() == 50
        words = ["c", "co", "con", "conv", "con", "co", "c", "", "-c", "-co"]
        spent = milliseconds(page, f"for (const text of {words}) type(text);") / len(words)
        assert spent < 50, f"{spent:.0f} ms of work at each key"
        page.locator("#filter").fill("")
        page.get_by_role("button", name="show all 500 runs").click()
        assert page.locator("#table tbody tr").count() == 500
        assert page.evaluate("document.activeElement.closest('tr').rowIndex") == 51


@pytest.mark.parametrize("width", [390, 320])
def test_a_phone_needs_no_sideways_scrolling(look, width):
    options = {"viewport": PHONE | {"width": width}, "is_mobile": True, "has_touch": True}
    values = comparison(36)
    values["summary"].append("x" * 200)
    with look(values, **options) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # A finger on a plot scrolls the page: no tool of the plot takes it.
        touch = page.evaluate(
            "[...figures.values()].map(f => getComputedStyle(f.canvas_view.events_el).touchAction)"
        )
        assert set(touch) <= {"auto", "pan-x pan-y"}


def test_plots_follow_light_and_dark(look):
    colour = "String(figures.get('cost').model.below[0].axis_label_text_color)"
    with look(comparison(12), color_scheme="light") as page:
        until(page, f"{colour} === '#1a1a1a'")
        page.emulate_media(color_scheme="dark")
        until(page, f"{colour} === '#ececec'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_people_who_see_or_move_otherwise_can_use_it(look, scheme):
    values = comparison(6)
    values["runs"][3] |= {"group": None, "why_not": "it has no predictions.parquet"}
    with look(values, color_scheme=scheme, reduced_motion="reduce") as page:
        page.locator("#choose summary").click()
        page.locator("#table tbody input").nth(1).check()
        assert complaints(page) == []
        assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_everything_can_be_reached_by_keys(look):
    with look(comparison(3)) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        seen = set()
        for _ in range(80):
            page.keyboard.press("Tab")
            seen.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        assert {"filter", "colour", "INPUT", "BUTTON", "cost-of", "flips-of", "SUMMARY"} <= seen


def test_is_whole_without_scripts(look):
    values = comparison(12)
    with look(values, drawn=False, java_script_enabled=False) as page:
        assert page.locator("#table tbody tr").count() == 12
        assert "need scripts" in page.locator("noscript").inner_text()
        assert page.locator("#controls").is_hidden()


def test_prints_table_and_plots_and_leaves_the_controls_out(look):
    with look(comparison(12), color_scheme="dark") as page:
        page.evaluate(
            """addEventListener('beforeprint', () => {
            window.stills = [...document.querySelectorAll('.still')].map(s => s.src.length); })"""
        )
        assert page.pdf().startswith(b"%PDF")
        assert len(page.evaluate("stills")) == 7
        assert min(page.evaluate("stills")) > 5_000
        assert page.locator(".still").count() == 0
        page.emulate_media(media="print", color_scheme="dark")
        assert page.locator("#controls").is_hidden()
        assert page.locator("#table").is_visible()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(255, 255, 255)"
        )


def test_flips_can_be_narrowed(look):
    with look(comparison(6)) as page:
        page.locator("#flips-of").select_option("only A is right")
        assert page.locator("#cards > li:visible").count() == 3
        assert page.locator("#cards > li:visible .said").first.text_content() == (
            "A: daisy 91 %, right"
        )


def test_a_comparison_of_little_says_so_and_draws_what_it_can(look):
    values = comparison(1, flips=0)
    values |= {"best": None, "baseline": None, "varied": [], "pair": None, "metric": "mae"}
    values |= {"lower_is_better": True, "task": "regression", "groups": [], "families": []}
    values["runs"][0] |= {"group": None, "why_not": "half-synced", "value": None, "low": None}
    values["runs"][0] |= {"high": None, "curve": None, "reliability": None, "family": None}
    values["runs"][0] |= {"params": {}, "ece": None, "metrics": {}, "pareto": False}
    with look(values) as page:
        assert "half-synced" in page.locator("#groups + h3 + ul").text_content()
        assert page.locator(".plot").count() == 0


def test_other_test_images_are_told_apart(look):
    values = comparison(12)
    other = values["runs"][11]
    other["group"] = 1
    values["groups"][0]["runs"].remove(other["id"])
    values["groups"].append(
        {"fingerprint": "ab" * 32, "images": 50, "classes": ["daisy"], "runs": [other["id"]]}
    )
    if values["best"] == other["id"]:
        values["best"] = values["reference"] = values["runs"][0]["id"]
    values["pairs"] = [p for p in values["pairs"] if other["id"] not in (p["a"], p["b"])]
    with look(values) as page:
        assert names(page)[-1] == other["name"]
        assert cells(page, "verdict")[-1] == "other test images"
        assert cells(page, "group")[-1] == "2"
        assert "not comparable" in page.locator("[data-legend]").first.text_content()


@pytest.fixture
def compared(tmp_path, capfd, monkeypatch):
    """Page and values of `tl compare` on five runs, of which two are the same but the seed."""

    def make(task):
        of = pictures(tmp_path / "images")
        for i, quality in enumerate((0.9, 0.88, 0.86, 0.6, 0.55)):
            table, metrics = answers(of, quality, i, task)
            settings = [f"seed={i % 2}", f"finetune.lr_ratio={3 + i // 2}"]
            run_folder(tmp_path / "runs" / f"r{i}", tmp_path / "images", table, metrics, *settings)
        out = tmp_path / "compared"
        command = Command(capfd, monkeypatch)
        done = command("compare", f"runs={tmp_path / 'runs'}", f"output_dir={out}")
        assert done.code == 0, done.err
        return out / "compare.html", json.loads((out / "compare.json").read_text())

    return make


@pytest.mark.parametrize("task", Task)
def test_the_page_of_a_real_comparison(browser, compared, task):
    file, values = compared(task)
    with opened(browser, file) as page:
        page.wait_for_selector("html[data-drawn]", state="attached", timeout=20_000)
        best = next(run for run in values["runs"] if run["id"] == values["best"])
        assert names(page)[0] == best["short"]
        page.locator("#filter").fill(f'"{best["name"]}"')  # the whole name is found, too
        assert names(page) == [best["short"]]
        page.locator("#filter").fill("")
        assert page.locator("#table tbody tr").count() == 5
        assert page.locator(".verdict li").all_text_contents() == values["summary"]
        assert cells(page, "verdict").count("worse") == sum(
            pair["verdict"] == "a" for pair in values["pairs"] if pair["a"] == values["best"]
        )
        assert page.locator("#cards > li").count() == len(values["flips"])
        assert min(page.evaluate(INK)) > 500


def test_of_equal_runs_the_best_stands_first():
    values = comparison(3)
    for run in values["runs"]:
        run["value"] = 0.9
    values["best"] = values["reference"] = values["runs"][2]["id"]
    first = re.search(r'<tr data-run="0"( class="best")?>', written(values))
    assert first.group(1)
