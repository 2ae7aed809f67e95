"""Which devices a run may use, by CUDA's own rules, and which of them NVML is asked about. Drivers are made up."""

import functools
import sys
from types import SimpleNamespace

import pytest
import torch

from sparsebench.records import machine
from tests.helpers import built

CARDS = {"GPU-aaaa1111": "NVIDIA H200", "GPU-bbbb2222": "NVIDIA A100", "GPU-bbcc3333": "NVIDIA L4"}


class NVMLError(Exception):
    pass


@pytest.fixture
def driver(monkeypatch):
    """A machine with three cards, whose NVML numbers are their places; clocks and processes tell which one was asked."""
    uuids = list(CARDS)

    def by_uuid(uuid):
        if uuid not in CARDS and uuid != "MIG-dddd":
            raise NVMLError(uuid)
        return uuid

    def refused(*arguments):
        raise NVMLError("not supported")

    fake = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlShutdown=lambda: None, nvmlDeviceGetCount=lambda: len(CARDS),
        nvmlDeviceGetHandleByIndex=uuids.__getitem__, nvmlDeviceGetHandleByUUID=by_uuid, nvmlDeviceGetUUID=lambda handle: handle,
        nvmlDeviceGetName=lambda handle: CARDS.get(handle, "a part of a card"), nvmlSystemGetDriverVersion=lambda: "570",
        nvmlDeviceGetClockInfo=lambda handle, kind: 1000 + uuids.index(handle) + kind, NVML_CLOCK_SM=0, NVML_CLOCK_MEM=100,
        nvmlDeviceGetEnforcedPowerLimit=refused, nvmlDeviceGetComputeRunningProcesses=lambda handle: [0] * uuids.index(handle),
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=lambda handle: uuids[1],
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(machine, "torch_has_cuda", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


@functools.cache
def automatic():
    return built("hardware", "hardware=auto")


@pytest.mark.parametrize(
    ("variable", "names"),
    [
        (None, ["NVIDIA H200", "NVIDIA A100", "NVIDIA L4"]),
        ("", []), ("-1", []), ("NoDevFiles", []), ("none", []), (" ", []), ("3", []), ("0,0", []), ("1,GPU-bbbb2222", []),
        ("1", ["NVIDIA A100"]), ("2,0", ["NVIDIA L4", "NVIDIA H200"]), ("0, 1", ["NVIDIA H200", "NVIDIA A100"]),
        ("1,-1,0", ["NVIDIA A100"]), ("1,7,0", ["NVIDIA A100"]), ("GPU-bbcc", ["NVIDIA L4"]), ("GPU-bb", []), ("GPU-zz", []),
        ("GPU-aaaa1111,1", ["NVIDIA H200", "NVIDIA A100"]), ("MIG-dddd", ["a part of a card"]), ("MIG-gone", []),
    ],
)  # fmt: skip
def test_hidden_devices_are_not_there(driver, monkeypatch, variable, names):
    """Before: everything but the empty string was taken for all devices, and hardware=auto chose a GPU that torch had not."""
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert machine.gpu_names() == machine.machine()["gpus"] == names
    assert automatic().present_device == ("cuda" if names else "cpu")


def test_what_is_hidden_is_said(driver, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    hardware = built("hardware", "hardware=cuda")
    (problem, *_) = hardware.problems(SimpleNamespace(measure=SimpleNamespace(latency=True)))
    assert problem.startswith("hardware=cuda needs an NVIDIA GPU, CUDA_VISIBLE_DEVICES='-1' leaves none")


def test_a_torch_without_cuda_has_no_devices(driver, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    for text, has in (
        ("cuda: Optional[str] = None", False),
        ("cuda: Optional[str] = '12.8'", True),
        ("cuda = None\n", False),
    ):
        (tmp_path / "version.py").write_text(f"__version__ = '2.11'\n{text}\nhip: Optional[str] = None\n")
        monkeypatch.setattr(machine, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
        machine.torch_has_cuda.cache_clear()
        assert machine.torch_has_cuda() is has and bool(machine.gpu_names()) is has
    monkeypatch.undo()
    machine.torch_has_cuda.cache_clear()
    assert machine.torch_has_cuda() is (torch.version.cuda is not None)


def test_nvml_is_asked_by_uuid(driver, monkeypatch):
    """Before: torch's number 0 was NVML's number 0, be it another card."""
    seen = SimpleNamespace(name="NVIDIA L4", uuid="bbcc3333")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: seen)
    account = machine.gpu()
    assert (account["gpu"], account["clock_sm_mhz"], account["clock_memory_mhz"]) == ("NVIDIA L4", 1002, 1102)
    assert account["other_processes"] == 1 and account["power_limit_w"] is None and account["driver"] == "570"
    assert machine.driver_account("dddd")["clock_sm_mhz"] == 1001  # an instance of a divided card
    assert machine.driver_account("nowhere")["clock_sm_mhz"] is None
    driver.nvmlInit = lambda: driver.nvmlDeviceGetHandleByUUID("nothing")
    assert machine.driver_account("bbcc3333") == {} and machine.gpu_names() == []


def test_of_several_devices_the_required_one_is_used():
    hardware = built("hardware", "hardware=h200")
    assert hardware.chosen(["NVIDIA A100", "NVIDIA H200", "NVIDIA H200"]) == [1]
    with pytest.raises(ValueError, match="needs a device named 'H200', torch sees"):
        hardware.chosen(["NVIDIA A100"])
    assert built("hardware", "hardware=cuda").chosen(["NVIDIA A100", "NVIDIA H200"]) == [0]
