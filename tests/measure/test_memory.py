"""Memory: shared storage once, and a peak of each model's own call, never of the process."""

import torch
from torch import nn

from sparsebench.measure import memory
from sparsebench.modules.input_sparse import InputSparseLinear, replace
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
    assert memory.peaks(both, dict.fromkeys(both, lambda i: None), torch.device("cpu")) == ({}, 0)


class Allocator:
    """What torch.cuda says of memory, for made-up calls."""

    def __init__(self, resident):
        self.now = self.most = resident

    def use(self, size):
        self.most = max(self.most, self.now + size)

    def stub(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(self, "most", self.now))


def test_peaks_are_of_each_models_own_call_whatever_else_lies_in_memory(monkeypatch):
    """1,000 bytes of other things; the dense call takes 300 on top of its weights, the sparse one 100."""
    device = Allocator(resident=1000)
    device.stub(monkeypatch)
    device.use(5000)  # fitting, long over
    both = {"dense": nn.Linear(4, 4, bias=False), "sparse": nn.Linear(4, 2, bias=False)}
    calls = {"dense": lambda i: device.use(300), "sparse": lambda i: device.use(100)}
    needed, highest = memory.peaks(both, calls, torch.device("cuda"))
    assert needed == {"dense": 64 + 300, "sparse": 32 + 100}
    assert highest == 6000  # the run's own peak is not lost
