"""The clock: fake calls of known length, a copy of known size, parity, break-even (docs/methods/metrics.md, check 9)."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sparsebench import kernels
from sparsebench.engines import Decoder
from sparsebench.measure import clock, latency, memory, sparsity
from sparsebench.measure.clock import Contender
from sparsebench.modules.input_sparse import InputSparseLinear, replace
from sparsebench.sites import find_blocks
from tests.helpers import tiny_model

CPU = torch.device("cpu")


def sparse_copy(threshold=0.3, kernel="cpu_numba"):
    model = tiny_model()
    for block in find_blocks(model):
        for site in block.sites.values():
            replace(
                model, site.path, InputSparseLinear(model.get_submodule(site.path), site.name, threshold, kernel=kernel)
            )
    return model


def test_samples_alternate_and_warmup_is_left_out():
    seen = []
    contenders = [Contender(lambda i: seen.append(("a", i))), Contender(lambda i: seen.append(("b", i)))]
    times, _ = clock.interleaved(contenders, warmup=2, samples=3, device=CPU)
    assert seen == [(name, i) for i in range(5) for name in "ab"]
    assert [len(t) for t in times] == [3, 3]


def test_known_durations():
    (fast, slow), _ = clock.interleaved(
        [Contender(lambda _: time.sleep(0.001)), Contender(lambda _: time.sleep(0.004))], 1, 5, CPU
    )
    assert 1.0 <= clock.summary(fast)["median_ms"] < 3.5  # 1 ms and 4 ms asked for
    assert 4.0 <= clock.summary(slow)["median_ms"] < 12


def test_no_operation_is_fast_and_a_copy_has_plausible_bandwidth():
    source, target = np.zeros(1 << 25, np.uint8), np.ones(1 << 25, np.uint8)
    (nothing, copy), _ = clock.interleaved(
        [Contender(lambda _: None), Contender(lambda _: np.copyto(target, source))], 2, 7, CPU
    )
    assert clock.summary(nothing)["median_ms"] < 0.1
    gigabytes = 2 * source.nbytes / clock.summary(copy)["median_ms"] / 1e6
    assert 0.2 < gigabytes < 1000  # read plus written, per second


def test_summary():
    found = clock.summary([float(i) for i in range(1, 12)])
    assert (found["median_ms"], found["p10_ms"], found["p90_ms"]) == (6, 2, 10)
    assert clock.summary([1.0, 1.0, 2.0, 50.0, 3.0])["median_ms"] == 2  # a mean would follow the one that was disturbed


@pytest.mark.parametrize(
    ("dense", "nothing", "sparse", "expected"),
    [(10, 12, 7, 0.5 * 2 / 5), (10, 9, 5, 0.0), (10, 12, 13, None), (10, 30, 25, None)],
)
def test_break_even(dense, nothing, sparse, expected):
    assert clock.break_even(dense, nothing, sparse, 0.5) == expected


def test_decoder_equals_the_full_forward_pass_and_rewinds():
    model, ids = tiny_model(), torch.randint(0, 320, (1, 12))
    decoder = Decoder(model, ids[:, :11], room=2, compiled=False)
    with torch.no_grad():
        full = model(input_ids=ids).logits[:, -1:]
    for _ in range(3):
        decoder.rewind()
        torch.testing.assert_close(decoder.step(ids[:, 11:]), full, rtol=1e-4, atol=1e-4)


def test_sparse_decode_equals_masked_dense_logits():
    ids = torch.randint(0, 320, (1, 12))
    fast, reference = sparse_copy(), sparse_copy(kernel="masked_dense")
    kernels.load("cpu_numba").prepare(1)
    found = [Decoder(m, ids[:, :11], 1, compiled=False).step(ids[:, 11:]) for m in (fast, reference)]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_parity_finds_a_kernel_that_is_wrong(monkeypatch):
    model, ids = sparse_copy(), torch.randint(0, 320, (1, 12))
    decoder = Decoder(model, ids[:, :11], 1, compiled=False)
    assert latency.check_parity(latency.parity(model, lambda: decoder.step(ids[:, 11:])), torch.float32) < 1e-5
    backend = kernels.load("cpu_numba")
    right = backend.input_sparse_linear
    monkeypatch.setattr(backend, "input_sparse_linear", lambda *a, **k: right(*a, **k) * 1.001)
    decoder.rewind()
    with pytest.raises(ArithmeticError, match=r"differs from masked-dense at \d\.\w+"):
        latency.check_parity(latency.parity(model, lambda: decoder.step(ids[:, 11:])), torch.float32)


def test_nan_never_passes_parity():
    with pytest.raises(ArithmeticError, match="at b"):
        latency.check_parity({"a": 1e-9, "b": float("nan")}, torch.float32)


def settings():
    return SimpleNamespace(samples=30, warmup=3, context=8, prompt=8)


def hardware(kernel):
    return SimpleNamespace(
        torch_device=CPU, kernel_name=kernel, torch_dtype=torch.float32, skips=kernels.load(kernel).SKIPS, engine="auto"
    )


def test_a_simulation_claims_no_speedup():
    tokens = torch.randint(0, 320, (64,))
    found = latency.latency(
        tiny_model(), sparse_copy(kernel="masked_dense"), tokens, settings(), hardware("masked_dense"), 0.5
    )
    assert "speedup" not in found["decode"] and "speedup" not in found["prefill"]
    assert len(found["decode"]["dense"]["samples_ms"]) == 30


def test_a_kernel_that_skips_has_a_speedup_and_a_break_even():
    tokens = torch.randint(0, 320, (64,))
    found = latency.latency(tiny_model(), sparse_copy(), tokens, settings(), hardware("cpu_numba"), 0.5)
    assert found["kernel"] == "cpu_numba" and found["decode"]["speedup"] > 0
    assert "break_even_sparsity" in found["decode"] and "nothing_skipped" in found["decode"]
    assert "speedup" not in found["prefill"]  # the prompt runs masked-dense
    assert found["decode"]["sparse_engine"] == "fused" and set(found["decode"]["engines"]) == {
        "dense/eager",
        "dense/fused",
        "sparse/fused",
    }
    assert found["decode"]["dense"]["median_ms"] == min(
        times["median_ms"] for name, times in found["decode"]["engines"].items() if name.startswith("dense")
    )
    assert found["parity_relative_error"] < 1e-5


def test_eager_engine_by_request():
    tokens = torch.randint(0, 320, (64,))
    target = hardware("cpu_numba")
    target.engine = "eager"
    found = latency.latency(tiny_model(), sparse_copy(), tokens, settings(), target, 0.5)["decode"]
    assert found["sparse_engine"] == "eager" and found["speedup"] > 0 and "nothing_skipped" in found


def test_decode_counts_its_own_sparsity_where_scoring_had_no_sparse_token():
    tokens, model, none = torch.randint(0, 320, (64,)), sparse_copy(), sparse_copy(-1)
    for sparse in model.modules():
        if isinstance(sparse, InputSparseLinear):
            sparse.prompt = "none"
    found = latency.latency(tiny_model(), model, tokens, settings(), hardware("cpu_numba"), 0.0)["decode"]
    prompt = Decoder(model, tokens[None, : settings().context], 1, compiled=False)
    with sparsity.counting(model) as counters:
        prompt.step(tokens[settings().context].view(1, 1))
    shares = sparsity.summarise(model, counters)
    one = sum(s.sparsity * s.weight for s in shares.values()) / sum(s.weight for s in shares.values())
    assert 0.05 < found["sparsity"] < 0.95 and found["sparsity"] == pytest.approx(one, abs=0.05)
    unskipped = latency.latency(tiny_model(), none, tokens, settings(), hardware("masked_dense"), 0.0)
    assert unskipped["decode"]["sparsity"] == 0


def test_nothing_skipped_restores_the_thresholds():
    model = sparse_copy(0.25)
    with latency.all_kept(model):
        assert all(float(m.threshold) == -1 for m in model.modules() if isinstance(m, InputSparseLinear))
    assert all(float(m.threshold) == 0.25 for m in model.modules() if isinstance(m, InputSparseLinear))


def test_weight_bytes_count_shared_storage_once():
    model = tiny_model(tie_word_embeddings=True)
    expected = sum(p.numel() for p in model.parameters()) * 4 + sum(
        b.numel() * b.element_size() for b in model.buffers()
    )
    assert memory.weight_bytes(model) == expected
    assert (
        memory.weight_bytes(sparse_copy()) <= memory.weight_bytes(tiny_model()) + 14 * 4
    )  # thresholds only: no second copy
