"""Memory: shared storage once, and a peak of each model's own call, never of the process."""

import torch
from torch import nn

from sparsebench.measure import memory
from sparsebench.modules.input_sparse import InputSparseLinear, replace
from sparsebench.records import progress
from sparsebench.sites import find_blocks
from tests.helpers import tiny_model


def test_weight_bytes_count_shared_storage_once():
    model = tiny_model(tie_word_embeddings=True)
    expected = sum(p.numel() for p in model.parameters()) * 4 + sum(
        b.numel() * b.element_size() for b in model.buffers()
    )
    assert memory.weight_bytes(model) == expected


def test_a_sparse_model_holds_no_second_copy_of_its_weights():
    model = tiny_model()
    for block in find_blocks(model):
        for site in block.sites.values():
            replace(model, site.path, InputSparseLinear(model.get_submodule(site.path), site.name, 0.3))
    assert memory.weight_bytes(model) <= memory.weight_bytes(tiny_model()) + 14 * 4  # thresholds only


def test_a_cpu_claims_no_peak_of_a_model():
    both = {"dense": nn.Linear(2, 2), "sparse": nn.Linear(2, 2)}
    assert memory.peaks(both, dict.fromkeys(both, lambda i: None), torch.device("cpu")) == {}


class Allocator:
    """What torch.cuda says of memory, for made-up calls."""

    def __init__(self, resident):
        self.now = self.most = resident

    def use(self, size):
        self.most = max(self.most, self.now + size)

    def stub(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda i: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda i: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda i: setattr(self, "most", self.now))


def test_peaks_are_of_each_models_own_call_whatever_else_lies_in_memory(monkeypatch):
    """1,000 bytes of other things; the dense call takes 300 on top of its weights, the sparse one 100."""
    device, cuda = Allocator(resident=1000), torch.device("cuda")
    device.stub(monkeypatch)
    memory.restart(cuda)
    device.use(5000)  # fitting, long over
    both = {"dense": nn.Linear(4, 4, bias=False), "sparse": nn.Linear(4, 2, bias=False)}
    calls = {"dense": lambda i: device.use(300), "sparse": lambda i: device.use(100)}
    assert memory.peaks(both, calls, cuda) == {"dense": 64 + 300, "sparse": 32 + 100}
    assert memory.peak_bytes(cuda) == 6000  # the run's own peak is not lost


def test_every_phase_has_its_own_peak_and_the_run_the_largest(monkeypatch):
    device, cuda = Allocator(resident=1000), torch.device("cuda")
    device.stub(monkeypatch)
    memory.restart(cuda)
    progress.taken()
    progress.with_peaks(lambda: memory.phase_peak(cuda))
    for name, size in (("loading", 100), ("fitting", 900), ("timing", 50)):
        progress.begin(name)
        device.use(size)
        memory.note(cuda)  # as what is measured inside a phase does
    assert memory.of_run(cuda, 1500, 500) == {
        "peak_bytes": 1900, "peak_of": "device", "cache_bytes": 500, "peak_ratio": 0.95,
    }  # fmt: skip
    assert [(each["name"], each["peak_bytes"]) for each in progress.taken()] == [
        ("loading", 1100), ("fitting", 1900), ("timing", 1050),
    ]  # fmt: skip
    memory.restart(cuda)
    assert memory.peak_bytes(cuda) == 1000, "the next run counts for itself"
