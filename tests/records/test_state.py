"""Fitted states: safetensors, damaged ones are fitted again, keys that leave the operating point out."""

import torch

from sparsebench import config
from sparsebench.config.compose import compose_all
from sparsebench.records import state
from sparsebench.records.state import State


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
        found, facts = state.cached(path, lambda: State({"a": torch.zeros(1)}, {"kind": "x"}))
        assert not facts["cached"] and torch.equal(found.tensors["a"], torch.zeros(1))
        path.unlink()


def test_key_ignores_the_operating_point_and_nothing_else():
    def key(*overrides):
        configuration = compose_all(["hardware=cpu", *overrides])[0]
        settings = config.build_settings(configuration)
        settings.hardware.prepare()
        return state.key(settings, configuration, {"versions": {}})

    base = key()
    assert key("method.sparsity=0.65") == key("method.prompt=half") == key("eval.text.test_sequences=3") == base
    assert key("hardware.kernel=masked_dense") == base
    different = {
        key("seed=1"),
        key("method.calibration_tokens=512"),
        key("dataset.sequence_length=64"),
        key("method.allocation=greedy"),
    }
    assert len(different | {base}) == 5
