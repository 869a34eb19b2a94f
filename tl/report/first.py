"""The first screen: what it is, what came out, how sure that is, and what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator

from tl.advice import forecast
from tl.config import Task
from tl.report.files import METRICS, PREDICTIONS, RunFiles
from tl.report.judging import (
    confused,
    group_table,
    guessed,
    names_below,
    per_class,
    sureness,
)
from tl.report.mistakes import suspects
from tl.report.parts import WORDS, Block, Part, facts, images, listed, number, share, step, tile
from tl.report.training import counted, gap, unsettled
from tl.sections import duration

NAMES = {"acc": "accuracy", "map": "mean average precision", "mae": "mean absolute error"}
WIDE = 0.03  # half an interval of the accuracy that is said to be wide
MOST_CLASSES = MOST_GROUPS = 3  # with a step of their own
FAR = 2.0  # how many times as large as usual is remarkable
LEARNED_BY_HEART = 0.2  # loss on val above that on train, in nats

Step = dict[str, str]


def overview(run: RunFiles) -> Part:
    """The figures that matter, and what they mean in words."""
    return Part("result", "result", verdict(run), [Block("numbers", [*_tiles(run)])],
                [METRICS, PREDICTIONS])  # fmt: skip


def verdict(run: RunFiles) -> list[str]:
    """Plain sentences: how good, against guessing, how certain, and with what caution."""
    split, name = run.split, run.headline
    low, high = _interval(run)
    of = images(int(run.metrics[f"{split}/images"]), WORDS[split])
    value, shown = run.metrics[f"{split}/{name}"], share if run.task is Task.single else number
    said = {
        Task.single: f"it is right {shown(value)} of the time",
        Task.multi: f"its mean average precision is {shown(value)}",
        Task.regression: f"it is off by {shown(value)} on average",
    }[run.task]
    expect = f"on other images of the same kind expect {shown(low)} to {shown(high)}"
    texts = [f"On {of} {said}; {expect}."]
    half = (high - low) / 2
    if run.task is Task.single and half > WIDE:
        count = math.ceil(run.metrics[f"{split}/images"] * (half / 0.02) ** 2 / 100) * 100
        text = f"That is wide: about {count:,} {WORDS[split]} images would tell it to ± 2 points."
        texts.append(text)
    judged = run.judged.get(split)
    if judged is not None:
        texts += _against_guessing(run, guessed(judged, run))
    if split == "val":
        texts.append(
            "There are no test images. Which epoch was kept was chosen by these same validation "
            "images, so expect a little less on new ones."
        )
    return texts


def _interval(run: RunFiles) -> tuple[float, float]:
    key = f"{run.split}/{run.headline}"
    value = run.metrics[key]
    return run.metrics.get(f"{key}_low", value), run.metrics.get(f"{key}_high", value)


def _against_guessing(run: RunFiles, guess: float) -> list[str]:
    how = {
        Task.single: "always saying the most frequent class",
        Task.multi: "guessing by how frequent each label is",
        Task.regression: "always saying the mean of the training images",
    }[run.task]
    figure = share(guess) if run.task is Task.single else number(guess)
    if _useless(run, guess):
        return [f"That is no better than {how} ({figure}): the model has learned nothing of use."]
    return [f"For comparison: {how} gives {figure}."]


def _useless(run: RunFiles, guess: float) -> bool:
    """Whether it cannot be told from one who has not looked at the images."""
    low, high = _interval(run)
    return high >= guess if run.task is Task.regression else low <= guess


def _tiles(run: RunFiles) -> Iterator[dict[str, str]]:
    split, name, m = run.split, run.headline, run.metrics
    low, high = _interval(run)
    shown = share if run.task is Task.single else number
    value = shown(m[f"{split}/{name}"])
    yield tile(f"{NAMES[name]} on {split}", value, f"95 % interval {shown(low)} to {shown(high)}")
    yield from _second_tile(run)
    trained = f"{m.get('trainable_parameters', 0):,.0f} parameters trained"
    yield tile("how it was transferred", run.method, f"{trained}, {m.get('epochs', 0):,.0f} epochs")
    fit = f"{duration(m.get('fit_seconds', 0.0))} of it training"
    yield tile("time", duration(m.get("total_seconds", 0.0)), fit)
    weights = f"weights: {run.model.get('weights', {}).get('source', '')}"
    yield tile("network", str(run.model.get("name", "")).split(".")[0], weights)
    total = run.model.get("data", {}).get("images", 0)
    yield tile("images", f"{total:,}", counted(run))


def _second_tile(run: RunFiles) -> Iterator[dict[str, str]]:
    """What stands beside the headline: how sure it is, or another view of how good."""
    split, m = run.split, run.metrics
    if run.task is Task.single:
        words, _, mean = sureness(run)
        error = number(m.get(f"{split}/ece", math.nan))
        yield tile("how sure", words, f"sure {share(mean)} on average; calibration error {error}")
    elif run.task is Task.multi:
        wrong = share(m.get(f"{split}/hamming", math.nan))
        value = share(m.get(f"{split}/exact_match", math.nan))
        yield tile("all labels right", value, f"of the images; {wrong} of all decisions are wrong")
    elif f"{split}/r2" in m:
        note = "share of the differences between images that it explains"
        yield tile("R²", number(m[f"{split}/r2"]), note)


def next_steps(run: RunFiles) -> Part:
    """What to do next, the most useful first, and the commands."""
    found: tuple[Callable[[RunFiles], Iterator[Step]], ...]
    found = (_labels, _audit, _classes, _groups, _training, _more_data, _calibration, _test)
    if _learned_nothing(run):  # what such a model says of classes and labels means nothing
        found = (_why_nothing, _audit, _training, _test)
    steps = [step for find in found for step in find(run)]
    texts = [] if steps else ["Nothing stands out: no class, no group and no label looks wrong."]
    blocks = [Block("steps", steps)] if steps else []
    files = [METRICS, PREDICTIONS]
    return Part("next", "what to do next", texts, [*blocks, _commands(run)], files)


def _learned_nothing(run: RunFiles) -> bool:
    judged = run.judged.get(run.split)
    return judged is not None and _useless(run, guessed(judged, run))


def _why_nothing(_: RunFiles) -> Iterator[Step]:
    text = (
        "Look whether the labels belong to the images, whether the loss of train falls at all (if "
        "not: another finetune.head_lr, more epochs), and whether the weights are pretrained ones."
    )
    yield step("Find out why it has learned nothing", text, "training")


def _labels(run: RunFiles) -> Iterator[Step]:
    found = suspects(run)
    if not found:
        return
    many = "1 label" if len(found) == 1 else f"{len(found):,} labels"
    why = (
        "The number is far from what the model says."
        if run.task is Task.regression
        else "The model, which did not see these images in training, is sure of another answer."
    )
    yield step(f"Look at {many} that may be wrong", why, "images")


def _audit(run: RunFiles) -> Iterator[Step]:
    found = [f for f in run.json("audit.json").get("findings", []) if f["severity"] == "error"]
    if not found:
        return
    text = f"{found[0]['text']}. Remedy: {found[0]['remedy']}."
    kinds = listed(f["kind"].replace("_", " ") for f in found)
    yield step(f"Mend the data: {kinds}", text, "data")


def _classes(run: RunFiles) -> Iterator[Step]:
    judged = run.judged.get(run.split)
    if judged is None or run.task is Task.regression:
        return
    table = per_class(run)
    seen = table[table["images"] > 0]
    whole = float((seen["recall"].fillna(0) * seen["images"]).sum() / seen["images"].sum())
    poor = names_below(table, whole, judged.classes)
    taken: dict[str, tuple[str, int]] = {}
    for name, other, count, _ in confused(judged):
        taken.setdefault(name, (other, count))
    trained = run.model.get("data", {}).get("counts", {}).get("train", {})
    for row in poor[:MOST_CLASSES]:
        name, low, high = row["class"], share(row["recall_low"]), share(row["recall_high"])
        text = (
            f"It finds {share(row['recall'])} ({low} to {high}) of its "
            f"{images(int(row['images']), WORDS[judged.split])}, and {share(whole)} over all "
            f"classes; it learned from {images(int(trained.get(name, 0)))}."
        )
        other, count = taken.get(name, ("", 0))
        if count > 1:
            text += f" {count:,} are taken for {other}: images that show the difference help most."
        yield step(f"Label more images of {name}", text, "classes")
    if len(poor) > MOST_CLASSES:
        names = listed((row["class"] for row in poor[MOST_CLASSES:]), 8)
        yield step("And of other classes that are found too rarely", f"{names}.", "classes")


def _groups(run: RunFiles) -> Iterator[Step]:
    table = group_table(run)
    if table is None:
        return
    numbers = run.task is Task.regression
    shown = number if numbers else share
    whole = float((table["value"] * table["images"]).sum() / table["images"].sum())
    worse = (table["low"] > whole) if numbers else (table["high"] < whole)
    for _, row in table[worse & ~table["small"]].head(MOST_GROUPS).iterrows():
        figure = "a mean error of" if numbers else "this share right:"
        text = (
            f"Its {images(int(row['images']))} have {figure} {shown(row['value'])} "
            f"({shown(row['low'])} to {shown(row['high'])}), and all images {shown(whole)}. More "
            "images of this group or of such in train help."
        )
        yield step(f"Look at group {row['group']}", text, "groups")


def _training(run: RunFiles) -> Iterator[Step]:
    names = unsettled(run)
    if names:
        epochs = {p["name"]: p["epochs"] for p in run.plan.get("phases", [])}[names[-1]]
        text = (
            f"Phase {names[-1]} ended after its {epochs} epochs while val was still getting "
            f"better: finetune.epochs={2 * epochs}."
        )
        yield step("Train longer", text, "training")
    losses = gap(run)
    if losses and losses[1] > FAR * losses[0] and losses[1] - losses[0] > LEARNED_BY_HEART:
        way = {"none": "light", "light": "medium", "medium": "strong"}.get(run.config.augment.name)
        text = (
            f"At the epoch that was kept its loss is {losses[0]:.2f} on train and {losses[1]:.2f} "
            "on val: it knows the training images by heart. "
        )
        text += f"Try augment={way}, or more images." if way else "More images help."
        yield step("It overfits", text, "training")


def _more_data(run: RunFiles) -> Iterator[Step]:
    evidence = run.evidence
    if evidence is None or evidence.amount.more_data is None:
        return
    if evidence.amount.more_data.interval()[0] > 0:  # else it may be chance: see the evidence
        yield step("Collect more images", forecast.sentence(evidence), "decision")


def _calibration(run: RunFiles) -> Iterator[Step]:
    if run.task is not Task.single:
        return
    words, difference, _ = sureness(run)
    if difference:
        text = (
            "What it says is as good as before, but a probability is not the share of images that "
            "are right."
        )
        yield step(f"Mind its probabilities: it is {words}", text, "calibration")


def _test(run: RunFiles) -> Iterator[Step]:
    if run.split == "val":
        text = (
            "Test images, by which nothing is chosen, give a figure to report: a folder test/, or "
            "data.test_fraction=0.2."
        )
        yield step("Keep test images apart", text)


def _commands(run: RunFiles) -> Block:
    place, bundle = shlex.quote(str(run.path)), shlex.quote(str(run.path / "bundle"))
    if run.has("bundle"):
        rows = {
            "predict": f"tl predict bundle={bundle} source=IMAGE_OR_FOLDER",
            "judge on other images": f"tl evaluate bundle={bundle} data.root=DIR",
            "compare with another run": f"tl compare runs={place},RUN",
            "enter into the registry": f"tl register run={place} name=NAME",
        }
    else:
        rows = {"make the bundle": f"tl export run={place}"}
    if run.decision is not None:
        root = shlex.quote(run.config.data.root)
        rows["try the next best guess"] = (
            f"tl train data.root={root} model.name={run.model.get('name')} "
            f"finetune={run.decision.neighbour}"
        )
    return facts(rows, "commands")
