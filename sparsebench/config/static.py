"""What a class of settings says, read from its source: types and allowed values of its fields, nothing imported.

`--explain` and completion answer by it at once; importing a method would import torch. What can't be told without running
code is left out of `fields_of`.
"""

from __future__ import annotations

import ast
import functools
from typing import Any

from sparsebench.config.inputs import module_file, tree_of

TYPES: dict[str, Any] = {each.__name__: each for each in (bool, int, float, str, dict, list, tuple)} | {"Any": Any}
Field = tuple[Any, dict[str, Any]]  # type, and what `setting` says of it


class Untold(ValueError):
    """An expression that means nothing without running code."""


@functools.cache
def fields_of(target: str, prefix: str = "") -> dict[str, Field]:
    """key -> (type, what `setting` says) of the fields of the dataclass at a dotted path and of the dataclasses in it."""
    located = class_statement(target)
    if located is None:
        return {}
    module, statement = located
    fields: dict[str, Field] = {}
    for base in statement.bases:
        if isinstance(base, ast.Name) and is_dataclass(whole := qualified(base.id, module)):
            fields |= fields_of(whole, prefix)
    for line in statement.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            nested = next((n for n in names_in(line.annotation) if is_dataclass(qualified(n, module))), None)
            key = prefix + line.target.id
            if nested:
                fields |= fields_of(qualified(nested, module), f"{key}.")
                continue
            try:
                fields[key] = (type_of(line.annotation), said(line.value, module))
            except Untold:
                continue
    return fields


def names_in(node: ast.expr) -> list[str]:
    """Names in an annotation that are no built-in type, those of other modules as `module.Name`."""
    if isinstance(node, ast.Attribute):
        return [ast.unparse(node)]
    if isinstance(node, ast.Name):
        return [] if node.id in TYPES else [node.id]
    return [name for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr) for name in names_in(child)]


def class_statement(target: str) -> tuple[str, ast.ClassDef] | None:
    """(its module, the class statement) at a dotted path, followed through modules that only hand it on."""
    module, _, name = target.rpartition(".")
    tree = tree_at(module)
    for node in tree.body if tree else ():
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    whole = qualified(name, module)
    return class_statement(whole) if tree and whole != target else None


def tree_at(module: str) -> ast.Module | None:
    path = module_file(module) if module else None
    return tree_of(path) if path else None


def is_dataclass(target: str) -> bool:
    located = class_statement(target)
    return located is not None and any("dataclass" in ast.unparse(d) for d in located[1].decorator_list)


def qualified(name: str, module: str) -> str:
    """The dotted path of a name as a module uses it."""
    if "." in name:
        first, _, rest = name.partition(".")
        return f"{qualified(first, module)}.{rest}"
    tree = tree_at(module)
    for node in tree.body if tree else ():
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{node.module}.{alias.name}"
    return f"{module}.{name}"


def type_of(annotation: ast.expr) -> Any:
    """The type that an annotation of built-in types names. Raises Untold for others."""
    try:
        return eval(ast.unparse(annotation), {"__builtins__": {}}, TYPES)
    except (NameError, TypeError, AttributeError) as error:
        raise Untold(ast.unparse(annotation)) from error


def said(call: ast.expr | None, module: str) -> dict[str, Any]:
    """The keywords of `setting(...)`; nothing for a field without. Raises Untold, and for a field that is no setting."""
    if call is None:
        return {}
    if not isinstance(call, ast.Call) or ast.unparse(call.func) not in ("setting", "config.setting"):
        raise Untold(ast.unparse(call))
    meta: dict[str, Any] = {}
    for keyword in (k for k in call.keywords if k.arg != "default"):  # no part of what is allowed
        value = valued(keyword.value, module)
        meta |= {keyword.arg: value} if keyword.arg else value
    if "pattern_text" in meta:
        meta["text"] = meta.pop("pattern_text")
    return meta


def valued(node: ast.expr, module: str) -> Any:
    """The value of an expression of constants, of names for them, and of tuples and dicts of these. Raises Untold."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, (ast.Tuple, ast.List)):
        values: list[Any] = []
        for each in node.elts:
            values += valued(each.value, module) if isinstance(each, ast.Starred) else [valued(each, module)]
        return tuple(values)
    if isinstance(node, ast.Dict):
        return {valued(k, module): told(v, module) for k, v in zip(node.keys, node.values, strict=True) if k}
    if isinstance(node, ast.Name):
        return assigned(qualified(node.id, module))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return assigned(qualified(ast.unparse(node), module))
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "tuple" and len(node.args) == 1:
        return tuple(valued(node.args[0], module))
    if isinstance(node, ast.Call) and ast.unparse(node).endswith(".names()"):
        return public_modules(qualified(ast.unparse(node.func.value), module))  # type: ignore[attr-defined]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return valued(node.left, module) ** valued(node.right, module)
    raise Untold(ast.unparse(node))


def public_modules(package: str) -> tuple[str, ...]:
    """The modules of a package as its `names` lists them: those in its folder that begin with no underscore."""
    path = module_file(package)
    if path is None or path.name != "__init__.py":
        raise Untold(package)
    return tuple(sorted(p.stem for p in path.parent.glob("*.py") if not p.name.startswith("_")))


def told(node: ast.expr, module: str) -> Any:
    """As `valued`, None for what can't be told: of a dict that lists names only the keys matter."""
    try:
        return valued(node, module)
    except Untold:
        return None


def assigned(target: str) -> Any:
    """The value that a module gives to a name at its top level. Raises Untold."""
    module, _, name = target.rpartition(".")
    tree = tree_at(module)
    for node in tree.body if tree else ():
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                return valued(node.value, module)
    whole = qualified(name, module)
    if tree and whole != target:
        return assigned(whole)
    raise Untold(target)
