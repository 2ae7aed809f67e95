"""The bytes limit of the machine: the arithmetic by hand, and nothing claimed where nothing was skipped."""

import pytest
import torch

from sparsebench.measure import clock, limit

CPU = torch.device("cpu")


def decode(**changes):
    return {"dense": {"median_ms": 20.0}, "sparse": {"median_ms": 10.0}, "speedup": 2.0, "sparsity": 0.5, **changes}


def test_shares_of_the_limit_by_hand(monkeypatch):
    """1 GB at 100 GB/s takes 10 ms: half of the dense 20; 0.4 GB take 4: two fifths of the sparse 10. Bytes allow 2.5x."""
    monkeypatch.setattr(clock, "read_bandwidth", lambda device: 100.0)
    actual = limit.of_decode(decode(), {"dense": 1e9, "sparse": 4e8}, CPU)
    assert actual["ms"] == pytest.approx({"dense": 10.0, "sparse": 4.0}) and actual["speedup"] == pytest.approx(2.5)
    assert actual["share"] == pytest.approx({"dense": 0.5, "sparse": 0.4}) and actual["read_bandwidth_gbs"] == 100.0


def test_bytes_are_those_of_the_timed_tokens(monkeypatch):
    monkeypatch.setattr(clock, "read_bandwidth", lambda device: 100.0)
    points = [{"sparsity": 0.0, "bytes": 1e9}, {"sparsity": 0.5, "bytes": 5e8}]
    actual = limit.of_decode(decode(break_even={"points": points}), {"dense": 1e9, "sparse": 4e8}, CPU)
    assert actual["bytes"]["sparse"] == 5e8 and actual["speedup"] == pytest.approx(2.0)


def test_a_simulation_has_no_limit_of_its_own(monkeypatch):
    monkeypatch.setattr(clock, "read_bandwidth", lambda device: 100.0)
    simulated = {k: v for k, v in decode().items() if k != "speedup"}
    actual = limit.of_decode(simulated, {"dense": 1e9, "sparse": 4e8}, CPU)
    assert set(actual["share"]) == {"dense"} and "speedup" not in actual


def test_memory_is_read_at_a_speed_that_memory_has():
    assert 0.1 < clock.read_bandwidth(CPU) < 2000  # GB/s
