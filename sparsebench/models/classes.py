"""Which output of a network is which class of a data set: by number, by name, or in the order of the names.

A network that was trained elsewhere numbers its classes itself. A data set that holds a part of them, or sorts them
otherwise ("10" before "2"), must be numbered as the network numbers them, or every accuracy is wrong.
"""

from __future__ import annotations

import re
from typing import Any

from sparsebench.data.labelled import relabel

WORDNET = re.compile(r"n\d{8}")


def align(data: Any, count: int, names: list[tuple[str, ...]] | None, source: str) -> str:
    """Give the labels of `data` (a LabelledData) the numbers of a network with `count` outputs. Returns by what.

    names: for each output the names it goes by; None where the weights name none. Raises ValueError where the classes
    of the data can't be told to be those of the network.
    """
    classes = [str(c) for c in data.classes]
    shown = [own[0] for own in names] if names else [str(i) for i in range(count)]
    known: dict[str, set[int]] = {}
    for number, own in enumerate(names or []):
        for name in own:
            known.setdefault(plain(name), set()).add(number)
    if all(plain(c) in known for c in classes):
        several = [c for c in classes if len(known[plain(c)]) > 1]
        if several:
            raise ValueError(f"dataset: {several[0]!r} names several classes of {source}: name its classes by number")
        relabel(data, [known[plain(c)].copy().pop() for c in classes], shown)
        return "by name"
    if all(c.isdecimal() and int(c) < count for c in classes):
        relabel(data, [int(c) for c in classes], shown)
        return "by number"
    ordered = names is None or all(WORDNET.fullmatch(c) for c in classes)
    if len(classes) == count and ordered:
        return "in the order of their names"
    unknown = next((c for c in classes if plain(c) not in known), classes[0])
    ways = f"its names ({', '.join(shown[:3])}, ...) or " if names else ""
    raise ValueError(
        f"dataset: classes must be {ways}numbers 0 to {count - 1} of {source}, which knows {count} classes; "
        f"got {len(classes)}, among them {unknown!r}"
    )


def plain(name: str) -> str:
    """A name without what differs between folders and label lists: case, underscores, spaces around it."""
    return name.replace("_", " ").strip().casefold()


def names_of(labels: dict[int, str]) -> list[tuple[str, ...]] | None:
    """The names of each output from transformers' id2label; None where they are its defaults, LABEL_0 and so on."""
    texts = [str(labels[i]) for i in sorted(labels)]
    if all(re.fullmatch(r"LABEL_\d+", text) for text in texts):
        return None
    return [(text, *filter(None, (part.strip() for part in text.split(",")))) for text in texts]
