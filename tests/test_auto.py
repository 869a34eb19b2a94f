"""`tl train finetune=auto`: what it measures, says, trains and leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from commands import TINY, UNTRACKED, Done, files
from mlflow import MlflowClient
from processes import finish, kill_when, start, timeless
from safetensors.torch import load_file

MOST_COLUMNS = 100


@pytest.fixture
def weights() -> Path:
    """Weights that a pretraining could have made: a file, the same in each test."""
    torch.manual_seed(0)
    path = Path("weights.pth").absolute()
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), path)
    return path


@pytest.fixture
def auto(tl, image_folder, weights) -> Callable[..., Done]:
    """Train with finetune=auto on coloured images, one epoch a phase."""

    def call(*args: str, tracked: bool = False, output: str = "run", **folder: object) -> Done:
        data = image_folder(**folder)
        settings = [*(TINY if tracked else UNTRACKED), f"model.weights={weights}"]
        done = tl(
            "train", f"data.root={data}", *settings, "finetune=auto", f"output_dir={output}", *args
        )
        assert done.code == 0, done.out + done.err
        return done

    return call


def decision(run: str = "run") -> dict[str, object]:
    values: dict[str, object] = json.loads(Path(run, "decision.json").read_text())
    return values


def said_before_training(done: Done) -> str:
    return done.out.split("data notes")[0].split("phase 1 of")[0]


# --- what it does -------------------------------------------------------------------------------


def test_auto_measures_decides_trains_and_says_so(auto):
    done = auto("finetune.epochs=2", splits={"train": 12, "val": 4})
    made = decision()
    evidence = json.loads(Path("run/evidence.json").read_text())
    plan = json.loads(Path("run/plan.json").read_text())
    assert (evidence["amount"]["images"], evidence["amount"]["per_class"]) == (36, 12)
    assert made["amount"] == made["measured"]["amount"] == "small"
    assert [s["stage"] for s in evidence["similarity"]["stages"]][-1] == "features"
    assert plan["method"] == f"auto: {made['method']}"
    assert {phase["epochs"] for phase in plan["phases"]} == {2}
    assert made["forced"]["finetune.epochs"] == 2
    assert made["confirmed"] is None
    page = Path("run/advice.html").read_text()
    assert f"images · test_resnet · auto: {made['method']}" in page
    assert "<svg" in page
    brief = said_before_training(done)
    assert made["rule"] in " ".join(brief.split())
    for text in (
        "small: 5 to 19 images a class",
        "how well each stage tells the classes apart",
        "what would change it",
        f"images · test_resnet · auto: {made['method']}",
    ):
        assert text in brief
    marked = [line for line in brief.splitlines() if "[" in line and "images a class" in line]
    assert len(marked) == 1
    assert f"[{made['method']}]" in marked[0]
    ours = brief.split("images · test_resnet")[0]
    assert max(map(len, ours.splitlines())) <= MOST_COLUMNS
    assert done.err == ""


def test_evidence_and_decision_are_in_mlflow(auto):
    auto("amount=large", tracked=True, splits={"train": 12, "val": 4})
    record, made = json.loads(Path("run/run.json").read_text()), decision()
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    run = client.get_run(record["run_id"])
    evidence = json.loads(Path("run/evidence.json").read_text())
    logged = run.data.metrics
    assert logged["evidence/amount/per_class"] == 12
    concat = evidence["similarity"]["concat"]
    assert logged["evidence/similarity/concat"] == pytest.approx(concat["value"])
    assert logged["evidence/similarity/concat_error"] == pytest.approx(concat["error"])
    last = evidence["similarity"]["stages"][-1]
    assert logged["evidence/similarity/stages/features/probe"] == pytest.approx(
        last["probe"]["value"]
    )
    assert logged["evidence/scores/logme"] == pytest.approx(evidence["scores"]["logme"])
    tags = run.data.tags
    assert tags["tl.method"] == made["method"]
    assert tags["tl.cell"] == f"large, {made['similarity']}"
    assert (tags["tl.amount"], tags["tl.amount_measured"]) == ("large", "small")
    assert tags["tl.similarity_measured"] == made["measured"]["similarity"]
    assert "amount=large" in tags["tl.forced"]
    assert tags["tl.rule"] == made["rule"]
    title = f"images · test_resnet · auto: {made['method']} · {record['job'][:4]}"
    assert run.info.run_name == title
    assert run.data.params["finetune.method"] == f"auto: {made['method']}"
    assert "phase.head.epochs" in run.data.params or "phase.all.epochs" in run.data.params
    names = {f.path for f in client.list_artifacts(record["run_id"])}
    assert {"evidence.json", "decision.json", "advice.html", "plan.json"} <= names


@pytest.mark.parametrize(
    ("amount", "similarity", "method"),
    [
        ("tiny", "similar", "wise_ft"),
        ("small", "similar", "lp_ft"),
        ("large", "different", "lp_ft"),
        ("tiny", "different", "stage_probe"),
    ],
)
def test_forced_cells_are_trained_and_the_measured_ones_said(auto, amount, similarity, method):
    done = auto(f"amount={amount}", f"similarity={similarity}", "model.image_size=64")
    made = decision()
    assert (made["amount"], made["similarity"], made["method"]) == (amount, similarity, method)
    assert {k: made["forced"][k] for k in ("amount", "similarity")} == {
        "amount": amount,
        "similarity": similarity,
    }
    assert made["measured"]["amount"] == "tiny"  # 18 images
    text = " ".join(done.out.split())
    assert f"amount={amount} (measured: tiny)" in text
    assert f"similarity={similarity} (measured: {made['measured']['similarity']})" in text


def test_random_weights_measure_nothing_and_it_says_so(auto):
    done = auto("model.weights=none")
    assert json.loads(Path("run/evidence.json").read_text())["similarity"] is None
    made = decision()
    assert made["similarity"] == made["measured"]["similarity"] == "unknown"
    text = " ".join(said_before_training(done).split())
    assert "random" in text
    assert "not measured" in text or "cannot be measured" in text


def test_small_images_are_trained_and_exported_at_a_smaller_size(auto):
    torch.manual_seed(0)
    name, file = "mobilenetv3_small_050", Path("small.pth").absolute()
    torch.save(timm.create_model(name).state_dict(), file)
    given = [f"model.name={name}", f"model.weights={file}", "amount=small", "similarity=similar"]
    done = auto(*given, "finetune.epochs=1", "model.image_size=null")
    assert decision()["image_size"] == 160
    assert "input of 160 instead of 224 pixels" in " ".join(done.out.split())
    facts = json.loads(Path("run/checkpoints/model.json").read_text())["preprocessing"]
    assert facts["input_size"] == [3, 160, 160]
    auto(*given, "finetune.epochs=1", "model.image_size=64", output="other")
    facts = json.loads(Path("other/checkpoints/model.json").read_text())["preprocessing"]
    assert (decision("other")["image_size"], facts["input_size"]) == (None, [3, 64, 64])


def test_augmentation_is_decided_unless_it_is_asked_for(auto):
    auto("augment=auto", "augment.hflip=0.25")
    auto("augment=strong", output="strong")
    made = decision()
    log = Path("run/config.yaml").read_text()
    assert "name: auto" in log, "the config stays as it was asked"
    assert made["augment"] in {"none", "light", "medium", "strong"}
    assert "name: strong" in Path("strong/config.yaml").read_text()


def test_an_explicit_method_measures_nothing(tl, image_folder):
    settings = [f"data.root={image_folder()}", *UNTRACKED, "output_dir=run"]
    done = tl("train", *settings, "finetune=linear_probe")
    assert done.code == 0, done.err
    assert not {"evidence.json", "decision.json", "advice.html"} & files(Path("run"))
    assert "how to transfer" not in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune=lp_ft", "amount=tiny"], "amount"),
        (["finetune=lp_ft", "similarity=different"], "similarity"),
        (["finetune=auto", "amount=huge"], "amount must be one of tiny, small, medium, large"),
        (["finetune=lp_ft", "finetune.epochs=null"], "finetune=auto"),
    ],
)
def test_what_only_auto_takes(tl, image_folder, arguments, message):
    settings = [f"data.root={image_folder()}", *UNTRACKED]
    tl("train", *settings, *arguments, "output_dir=run").refused("ConfigError", message)
    assert not Path("run").exists()


def test_auto_is_the_default_and_batches_mix_it_with_methods(tl, image_folder, weights):
    data = image_folder()
    settings = [f"data.root={data}", *UNTRACKED, f"model.weights={weights}"]
    done = tl("train", "-m", *settings, "finetune=auto,linear_probe", "output_dir=batch")
    assert done.code == 0, done.err
    methods = [json.loads(Path(f"batch/{i}/plan.json").read_text())["method"] for i in (0, 1)]
    assert methods[0].startswith("auto: ")
    assert methods[1] == "linear_probe"
    from tl.config import compose

    config = compose("train", ["data.root=x"])
    assert (config.finetune.method, config.augment.name) == ("auto", "auto")


def test_the_same_seed_decides_and_trains_the_same(auto):
    auto("seed=5")
    auto("seed=5", output="again")
    left, right = (json.loads(Path(run, "evidence.json").read_text()) for run in ("run", "again"))
    left.pop("seconds"), right.pop("seconds")
    assert left == right
    assert decision() == decision("again")
    metrics = [json.loads(Path(run, "metrics.json").read_text()) for run in ("run", "again")]
    assert timeless(metrics[0]) == timeless(metrics[1])


# --- confirm ------------------------------------------------------------------------------------


def test_confirm_trains_choice_and_neighbour_and_keeps_one(auto):
    done = auto("finetune.confirm=true", "finetune.epochs=8", splits={"train": 12, "val": 8})
    made = decision()
    confirmed = made["confirmed"]
    assert confirmed["images"] == 24
    assert {confirmed["choice"], confirmed["neighbour"]} == {
        made["method"],
        made["neighbour"],
    }
    kept = made["method"] if confirmed["kept"] == "choice" else made["neighbour"]
    plan = json.loads(Path("run/plan.json").read_text())
    assert plan["method"] == f"auto: {kept}"
    assert {phase["epochs"] for phase in plan["phases"]} == {8}
    for name in ("choice", "neighbour"):
        folder = Path(f"run/checkpoints/confirm-{name}")
        tried = json.loads((folder / "confirm.json").read_text())
        assert np.mean(tried["scores"]) == pytest.approx(confirmed[f"{name}_score"])
        epochs = json.loads((folder / "progress.json").read_text())["phases"]
        assert {phase["epochs"] for phase in epochs} <= {1, 2}
        assert not [*folder.rglob("*.ckpt"), *folder.rglob("*.safetensors")]
    assert confirmed["why"] in " ".join(done.out.split())
    assert "choice and neighbour compared" in Path("run/advice.html").read_text()


# --- resume -------------------------------------------------------------------------------------

AUTO = [
    "experiment=smoke",
    "finetune=auto",
    "model.image_size=32",
    "finetune.epochs=6",
    "finetune.patience=4",
    "amount=medium",
    "similarity=different",
    "export.enabled=false",
    "tracking.enabled=false",
    "seed=3",
]


def test_a_resumed_run_goes_on_as_it_decided(image_folder, weights, tmp_path):
    data = image_folder(splits={"train": 12, "val": 6})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = [f"data.root={data}", f"model.weights={weights}", *AUTO]
    finish(start(*settings, f"output_dir={whole}"))
    victim = start(*settings, f"output_dir={broken}")
    kill_when(victim, broken / "checkpoints/2-all/last.ckpt")
    # If the resumed run measured and decided again, this would be gone.
    told = json.loads((broken / "decision.json").read_text())
    (broken / "decision.json").write_text(json.dumps({**told, "rule": "As a test wrote it."}))
    output = finish(start(f"resume={broken}"))
    assert "As a test wrote it." in " ".join(output.split())
    assert "phase head is done already" in output
    left, right = (json.loads((run / "metrics.json").read_text()) for run in (whole, broken))
    assert timeless(left) == timeless(right)
    curves = [pd.read_csv(run / "history.csv").drop(columns="seconds") for run in (whole, broken)]
    pd.testing.assert_frame_equal(*curves, check_exact=True)
    models = [load_file(run / "checkpoints/model.safetensors") for run in (whole, broken)]
    assert all((models[0][name] == models[1][name]).all() for name in models[0])


def test_a_run_that_is_killed_while_it_confirms_goes_on(image_folder, weights, tmp_path):
    data = image_folder(splits={"train": 12, "val": 6})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = [f"data.root={data}", f"model.weights={weights}", *AUTO, "finetune.confirm=true"]
    finish(start(*settings, f"output_dir={whole}"))
    victim = start(*settings, f"output_dir={broken}")
    kill_when(victim, broken / "checkpoints/confirm-choice/confirm.json")
    assert json.loads((broken / "decision.json").read_text())["confirmed"] is None
    output = finish(start(f"resume={broken}"))
    assert "trying the choice" not in output
    assert "trying the neighbour" in output
    left, right = (json.loads((run / "metrics.json").read_text()) for run in (whole, broken))
    assert timeless(left) == timeless(right)
    results = [json.loads((run / "decision.json").read_text()) for run in (whole, broken)]
    assert results[0] == results[1]


@pytest.mark.parametrize("content", [None, "{", "{}", '{"confirmed": null}'])
def test_a_run_that_lost_its_decision_says_so(auto, tl, content):
    auto()
    Path("run/decision.json").unlink()
    if content is not None:
        Path("run/decision.json").write_text(content)
    tl("train", "resume=run").refused(
        "RunError: ", "run cannot be resumed: its evidence.json or decision.json cannot be read"
    )
