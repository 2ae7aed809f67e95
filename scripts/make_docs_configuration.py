"""Writes docs/configuration.md from the comments in conf/ and the bounds of the classes; part of `make docs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sparsebench.config import explain
from sparsebench.config.explain import Entry, Option

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
INTRO = """# Configuration

<!-- Written by scripts/make_docs_configuration.py from the comments in conf/: edit those. -->

Every setting is a key of a YAML file in `conf/`. A key is set on the command line as `key=value`, an option of a group
as `group=option`:

```
sparsebench method=teal method.sparsity=0.65 eval.text.test_sequences=32
sparsebench -m method=teal,wina method.sparsity=0.25,0.5   # every combination
sparsebench --cfg job                                      # what would run, in full
```

`null` means none. `[choice]` marks a value that is ours where the source leaves it open, `(unverified)` one that could
not be checked against its source. A wrong key, type or value is refused before anything is loaded, all problems at
once. An option of your own is a YAML file in a folder given by `--config-dir` (see [extending](extending.md)).
"""
TITLES = {
    "dataset": "Data sets: `dataset=`",
    "model": "Models: `model=`",
    "method": "Methods: `method=`",
    "hardware": "Hardware targets: `hardware=`",
}
ABOUT = {
    "dataset": "What they hold and how to add one: [models and data](models-and-data.md).",
    "model": "Which families work: [models and data](models-and-data.md).",
    "method": "What each does, with formulas and sources: [methods](methods/index.md).",
    "hardware": "Kernels and engines: [hardware and kernels](hardware-and-kernels.md).",
}


def text(words: str) -> str:
    """Words of a comment as Markdown inside a table."""
    for plain, escaped in (("<", "&lt;"), ("|", "\\|"), ("*", "\\*")):
        words = words.replace(plain, escaped)
    return words


def value(content: Any) -> str:
    """A value as it stands in YAML, on one line."""
    if isinstance(content, dict):
        return ""
    dumped = yaml.safe_dump(content, default_flow_style=True, width=10_000).removesuffix("\n...\n").strip()
    dumped = "???" if content == "???" else dumped
    return f"`{dumped}`".replace("|", "\\|")


def meaning(entry: Entry) -> str:
    return text(f"{entry.meaning}. Here: {entry.note}" if entry.note else entry.meaning)


def table(entries: list[Entry]) -> str:
    """One row per key."""
    rows = [f"| `{e.key}` | {meaning(e)} | {value(e.default)} | {text(e.allowed)} |" for e in entries]
    return "\n".join(["| key | meaning | default | allowed |", "|---|---|---|---|", *rows]) + "\n"


def shown(entries: list[Entry]) -> list[Entry]:
    """Without keys inside a free mapping (`model.architecture`), and without what a training block leaves as it was."""
    free = tuple(f"{e.key}." for e in entries if e.allowed.startswith("a mapping"))
    return [e for e in entries if e.own and not (free and e.key.startswith(free))]


def differences(option: Option, entries: list[Entry], first: dict[str, Entry]) -> str:
    """An option of a class that is described already: what it is, and what it sets differently."""
    changed = [e for e in entries if e.key not in first or e.default != first[e.key].default]
    changed = [e for e in changed if not isinstance(e.default, dict) and not e.key.endswith(".name")]
    keys = [f"`{e.key}` = {value(e.default)}" + (f" ({text(e.note)})" if e.note else "") for e in changed]
    return f"- **`{option.name}`** {text(option.about)}" + (" Sets " + "; ".join(keys) + "." if keys else "")


def defaults() -> dict[str, str]:
    """The option of each group that a run takes by itself; its class comes first."""
    listed = yaml.safe_load((explain.conf() / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    return {group: name for entry in listed if isinstance(entry, dict) for group, name in entry.items()}


def section(group: str, all_entries: list[Entry]) -> str:
    """A group: for each class a table of keys, then the options that set them differently."""
    parts, known = [f"## {TITLES[group]}\n\n{ABOUT[group]}\n"], explain.options(group)
    chosen = defaults()[group]
    classes = [[o for o in known if o.target == target] for target in dict.fromkeys(o.target for o in known)]
    for same in sorted(classes, key=lambda each: chosen not in [o.name for o in each]):
        first = explain.canonical(same)
        of = {o.name: [e for e in all_entries if (e.group, e.option) == (group, o.name)] for o in same}
        rows = shown(of[first.name])
        parts.append(f"### `{group}={first.name}`\n\n{text(first.about)}\n\n{table(rows)}")
        if first.blocks:
            blocks = " and ".join(f"`{group}.{b}` ([{o}](#training-blocks))" for b, o in first.blocks.items())
            parts.append(f"Training blocks start from `conf/train/`: {blocks}; the table names what differs.\n")
        others = [differences(o, shown(of[o.name]), {e.key: e for e in rows}) for o in same if o is not first]
        if others:
            parts.append("Options with the same keys:\n\n" + "\n".join(others) + "\n")
    return "\n".join(parts)


def training(entries: list[Entry]) -> str:
    """The blocks of conf/train/ side by side."""
    of = {name: {e.key: e for e in entries if (e.group, e.option) == ("train", name)} for name in ("adamw", "sgd")}
    rows = [
        f"| `{key.removeprefix('train.')}` | {text(e.meaning)} | {value(e.default)} | {value(of['sgd'][key].default)} | {text(e.allowed)} |"
        for key, e in of["adamw"].items()
    ]
    head = "| key | meaning | adamw | sgd | allowed |\n|---|---|---|---|---|\n"
    about = (
        "Whatever trains has such a block, under the key that the method or model gives it (`method.train`, "
        "`method.router`, `model.train`). It starts from one of two files; `???` must be said by whoever uses it.\n\n"
    )
    return "## Training blocks\n\n" + about + head + "\n".join(rows) + "\n"


def experiments() -> str:
    rows = [f"| `{o.name}` | {text(o.about)} |" for o in explain.options("experiment")]
    about = "A named run, or with `-m` a whole table: the settings of a paper, or ours.\n\n"
    return "## Experiments: `experiment=`\n\n" + about + "\n".join(["| option | what |", "|---|---|", *rows]) + "\n"


def page() -> str:
    """The whole page as Markdown."""
    listed = explain.entries(allowed=True)
    run = table([e for e in listed if e.group == ""])
    bench = table([e for e in listed if e.group == "bench"])
    parts = [
        INTRO,
        "## The run\n\n" + run,
        *(section(group, listed) for group in TITLES),
        training(listed),
        experiments(),
        "## sparsebench-bench\n\nSettings of the kernel benchmark, beside the groups `model` and `hardware`.\n\n"
        + bench,
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
