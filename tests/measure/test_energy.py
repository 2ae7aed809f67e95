"""Joules per token from made-up counters: known answers, ranges that begin again, and nothing where nothing can be read."""

import sys
from types import SimpleNamespace

import pytest
import torch

from sparsebench.measure import energy
from sparsebench.measure.clock import Contender

CPU = torch.device("cpu")
RANGE = 1_000_000  # microjoules after which a made-up counter begins again


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(energy, "SECONDS", 0.02)
    monkeypatch.setattr(energy, "BETWEEN", 0.002)
    monkeypatch.setattr(energy, "PATIENCE", 0.05)


@pytest.fixture
def powercap(tmp_path, monkeypatch):
    """Two packages and the memory of one, with what must not be counted beside them: cores (a part) and the whole system."""
    zones = {"intel-rapl:0": "package-0", "intel-rapl:0:0": "core", "intel-rapl:0:1": "dram", "intel-rapl:1": "package-1",
             "intel-rapl:2": "psys"}  # fmt: skip
    for zone, name in zones.items():
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "name").write_text(f"{name}\n")
        (tmp_path / zone / "max_energy_range_uj").write_text(f"{RANGE}\n")
        (tmp_path / zone / "energy_uj").write_text("990000\n")
    monkeypatch.setattr(energy, "POWERCAP", tmp_path)

    def spend(microjoules):
        for zone in zones:
            file = tmp_path / zone / "energy_uj"
            file.write_text(f"{(int(file.read_text()) + microjoules) % (RANGE + 1)}\n")

    return tmp_path, spend


def test_joules_per_token_are_those_of_packages_and_memory(powercap):
    """Three counters rise by 7 and by 3 microjoules a step, over where they begin again; the two others count nothing."""
    _, spend = powercap
    contenders = {"dense": Contender(lambda i: spend(7)), "sparse": Contender(lambda i: spend(3))}
    actual = energy.measure(contenders, 1, "token", CPU)
    assert actual["dense"]["joules"] == pytest.approx(21e-6) and actual["sparse"]["joules"] == pytest.approx(9e-6)
    assert actual["source"] == "RAPL, package-0, dram, package-1" and actual["reason"] is None
    assert actual["dense"]["watts"] == pytest.approx(
        actual["dense"]["joules"] * actual["dense"]["token"] / actual["dense"]["seconds"]
    )
    assert actual["dense"]["seconds"] >= energy.TURNS * 0.02


def test_several_tokens_of_a_call_share_its_energy(powercap):
    _, spend = powercap
    actual = energy.measure({"dense": Contender(lambda i: spend(40))}, 8, "token", CPU)
    assert actual["dense"]["joules"] == pytest.approx(15e-6) and actual["dense"]["token"] % 8 == 0


def test_a_counter_that_began_again_is_followed(powercap):
    folder, spend = powercap
    meter = energy.Packages(folder)
    spend(20_000)  # 990000 -> 9999: over the end
    assert meter.joules() == pytest.approx(3 * 0.02)
    spend(5)
    assert meter.joules() == pytest.approx(3 * 0.020005)


def test_without_a_counter_there_is_no_figure_and_a_reason(tmp_path, monkeypatch):
    for folder in (tmp_path / "missing", tmp_path):
        monkeypatch.setattr(energy, "POWERCAP", folder)
        actual = energy.measure({"dense": Contender(pytest.fail), "sparse": Contender(pytest.fail)}, 1, "token", CPU)
        assert actual["dense"] is actual["sparse"] is actual["source"] is None
        assert actual["reason"] == f"no counter of a package in {folder}"


def test_a_counter_of_root_alone_is_named(powercap, monkeypatch):
    folder, _ = powercap
    read = type(folder).read_text

    def refused(self, *arguments, **options):
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(self, *arguments, **options)

    monkeypatch.setattr(type(folder), "read_text", refused)
    actual = energy.measure({"dense": Contender(pytest.fail)}, 1, "token", CPU)
    assert actual["dense"] is None and "energy_uj may not be read by this user" in actual["reason"]


def test_a_counter_that_stands_still_gives_nothing(powercap):
    actual = energy.measure({"dense": Contender(lambda i: None)}, 1, "token", CPU)
    assert actual["dense"] is None and "stood still" in actual["reason"]


class NVMLError(Exception):
    pass


@pytest.fixture
def card(monkeypatch):
    """A driver that knows one whole card, whose counter (mJ) ticks only when 50 of them were spent."""
    state = SimpleNamespace(millijoules=0, counts=True)

    def handle(uuid):
        if uuid != "GPU-whole":
            raise NVMLError("not found")
        return uuid

    def total(_):
        if not state.counts:
            raise NVMLError("not supported")
        return 5_000_000 + state.millijoules // 50 * 50

    fake = SimpleNamespace(NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=handle,
                           nvmlDeviceGetTotalEnergyConsumption=total)  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return state


def test_a_card_is_read_from_tick_to_tick(card):
    """10 mJ a step; between two ticks there are whole tens of them, whatever the counter does in between."""

    def step():
        card.millijoules += 10

    joules, seconds, calls = energy.between_ticks(step, energy.Card("whole"), 0.02)
    assert joules / calls == pytest.approx(0.01, rel=0.2) and calls > 5 and seconds >= 0.02


def test_a_part_of_a_card_and_a_card_that_does_not_count_have_no_energy(card):
    with pytest.raises(OSError, match="no whole card"):
        energy.Card("a-part")
    card.counts = False
    with pytest.raises(OSError, match="counts no energy"):
        energy.Card("whole")
