"""tl advise: its sentences, its ranking, its pages, and a plan that trains."""

from __future__ import annotations

import html.parser
import json
from dataclasses import replace

import pytest
import yaml

from tl import advice
from tl.advice import forecast
from tl.advice.details import learning_curve, more_images, plan_table
from tl.advice.page import page
from tl.advice.sections import Section, brief
from tl.advice.text import markdown
from tl.advice.whole import sections
from tl.advice.writing import plan_yaml
from tl.config import AdviseConfig, ConfigError, ModelConfig, compose
from tl.decision import Cost, decide
from tl.decision.evidence import (
    Amount,
    Backbone,
    Evidence,
    Flips,
    Score,
    Similarity,
    StageScore,
)
from tl.pages.learning import chart

RISES = Score(0.05, 0.01)
NAMES = ("stage0", "stage1", "stage2", "stage3", "stage4", "head")


def evidence(
    qualities=(0.2, 0.4, 0.6, 0.7, 0.8, 0.9),
    error=0.02,
    *,
    images=240,
    classes=3,
    more=RISES,
    name="test_resnet",
) -> Evidence:
    stages = tuple(
        StageScore("features" if i == len(qualities) - 1 else f"stage{i}", 16, s, s)
        for i, s in enumerate(Score(q, error) for q in qualities)
    )
    gap = max(qualities[:-1]) - qualities[-1]
    return Evidence(
        amount=Amount(
            images=images,
            classes=classes,
            per_class=images / classes,
            least=images // classes,
            most=images // classes,
            val_images=60,
            val_least=20,
            more_data=more,
            effective_rank=12.0,
        ),
        backbone=Backbone(name, 370_000, NAMES, True, False, True, 64),
        similarity=Similarity(
            stages,
            concat=Score(qualities[-1] + 0.01, error),
            depth_gap=Score(gap, error),
            concat_gain=Score(0.01, error),
            drift=0.1,
            drift_floor=0.01,
        ),
        flips=Flips(Score(-0.001, 0.004), Score(-0.2, 0.02)),
        native_side=40,
        scores={"logme": 0.5},
        seconds={"pass": 1.2},
    )


def candidate(found: Evidence, speed=100.0, **changes) -> advice.Candidate:
    cost = Cost(speed, 2.0, {"head": 30.0, "last": 50.0}, 1.5e9, 1_000)
    given = advice.Candidate(
        found, decide(found), cost, f"{found.backbone.name}.pth", "Apache-2.0", "file"
    )
    return replace(given, **changes)


# --- sections -----------------------------------------------------------------------------------


def test_the_brief_marks_the_cell_of_the_decision_and_says_why():
    found = evidence()
    decision = decide(found)
    parts = brief(found, decision)
    grid = parts[0]
    assert grid.kind == "grid"
    marked = [row for row in grid.rows if row["marked"]]
    assert [row["marked"] for row in marked] == [decision.similarity] == ["similar"]
    assert marked[0]["amount"].startswith(f"{decision.amount}:")
    assert decision.rule in grid.note
    bars = parts[1]
    assert [row["name"] for row in bars.rows][-2:] == ["last features", "all stages together"]
    assert bars.rows[-2]["text"] == "90 (86 to 94)"
    assert (bars.rows[-2]["low"], bars.rows[-2]["high"]) == pytest.approx((0.86, 0.94))
    said = [row["text"] for part in parts for row in part.rows if part.kind == "list"]
    assert set(decision.reasons) | set(decision.would_change) <= set(said)


def test_a_forced_axis_is_shown_beside_what_was_measured():
    found = evidence()
    parts = brief(found, decide(found, similarity="different"))
    assert "You set similarity=different (measured: similar" in parts[0].note
    assert [r["marked"] for r in parts[0].rows if r["marked"]] == ["different"]


def test_without_a_measurement_the_brief_says_why():
    found = replace(evidence(), similarity=None, unmeasured="the weights are random")
    found = replace(found, backbone=replace(found.backbone, pretrained=False))
    parts = brief(found, decide(found))
    assert any(row.get("text") == "the weights are random" for p in parts for row in p.rows)
    assert not any(part.kind == "bars" for part in parts)


def test_the_plan_names_stages_epochs_and_rates():
    found = evidence()
    decision = decide(found)
    table = plan_table(decision, found.backbone.stages)
    assert decision.method in table.title
    assert [row["phase"] for row in table.rows] == list(decision.finetune.phases)
    assert table.rows[0]["trains"] == "head"
    assert "and head" in table.rows[-1]["trains"]
    assert "up-down" not in table.note, "the up-down flip is not safe here"


# --- more images --------------------------------------------------------------------------------


def test_the_forecast_is_a_power_law_through_both_measured_points():
    curve = forecast.curve(evidence(more=Score(0.1, 0.01)))
    assert curve.at(120).value == pytest.approx(0.9 - 0.1)
    assert curve.at(240).value == pytest.approx(0.9)
    # The error halves when the number of images doubles: 0.2, 0.1, 0.05.
    assert curve.at(480).value == pytest.approx(0.95)
    assert curve.gain(480).error > 0
    wide = forecast.curve(evidence(more=Score(0.1, 0.05)))
    assert wide.gain(480).error > 2 * curve.gain(480).error


def with_quarters(found, value, error):
    return replace(found, amount=replace(found.amount, half_data=Score(value, error)))


def test_a_third_measured_point_makes_the_forecast_surer_where_it_agrees():
    two = evidence(more=Score(0.1, 0.02))
    agrees, bends = with_quarters(two, 0.2, 0.02), with_quarters(two, -0.05, 0.01)
    curves = [forecast.curve(found) for found in (two, agrees, bends)]
    assert [curve.share > 0 for curve in curves] == [False, True, False]
    # The error of the classifier halves with every doubling: 0.4, 0.2, 0.1, and so 0.05.
    assert [c.at(480).value for c in curves] == pytest.approx([0.95] * 3)
    assert curves[1].gain(480).error < 0.95 * curves[0].gain(480).error
    assert curves[2].gain(480).error == pytest.approx(curves[0].gain(480).error)
    rows = learning_curve(agrees).rows
    assert [r["images"] for r in rows if r["measured"]] == [60, 120, 240]
    assert rows[0]["value"] == pytest.approx(0.6)
    assert "to half it brought +13.3, which agrees." in more_images(agrees).rows[0]["text"]
    assert "does not fit one curve" in more_images(bends).rows[0]["text"]


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (Score(0.1, 0.01), "100 more images: about +"),
        (Score(0.001, 0.001), "would add at most"),
        (Score(0.05, 0.06), "cannot be told"),
        (None, "too few to try"),
    ],
)
def test_more_images_are_promised_only_where_it_can_be_told(more, text):
    found = evidence(more=more)
    assert text in more_images(found).rows[0]["text"]
    expected = [r for r in learning_curve(found).rows if not r["measured"]]
    assert bool(expected) == (more == Score(0.1, 0.01))


def test_no_forecast_goes_beyond_perfect():
    found = evidence((0.5, 0.9, 0.999), 0.001, more=Score(0.2, 0.001))
    assert forecast.curve(found).at(10**6).value <= 1
    assert all(row["high"] <= 1 for row in learning_curve(found).rows)


# --- ranking ------------------------------------------------------------------------------------


def test_the_better_backbone_wins_beyond_the_error_and_the_faster_within_it():
    good = candidate(evidence((0.5, 0.9), 0.01, name="good"), speed=10)
    equal = candidate(evidence((0.5, 0.895), 0.01, name="equal"), speed=50)
    poor = candidate(evidence((0.5, 0.8), 0.01, name="poor"), speed=900)
    chosen, why = advice.best([poor, good])
    assert (chosen.name, "poor with 80 (78 to 82)" in why) == ("good", True)
    chosen, why = advice.best([poor, good, equal])
    assert chosen.name == "equal"
    assert "as good as good within the error, and the fastest" in why
    table = advice.ranking([poor, equal, good])
    assert [row["backbone"] for row in table.rows] == ["= good", "→ equal", "poor"]
    assert [*table.rows[0].values()] == [
        *("= good", "90 (88 to 92)", "0.50", "0.4 M", "10", "Apache-2.0", "file"),
    ]


def test_what_could_not_be_measured_comes_last():
    found = evidence(name="unknown")
    unknown = candidate(replace(found, similarity=None, unmeasured="random"), speed=10**6)
    assert advice.best([unknown, candidate(evidence())])[0].name == "test_resnet"
    assert advice.best([unknown])[0] is unknown
    rows = advice.ranking([unknown, candidate(evidence())]).rows
    assert rows[-1]["quality"] == "not measured"


# --- pages --------------------------------------------------------------------------------------


class Seen(html.parser.HTMLParser):
    """Tags that are open, what would be fetched, and headings."""

    EMPTY = ("meta", "rect", "line", "circle", "polyline", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_startendtag(self, tag, attrs):
        assert tag in self.EMPTY, tag

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_fetches_nothing(tmp_path):
    config = compose("advise", ["data.root=x"], {"data.root": "my photos"})
    both = [candidate(evidence()), candidate(evidence(name="other"))]
    parts = sections(config, both, {}, tmp_path)
    text = page("How to transfer to photos", "below", parts, "footer")
    seen = Seen()
    seen.feed(text)
    assert seen.open == []
    assert seen.fetched == []
    assert "url(" not in text
    assert "<script" not in text
    assert text.startswith("<!DOCTYPE html>")
    for part in parts:
        assert part.title in seen.text
    assert "tl train 'data.root=my photos' model.name=" in seen.text
    assert 'role="img" aria-label="Quality by number of training images: 85' in text


def test_names_from_folders_cannot_become_markup():
    bad = "<script>alert(1)</script>|x`"
    parts = [Section("t", "facts", ({"name": bad, "text": bad},))]
    assert "<script>" not in page(bad, bad, parts, bad)
    line = markdown(bad, bad, parts).splitlines()[-1]
    assert line.count("|") - line.count("\\|") == 3
    assert "\\<script>" in line


def test_the_chart_stays_inside_its_frame():
    drawn = chart(learning_curve(evidence((0.2, 0.01), 0.2, more=Score(0.3, 0.01))).rows)
    for point in drawn["points"]:
        assert drawn["left"] <= point["x"] <= drawn["right"]
        assert 0 <= point["high"] <= point["y"] <= point["low"] <= drawn["bottom"]
    perfect = chart(learning_curve(evidence((0.5, 0.96), 0.02, more=Score(0.001, 0.01))).rows)
    assert perfect["quality"][-1][1] == "100", "the axis ends where the intervals do"
    rows = learning_curve(evidence((0.5, 0.99), 0.001, more=Score(0.001, 0.001))).rows
    nearly = chart([{**row, "low": 0.985, "high": 0.995} for row in rows])
    assert [nearly["quality"][end][1] for end in (0, -1)] == ["90", "100"], "not above 100"
    texts = [float(text) for _, text in drawn["quality"]]
    assert texts == sorted(texts)
    assert len(texts) <= 7


# --- plan.yaml ----------------------------------------------------------------------------------


def test_the_plan_is_complete_and_has_its_reasons(tmp_path):
    config = compose("advise", ["data.root=x", "data.batch_size=8", "model=test_resnet"])
    given = candidate(evidence())
    text = plan_yaml(config, given, tmp_path)
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert given.decision.rule in comments[1]
    values = yaml.safe_load(text)
    assert values["data"]["batch_size"] == 8
    assert values["data"]["root"].startswith("/")
    assert values["model"]["name"] == "test_resnet"
    assert values["finetune"]["method"] == given.decision.method
    groups = {key for d in values["defaults"] if isinstance(d, dict) for key in d}
    assert not groups & {"model", "augment", "finetune"}


# --- what is asked ------------------------------------------------------------------------------


def test_models_are_presets_or_timm_names():
    config = compose("advise", ["data.root=x", "models=[resnet18,test_vit,resnet18]"])
    assert [m.name for m in advice.models(config)] == ["resnet18.a1_in1k", "test_vit"]
    assert advice.models(compose("advise", ["data.root=x", "model=test_resnet"])) == [
        ModelConfig(name=compose("train", ["data.root=x", "model=test_resnet"]).model.name)
    ]


def test_a_method_of_ones_own_is_no_question():
    with pytest.raises(ConfigError, match="finetune=lp_ft says the method already"):
        compose("advise", ["data.root=x", "finetune=lp_ft"])
    with pytest.raises(ConfigError, match=r"model\.weights names one file"):
        compose("advise", ["data.root=x", "models=[a,b]", "model.weights=w.safetensors"])


def test_advise_config_has_the_defaults_of_train():
    ours, theirs = compose("advise", ["data.root=x"]), compose("train", ["data.root=x"])
    assert isinstance(ours, AdviseConfig)
    for key in ("data", "model", "cache", "seed", "amount", "similarity"):
        assert getattr(ours, key) == getattr(theirs, key)


# --- the command --------------------------------------------------------------------------------


def random_weights(folder, *names):
    """Weights of tiny networks, as files: pretrained as far as anyone can tell."""
    import timm
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    for name in names:
        torch.manual_seed(0)
        save_file(timm.create_model(name).state_dict(), folder / f"{name}.safetensors")
    return folder


def test_advise_ranks_backbones_and_goes_on_without_one_that_cannot_be_loaded(
    tl, image_folder, tmp_path
):
    weights = random_weights(tmp_path / "weights", "test_resnet", "test_efficientnet")
    done = tl(
        "advise",
        f"data.root={image_folder(splits={'train': 8, 'val': 2})}",
        "model=test_resnet,test_efficientnet,test_vit",
        f"model.weights={weights}",
        f"output_dir={tmp_path / 'advice'}",
    )
    assert done.code == 0, done.out + done.err
    names = {"advice.md", "advice.html", "plan.yaml", "evidence.json", "decision.json"}
    assert {p.name for p in (tmp_path / "advice").iterdir()} == names
    for text in ("backbones, the best first", "how to transfer", "time and memory"):
        assert text in done.out
    assert "- test_vit: model.weights:" in done.out, "one that cannot be loaded stops nothing"
    found = Evidence.from_dict(json.loads((tmp_path / "advice/evidence.json").read_text()))
    assert (found.amount.images, found.amount.classes) == (24, 3)
    assert found.similarity is not None
    assert found.backbone.name.split(".")[0] in ("test_resnet", "test_efficientnet")
    assert f"with {found.backbone.name}" in done.out


def test_the_plan_of_an_advice_trains_as_it_says(tl, image_folder, tmp_path):
    root = image_folder()
    done = tl(
        "advise",
        f"data.root={root}",
        *("model=test_resnet", "model.weights=none", "model.image_size=32"),
        *("finetune.epochs=2", f"output_dir={tmp_path / 'advice'}"),
    )
    assert done.code == 0, done.out + done.err
    said = (tmp_path / "advice/advice.md").read_text()
    assert "random" in said, "there is no pretraining to be similar to"
    plan = yaml.safe_load((tmp_path / "advice/plan.yaml").read_text())
    done = tl(
        "train",
        *("--config-dir", tmp_path / "advice", "--config-name", "plan"),
        *("tracking.enabled=false", "export.enabled=false", f"output_dir={tmp_path / 'run'}"),
    )
    assert done.code == 0, done.out + done.err
    stored = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    for group in ("data", "model", "augment"):
        assert {k: stored[group][k] for k in plan[group]} == plan[group]
    assert stored["finetune"]["method"] == plan["finetune"]["method"]
    assert stored["finetune"]["epochs"] == 2
    assert list(stored["finetune"]["phases"]) == list(plan["finetune"]["phases"])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["data.root=nowhere"], ["DataError", "nowhere"]),
        (["model=test_resnet,no_such_net"], ["ConfigError", "no_such_net"]),
        (["finetune=lp_ft"], ["ConfigError", "says the method already"]),
        (["model=test_resnet", "model.weights=nowhere.pth"], ["WeightsError", "nowhere.pth"]),
        (["amount=huge"], ["ConfigError", "amount must be one of"]),
        (["modle=test_resnet"], ["ConfigError", "model"]),
    ],
)
def test_bad_requests_end_in_one_clear_error(tl, image_folder, arguments, parts):
    root = [] if "data.root" in arguments[0] else [f"data.root={image_folder()}"]
    tl("advise", *root, *arguments).refused(*parts)


def test_an_advice_that_cannot_be_written_says_where(tl, image_folder, tmp_path):
    (tmp_path / "file").write_text("")
    done = tl(
        "advise",
        f"data.root={image_folder()}",
        *("model=test_resnet", "model.weights=none", f"output_dir={tmp_path / 'file'}"),
    )
    done.refused("AdviceError", "file", "choose another output_dir")
