"""Classes of a data set and outputs of a network: told by name, by number or by order, or refused."""

from types import SimpleNamespace

import pytest
import torch

from sparsebench.models.classes import align, names_of
from sparsebench.models.recipes import imagenet_names

NAMES = [("tench", "Tinca tinca"), ("great white shark",), ("crane",), ("crane",)]


def data(*classes):
    splits = [SimpleNamespace(labels=torch.arange(len(classes)), classes=len(classes)) for _ in range(3)]
    return SimpleNamespace(fit=splits[0], dev=splits[1], test=splits[2], classes=list(classes))


@pytest.mark.parametrize(
    ("classes", "names", "told", "labels"),
    [
        (("Great_White_Shark", "tinca tinca"), NAMES, "by name", [1, 0]),
        (("0", "3"), NAMES, "by number", [0, 3]),
        (("000", "002"), None, "by number", [0, 2]),
        (("cat", "dog", "eel", "fly"), None, "in the order of their names", [0, 1, 2, 3]),
        (("n00000001", "n00000002", "n00000003", "n00000004"), NAMES, "in the order of their names", [0, 1, 2, 3]),
    ],
)
def test_labels_are_those_of_the_network(classes, names, told, labels):
    given = data(*classes)
    assert align(given, 4, names, "net") == told
    assert all(split.labels.tolist() == labels and split.classes == 4 for split in (given.fit, given.dev, given.test))
    assert len(given.classes) == 4


@pytest.mark.parametrize(
    ("classes", "names", "message"),
    [
        (
            ("cat", "tench"),
            NAMES,
            r"classes must be its names \(tench, great white shark, crane, ...\) or numbers 0 to 3",
        ),
        (("1", "4"), None, "numbers 0 to 3 of net, which knows 4 classes; got 2, among them '1'"),
        (("cat", "dog"), None, "which knows 4 classes; got 2, among them 'cat'"),
        (("crane", "tench"), NAMES, "'crane' names several classes of net: name its classes by number"),
        (("a", "b", "c", "d"), NAMES, "got 4, among them 'a'"),
    ],
)
def test_what_can_not_be_told_is_refused(classes, names, message):
    with pytest.raises(ValueError, match=message):
        align(data(*classes), 4, names, "net")


def test_labels_of_transformers():
    assert names_of({0: "LABEL_0", 1: "LABEL_1"}) is None
    assert names_of({1: "POSITIVE", 0: "tench, Tinca tinca"}) == [
        ("tench, Tinca tinca", "tench", "Tinca tinca"), ("POSITIVE", "POSITIVE"),
    ]  # fmt: skip


def test_names_of_timm():
    pytest.importorskip("timm")
    names = imagenet_names(1000, None)
    assert names[1] == ("goldfish", "Carassius auratus", "n01443537") and len(names) == 1000
    assert imagenet_names(10, None) is None and imagenet_names(2, ["no", "yes"]) == [("no",), ("yes",)]
