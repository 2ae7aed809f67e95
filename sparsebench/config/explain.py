"""What every key of the configuration means, read from the comments of the YAML files: one `Entry` per key and option.

Options of one class share the meaning of their keys: it stands in the file that comments most of them. What another
file says behind a key is a note on its own value. Keys of training blocks come from conf/train/. What is allowed is read
from the source of the classes. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import yaml

from sparsebench.config import static
from sparsebench.config.fields import expected

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python 3.11

GROUPS = ("train", "dataset", "model", "method", "hardware")
CLASSES = {  # of files that name none by `_target_`
    "": "sparsebench.config.settings.Settings",
    "bench": "sparsebench.bench.Bench",
    "train": "sparsebench.training.loop.Training",
}
LOADER: Any = getattr(
    yaml, "CSafeLoader", yaml.SafeLoader
)  # libyaml, where PyYAML was built with it, is ten times faster
NOT_KEYS = ("defaults", "hydra", "_target_")  # Hydra's own
NAME = "the option's name in records, tables and the run's folder"  # of every group


@dataclass(frozen=True)
class Entry:
    """One key of the configuration, as one option sets it."""

    key: str  # as on the command line, e.g. `method.sparsity`
    default: Any
    meaning: str
    allowed: str  # in words; "" where not asked for, and for mappings
    group: str  # train, dataset, model, method, hardware; "" = config.yaml, "bench" = bench.yaml
    option: str  # "" for config.yaml and bench.yaml
    note: str = ""  # what this option's file says of its own value
    own: bool = True  # False: the value stands in conf/train/ and the option leaves it alone


@dataclass(frozen=True)
class Line:
    """One key of a file, before it has a place in the configuration."""

    key: str
    value: Any
    comment: str


@dataclass(frozen=True)
class Option:
    """One choice of a group: a YAML file."""

    group: str
    name: str
    about: str  # its first comment
    target: str  # its class
    blocks: dict[str, str]  # key -> option of conf/train/ that it starts from
    lines: list[Line]


def conf() -> Traversable:
    """The folder of YAML files, in a checkout and in an installed wheel alike."""
    return files("sparsebench.conf")


def lines_of(text: str) -> list[Line]:
    """Every key of a YAML document in order, nested ones dotted, with the comment that stands behind it on its line."""
    rows, values = text.splitlines(), yaml.SafeLoader("")

    def walk(node: yaml.Node | None, prefix: str) -> Iterator[Line]:
        for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if not prefix and name.value in NOT_KEYS:
                continue
            mark = value.end_mark if value.end_mark.line == name.end_mark.line else name.end_mark
            comment = rows[mark.line][mark.column :].partition("#")[2].strip()
            yield Line(prefix + name.value, values.construct_object(value, deep=True), comment)
            if not (isinstance(value, yaml.MappingNode) and value.flow_style):
                yield from walk(value, f"{prefix}{name.value}.")

    return list(walk(yaml.compose(text, LOADER), ""))


def options(group: str) -> list[Option]:
    """The options of a group by name, those in folders as folder/name."""

    def walk(folder: Traversable, prefix: str) -> Iterator[Option]:
        for child in sorted(folder.iterdir(), key=lambda c: c.name):
            if child.name.endswith(".yaml"):
                yield option(group, prefix + child.name.removesuffix(".yaml"), child.read_text(encoding="utf-8"))
            elif child.is_dir() and not child.name.startswith("_"):
                yield from walk(child, f"{prefix}{child.name}/")

    return list(walk(conf() / group, ""))


def option(group: str, name: str, text: str) -> Option:
    """What one YAML file says."""
    content = yaml.load(text, LOADER)
    about = first_comment(text)
    blocks = {
        str(key).partition("@")[2]: str(value)
        for entry in content.get("defaults", ())
        if isinstance(entry, dict)
        for key, value in entry.items()
        if str(key).startswith("/train@")
    }
    return Option(group, name, about, content.get("_target_", CLASSES.get(group, "")), blocks, lines_of(text))


def first_comment(text: str) -> str:
    """The comment that a file starts with, up to the first line that ends a sentence."""
    words: list[str] = []
    for row in text.splitlines():
        if row.startswith("# ") and not row.startswith("# @"):
            words.append(row[1:].strip())
        if words and (not row.startswith("#") or row.endswith((".", ":"))):
            break
    return " ".join(words)


def entries(allowed: bool = False) -> list[Entry]:
    """Every key of config.yaml, of bench.yaml and of every option of every group but `experiment`.

    allowed: also say what each key accepts, which reads the source of their classes.
    """
    training = {o.name: o for o in options("train")}
    listed: list[Entry] = []
    for group, file in (("", "config.yaml"), ("bench", "bench.yaml")):
        listed += of_class([option(group, "", (conf() / file).read_text(encoding="utf-8"))], training, allowed)
    for group in GROUPS:
        known = options(group)
        for target in dict.fromkeys(o.target for o in known):
            listed += of_class([o for o in known if o.target == target], training, allowed)
    return listed


def canonical(same: list[Option]) -> Option:
    """Of options of one class, the one whose file says what the keys mean: the one with most comments."""
    return max(same, key=lambda o: sum(bool(line.comment) for line in o.lines))


def of_class(same: list[Option], training: dict[str, Option], allowed: bool) -> list[Entry]:
    """The entries of all options of one class."""
    words = bounds(same[0].target) if allowed else {}
    meanings = {line.key: line.comment for line in canonical(same).lines}
    listed = []
    for each in same:
        prefix = f"{each.group}." if each.group in GROUPS else ""
        trained = {
            f"{block}.{line.key}": line for block, start in each.blocks.items() for line in training[start].lines
        }
        comments = meanings | {key: line.comment for key, line in trained.items()}
        comments |= {"name": NAME} if each.group in GROUPS[1:] else {}
        given = {line.key: line for line in each.lines}
        nothing = tuple(f"{key}." for key, line in given.items() if line.value is None)  # blocks set to null
        rows = [(line, True) for line in each.lines]
        rows += [
            (Line(key, line.value, ""), False)
            for key, line in trained.items()
            if key not in given and not (nothing and key.startswith(nothing))
        ]
        for line, own in rows:
            meaning = comments.get(line.key) or parent(line.key, comments) or line.comment
            note = line.comment if line.comment != meaning else ""
            key = prefix + line.key
            listed.append(Entry(key, line.value, meaning, words.get(line.key, ""), each.group, each.name, note, own))
    return listed


def parent(key: str, comments: dict[str, str]) -> str:
    """The comment of the mapping that a key stands in, e.g. of `architecture` for `architecture.hidden_size`."""
    return comments.get(key.rpartition(".")[0], "")


def bounds(target: str) -> dict[str, str]:
    """key -> what it accepts, in words, for the fields of the dataclass at a dotted path and of the dataclasses in it."""
    words = {key: expected(hint, meta) for key, (hint, meta) in static.fields_of(target).items()}
    return {key: text for key, text in words.items() if text != "a value"}


def find(key: str, allowed: bool = True) -> list[Entry]:
    """The entries of a key and of all keys below it: `method.sparsity`, `eval`, `eval.text`."""
    return [e for e in entries(allowed) if e.key == key or e.key.startswith(f"{key}.")]


def chosen(primary: str) -> dict[str, str]:
    """group -> option that a primary file (config, bench) chooses where the user chooses none."""
    listed = yaml.safe_load((conf() / f"{primary}.yaml").read_text(encoding="utf-8"))["defaults"]
    pairs = [pair for each in listed if isinstance(each, dict) for pair in each.items()]
    return {group: name for group, name in pairs if group in GROUPS}


def matching(query: str) -> list[Entry]:
    """The entries that a user means by `query`: a whole key, a leaf or the end of one, or an option (`method=teal`)."""
    group, given, name = query.partition("=")
    if given:
        known = entries() if group in GROUPS else of_experiments() if group == "experiment" else []
        return [e for e in known if (e.group, e.option) == (group, name)]
    known = entries()
    return [e for e in known if e.key == query] or [e for e in known if e.key.endswith(f".{query}")]


def of_experiments() -> list[Entry]:
    """What every experiment sets, each key with the comment that stands behind it."""
    return [
        Entry(line.key, line.value, line.comment, "", "experiment", option.name)
        for option in options("experiment")
        for line in option.lines
    ]


def nearest(query: str) -> str | None:
    """The key or option nearest to one that does not exist."""
    if "=" in query:
        group = query.partition("=")[0]
        near = difflib.get_close_matches(group, (*GROUPS, "experiment"), n=1)
        names = {f"{near[0]}={o.name}" for o in options(near[0])} if near else set()
    else:
        names = {e.key for e in entries()}
    # of an option its name counts, not the group that every other has too; of a key what stands behind its dots, at last
    leaves = {re.split(r"[=/.]", name)[-1]: name for name in sorted(names, reverse=True)}
    whole = difflib.get_close_matches(query, sorted(names), n=1)
    leaf = [leaves[each] for each in difflib.get_close_matches(re.split(r"[=/.]", query)[-1], sorted(leaves), n=1)]
    near = (leaf or whole) if "=" in query else (whole or leaf)
    return near[0] if near else None


def allowed(entry: Entry) -> str:
    """What a key accepts, in words."""
    name = entry.key.removeprefix(f"{entry.group}.") if entry.group in GROUPS else entry.key
    target = CLASSES.get(entry.group) or next(o.target for o in options(entry.group) if o.name == entry.option)
    return bounds(target).get(name, "")
