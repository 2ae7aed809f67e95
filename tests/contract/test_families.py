"""Families of transformers times language methods: the dense model with nothing dropped, a masked reference at its
operating point, or a refusal in one line. The whole matrix makes docs/families.md (scripts/make_families.py)."""

import pytest

from sparsebench.sites import find_blocks
from tests.families import KNOWN, METHODS, UNKNOWN, family, outcome

# One of each layout and of each peculiarity: post-norms, multipliers, parallel blocks, a norm in the FFN, flattened tokens.
REPRESENTATIVE = ("llama", "phi3", "gpt2", "opt", "gpt_neox", "olmo2", "granite", "cohere", "bitnet", "gemma2")
QUICK = ("teal", "wina", "larosa", "cats")
REFUSED = {
    "wina": {"gpt2", "opt", "gpt_neox", "olmo2", "cohere"},
    "larosa": {"gpt2", "opt", "gpt_neox", "olmo2", "cohere"},
    "cats": {"gpt2", "opt", "gpt_neox", "bitnet", "phi3"},
    "teal": set(),
}


@pytest.mark.parametrize("kind", REPRESENTATIVE)
def test_a_family_and_a_method(kind, tmp_path):
    record = {name: outcome(kind, name, tmp_path) for name in QUICK}
    assert {name for name, line in record.items() if line != "equal"} == {n for n in QUICK if kind in REFUSED[n]}, (
        record
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KNOWN)
def test_every_family_and_every_method(kind, tmp_path):
    record = {name: outcome(kind, name, tmp_path) for name in METHODS}
    assert {record[name] for name in ("teal", "wina_plain", "rsparse")} == {"equal"}


def test_a_family_of_unknown_structure_names_the_block():
    for kind in ("bloom", "glm", "apertus"):
        with pytest.raises(
            ValueError, match=r"\.0 is a block of an unknown structure; its linear maps: .*known families"
        ):
            find_blocks(family(kind))


@pytest.mark.slow
@pytest.mark.parametrize("kind", UNKNOWN)
def test_every_unknown_family_is_refused_in_one_line(kind):
    with pytest.raises(ValueError, match="unknown structure") as line:
        find_blocks(family(kind))
    assert "\n" not in str(line.value)
