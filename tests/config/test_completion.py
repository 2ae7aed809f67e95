"""Completion behind the equals sign: options in folders, choices of a key, switches; words of Hydra stay."""

import pytest

from sparsebench.config import completion


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("experiment=paper/t", {"experiment=paper/teal", "experiment=paper/teal_speed"}),
        ("method.allocation=", {"method.allocation=uniform", "method.allocation=greedy"}),
        ("method=rsparse method.rho_from=s", {"method.rho_from=search"}),
        ("hardware.kernel=cpu", {"hardware.kernel=cpu_numba", "hardware.kernel=cpu_packed"}),
        ("wandb.mode=o", {"wandb.mode=offline", "wandb.mode=online"}),
        ("force=", {"force=true", "force=false"}),
        ("method=nothing method.allocation=", set()),
        ("method.greedy.stop=", set()),
        ("meth", set()),
    ],
)
def test_values_behind_the_equals_sign(line, expected):
    *before, word = line.split(" ")
    actual = completion.values(word, before)
    assert set(actual) == expected


def test_words_of_hydra_and_of_the_shell(monkeypatch):
    monkeypatch.setenv("COMP_LINE", "sparsebench wandb.mode=on")
    assert completion.completed("bash", lambda: print("wandb.mode=offline")) == "wandb.mode=offline wandb.mode=online"
    assert completion.completed("fish", lambda: print("a\nb")) == "a\nb\nwandb.mode=online"
