"""Fitted states: safetensors, damaged ones are fitted again, keys that leave the operating point out."""

import json
import os

import pytest
import torch

from sparsebench import config
from sparsebench.calibration import allocation
from sparsebench.config import identity
from sparsebench.config.compose import compose_all
from sparsebench.methods.rsparse import evolution, low_rank
from sparsebench.records import state
from sparsebench.records.state import State
from sparsebench.sites import find_blocks
from tests.helpers import tiny_model, variants


def test_round_trip_and_cache(tmp_path):
    path, calls = tmp_path / "s.safetensors", []

    def fit():
        calls.append(1)
        return State({"a": torch.arange(6).view(2, 3).t()}, {"kind": "calibrated", "nested": {"x": 1}})

    first, facts = state.cached(path, fit)
    second, again = state.cached(path, fit)
    assert len(calls) == 1 and (facts["cached"], again["cached"]) == (False, True)
    assert torch.equal(first.tensors["a"], second.tensors["a"]) and second.info["nested"] == {"x": 1}
    assert again["seconds"] == facts["seconds"] > 0


def test_a_damaged_state_is_fitted_again(tmp_path):
    path = tmp_path / "s.safetensors"
    state.write(State({"a": torch.ones(100)}), path)
    for content in (b"", b"garbage", path.read_bytes()[:-50]):
        path.write_bytes(content)
        assert state.read(path) is None
        actual, facts = state.cached(path, lambda: State({"a": torch.zeros(1)}, {"kind": "x"}))
        assert not facts["cached"] and torch.equal(actual.tensors["a"], torch.zeros(1))
        path.unlink()


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def test_one_flipped_byte_anywhere_is_noticed(tmp_path):
    """In the tensors and in the facts: 40 places spread over the file; none is read as the state that was written."""
    path = tmp_path / "s.safetensors"
    written = state.write(
        State({"hist": torch.arange(1000), "b": torch.ones(3, dtype=torch.bfloat16)}, {"t": 1.5}), path
    )
    content = path.read_bytes()
    assert state.load(path)[1] == written and len(written) == 64
    for at in range(8, len(content), len(content) // 40):
        path.write_bytes(flipped(content, at))
        with pytest.raises(state.Damaged):
            state.load(path)
    path.write_bytes(content.replace(b"1.5", b"2.5"))
    with pytest.raises(state.Damaged, match="SHA-256"):
        state.load(path)


@pytest.mark.parametrize("count", [120, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_foreign_header_is_damage_or_the_very_same_state(tmp_path, count):
    """The JSON before the tensors with keys gone, renamed, of other values, cut, without end."""
    path = tmp_path / "s.safetensors"
    state.write(State({"a": torch.arange(12.0), "b": torch.ones(3)}, {"kind": "calibrated", "n": {"x": 1}}), path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body, same = json.loads(content[8 : 8 + length]), content[8 + length :], 0
    for said, text in variants(header, count):
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)
        actual = state.read(path)
        if actual is not None:
            same += 1
            assert torch.equal(actual.tensors["a"], torch.arange(12.0)) and actual.info["kind"] == "calibrated", said
            assert set(actual.tensors) == {"a", "b"} and actual.info["n"] == {"x": 1}, said
    assert same < count / 4


@pytest.mark.parametrize("info", ["[1]", "3", "null", "[" * 100_000, "{"])
def test_facts_that_are_none(tmp_path, info):
    """Even with the right checksum."""
    tensors = {"a": torch.ones(2)}
    metadata = {"info": info, "sha256": state.checksum(tensors, info), "name": "s"}
    (tmp_path / "s.safetensors").write_bytes(state.save(tensors, metadata=metadata))
    with pytest.raises(state.Damaged) as error:
        state.load(tmp_path / "s.safetensors")
    assert "\n" not in str(error.value)


def test_the_state_of_another_fit_is_fitted_again(tmp_path, caplog):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    state.cached(one, lambda: State({"a": torch.zeros(4)}))
    two.write_bytes(one.read_bytes())  # whole, under another key
    actual, facts = state.cached(two, lambda: State({"a": torch.ones(4)}))
    assert not facts["cached"] and torch.equal(actual.tensors["a"], torch.ones(4))
    assert [
        "two.safetensors is damaged (it is that of one): fitting again" in r.getMessage() for r in caplog.records
    ] == [True]


def test_the_checksum_is_in_the_facts_of_a_fit(tmp_path):
    path = tmp_path / "s.safetensors"
    _, first = state.cached(path, lambda: State({"a": torch.ones(4)}))
    _, again = state.cached(path, State)
    assert first["state_sha256"] == again["state_sha256"] == state.load(path)[1]
    assert state.checksum({"a": torch.ones(4)}, "{}") != state.checksum({"a": torch.ones(2, 2)}, "{}")
    assert state.checksum({"a": torch.ones(4)}, "{}") != state.checksum({"b": torch.ones(4)}, "{}")
    assert state.checksum({"a": torch.zeros(4)}, "{}") != state.checksum({"a": torch.zeros(4).int()}, "{}")


def damaged(folder) -> None:
    """Flip one byte of the tensors in every state below `folder`."""
    for file in folder.rglob("*.safetensors"):
        content = file.read_bytes()
        file.write_bytes(flipped(content, len(content) - 8))


def made_again(caplog) -> int:
    return sum("is damaged (its SHA-256 is" in r.getMessage() for r in caplog.records)


def test_low_rank_factors_are_checked(tmp_path, caplog):
    weight = torch.randn(12, 20, generator=torch.Generator().manual_seed(0))
    first = low_rank.cached(weight, tmp_path)
    damaged(tmp_path)
    again = low_rank.cached(weight, tmp_path)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True)) and made_again(caplog) == 1
    low_rank.cached(weight, tmp_path)
    assert made_again(caplog) == 1


def test_a_search_is_checked(tmp_path, caplog):
    calls = []
    settings = evolution.Evolution(population=4, generations=2, group=2, mutation=0.5, crossover=0.9, tokens=1, seed=0)

    def search():
        calls.append(0)
        return evolution.evolve(lambda x: calls.append(1) or float(x.sum()), 4, settings, tmp_path)

    first, history = search()
    whole = len(calls)
    assert torch.equal(search()[0], first) and len(calls) == whole + 1  # answered
    damaged(tmp_path)
    again, same = search()
    assert torch.equal(again, first) and same == history and len(calls) == 2 * whole + 1 and made_again(caplog) == 1


def test_greedy_tables_are_checked(tmp_path, caplog):
    model = tiny_model()
    rows = torch.randint(0, 320, (2, 8), generator=torch.Generator().manual_seed(0))

    def search():
        settings = allocation.Greedy(step=0.3, stop=0.5, error_tokens=0.5)
        return allocation.greedy(
            model, find_blocks(model), rows, lambda layer, role, p: p, settings, batch_size=2, folder=tmp_path
        )

    first = search()
    (tmp_path / "greedy-1.safetensors").write_bytes((tmp_path / "greedy-0.safetensors").read_bytes())
    again = search()
    assert all(torch.equal(x.sparsity, y.sparsity) for x, y in zip(first, again, strict=True))
    assert "greedy-1.safetensors is damaged (it is that of greedy-0)" in caplog.text
    damaged(tmp_path)
    again = search()
    assert all(torch.equal(x.greedy_error, y.greedy_error) for x, y in zip(first, again, strict=True))
    assert made_again(caplog) == 2


def test_damage_to_the_cache_does_not_reach_a_runs_folder(tmp_path):
    path, run = tmp_path / "s.safetensors", tmp_path / "run"
    run.mkdir()
    state.write(State({"a": torch.ones(1000)}), path)
    state.keep(path, run)
    assert os.stat(run / state.FILE).st_ino != os.stat(path).st_ino
    with path.open("r+b") as file:  # in place, as a failing disk or a careless program does
        file.seek(-10, os.SEEK_END)
        file.write(b"\xff" * 10)
    assert state.read(path) is None
    assert torch.equal(state.read(run / state.FILE).tensors["a"], torch.ones(1000))


def test_key_ignores_the_operating_point_and_nothing_else(monkeypatch):
    def key(*overrides):
        configuration = compose_all(["hardware=cpu", *overrides])[0]
        settings = config.build_settings(configuration)
        settings.hardware.prepare()
        return state.key(settings, configuration, {"versions": versions})

    versions = {}
    base = key()
    assert key("method.sparsity=0.65") == key("method.prompt=half") == key("eval.text.test_sequences=3") == base
    assert key("hardware.kernel=masked_dense") == base
    different = {
        key("seed=1"),
        key("method.calibration_tokens=512"),
        key("dataset.sequence_length=64"),
        key("method.allocation=greedy"),
    }
    versions = {"numpy": "2"}
    different.add(key())
    versions = {}
    monkeypatch.setattr(identity, "package", lambda: "edited")
    different.add(key())
    assert len(different | {base}) == 7
