"""One config node to one checked dataclass: fields that state what they allow, and every problem said in one line.

Nothing here imports torch. The class that `_target_` names is imported only by `build`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, field
from inspect import signature
from types import FunctionType, NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """What is wrong with a configuration: one line per problem, all problems of the run together."""

    def __init__(self, problems: list[str]):
        self.problems = list(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))


def setting(
    *,
    choices: Iterable[Any] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    pattern: str | None = None,
    pattern_text: str | None = None,
    file: str | None = None,
    exists: bool = False,
    default: Any = MISSING,
) -> Any:
    """A dataclass field whose allowed values are stated beside it and checked by `build`.

    `choices`, the bounds and `pattern` (a full-match regular expression, described by `pattern_text`) apply to the
    value, or to each element of a list. file: the value may name a file or folder, and the word says which files of it
    are read: one of inputs.KINDS, e.g. "model". Their content is then part of the run's identity (inputs.py finds such
    fields by this very keyword). exists: it must be there. default: of a key that records of before do not have.
    """
    return field(
        default=default,
        metadata={
            "choices": choices, "ge": ge, "gt": gt, "le": le, "lt": lt, "pattern": pattern, "text": pattern_text,
            "file": file, "exists": exists,
        },
    )  # fmt: skip


NAME_PATTERN = {"pattern": r"[A-Za-z0-9][A-Za-z0-9._-]*", "pattern_text": "a name of letters, digits, '.', '_' and '-'"}


def expected(hint: Any, meta: Mapping[str, Any]) -> str:
    """Words for what a field accepts, e.g. `a number in [0, 1)`, `one of none, half, p99, all`."""
    hints = [h for h in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)) if h is not NoneType]
    base = hints[0] if hints else hint
    if get_origin(base) is list:
        text = "a list, each element " + expected(get_args(base)[0], meta)
    elif meta.get("choices"):
        text = "one of " + ", ".join(str(c) for c in meta["choices"] if c is not None)
    elif meta.get("exists"):
        text = "an existing file or folder"
    elif meta.get("file") == "model":
        text = "a folder, a file or a Hub id"
    elif meta.get("file"):
        text = "a file or folder"
    elif meta.get("pattern"):
        text = meta["text"]
    else:
        text = {bool: "true or false", int: "a whole number", float: "a number", str: "text", dict: "a mapping"}.get(
            get_origin(base) or base,
            "a mapping of settings" if dataclasses.is_dataclass(base) or names_class(base) else "a value",
        )
        low = meta.get("ge") if meta.get("ge") is not None else meta.get("gt")
        high = meta.get("le") if meta.get("le") is not None else meta.get("lt")
        if low is not None and high is not None:
            text += f" in {'[' if meta.get('ge') is not None else '('}{low}, {high}{']' if meta.get('le') is not None else ')'}"
        elif low is not None:
            text += f" {'>=' if meta.get('ge') is not None else '>'} {low}"
        elif high is not None:
            text += f" {'<=' if meta.get('le') is not None else '<'} {high}"
    return text + (" or null" if NoneType in get_args(hint) else "")


def convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; raises ValueError where it is of another type. No silent truncation."""
    if get_origin(hint) in (Union, UnionType):
        if value is None and NoneType in get_args(hint):
            return None
        problems = []
        for option in (h for h in get_args(hint) if h is not NoneType):
            try:
                return convert(value, option)
            except ValueError as problem:
                problems.append(problem)
        raise problems[0]
    if hint is Any:
        return value
    if get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError("not a list")
        return [convert(v, get_args(hint)[0]) for v in value]
    kind = get_origin(hint) or hint
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"not {kind.__name__}")
    return value


def names_class(hint: Any) -> bool:
    """Whether a field of this type holds the object that its own `_target_` names: a group, by its protocol."""
    return hint is Any or getattr(hint, "_is_protocol", False)


def in_bounds(value: Any, meta: Mapping[str, Any]) -> bool:
    if isinstance(value, list):
        return all(in_bounds(v, meta) for v in value)
    if value is None:
        return True
    if beyond(value) or (meta.get("file") and not value.strip()):
        return False
    if meta.get("choices") is not None and value not in meta["choices"]:
        return False
    if meta.get("exists") and not os.path.exists(value):
        return False
    if meta.get("pattern") is not None and not re.fullmatch(meta["pattern"], str(value)):
        return False
    checks: dict[str, Callable[[Any, Any], bool]] = {
        "ge": lambda a, b: a >= b, "gt": lambda a, b: a > b, "le": lambda a, b: a <= b, "lt": lambda a, b: a < b,
    }  # fmt: skip
    return all(meta.get(name) is None or check(value, meta[name]) for name, check in checks.items())


def beyond(value: Any) -> str:
    """Why no setting takes a number, whatever its bounds, or nothing: arrays, JSON and a run's hash can't hold it."""
    if isinstance(value, dict):
        return next(filter(None, map(beyond, value.values())), "")
    if isinstance(value, list):
        return next(filter(None, map(beyond, value)), "")
    if isinstance(value, float) and not math.isfinite(value):
        return " (not finite)"
    return " (over 15 digits)" if isinstance(value, int) and abs(value) >= 10**15 else ""


def wrong(full: str, value: Any, hint: Any, meta: Mapping[str, Any]) -> str | None:
    """The line about a value of a wrong type or out of its bounds, or None. full: the setting's whole key."""
    try:
        converted = convert(value, hint)
    except ValueError:
        return f"{full} must be {expected(hint, meta)}, got {value!r}"
    if in_bounds(converted, meta):
        return None
    return f"{full} must be {expected(hint, meta)}{near_choice(converted, meta)}, got {value!r}{beyond(value)}"


def near_choice(value: Any, meta: Mapping[str, Any]) -> str:
    """` (did you mean ...?)` where a choice is spelt nearly so, else nothing."""
    choices = [str(choice) for choice in meta.get("choices") or ()]
    wrong = [each for each in (value if isinstance(value, list) else [value]) if str(each) not in choices]
    near = [match for each in wrong for match in difflib.get_close_matches(str(each).lower(), choices, n=1)]
    return f" (did you mean {', '.join(near)}?)" if near else ""


def build(
    node: dict[str, Any],
    key: str,
    problems: list[str],
    cls: type[Any] | None = None,
    root: dict[str, Any] | None = None,
    part: Any = None,
) -> Any:
    """The object a config node describes, or None with lines added to `problems`.

    `cls` defaults to the class that `_target_` names; its dataclass fields are exactly the keys allowed.
    root: the whole configuration, to say where a misplaced key belongs. part: the protocol that the class must have.
    """
    root = node if root is None else root
    prefix = f"{key}." if key else ""
    if not isinstance(node, dict):
        problems.append(f"{key} must be a mapping of settings, got {node!r}")
        return None
    if cls is None:
        try:
            cls = named_class(str(node.get("_target_")), part)
        except ValueError as error:
            problems.append(
                f"{prefix}_target_ must name the class {article(key)}, got {node.get('_target_')!r} ({error})"
            )
            return None
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    before = len(problems)
    for name in node:
        if name not in fields and name != "_target_":
            problems.append(unknown_key(f"{prefix}{name}", fields, root))
    values = {}
    for name, spec in fields.items():
        full, hint, meta = f"{prefix}{name}", hints[name], spec.metadata
        if name not in node:
            if spec.default is MISSING and spec.default_factory is MISSING:
                problems.append(f"{full} is missing: it must be {expected(hint, meta)}")
            continue
        nested: list[Any] = [h for h in (get_args(hint) or (hint,)) if dataclasses.is_dataclass(h)]
        if node[name] is not None and (nested or names_class(hint)):
            values[name] = build(node[name], full, problems, nested[0] if nested else None, root, hint)
            continue
        problem = wrong(full, node[name], hint, meta)
        if problem:
            problems.append(problem)
        else:
            values[name] = convert(node[name], hint)
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except ValueError as error:  # a check across fields, in the class's __post_init__; one line per problem
        problems.extend(f"{prefix}{line}" for line in str(error).splitlines())
        return None


def article(key: str) -> str:
    """Of a group's key what its class stands for: `of a method`."""
    return f"of a {key.rpartition('.')[2]}" if key else "with settings"


def named_class(target: str, part: Any = None) -> type[Any]:
    """The class that `_target_` names. Raises ValueError in one line where there is none such, or it is of another kind.

    Nothing of Python's own library is imported: no class there has settings.
    """
    module, _, name = target.rpartition(".")
    if not all(word.isidentifier() for word in target.split(".")) or not module:
        raise ValueError("not a dotted name, package.module.Class")
    if module.split(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{module.split('.')[0]} is part of Python")
    try:
        cls = getattr(importlib.import_module(module), name)
    except AttributeError:
        raise ValueError(f"{module} has no {name}") from None
    except (Exception, SystemExit) as error:  # whatever a module of the user's does when it is imported
        raise ValueError(
            f"{module} can't be imported: {' '.join(f'{type(error).__name__}: {error}'.split())}"
        ) from None
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        raise ValueError("no dataclass, whose fields would be its settings")
    missing = lacking(cls, part)
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    return cls


def lacking(cls: type[Any], part: Any) -> list[str]:
    """Names that the protocol `part` asks for and a class lacks, methods that take another number of arguments among them."""
    missing = []
    protocols = [base for base in getattr(part, "__mro__", ()) if base.__module__ != "typing" and names_class(base)]
    stated = {name for base in cls.__mro__ for name in vars(base).get("__annotations__", ())}
    for base in protocols:
        missing += [n for n in vars(base).get("__annotations__", ()) if n not in stated and not hasattr(cls, n)]
        for name, asked in vars(base).items():
            if isinstance(asked, FunctionType) and not name.startswith("_"):
                given = getattr(cls, name, None)
                same = callable(given) and len(signature(given).parameters) == len(signature(asked).parameters)
                missing += [] if same else [f"{name}({', '.join(list(signature(asked).parameters)[1:])})"]
    return missing


def unknown_key(full: str, allowed: Iterable[str], root: dict[str, Any], typed: str | None = None) -> str:
    """The line for a key that does not exist: the keys of that name elsewhere in `root`, or the nearest allowed one.

    full: the part of the key up to where it leaves the configuration; typed: all of it.
    """
    typed, allowed = typed or full, sorted(allowed)
    leaf = typed.rpartition(".")[2]
    others = [key for key in leaves(root) if key != typed]
    same = [key for key in others if key.rpartition(".")[2] == leaf]
    if same:
        best = max(shared(key, typed) for key in same)
        near = [key for key in same if shared(key, typed) == best]
        shortest = min(key.count(".") for key in near)
        near = [key for key in near if key.count(".") == shortest]
    else:
        near = difflib.get_close_matches(full.rpartition(".")[2], allowed, n=1)
        names = {key.rpartition(".")[2]: key for key in reversed(others)}
        near = near or [names[n] for n in difflib.get_close_matches(leaf, list(names), n=1)]
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    inside = f"allowed: {', '.join(allowed)}" if allowed else f"{full.rpartition('.')[0]} holds one value"
    return f"{typed if same else full} is not a known key{hint}; {inside}"


def leaves(node: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of all values and sections of a configuration."""
    keys: list[str] = []
    for key, value in node.items():
        keys += [f"{prefix}{key}"] + (leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [])
    return keys


def shared(a: str, b: str) -> int:
    """How many parts two dotted keys begin with in common."""
    pairs = zip(a.split("."), b.split("."), strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(a.count("."), b.count(".")) + 1)
