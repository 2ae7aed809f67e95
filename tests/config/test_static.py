"""What is read from the source of the classes is what the classes say, and a class's own field is not overlooked."""

import dataclasses
import importlib
import subprocess
import sys
from typing import Any, get_args, get_type_hints

import pytest

from sparsebench.config import explain, static

TARGETS = sorted({o.target for group in explain.GROUPS for o in explain.options(group)} | set(explain.CLASSES.values()))


def imported(cls, prefix=""):
    """key -> (type, metadata) from the class itself; fields that hold an object of another group left out."""
    fields, hints = {}, get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        nested = [h for h in (get_args(hint) or (hint,)) if dataclasses.is_dataclass(h)]
        if nested:
            fields |= imported(nested[0], f"{prefix}{field.name}.")
        elif field.init and not getattr(hint, "_is_protocol", False):
            fields[prefix + field.name] = (hint, {k: v for k, v in field.metadata.items() if v not in (None, False)})
    return fields


@pytest.mark.parametrize("target", TARGETS)
def test_the_source_says_what_the_class_says(target):
    module, _, name = target.rpartition(".")
    expected = imported(getattr(importlib.import_module(module), name))
    told = static.fields_of(target)
    assert told.keys() == expected.keys()
    for key, (hint, meta) in expected.items():
        stated = {k: v for k, v in told[key][1].items() if v not in (None, False)}
        assert told[key][0] == hint, key
        for word in meta.keys() | stated.keys():
            a, b = stated.get(word), meta.get(word)
            assert (tuple(a) == tuple(b)) if word == "choices" else a == b, (key, word)


def test_what_needs_running_code_is_left_out(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\nfrom sparsebench.config import setting\nA = ('x', 'y')\n"
        "@dataclass\nclass Mine:\n    a: str = setting(choices=(None, *A))\n    b: int = setting(gt=len(A))\n    c: list[int]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert static.fields_of("mine.Mine") == {"a": (str, {"choices": (None, "x", "y")}), "c": (list[int], {})}
    assert Any not in {hint for hint, _ in static.fields_of("mine.Mine").values()} and "mine" not in sys.modules
    assert static.fields_of("nowhere.Class") == static.fields_of("mine.Other") == {}


def test_explaining_every_key_imports_no_torch():
    script = "import sys\nfrom sparsebench.config import explain\nexplain.entries(True)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
