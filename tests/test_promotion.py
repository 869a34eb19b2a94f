from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from exporting import CLASSES, export, make_photos, network
from PIL import Image, ImageEnhance
from registering import aliases, everything, hashes, record, spoil, table
from sklearn.metrics import average_precision_score

from tl.bundle import Bundle, Outputs
from tl.config import Task
from tl.evaluation import predictions_table


@pytest.fixture
def place(crowned, tmp_path):
    """Address of the store in which version 1 of `flowers` is champion."""
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def words(done):
    """What a command said, in one line."""
    return " ".join((done.out + done.err).replace("\ufffd", " ").split())


# --- promote -------------------------------------------------------------------------------------


def test_the_first_becomes_champion(tl, run_store, store_client):
    tl("register", "run=good", "name=flowers")
    done = tl("promote", "name=flowers")
    assert done.code == 0, done.err
    assert "there was no champion, and its seal holds" in done.out
    assert aliases(store_client) == {"champion": 1}


def test_one_that_is_not_worse_takes_its_place(tl, crowned):
    tl("register", "run=better", "name=flowers")
    done = tl("promote", "name=flowers")
    assert done.code == 0, done.err
    assert "version 2, in place of version 1" in done.out
    figures = "accuracy 0.900 against the champion's 0.800 on 400 test images: 0.100 better"
    assert figures in done.out
    assert aliases(crowned) == {"champion": 2, "previous": 1}
    new, old = (crowned.get_model_version("flowers", n) for n in ("2", "1"))
    assert f"champion in place of version 1: {figures}" in new.description
    assert "no longer champion: version 2 took its place" in old.description
    assert new.tags["tl.replaced"] == "1"
    names = [model.name for model in crowned.search_registered_models()]
    assert names == ["flowers"]  # no lock is left
    tl("promote", "name=flowers", "candidate=2").refused("version 2 is the champion", code=1)


def test_a_worse_one_stays_challenger_and_nothing_changes(tl, crowned):
    tl("register", "run=worse", "name=flowers")
    before = everything(crowned)
    done = tl("promote", "name=flowers")
    done.refused(
        "flowers keeps its champion, version 1: version 2 may be worse",
        "accuracy 0.600 against the champion's 0.800 on 400 test images: 0.200 worse",
        "the margin is 0.01",
        code=1,
    )
    assert everything(crowned) == before
    assert tl("promote", "name=flowers", "margin=0.4").code == 0
    assert aliases(crowned) == {"champion": 2, "previous": 1}


def test_too_few_images_to_tell_are_said_with_how_many_would(tl, run_store, run_bundles, tmp_path):
    for number, (bundle, right) in enumerate({"one": 0.8, "two": 0.83}.items()):
        predictions = table(right, digests=hashes(60), seed=number)
        record(run_store, tmp_path / bundle, run_bundles[bundle], predictions, name=bundle)
        tl("register", f"run={bundle}", "name=few")
        done = tl("promote", "name=few")
    done.refused("version 2 may be worse", "0.033 better, at worst 0.", code=1)
    needed = int(re.search(r"with about ([\d,]+) such images", done.err)[1].replace(",", ""))
    assert 60 < needed < 2000


def test_images_that_the_challenger_was_trained_on_do_not_count(tl, crowned):
    tl("register", "run=leaky", "name=flowers")
    done = tl("promote", "name=flowers", "margin=0.2")
    assert done.code == 0, done.err
    assert "on 300 test images" in done.out
    assert "100 of the champion's test images do not count" in words(done)


def test_a_challenger_that_knows_all_test_images_cannot_be_judged(tl, crowned):
    tl("register", "run=known", "name=flowers")
    before = everything(crowned)
    done = tl("promote", "name=flowers")
    done.refused("was trained or chosen with every test image of the champion", code=1)
    assert everything(crowned) == before


@pytest.fixture
def moving(tl, run_store, run_bundles, tmp_path):
    """A champion with 24 real test images, and a challenger that has judged half of them."""
    photos = make_pictures(tmp_path / "photos", 24)
    names = [f"test/{path.name}" for path in photos]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in photos]
    given = table(0.5, digests=digests, names=names)
    place = tmp_path / "photos"
    record(run_store, tmp_path / "a", run_bundles["one"], given, name="a", root=place)
    half = table(0.9, digests=digests[:12], names=names[:12])
    record(run_store, tmp_path / "b", run_bundles["two"], half, name="b", root=tmp_path / "other")
    for run in ("a", "b"):
        tl("register", f"run={run}", "name=photos")
        if run == "a":
            tl("promote", "name=photos")
    said = Bundle.load(run_bundles["two"]).predict(photos[12:])["label"]
    right = half["correct"].sum() + (said == given["label"][12:].to_numpy()).sum()
    return photos, f"accuracy {right / 24:.3f} against the champion's 0.500 on 24 test images"


def test_missing_images_are_predicted_where_they_are(tl, moving):
    _, figures = moving
    done = tl("promote", "name=photos", "margin=0.5")
    assert figures in words(done)
    assert "its bundle looked at 12 of them now" in words(done)


def test_images_that_moved_are_found_by_their_hash_or_named(tl, moving, store_client, tmp_path):
    photos, figures = moving
    moved = tmp_path / "archive/2020"
    moved.mkdir(parents=True)
    for number, photo in enumerate(photos):
        photo.rename(moved / f"{number + 100}.png")
    before = everything(store_client, "photos")
    done = tl("promote", "name=photos")
    done.refused("12 of the champion's test images are needed", "data.root=", photos[12].name)
    spare = (moved / "120.png").read_bytes()
    (moved / "120.png").write_bytes(b"another picture")
    archive = f"data.root={tmp_path / 'archive'}"
    tl("promote", "name=photos", archive).refused("1 of the champion's test images are needed")
    assert everything(store_client, "photos") == before
    (moved / "120.png").write_bytes(spare)
    assert figures in words(tl("promote", "name=photos", archive, "margin=0.5"))


def make_pictures(folder, number):
    """Pictures that differ, as files of a test split."""
    (folder / "test").mkdir(parents=True)
    sources = make_photos(folder)
    made = [folder / "test" / f"{i}.png" for i in range(number)]
    for i, path in enumerate(made):
        with Image.open(sources[i % 3]) as image:
            ImageEnhance.Brightness(image.convert("RGB")).enhance(0.5 + i / 50).save(path)
    return made


def test_images_in_a_table_are_read_from_there(tl, run_store, run_bundles, tmp_path):
    photos = make_pictures(tmp_path / "photos", 6)
    root = tmp_path / "photos"
    lines = ["path,label,split"] + [f"test/{p.name},ant,test" for p in photos]
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in photos]
    names = [f"test/{path.name}" for path in photos]
    listed = root / "list.csv"
    for name, bundle, table_of in (
        ("a", "one", table(0.5, digests=digests, names=names)),
        ("b", "two", table(0.9, digests=hashes(3, "own"))),
    ):
        record(run_store, tmp_path / name, run_bundles[bundle], table_of, name=name, root=listed)
        tl("register", f"run={name}", "name=photos")
        done = tl("promote", "name=photos", "margin=0.5")
    assert "on 6 test images" in words(done)
    assert "its bundle looked at 6 of them now" in words(done)


def number_bundles(folder, photos):
    """Two bundles that predict an age."""
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        model = timm.create_model("test_resnet", num_classes=1)
        outputs = Outputs("regression", mean=30.0, std=9.0)
        export(folder / name, model, photos, classes=["age"], outputs=outputs)
    return folder


def label_bundles(folder, photos):
    """Two bundles with several labels an image."""
    for number, name in enumerate(("one", "two")):
        model = network("test_resnet")
        model.get_classifier().bias.data += 0.1 * number
        outputs = Outputs("multi", thresholds=(0.2, 0.3, 0.3))
        export(folder / name, model, photos, outputs=outputs)
    return folder


def numbers(rows, error):
    """Predictions of ages that are wrong by about as much."""
    truth = np.linspace(20, 60, len(rows))
    wrong = error * np.random.default_rng(0).choice([-1.2, -0.8, 0.8, 1.2], len(rows))
    return predictions_table(rows, truth + wrong, ["age"], task=Task.regression, targets=truth)


def labels(rows, error):
    """Predictions of labels, of which a share is the wrong way round."""
    rng = np.random.default_rng(0)
    truth = np.stack([rng.permutation(len(rows)) % 2 for _ in CLASSES], axis=1)
    shares = np.where(rng.random(truth.shape) < error, 1 - truth, truth) * 0.6 + 0.2
    return predictions_table(
        rows, shares, CLASSES, task=Task.multi, targets=truth, thresholds=[0.5] * 3
    )


@pytest.mark.parametrize(
    ("make", "say", "metric"),
    [(number_bundles, numbers, "mean absolute error"), (label_bundles, labels, "mAP")],
)
def test_numbers_and_labels_are_judged_and_predicted_too(
    tl, run_store, tmp_path, sample_photos, make, say, metric
):
    made = make(tmp_path / "bundles", sample_photos)
    photos = make_pictures(tmp_path / "photos", 8)
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in photos] + hashes(192)
    names = [f"test/{path.name}" for path in photos] + [f"{i}.png" for i in range(192)]
    rows = pd.DataFrame({"path": names, "split": "test", "sha256": digests})
    root = tmp_path / "photos"
    both = {"one": say(rows, 0.3), "two": say(rows, 0.1).iloc[8:]}
    for name, predictions in both.items():
        record(run_store, tmp_path / name, made / name, predictions, name=name, root=root)
        tl("register", f"run={name}", "name=flowers")
        done = tl("promote", "name=flowers", "margin=0.5")
    assert metric in words(done)
    assert "on 200 test images" in words(done)
    assert "its bundle looked at 8 of them now" in words(done)
    # by hand: what its run said, and what the bundle says of the eight
    bundle, theirs = Bundle.load(made / "two"), both["one"]
    if metric == "mAP":
        shares = pd.concat([theirs[:8], both["two"]])[[f"p_{name}" for name in CLASSES]].to_numpy(
            copy=True
        )
        shares[:8] = bundle.probabilities(photos)
        truth = [[name in found for name in CLASSES] for found in theirs["labels"]]
        assert f"mAP {average_precision_score(truth, shares):.3f} against" in words(done)
    else:
        errors = np.abs(bundle.values(photos) - theirs["target"].to_numpy()[:8])
        mae = np.concatenate([errors, both["two"]["error"].abs()]).mean()
        assert f"mean absolute error {mae:.4g} against" in words(done)


def test_a_broken_seal_keeps_the_champion(tl, crowned, place, run_bundles, tmp_path):
    record(place, tmp_path / "run", run_bundles["two"], table(0.95, seed=5), name="mine")
    tl("register", "run=mine", "name=flowers")
    spoil(crowned, tmp_path / "run")
    before = everything(crowned)
    done = tl("promote", "name=flowers")
    done.refused("the seal of version 2 is broken", "not those that were sealed", code=1)
    assert everything(crowned) == before


def test_without_test_images_those_of_val_count_and_it_says_so(
    tl, run_store, run_bundles, tmp_path
):
    for number, (bundle, right) in enumerate({"one": 0.7, "two": 0.9}.items()):
        predictions = table(right, split="val", seed=number)
        record(run_store, tmp_path / bundle, run_bundles[bundle], predictions, name=bundle)
        tl("register", f"run={bundle}", "name=flowers")
        done = tl("promote", "name=flowers")
    assert done.code == 0, done.err
    assert "on 400 val images" in done.out
    assert "the champion had no test images" in words(done)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name=roses"], "there is no registered model 'roses'; there are flowers"),
        (["name=flowers"], "flowers has no version called challenger: it has champion (version 1)"),
        (["name=flowers", "candidate=7"], "flowers has no version 7"),
        (["name=flowers", "candidate=champion"], "candidate=champion is what it would replace"),
        (["name=flowers", "margin=2"], "margin must be in [0, 0.5], got 2"),
        (["name=flowers", "rollback=true"], "flowers has no former champion"),
    ],
)
def test_what_cannot_be_promoted_is_said(tl, crowned, arguments, message):
    before = everything(crowned)
    tl("promote", *arguments).refused(message)
    assert everything(crowned) == before


def test_runs_without_predictions_or_hashes_are_named(tl, crowned, place, run_bundles, tmp_path):
    old = table(0.9).drop(columns="sha256")
    record(place, tmp_path / "old", run_bundles["two"], old, name="old")
    tl("register", "run=old", "name=flowers")
    tl("promote", "name=flowers").refused("do not say which images they are of")
    run = crowned.get_run(crowned.get_model_version("flowers", "2").run_id)
    (Path(run.info.artifact_uri.removeprefix("file://")) / "predictions.parquet").unlink()
    tl("promote", "name=flowers").refused("has no predictions.parquet in the store")
    assert aliases(crowned) == {"champion": 1, "challenger": 2}


def test_a_run_that_does_not_say_what_it_was_trained_on_is_named(
    tl, crowned, place, run_bundles, tmp_path
):
    some = table(0.9, digests=hashes(100))
    record(place, tmp_path / "old", run_bundles["two"], some, name="old")
    tl("register", "run=old", "name=flowers")
    run = crowned.get_run(crowned.get_model_version("flowers", "2").run_id)
    (Path(run.info.artifact_uri.removeprefix("file://")) / "train_images.parquet").unlink()
    tl("promote", "name=flowers").refused("it has no train_images.parquet")
    assert aliases(crowned) == {"champion": 1, "challenger": 2}


# --- rollback ------------------------------------------------------------------------------------


def test_rollback_goes_back_step_by_step(tl, crowned):
    for run in ("better", "worse"):
        tl("register", f"run={run}", "name=flowers")
        assert tl("promote", "name=flowers", "margin=0.5").code == 0
    assert aliases(crowned) == {"champion": 3, "previous": 2}
    done = tl("promote", "name=flowers", "rollback=true")
    assert done.code == 0, done.err
    assert "version 2, in place of version 3" in done.out
    assert aliases(crowned) == {"champion": 2, "previous": 1}
    assert tl("promote", "name=flowers", "rollback=true").code == 0
    assert aliases(crowned) == {"champion": 1}
    tl("promote", "name=flowers", "rollback=true").refused("flowers has no former champion")
    story = crowned.get_model_version("flowers", "2").description
    assert [line.split(" ", 2)[2][:20] for line in story.split("\n\n")[1:]] == [
        "registered from the ",
        "champion in place of",
        "no longer champion: ",
        "champion again, in p",
        "no longer champion: ",
    ]
    assert tl("promote", "name=flowers", "candidate=2").code == 0
    assert aliases(crowned) == {"champion": 2, "previous": 1}


def test_rollback_to_a_broken_seal_changes_nothing(tl, crowned, place, run_bundles, tmp_path):
    record(place, tmp_path / "run", run_bundles["three"], table(0.95, seed=5), name="mine")
    for run in ("mine", "better"):
        tl("register", f"run={run}", "name=flowers")
        assert tl("promote", "name=flowers", "margin=0.5").code == 0
    spoil(crowned, tmp_path / "run")
    before = everything(crowned)
    done = tl("promote", "name=flowers", "rollback=true")
    done.refused("the seal of version 2 is broken", code=1)
    assert everything(crowned) == before
