"""Shape bias of an image classifier on cue-conflict images: does it name the shape or the texture? (arXiv 1811.12231)

A folder holds images named `<shape><number>-<texture><number>.<suffix>`, in sub-folders or not, e.g. cat7-elephant1.png.
Names are classes of the data set; where the model knows finer classes (ImageNet's 1000 for 16 names), groups.json in the
folder gives the class numbers behind each name, whose probabilities are averaged. A ratio alone can mislead: it rises
when texture answers collapse, so cue accuracy stands beside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

PATTERN = re.compile(r"([a-z_]+)\d+-([a-z_]+)\d+\.(?:png|jpe?g)", re.IGNORECASE)


def score(trials: Iterable[tuple[str, str, str]]) -> dict:
    """From (answer, shape, texture): bias = n_shape / (n_shape + n_texture), None without such answers; cue_accuracy =
    (n_shape + n_texture) / trials. Trials whose cues are equal are left out."""
    conflicts = [t for t in trials if t[1] != t[2]]
    shapes, textures = (sum(t[0] == t[cue] for t in conflicts) for cue in (1, 2))
    return {
        "shape_bias": shapes / (shapes + textures) if shapes + textures else None,
        "cue_accuracy": (shapes + textures) / len(conflicts) if conflicts else None,
        "shape_answers": shapes, "texture_answers": textures, "trials": len(conflicts),
    }  # fmt: skip


def problem(folder: str) -> str | None:
    """What is wrong with a folder of cue-conflict images, before anything is loaded."""
    return None if images(Path(folder)) else f"{folder!r} holds no image named <shape><number>-<texture><number>.png"


def images(folder: Path) -> list[tuple[Path, str, str]]:
    """(file, shape, texture) of every image, by name."""
    matches = ((path, PATTERN.fullmatch(path.name)) for path in sorted(folder.rglob("*")))
    return [(path, match[1].lower(), match[2].lower()) for path, match in matches if match]


def groups_of(folder: Path, names: set[str], classes: list[str]) -> dict[str, list[int]]:
    """Class numbers behind each name. Raises ValueError for names that are no classes, or numbers there are not."""
    file = folder / "groups.json"
    known = json.loads(file.read_text()) if file.is_file() else {name.lower(): [i] for i, name in enumerate(classes)}
    missing = sorted(names - known.keys())
    if missing:
        raise ValueError(f"eval.classifier.cue_conflict: {', '.join(missing)} must be among {', '.join(sorted(known))}")
    wrong = sorted({i for numbers in known.values() for i in numbers if not 0 <= i < len(classes)})
    if wrong:
        raise ValueError(
            f"eval.classifier.cue_conflict: groups.json names class {wrong[0]}, the data set has {len(classes)}"
        )
    return known


def measure(module, data, folder: str, batch_size: int) -> dict:
    """`score` of a classifier (torch module); images are brought to its input as those of the data set are."""
    import torch

    from sparsebench.measure.quality import logits

    listed = images(Path(folder))
    groups = groups_of(Path(folder), {name for _, *cues in listed for name in cues}, data.classes)
    names, device = sorted(groups), next(module.parameters()).device
    paths = [str(path) for path, _, _ in listed]
    answers: list[str] = []
    for start in range(0, len(paths), batch_size):
        pixels = data.test.read_files(paths[start : start + batch_size]).to(device)
        pixels = pixels if data.test.channels == 3 else pixels.float().mean(1, keepdim=True).round().byte()
        with torch.no_grad():
            chances = logits(module, data.test.prepare(pixels)).float().softmax(-1)
        grouped = torch.stack([chances[:, groups[name]].mean(1) for name in names], 1)
        answers += [names[i] for i in grouped.argmax(1).tolist()]
    return score((answer, shape, texture) for answer, (_, shape, texture) in zip(answers, listed, strict=True))
