"""What is wrong with the YAML file of a user's own option, in one line, before Hydra reads it.

The file is anybody's: it may be no UTF-8, no YAML, no mapping, say a key twice, hold itself, or unpack without end.
"""

from __future__ import annotations

from pathlib import Path

import yaml

MOST_NODES = 100_000  # of a file with its aliases written out: Hydra copies each


def problem(file: Path) -> str | None:
    """The line about an option's file, or None."""
    try:
        text = file.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        reason = None if root is None else wrong_in(root)
    except UnicodeDecodeError as error:
        reason = f"it is not UTF-8 (byte {error.start})"
    except yaml.MarkedYAMLError as error:
        at = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        reason = f"{at}{error.problem or error.context}"
    except yaml.YAMLError as error:
        reason = str(error)
    except RecursionError:
        reason = "it is nested without end"
    except OSError as error:
        reason = error.strerror or str(error)
    return reason and f"{file} can't be read as an option: {' '.join(reason.split())}"


def wrong_in(root: yaml.Node) -> str | None:
    if not isinstance(root, yaml.MappingNode):
        return "it is no mapping of keys to values"
    sizes: dict[int, int] = {}
    if written_out(root, sizes) > MOST_NODES:
        return f"its aliases stand for more than {MOST_NODES:,} values"
    return odd(root, set())


def written_out(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How many nodes it is with every alias replaced by what it stands for. Raises RecursionError where it holds itself."""
    if id(node) not in sizes:
        sizes[id(node)] = 1 + sum(written_out(each, sizes) for each in inside(node))
    return sizes[id(node)]


def inside(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def odd(node: yaml.Node, seen: set[int]) -> str | None:
    """A key that one mapping has twice, or an object that a tag would make."""
    if id(node) in seen:
        return None
    seen.add(id(node))
    if not node.tag.startswith("tag:yaml.org,2002:") or "python/" in node.tag:
        return f"line {node.start_mark.line + 1}: the tag {node.tag!r} stands for no value"
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in keys and name != "<<":
                return f"line {key.start_mark.line + 1}: {name} stands there twice"
            keys.add(name)
    return next(filter(None, (odd(each, seen) for each in inside(node))), None)
