"""Losses of the tasks against torch's own, and whole epochs of a head against autograd."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, mean_absolute_error, r2_score
from torch import nn
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from tl.config import ConfigError, Imbalance, Task
from tl.heads import train_epoch
from tl.imbalance import Balance, choose_balance
from tl.losses import Objective
from tl.scores import Scores

CLASSES = ["ant", "bee", "cat"]
COUNTS = (60, 30, 10)
LABELS = np.repeat(np.arange(3), COUNTS)
SPREAD = np.random.default_rng(0).permutation(LABELS)  # every batch has every class


def marks(rows=40, classes=5, seed=0):
    shares = np.linspace(0.1, 0.6, classes)
    return (np.random.default_rng(seed).random((rows, classes)) < shares).astype(np.float32)


def outputs(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def single(method):
    return Objective(Task.single, choose_balance(method, Task.single, LABELS, CLASSES))


def test_without_anything_it_is_cross_entropy_to_the_bit():
    z, y = outputs(100, 3), torch.from_numpy(LABELS)
    found = single(Imbalance.none)(z, y, label_smoothing=0.1)
    assert torch.equal(found, F.cross_entropy(z, y, label_smoothing=0.1))


def test_class_weights_count_an_image_as_several():
    z, y = outputs(100, 3), torch.from_numpy(LABELS)
    share = torch.tensor([100 / 3 / count for count in COUNTS])
    expected = (share[y] * F.cross_entropy(z, y, reduction="none")).sum() / 100
    assert single(Imbalance.weights)(z, y).item() == pytest.approx(expected.item(), rel=1e-6)
    assert expected.item() == pytest.approx(F.cross_entropy(z, y, weight=share).item(), rel=1e-6)


def test_logit_adjustment_adds_the_log_of_the_shares_in_the_loss_only():
    z, y = outputs(100, 3), torch.from_numpy(LABELS)
    objective = single(Imbalance.logit_adjustment)
    expected = F.cross_entropy(z + torch.log(torch.tensor([0.6, 0.3, 0.1])), y)
    assert objective(z, y).item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.equal(objective.activate(z), z.softmax(dim=1))


def test_focal_loss_of_classes():
    z, y = outputs(100, 3), torch.from_numpy(LABELS)
    p = z.softmax(dim=1)[range(100), y]
    expected = (-((1 - p) ** 2) * p.log()).mean()
    assert single(Imbalance.focal)(z, y).item() == pytest.approx(expected.item(), rel=1e-5)


def test_weights_of_images_are_shares_of_their_mean():
    z, y = outputs(100, 3), torch.from_numpy(LABELS)
    weights = torch.rand(100) + 0.5
    objective = Objective(usual_weight=float(weights.mean()))
    each = F.cross_entropy(z, y, reduction="none")
    expected = (each * weights).sum() / weights.sum()
    assert objective(z, y, weights).item() == pytest.approx(expected.item(), rel=1e-5)
    # A weight of 0 takes an image out.
    only = (torch.arange(100) < 10).float()
    found = Objective(usual_weight=0.1)(z, y, only)
    assert found.item() == pytest.approx(each[:10].mean().item(), rel=1e-5)


def test_several_labels():
    y = torch.from_numpy(marks())
    z = outputs(*y.shape)
    plain = Objective(Task.multi)
    expected = F.binary_cross_entropy_with_logits(z, y)
    assert plain(z, plain.encode(y)).item() == pytest.approx(expected.item(), rel=1e-6)
    smooth = F.binary_cross_entropy_with_logits(z, y * 0.8 + 0.1)
    assert plain(z, y, label_smoothing=0.2).item() == pytest.approx(smooth.item(), rel=1e-6)
    assert torch.equal(plain.activate(z), z.sigmoid())

    def balanced(method):
        return Objective(Task.multi, choose_balance(method, Task.multi, y.numpy(), "abcde"))

    focal = sigmoid_focal_loss(z, y, alpha=-1, gamma=2, reduction="mean")
    assert balanced(Imbalance.focal)(z, y).item() == pytest.approx(focal.item(), rel=1e-5)
    share = y.mean(dim=0)
    sides = torch.where(y > 0, 0.5 / share, 0.5 / (1 - share))
    weighted = F.binary_cross_entropy_with_logits(z, y, weight=sides)
    assert balanced(Imbalance.weights)(z, y).item() == pytest.approx(weighted.item(), rel=1e-5)
    assert sides.mean().item() == pytest.approx(1, rel=1e-5)
    shifted = F.binary_cross_entropy_with_logits(z + torch.logit(share), y)
    found = balanced(Imbalance.logit_adjustment)(z, y)
    assert found.item() == pytest.approx(shifted.item(), rel=1e-5)


def test_a_number_is_learned_in_units_of_its_spread():
    objective = Objective(Task.regression, mean=50.0, std=10.0)
    y = torch.tensor([40.0, 50.0, 70.0])
    assert objective.encode(y).tolist() == [[-1], [0], [2]]
    z = torch.tensor([[0.0], [0.0], [1.5]])
    assert objective(z, objective.encode(y), label_smoothing=0.1).item() == pytest.approx(1.25 / 3)
    assert objective.activate(z).tolist() == [50, 50, 65]


def objectives():
    multi = marks(203, 4, seed=1)
    labels = np.random.default_rng(2).permutation(np.repeat([0, 1, 2, 3], (120, 60, 20, 3)))
    numbers = np.random.default_rng(3).normal(3, 2, 203).astype(np.float32)
    methods = [m for m in Imbalance if m not in {Imbalance.auto, Imbalance.sampler}]
    for method in methods:
        balance = choose_balance(method, Task.single, labels, "abcd")
        yield f"single-{method.value}", Objective(Task.single, balance, usual_weight=1.5), labels
        balance = choose_balance(method, Task.multi, multi, "abcd")
        yield f"multi-{method.value}", Objective(Task.multi, balance, usual_weight=1.5), multi
    mean, std = float(numbers.mean()), float(numbers.std())
    yield "regression", Objective(Task.regression, mean=mean, std=std, usual_weight=1.5), numbers


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("objective", "values"), [pytest.param(o, v, id=i) for i, o, v in objectives()]
)
def test_whole_epochs_of_a_head_are_those_of_autograd(objective, values, weighted):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(203, 30, generator=generator)
    order = torch.randint(203, (203,), generator=generator)  # as a sampler draws: with repeats
    targets = objective.encode(torch.from_numpy(values))
    weights = torch.rand(203, generator=generator) + 0.1 if weighted else None
    head = nn.Linear(30, 1 if values.ndim == 1 and values.dtype == np.float32 else 4)
    other = copy.deepcopy(head)
    sgd = torch.optim.SGD([{"params": head.parameters(), "initial_lr": 0.5}], lr=0.5, momentum=0.9)
    found = train_epoch(
        head, sgd, x, targets,
        batch_size=32, objective=objective, weights=weights, order=order, label_smoothing=0.1,
    )  # fmt: skip
    plain = torch.optim.SGD(other.parameters(), lr=0.5, momentum=0.9)
    wanted = []
    for rows in order.split(32):
        own = None if weights is None else weights[rows]
        loss = objective(other(x[rows]), targets[rows], own, 0.1)
        plain.zero_grad()
        loss.backward()
        plain.step()
        wanted.append(loss.detach())
    torch.testing.assert_close(found, torch.stack(wanted), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(head.weight, other.weight, rtol=1e-4, atol=1e-6)


# --- what to do about classes of different sizes --------------------------------------------------


def test_auto_goes_by_the_counts_and_says_them():
    few = choose_balance(Imbalance.auto, Task.single, LABELS, CLASSES)
    assert few.method is Imbalance.logit_adjustment
    assert few.why.startswith(
        "the largest class, ant, has 6.0 times as many training images as the smallest, cat "
        "(60 and 10)"
    )
    even = choose_balance(Imbalance.auto, Task.single, np.arange(60) % 3, CLASSES)
    assert (even.method, even.shift) == (Imbalance.none, None)
    several = choose_balance(Imbalance.auto, Task.multi, marks(), "abcde")
    assert several.method is Imbalance.none
    assert "threshold of its own" in several.why
    number = choose_balance(Imbalance.auto, Task.regression, np.ones(3), ["age"])
    assert number == Balance(why="a number has no classes")


@pytest.mark.parametrize("method", ["weights", "sampler", "focal", "logit_adjustment"])
def test_a_number_has_no_classes_to_balance(method):
    with pytest.raises(ConfigError, match=rf"imbalance={method} is about classes.*regression"):
        choose_balance(Imbalance(method), Task.regression, np.ones(3), ["age"])


def test_the_sampler_draws_all_classes_equally():
    draws = choose_balance(Imbalance.sampler, Task.single, SPREAD, CLASSES).draws
    assert np.bincount(SPREAD, draws) == pytest.approx([100 / 3] * 3)
    y = np.array([[1, 0], [1, 0], [1, 1], [0, 0]], np.float32)
    draws = choose_balance(Imbalance.sampler, Task.multi, y, "ab").draws
    assert draws.tolist() == pytest.approx([1 / 3, 1 / 3, 1, 1])


def test_a_class_without_training_images_gives_no_infinity():
    labels = np.array([0, 0, 1, 1, 1])
    for method in Imbalance:
        found = choose_balance(method, Task.single, labels, CLASSES)
        for values in (found.positive, found.shift, found.draws):
            assert values is None or np.isfinite(values).all()
        y = np.array([[1, 0, 1], [1, 0, 0]], np.float32)  # on all images, on none, on some
        found = choose_balance(method, Task.multi, y, CLASSES)
        for values in (found.positive, found.negative, found.shift, found.draws):
            assert values is None or np.isfinite(values).all()


# --- scores of an epoch ---------------------------------------------------------------------------


def scored(objective, z, y, columns):
    scores = Scores(objective, columns)
    for part in (slice(0, 17), slice(17, None)):
        scores.update(z[part], y[part])
    found = {name: float(value) for name, value in scores.compute().items()}
    assert tuple(found) == scores.names
    scores.update(z, y)  # nothing is left of the epoch before
    again = {name: float(value) for name, value in scores.compute().items()}
    assert again == pytest.approx(found, abs=1e-5)
    return found


def test_scores_of_several_labels_leave_out_what_no_image_has():
    y = marks()
    y[:, 2] = 0
    z = outputs(*y.shape)
    seen = [c for c in range(5) if c != 2]
    expected = average_precision_score(y[:, seen], z.sigmoid().numpy()[:, seen])
    found = scored(Objective(Task.multi), z, torch.from_numpy(y), 5)
    assert found == {"map": pytest.approx(expected, abs=1e-5)}


def test_scores_of_a_number_are_in_its_own_units():
    objective = Objective(Task.regression, mean=5.0, std=2.0)
    y = torch.randn(40, generator=torch.Generator().manual_seed(1)) * 2 + 5
    z = outputs(40, 1)
    said = z[:, 0] * 2 + 5
    found = scored(objective, z, y, 1)
    assert found["mae"] == pytest.approx(mean_absolute_error(y, said), rel=1e-5)
    assert found["r2"] == pytest.approx(r2_score(y, said), rel=1e-4)
    alone = Scores(objective, 1)
    alone.update(z[:1], y[:1])
    assert alone.compute()["r2"].isnan()
