"""From evidence to a decision: cells, settings, forced values, reasons, and no crash anywhere."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from deciding import STAGES, STRANGE, asked, evidence

from tl.config import (
    DECIDED,
    BatchNormMode,
    Budget,
    ConfigError,
    HeadKind,
    ModelConfig,
    Select,
    Trains,
)
from tl.decision import METHODS, TIERS, Decision, Thresholds, decide, recipe, table_rows
from tl.decision.evidence import Flips, Score
from tl.decision.recipes import START_STEPS
from tl.finetuning import build_plan
from tl.models import build_model

# --- cells --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_class", "kind", "method", "stages", "ratio", "neighbour"),
    [
        (2, {}, "wise_ft", -1, 5, "linear_probe"),
        (10, {}, "lp_ft", -1, 5, "lp_partial"),
        (50, {}, "lp_ft", -1, 5, "lp_partial"),
        (200, {}, "lp_ft", -1, 5, "lp_partial"),
        (4, STRANGE, "stage_probe", 0, 10, "norm_affine"),
        (10, STRANGE, "lp_ft", -1, 5, "norm_affine"),
        (50, STRANGE, "lp_ft", -1, 3, "lp_partial"),
        (200, STRANGE, "lp_ft", -1, 3, "full"),
    ],
)
def test_every_cell_has_its_method(per_class, kind, method, stages, ratio, neighbour):
    found = decide(evidence(per_class, **kind))
    assert (found.method, found.neighbour) == (method, neighbour)
    assert found.finetune.method == method
    assert found.finetune.lr_ratio == ratio
    assert [*found.finetune.phases.values()][-1].train_stages == stages
    assert found.similarity == ("different" if kind else "similar")
    assert found.finetune.head is (HeadKind.stages if method == "stage_probe" else HeadKind.linear)
    row = next(r for r in table_rows() if r["tier"] == found.amount)
    assert row[found.similarity] == method


def test_attention_networks_have_adapters_as_their_neighbour():
    found = decide(evidence(10, **STRANGE, batch_norm=False, attention=True))
    assert found.neighbour == "lora"
    assert found.neighbour_finetune.phases["lora"].trains is Trains.lora
    assert (found.finetune.head_lr, found.finetune.weight_decay) == (5e-4, 0.05)
    # LayerNorm alone has neither adapters nor statistics: the last stage is the modest choice.
    assert decide(evidence(10, **STRANGE, batch_norm=False)).neighbour == "lp_partial"


@pytest.mark.parametrize(
    ("change", "similarity", "fired"),
    [
        ({"quality": 0.47}, "different", "quality 0.47"),
        ({"quality": 0.49}, "similar", "quality 0.49"),  # within the error of 0.5
        ({"gap": 0.03}, "different", "an earlier stage is better by 0.03"),
        ({"gap": 0.03, "error": 0.04}, "similar", "quality 0.80"),
        ({"gap": 0.03, "classes": 5}, "similar", "quality 0.80"),  # 50 images: two errors
        ({"gap": 0.05, "classes": 5}, "different", "an earlier stage is better by 0.05"),
        ({"gain": 0.06}, "different", "all stages together are better by 0.06"),
        ({"gain": 0.06, "error": 0.07}, "similar", "quality 0.80"),
        ({"drift": 0.9}, "different", "channel statistics are 0.90 away"),
        ({"drift": 0.15}, "similar", "quality 0.80"),  # 0.01 of it is chance
        ({"drift": 0.9, "quality": 0.99}, "different", "channel statistics are 0.90 away"),
        ({"drift": 0.9, "classes": 2}, "different", "channel statistics are 0.90 away"),
    ],
)
def test_a_figure_counts_beyond_its_threshold_and_its_error(change, similarity, fired):
    found = decide(evidence(10, **change))
    assert found.similarity == similarity
    assert fired in found.rule


@pytest.mark.parametrize(
    ("classes", "error", "similarity"),
    [(2, 0.02, "different"), (2, 0.04, "similar"), (20, 0.04, "different")],
)
def test_drift_counts_beyond_its_error(classes, error, similarity):
    found = evidence(10, classes=classes, drift=0.28)  # fewer than 64 images: two errors
    found = replace(found, similarity=replace(found.similarity, drift_error=error))
    decision = decide(found)
    assert decision.similarity == similarity
    said = next(reason for reason in decision.reasons if "channel statistics" in reason)
    assert f"0.280 ± {error:.3f} away" in said
    assert ("foreign" in said) == (similarity == "different")


def test_few_images_alone_do_not_make_images_different():
    found = decide(evidence(4, quality=0.2))
    assert (found.amount, found.similarity, found.method) == ("tiny", "similar", "wise_ft")
    assert "with so few images low quality decides nothing" in found.reasons


@pytest.mark.parametrize("per_class", [4, 10, 50])
def test_foreign_pixels_alone_train_all_stages_the_early_ones_gently(per_class):
    found = decide(evidence(per_class, drift=0.9))
    assert (found.method, found.finetune.lr_ratio) == ("lp_ft", 5)
    assert any("only the pixels are foreign" in reason for reason in found.reasons)
    assert found.finetune.phases["all"].head_lr == pytest.approx(1e-3 if per_class < 5 else 3e-3)


@pytest.mark.parametrize(
    ("kind", "net", "rate"),
    [
        ({}, {}, 3e-4),
        (STRANGE, {}, 1e-3),
        ({"drift": 0.9}, {}, 3e-3),  # by a larger ratio, so that early stages learn less
        ({}, {"batch_norm": False, "attention": True}, 1.5e-4),
        (STRANGE, {"batch_norm": False, "attention": True}, 2e-4),
    ],
)
def test_strange_images_need_larger_steps_where_the_network_bears_them(kind, net, rate):
    phases = decide(evidence(50, **kind, **net)).finetune.phases
    assert phases["all"].head_lr == pytest.approx(rate)


def test_few_images_in_all_are_tiny_however_few_the_classes():
    found = decide(evidence(9, classes=2))
    assert (found.amount, found.method) == ("tiny", "wise_ft")
    assert "fewer than 20 images in all are tiny, however few the classes" in found.reasons
    assert found.rule.startswith("tiny data (18 images in all), images like the pretraining's")
    assert found.would_change[0].startswith("with at least 20 images in all (now 18): train the")


def test_rules_that_are_off_can_be_switched_on():
    of_hymenoptera = evidence(120, classes=2)
    assert decide(of_hymenoptera).amount == "large"
    by_all = Thresholds(medium_images=100, large_images=1_000)
    found = decide(of_hymenoptera, thresholds=by_all)
    assert found.amount == "medium"
    assert found.would_change[0].startswith("with fewer than 5 images a class")
    assert decide(evidence(50, classes=1), thresholds=by_all).amount == "small"
    assert decide(evidence(120, classes=10), thresholds=by_all).amount == "large"


def test_where_nothing_is_left_to_gain_a_linear_classifier_does():
    good = evidence(120, quality=0.96, error=0.005)
    found = decide(good)
    assert (found.method, found.neighbour) == ("linear_probe", "lp_ft")
    assert any("next to nothing is left to gain" in reason for reason in found.reasons)
    assert decide(good, thresholds=Thresholds(enough=None)).method == "lp_ft"
    assert decide(good, similarity="similar").method == "lp_ft"  # as the user says
    assert decide(evidence(120, quality=0.96, error=0.07)).method == "lp_ft"
    foreign = decide(evidence(120, quality=0.98, error=0.005, drift=0.9))
    assert foreign.method == "lp_ft"
    said = " ".join(foreign.reasons)
    assert "next to nothing" not in said
    assert "good features are no reason to stop" in said


# --- where nothing can be measured, or there is nothing to learn --------------------------------


@pytest.mark.parametrize(
    ("per_class", "method"),
    [(1, "linear_probe"), (10, "lp_partial"), (50, "lp_ft"), (500, "lp_ft")],
)
def test_without_measurement_the_amount_decides_and_it_says_so(per_class, method):
    found = decide(evidence(per_class, measured=False))
    assert (found.method, found.similarity) == (method, "unknown")
    assert "unknown similarity, so by amount alone" in found.rule
    assert found.warnings == (
        "similarity is unknown (too few images to hold some out): decided by the amount of data "
        "alone",
    )


def test_random_weights_train_as_a_whole():
    found = decide(evidence(50, pretrained=False))
    assert (found.method, found.similarity, found.finetune.lr_ratio) == ("full", "unknown", 1)
    assert found.finetune.batch_norm is BatchNormMode.train
    assert found.rule.startswith("The weights are random, so there is nothing to keep")


def test_labels_at_random_are_told_and_cost_little():
    found = decide(evidence(50, quality=0.01, gap=0.0, chance=0.4))
    assert found.method == "linear_probe"
    assert found.rule.startswith("No signal: 40% of random labels fit as well as the true ones")
    assert found.warnings == (
        "no signal: check the labels (40% of random labels fit the images as well as the true "
        "ones)",
    )
    few = decide(evidence(3, classes=5, quality=0.01, gap=0.0, chance=0.4))
    assert "15 images are too few to tell signal from chance" in few.warnings[0]


def test_a_class_with_hardly_an_image_is_named():
    found = evidence(50)
    found = replace(found, amount=replace(found.amount, least=2))
    assert "the smallest class has 2 training images" in decide(found).warnings[0]


# --- settings -----------------------------------------------------------------------------------


def test_a_tiny_validation_chooses_nothing():
    found = decide(evidence(10, classes=10)).finetune  # 25 validation images
    assert (found.select, found.patience, found.ema) == (Select.last, 0, True)
    assert (found.phases["head"].ema, found.phases["head"].patience) == (False, 0)
    assert not any(phase.average for phase in found.phases.values())


def test_a_validation_of_some_size_chooses_epoch_and_average():
    found = decide(evidence(50)).finetune  # 120 validation images, 12 a class
    assert (found.select, found.ema) == (Select.best, False)
    assert found.phases["all"].average
    # Stages are noisy until their rate falls; a head is not.
    assert found.patience == round(0.5 * found.epochs) > 5
    head = found.phases["head"]
    assert head.patience == max(5, round(0.15 * head.epochs))
    assert decide(evidence(50), given=asked("finetune.epochs=6")).finetune.patience == 5


def test_small_images_need_no_large_input_where_all_stages_of_a_network_with_batch_norm_train():
    small = replace(evidence(10), native_side=32.0)
    found = decide(small)
    assert found.image_size == 160
    assert "input of 160 instead of 224 pixels: the images have 32" in " ".join(found.reasons)
    assert found.model(ModelConfig()).image_size == 160
    assert found.model(ModelConfig(image_size=96)).image_size == 96
    others = (
        replace(small, native_side=65.0),
        replace(small, native_side=0.0),  # not known
        replace(small, backbone=replace(small.backbone, input_size=128)),
        replace(evidence(10, attention=True), native_side=32.0),
        replace(evidence(10, batch_norm=False), native_side=32.0),
        replace(evidence(10, pretrained=False), native_side=32.0),
        replace(evidence(50, quality=0.99), native_side=32.0),  # a head is enough
    )
    assert [decide(other).image_size for other in others] == [None] * len(others)
    assert decide(small, image_size=224).image_size is None


def test_batch_norm_relearns_only_from_many_images_in_large_batches():
    modes = {
        (per_class, batch): decide(evidence(per_class, **STRANGE), batch_size=batch)
        for per_class, batch in ((200, 32), (2_000, 32), (2_000, 8))
    }
    assert [d.finetune.batch_norm.value for d in modes.values()] == ["frozen", "train", "frozen"]
    little = recipe("lp_partial", evidence(2_000, 20), last_stages=1)
    assert little.batch_norm is BatchNormMode.frozen


@pytest.mark.parametrize(
    ("per_class", "classes", "budget", "epochs"),
    [
        (10, 100, Budget.normal, 48),
        (10, 100, Budget.quick, 12),
        (10, 50, Budget.thorough, 100),
        (10, 2_000, Budget.normal, 11),
        (10, 20_000, Budget.quick, 5),
    ],
)
def test_epochs_are_a_number_of_image_views(per_class, classes, budget, epochs):
    assert decide(evidence(per_class, classes), budget).finetune.epochs == epochs
    if budget is Budget.normal:  # all stages instead of the last one
        last = recipe("lp_partial", evidence(per_class, classes), last_stages=1)
        assert epochs in (2 * last.epochs, 2 * last.epochs - 1)


def test_a_head_has_steps_enough_on_few_images():
    steps = {
        images: recipe("linear_probe", evidence(4, images // 4)).epochs * -(-images // 32)
        for images in (8, 40, 400, 4_000)
    }
    assert steps == {8: 300, 40: 600, 400: 611, 4_000: 1_250}


@pytest.mark.parametrize(("per_class", "classes"), [(2, 4), (4, 10), (10, 4), (10, 10), (19, 10)])
@pytest.mark.parametrize("method", ["wise_ft", "lp_ft", "lp_partial", "norm_affine", "lora"])
def test_a_head_that_prepares_for_stages_is_short_where_nothing_can_end_it(
    per_class, classes, method
):
    known = evidence(per_class, classes, drift=0.9)
    first, *_ = recipe(method, known, Budget.thorough).phases.values()
    steps = first.epochs * -(-per_class * classes // 32)
    assert START_STEPS <= steps < START_STEPS + -(-per_class * classes // 32)
    alone = recipe("linear_probe", known)
    assert alone.epochs * -(-per_class * classes // 32) >= 300
    # With validation enough, that says when the head is done.
    known = replace(known, amount=replace(known.amount, val_images=60, val_least=6))
    first, *_ = recipe(method, known).phases.values()
    assert (first.epochs, first.patience > 0) == (alone.epochs, True)


@pytest.mark.parametrize(("classes", "steps"), [(10, 40), (100, 400), (1_000, 630)])
def test_a_head_of_many_classes_sees_enough_of_each_before_the_stages_train(classes, steps):
    known = evidence(2, classes)
    known = replace(known, amount=replace(known.amount, val_images=20, val_least=0))
    first, *_ = recipe("lp_ft", known).phases.values()
    assert steps <= first.epochs * -(-2 * classes // 32) < steps + -(-2 * classes // 32)


def test_gentle_steps_are_about_what_was_pretrained_and_not_about_the_new_head():
    found = decide(evidence(4, drift=0.9)).finetune
    assert (found.phases["head"].head_lr, found.phases["all"].head_lr) == (
        1e-3,
        pytest.approx(1e-3),
    )
    assert decide(evidence(10, drift=0.9)).finetune.phases["head"].head_lr is None


def test_a_short_head_is_explained():
    def said(*given, **kind):
        found = decide(evidence(10, **kind), given=asked(*given))
        return [reason for reason in found.reasons if "prepares for the stages" in reason]

    [reason] = said()
    assert reason.startswith("the head that prepares for the stages trains for 10 epochs only")
    assert not said("finetune.epochs=7")
    assert not said(quality=0.99)  # a linear classifier alone
    assert not said(classes=40)  # 100 validation images end it


def test_flips_follow_the_measurement():
    def of(horizontal, vertical):
        found = decide(evidence(10, flips=Flips(horizontal, vertical)))
        return found.hflip, found.vflip

    assert of(None, None) == (True, False)
    assert of(Score(-0.01, 0.01), Score(-0.01, 0.01)) == (True, False)
    assert of(Score(-0.05, 0.01), Score(-0.001, 0.01)) == (False, True)
    assert of(Score(-0.05, 0.06), Score(0.0, 0.06)) == (True, False)  # nobody knows


def test_augmentation_grows_with_the_data():
    sizes = (4, 10), (10, 10), (50, 10), (200, 10), (5_000, 10)
    presets = [decide(evidence(m, c)).augment for m, c in sizes]
    assert presets == ["light", "light", "medium", "medium", "strong"]


# --- what the user fixes ------------------------------------------------------------------------


def test_what_the_user_fixes_wins_and_is_listed():
    given = asked("finetune.epochs=7", "finetune.precision=bf16-mixed", "finetune.head_lr=0.02")
    found = decide(evidence(10), given=given, amount="large", similarity="different")
    assert (found.amount, found.similarity, found.method) == ("large", "different", "lp_ft")
    assert found.measured == {"amount": "small", "similarity": "similar"}
    assert found.forced == {
        "amount": "large",
        "similarity": "different",
        "finetune.epochs": 7,
        "finetune.head_lr": 0.02,
        "finetune.precision": "bf16-mixed",
    }
    for config in (found.finetune, found.neighbour_finetune):
        assert (config.epochs, config.head_lr, config.precision) == (7, 0.02, "bf16-mixed")
        assert all(p.epochs is None and p.head_lr is None for p in config.phases.values())
    assert "you set amount=large" in found.reasons


def test_a_head_on_all_stages_may_be_asked_for():
    found = decide(evidence(50), given=asked("finetune.head=stages"))
    assert (found.method, found.neighbour) == ("stage_probe", "lp_ft")
    assert found.neighbour_finetune.head is HeadKind.linear
    assert found.forced == {"finetune.head": "stages"}


def test_forced_similarity_answers_for_random_weights_too():
    found = decide(evidence(10, pretrained=False), similarity="similar")
    assert found.method == "lp_ft"


# --- what it says -------------------------------------------------------------------------------


def test_it_says_what_would_change_it():
    found = decide(evidence(12))
    assert found.would_change[0] == (
        "with fewer than 5 images a class (now 12): train the head, then all stages gently, and "
        "take the mean of before and after"
    )
    assert any("quality below 0.50 (now 0.80)" in text for text in found.would_change)
    strange = decide(evidence(12, **STRANGE))
    assert (
        "similarity=similar: train the head, then all stages too, in smaller steps"
        in strange.would_change
    )
    foreign = decide(evidence(50, drift=0.9))
    assert foreign.would_change == (
        "with fewer than 5 images a class (now 50): train the head, then all stages too, in "
        "smaller steps",
        "similarity=similar: train the head, then all stages too, in smaller steps",
    )


@pytest.mark.parametrize(("val_images", "chooses"), [(8, False), (400, True)])
def test_few_similar_images_end_half_way(val_images, chooses):
    found = evidence(3, classes=100)
    found = replace(found, amount=replace(found.amount, val_images=val_images, val_least=4))
    decision = decide(found)
    head, body = decision.finetune.phases.values()
    assert (head.average, body.average) == (None, True)
    assert body.head_lr == pytest.approx(1e-4), "a third of what all stages have elsewhere"
    assert (decision.finetune.select is Select.best) == chooses
    said = any("the mean of the weights before and after" in why for why in decision.reasons)
    assert said != chooses, "where val can choose it chooses the share"


def test_a_decision_survives_json():
    found = decide(evidence(10, **STRANGE))
    assert Decision.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_table_for_people_has_a_row_a_tier():
    rows = table_rows(Thresholds(tiny=3))
    assert [row["tier"] for row in rows] == list(TIERS)
    assert rows[0]["amount"] == "below 3 images a class"
    assert (rows[1]["similar"], rows[1]["different"]) == ("lp_ft", "lp_ft")


# --- everywhere ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    return build_model(ModelConfig(name="test_resnet", weights="none"), ["a", "b"])


def grid():
    """Evidence of all kinds, from one image to a million."""
    amounts = [(m, c) for m in (1, 2, 4, 5, 19, 20, 100, 20_000) for c in (2, 10, 1_000)]
    kinds = ({}, STRANGE, {"drift": 0.9}, {"measured": False}, {"pretrained": False})
    nets = ({}, {"batch_norm": False, "attention": True}, {"batch_norm": False})
    errors = ({}, {"error": 0.3, "chance": 0.5, "more_data": None})
    for (m, c), kind, net, error in itertools.product(amounts, kinds, nets, errors):
        yield evidence(m, c, **{**kind, **net, **error})


def test_every_evidence_has_a_complete_plan_with_reasons(resnet):
    for number, found in enumerate(grid()):
        decision = decide(found, [*Budget][number % 3], batch_size=(8, 32)[number % 2])
        for config in (decision.finetune, decision.neighbour_finetune):
            assert all(getattr(config, key) is not None for key in DECIDED)
            plan = build_plan(config, resnet, train_images=found.amount.images, batch_size=32)
            assert plan.phases
            assert not plan.phases[0].average
        assert decision.method != decision.neighbour or (
            decision.finetune.phases != decision.neighbour_finetune.phases
        )
        assert decision.method in METHODS
        assert decision.rule.endswith(".")
        assert decision.reasons
        assert decision.would_change
        text = " ".join((decision.rule, *decision.reasons, *decision.would_change))
        assert "nan" not in text
        assert "None" not in text


@pytest.mark.parametrize("kind", [{}, STRANGE, {"measured": False}])
def test_more_data_never_trains_fewer_stages(kind):
    def trained(per_class):
        phases = [*decide(evidence(per_class, **kind)).finetune.phases.values()]
        last = phases[-1].train_stages
        return len(STAGES) if last < 0 else last

    counts = [trained(m) for m in (1, 2, 4, 5, 10, 19, 20, 50, 99, 100, 1_000, 60_000)]
    assert counts == sorted(counts)
    assert (counts[0] < counts[-1]) == bool(kind)  # a few similar ones train all of them, half-way


@pytest.mark.parametrize("method", METHODS)
def test_any_method_has_its_recipe(method, resnet):
    found = recipe(method, evidence(50), last_stages=1 if method == "lp_partial" else None)
    assert found.method == method
    last = [*found.phases.values()][-1].train_stages
    assert last == {"linear_probe": 0, "stage_probe": 0, "lp_partial": 1}.get(method, -1)
    assert build_plan(found, resnet, train_images=500, batch_size=32).phases


def test_the_recipe_of_the_choice_is_the_decision():
    for found in (evidence(50), evidence(10, **STRANGE), evidence(50, drift=0.9)):
        decision = decide(found)
        assert recipe(decision.method, found) == decision.finetune


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ConfigError, match="no method magic; there are linear_probe, stage_probe"):
        recipe("magic", evidence())
