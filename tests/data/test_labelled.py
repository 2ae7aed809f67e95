"""Labelled examples: splits, figures of a classifier against counts by hand, their place in the training loop."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from sparsebench.data.labelled import Labelled, LabelledData, stratified, unique_rows
from sparsebench.measure import quality, uncertainty
from sparsebench.training.loop import classification_loss, train
from tests.helpers import training_settings


class Points:
    """A split of vectors in the plane; the class is the quadrant."""

    unit, classes = "points", 4

    def __init__(self, name: str, count: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.name, self.x = name, torch.randn(count, 2, generator=generator)
        self.y = (self.x[:, 0] > 0).long() + 2 * (self.x[:, 1] > 0).long()

    def __len__(self):
        return len(self.x)

    def __getitem__(self, rows):
        return Labelled(self.x[rows], self.y[rows])

    def batches(self, limit, batch_size, device):
        for start in range(0, min(limit or len(self), len(self)), batch_size):
            stop = min(start + batch_size, limit or len(self))
            yield Labelled(self.x[start:stop], self.y[start:stop]).to(device)

    def fingerprints(self):
        return [str(row.tolist()) for row in self.x]


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 4))


def test_metrics_by_hand():
    counts = quality.ClassCounts(2)
    scores = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)], [math.log(9), 0.0], [0.0, 0.0]])
    counts.add(scores, torch.tensor([1, 0, 0, 1]))
    actual = counts.metrics()
    assert actual["confusion"] == [[1, 1], [1, 1]]  # a tie is won by the first class
    assert actual["accuracy"] == 0.5 and actual["per_class"] == [0.5, 0.5] and actual["examples"] == 4
    assert actual["nll"] == pytest.approx(-(math.log(0.75) + math.log(0.25) + math.log(0.9) + math.log(0.5)) / 4)
    # bins of 1/15: 0.75 twice with one right, 0.9 once and right, 0.5 once and wrong
    assert actual["ece"] == pytest.approx((abs(1 - 1.5) + abs(1 - 0.9) + abs(0 - 0.5)) / 4)


def test_rows_of_the_confusion_matrix_are_true_classes():
    counts = quality.ClassCounts(2)
    counts.add(torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 2.0]]), torch.tensor([0, 0, 0, 1]))
    actual = counts.metrics()
    assert actual["confusion"] == [[1, 2], [0, 1]] and actual["per_class"] == [pytest.approx(1 / 3), 1.0]
    assert actual["accuracy"] == 0.5  # of examples, not the mean over classes


def test_calibration_has_fifteen_bins():
    """0.66 lies in (9/15, 10/15] and 0.68 in the next; in tenths they would share a bin and their errors would cancel."""
    counts = quality.ClassCounts(2)
    for chance, label in ((0.66, 1), (0.68, 0)):
        counts.add(torch.tensor([[0.0, math.log(chance / (1 - chance))]]), torch.tensor([label]))
    assert counts.metrics()["ece"] == pytest.approx((abs(1 - 0.66) + abs(0 - 0.68)) / 2)


def test_the_error_of_a_calibration_error_is_that_of_samples():
    """Overconfident predictions of two models, drawn again and again: the spread of ECE between draws is its standard
    error, and that of the paired difference."""
    generator, seen, stated = torch.Generator().manual_seed(0), [], []
    for _ in range(400):
        labels = (torch.rand(300, generator=generator) < 0.7).long()  # the class said is always 1
        confidence = 0.8 + 0.1 * torch.rand(300, generator=generator)
        pair = []
        for chances in (confidence, (confidence + 0.05 + 0.04 * labels).clamp_max(0.99)):
            counts = quality.ClassCounts(2)
            counts.add(torch.stack([(1 - chances).log(), chances.log()], -1), labels)
            pair.append(counts.metrics())
        assert pair[0]["gaps"].mean() == pytest.approx(pair[0]["ece"])
        ece = quality.compare_classes(*pair, {})["ece"]
        seen.append((ece["dense"], ece["sparse"] - ece["dense"]))
        stated.append((ece["dense_stderr"], ece["difference_stderr"]))
    for column in (0, 1):
        spread = np.std([row[column] for row in seen], ddof=1)
        assert np.mean([row[column] for row in stated]) == pytest.approx(spread, rel=0.15), column


def test_figures_do_not_depend_on_the_batches():
    split, model = Points("test", 50, 1), classifier()
    (one, _), (two, _) = (quality.classification_quality(model, split, None, b) for b in (7, 50))
    assert one["confusion"] == two["confusion"]
    assert one["nll"] == pytest.approx(two["nll"]) and one["ece"] == pytest.approx(two["ece"])
    limited, _ = quality.classification_quality(model, split, 10, 4)
    assert limited["examples"] == 10


def test_confident_and_right_has_no_calibration_error_and_nan_is_an_error():
    counts = quality.ClassCounts(3)
    counts.add(100 * torch.eye(3), torch.arange(3))
    assert counts.metrics()["ece"] == pytest.approx(0) and counts.metrics()["accuracy"] == 1
    counts.add(torch.full((1, 3), float("nan")), torch.tensor([0]))
    with pytest.raises(FloatingPointError, match="not finite"):
        counts.metrics()


def test_a_class_without_examples_has_no_accuracy():
    counts = quality.ClassCounts(3)
    counts.add(torch.eye(3)[:2], torch.arange(2))
    assert counts.metrics()["per_class"] == [1.0, 1.0, None]


def counted(accuracy, first, **figures):
    """Metrics over 100 examples of which those from `first` on, as many as `accuracy` says, are right."""
    right = np.zeros(100, dtype=bool)
    right[first : first + round(100 * accuracy)] = True
    return {"accuracy": accuracy, "examples": 100, "right": right, "losses": np.full(100, figures["nll"]),
            "gaps": right - 0.85, **figures}  # fmt: skip


def test_compare_names_direction_protocol_and_error():
    section = quality.compare_classes(
        counted(0.9, 0, nll=1.0, ece=0.1),
        counted(0.8, 15, nll=2.0, ece=0.2),
        {"split": "test"},
    )
    assert section["accuracy"]["higher_is_better"] and not section["nll"]["higher_is_better"]
    accuracy = section["accuracy"]
    assert accuracy["dense_stderr"] == pytest.approx((0.9 * 0.1 / 99) ** 0.5)
    assert accuracy["discordant"] == {"gained": 5, "lost": 15}
    # McNemar's variance: (b + c - (b - c)^2 / n) / n, with n - 1
    assert accuracy["difference_stderr"] == pytest.approx(((20 - 100 / 100) / 99 / 100) ** 0.5)
    unpaired = (accuracy["dense_stderr"] ** 2 + accuracy["sparse_stderr"] ** 2) ** 0.5
    assert accuracy["difference_stderr"] < unpaired
    assert section["nll"]["difference_stderr"] == 0  # each example lost the same
    right = uncertainty.unpacked(accuracy["losses"]["sparse_right"], "bits")[:100]
    assert right.sum() == 80 and right[:15].sum() == 0
    assert section["accuracy"]["protocol"] == {"split": "test", "examples": 100}


def test_training_learns_labels(tmp_path):
    model, fit, test = classifier(), Points("fit", 200, 0), Points("test", 100, 1)
    schedule = training_settings(steps=150, batch_size=20, micro_batch=20, lr=3e-2, dropout=0.0, log_every=50)
    history = train(model, fit, schedule, folder=tmp_path, seed=0, loss=classification_loss)
    metrics, _ = quality.classification_quality(model, test, None, 32)
    assert metrics["accuracy"] > 0.9 and "train/points_per_s" in history.rows[-1]


def test_autocast_ends_with_the_training(tmp_path):
    model, fit, x = classifier(), Points("fit", 40, 0), torch.randn(8, 2)
    schedule = training_settings(steps=5, batch_size=8, micro_batch=8, dropout=0.0, precision="bf16")
    train(model, fit, schedule, folder=tmp_path, seed=0, loss=classification_loss)
    plain = classifier()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))


def test_stratified_split_is_even_disjoint_and_a_function_of_the_seed():
    labels = torch.arange(100) % 5
    shares = {"fit": 0.6, "dev": 0.2, "test": 0.2}
    actual = stratified(labels, shares, seed=1)
    assert {k: len(v) for k, v in actual.items()} == {"fit": 60, "dev": 20, "test": 20}
    assert all(torch.bincount(labels[rows]).tolist() == [len(rows) // 5] * 5 for rows in actual.values())
    assert sorted(torch.cat(list(actual.values())).tolist()) == list(range(100))
    assert torch.equal(stratified(labels, shares, seed=1)["dev"], actual["dev"])
    assert not torch.equal(stratified(labels, shares, seed=2)["dev"], actual["dev"])


def test_an_example_in_two_splits_is_an_error():
    data = LabelledData(Points("fit", 9, 0), Points("dev", 5, 1), Points("test", 5, 2), list("abcd"), {}, "vision")
    data.check_disjoint()
    assert data.describe()["test"]["points"] == 5 and data.describe()["classes"] == 4
    data.test.x[3] = data.fit.x[4]
    with pytest.raises(ValueError, match="example 3 of test has the same content as one of fit"):
        data.check_disjoint()


def test_repeated_examples_are_kept_once():
    seen = set()
    assert unique_rows(["a", "b", "a"], seen) == [0, 1] and unique_rows(["b", "c"], seen) == [1]
