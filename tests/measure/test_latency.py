"""Latency of decode: parity, the dense baseline, what is executed, break-even (docs/methods/metrics.md, check 9)."""

import copy
import statistics
from types import SimpleNamespace

import pytest
import torch

from sparsebench import config, engines, kernels, tasks
from sparsebench.config.compose import compose_all
from sparsebench.engines import Decoder, check, fused_cpu
from sparsebench.measure import clock, latency, macs, sparsity
from sparsebench.methods.base import Work
from sparsebench.modules import storage
from sparsebench.modules.input_sparse import InputSparseLinear, replace
from sparsebench.sites import find_blocks
from tests.helpers import accounted, sparse_copy, tiny_model

CPU = torch.device("cpu")


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
    values = [Decoder(m, ids[:, :11], 1, compiled=False).step(ids[:, 11:]) for m in (fast, reference)]
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-3)


def test_parity_finds_a_kernel_that_is_wrong(monkeypatch):
    model, ids = sparse_copy(), torch.randint(0, 320, (1, 12))
    decoder = Decoder(model, ids[:, :11], 1, compiled=False)
    assert check.check_parity(check.parity(model, lambda: decoder.step(ids[:, 11:])), torch.float32) < 1e-5
    backend = kernels.load("cpu_numba")
    right = backend.input_sparse_linear
    monkeypatch.setattr(backend, "input_sparse_linear", lambda *a, **k: right(*a, **k) * 1.001)
    decoder.rewind()
    with pytest.raises(ArithmeticError, match=r"differs from masked-dense at \d\.\w+"):
        check.check_parity(check.parity(model, lambda: decoder.step(ids[:, 11:])), torch.float32)


def test_nan_never_passes_parity():
    with pytest.raises(ArithmeticError, match="at b"):
        check.check_parity({"a": 1e-9, "b": float("nan")}, torch.float32)


def settings():
    return SimpleNamespace(samples=30, warmup=3, context=8, prompt=8, by_kernel=True, energy=False)


def hardware(kernel, engine="auto"):
    return SimpleNamespace(
        torch_device=CPU, kernel_name=kernel, torch_dtype=torch.float32, skips=kernels.load(kernel).SKIPS, engine=engine
    )


def tokens(count=64):
    return torch.randint(0, 320, (count,), generator=torch.Generator().manual_seed(3))


def test_a_simulation_claims_no_speedup():
    sparse, target = sparse_copy(kernel="masked_dense"), hardware("masked_dense")
    timing = latency.latency(tiny_model(), sparse, tokens(), settings(), target)
    decode = timing.latency["decode"]
    assert "speedup" not in decode and "speedup" not in timing.latency["prefill"] and "break_even" not in decode
    assert len(decode["dense"]["samples_ms"]) == 30
    model = tiny_model()
    dense, _ = accounted(macs.dense_sites(model), model, {}, context=8, skips=False)
    assert timing.step_macs == dense["dense"]  # masks ran every product


@pytest.mark.parametrize("engine", ["auto", "eager"])
def test_every_run_has_the_fastest_dense_step_and_a_measured_break_even(engine):
    """The fused dense step is timed wherever it can be, whatever engine the sparse model runs in."""
    model = sparse_copy()
    timing = latency.latency(tiny_model(), model, tokens(), settings(), hardware("cpu_numba", engine))
    actual, decode = timing.latency, timing.latency["decode"]
    mine = "eager" if engine == "eager" else "fused"
    assert actual["kernel"] == "cpu_numba" and decode["sparse_engine"] == mine
    assert set(decode["engines"]) == {"dense/eager", "dense/fused", f"sparse/{mine}"} and decode["refused"] == {}
    fastest = min(("eager", "fused"), key=lambda name: decode["engines"][f"dense/{name}"]["median_ms"])
    assert decode["dense_engine"] == fastest and decode["dense"] == decode["engines"][f"dense/{fastest}"]
    assert decode["speedup"] == decode["dense"]["median_ms"] / decode["sparse"]["median_ms"]
    assert decode["speedup_p10"] <= decode["speedup_p90"]
    assert "speedup" not in actual["prefill"]  # the prompt runs masked-dense
    assert 0 < actual["parity_relative_error"] < 1e-5
    points = decode["break_even"]["points"]
    assert points[0]["sparsity"] == 0 and points[-1]["sparsity"] == decode["sparsity"] > 0.05
    assert [p["sparsity"] for p in points] == sorted({p["sparsity"] for p in points}) and len(points) == 4
    assert [p["bytes"] for p in points] == sorted({p["bytes"] for p in points}, reverse=True)
    assert (decode["break_even"]["reason"] is None) == (decode["break_even"]["sparsity"] is not None)
    assert {"noisy", "reasons", "load"} <= set(actual)
    assert all(float(m.threshold) == pytest.approx(0.3) for m in model.modules() if isinstance(m, InputSparseLinear))


def test_executed_macs_are_those_of_the_timed_tokens():
    model = sparse_copy()
    timing = latency.latency(tiny_model(), model, tokens(), settings(), hardware("cpu_numba", "eager"))
    prompt = Decoder(model, tokens()[None, :8], 1, compiled=False)
    with sparsity.counting(model) as counters:
        for i in clock.timed_calls(3, 30, latency.BLOCK):
            prompt.rewind()
            prompt.step(tokens()[8 + i % 56].view(1, 1))
    measured = sparsity.summarise(model, counters)
    expected, _ = accounted(macs.dense_sites(tiny_model()), model, measured, context=8, skips=True)
    assert timing.step_macs == expected["executed"] < expected["dense"]


def test_the_dense_step_is_the_untouched_models_own(monkeypatch):
    """Built from the dense model and leaving it as it was: other weights in the sparse one change nothing."""
    dense, ids = tiny_model(seed=5), tokens()
    before = {name: (p.data_ptr(), p.stride(), p.data.clone()) for name, p in dense.named_parameters()}
    text = latency.Text(ids[None, :8], ids[8:])
    decoders, refused = latency.dense_decoders(dense, text, hardware("cpu_numba"))
    assert list(decoders) == ["eager", "fused"] and not refused
    with torch.no_grad():
        expected = dense(input_ids=ids[None, :9], use_cache=False).logits[:, -1:]
    for decoder in decoders.values():
        decoder.rewind()
        torch.testing.assert_close(decoder.step(ids[8].view(1, 1)), expected, rtol=1e-3, atol=1e-3)
    storage.lay(dense)
    for name, parameter in dense.named_parameters():
        address, stride, values = before[name]
        assert (parameter.data_ptr(), parameter.stride()) == (address, stride) and torch.equal(parameter, values)
    assert not any(isinstance(m, InputSparseLinear) for m in dense.modules())


def test_a_dense_engine_that_is_not_the_model_is_refused_with_its_reason(monkeypatch):
    step = fused_cpu.Decoder.step
    monkeypatch.setattr(fused_cpu.Decoder, "step", lambda self, token: step(self, token).roll(1, -1))
    ids = tokens()
    decoders, refused = latency.dense_decoders(
        tiny_model(), latency.Text(ids[None, :8], ids[8:]), hardware("cpu_numba")
    )
    assert list(decoders) == ["eager"] and "differs from masked-dense at logits" in refused["fused"]


def test_thresholds_that_move_nothing_leave_no_break_even():
    """The largest k of a token: only all kept and the operating point can be measured, and two points are too few."""
    model = tiny_model()
    for block in find_blocks(model):
        for site in block.sites.values():
            linear = model.get_submodule(site.path)
            rule = {"top_k": linear.weight.shape[1] // 2, "kernel": "cpu_numba"}
            replace(model, site.path, InputSparseLinear(linear, site.name, 0.0, **rule))
    decode = latency.latency(tiny_model(), model, tokens(), settings(), hardware("cpu_numba")).latency["decode"]
    assert decode["speedup"] > 0 and decode["sparsity"] == pytest.approx(0.5)
    assert decode["break_even"]["sparsity"] is None
    assert decode["break_even"]["reason"] == "needs three measured sparsities, got 2"


def test_decode_counts_its_own_sparsity_where_scoring_had_no_sparse_token():
    model, none = sparse_copy(), sparse_copy(-1)
    for sparse in model.modules():
        if isinstance(sparse, InputSparseLinear):
            sparse.prompt = "none"
    decode = latency.latency(tiny_model(), model, tokens(), settings(), hardware("cpu_numba")).latency["decode"]
    prompt = Decoder(model, tokens()[None, :8], 1, compiled=False)
    with sparsity.counting(model) as counters:
        prompt.step(tokens()[8].view(1, 1))
    shares = sparsity.summarise(model, counters)
    one = sum(s.sparsity * s.weight for s in shares.values()) / sum(s.weight for s in shares.values())
    assert 0.05 < decode["sparsity"] < 0.95 and decode["sparsity"] == pytest.approx(one, abs=0.05)
    unskipped = latency.latency(tiny_model(), none, tokens(), settings(), hardware("masked_dense"))
    assert unskipped.latency["decode"]["sparsity"] == 0


def test_the_dial_lowers_thresholds_and_restores_them():
    model = sparse_copy(0.25)
    maps = [m for m in model.modules() if isinstance(m, InputSparseLinear)]
    maps[0].threshold.fill_(-1)  # a map that its method left dense
    with latency.dial(model) as turn:
        turn(1 / 2)
        assert [float(m.threshold) for m in maps[:2]] == [-1, 0.125]
        turn(0.0)
        assert {float(m.threshold) for m in maps} == {-1}
        turn(1 / 4)
        assert float(maps[1].threshold) == 0.0625
    assert [float(m.threshold) for m in maps] == [-1, *[0.25] * (len(maps) - 1)]


def test_a_fused_step_follows_the_dial():
    """One decoder serves every sparsity of the break-even: it reads the thresholds that are set, not those it was made with."""
    model, ids = sparse_copy(0.3), tokens()
    decoder = engines.decoder(model, ids[None, :8], 1, hardware("cpu_numba"), "fused")
    eager = Decoder(model, ids[None, :8], 1, compiled=False)
    with latency.dial(model) as turn:
        for share in (0.0, 1 / 3, 1.0):
            turn(share)
            steps = []
            for each in (decoder, eager):
                each.rewind()
                steps.append(each.step(ids[8].view(1, 1)).clone())
            torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_reversing_the_order_moves_the_default_runs_speedup_by_less_than_5_percent(tmp_path, monkeypatch):
    """The default model, method and sparsity, timed in turn with contenders in their order and reversed."""
    settings = config.build_settings(
        compose_all(["hardware=cpu", "hardware.threads=1", "method.calibration_tokens=4096", "measure.prompt=2"])[0]
    )
    settings.hardware.prepare()
    data = settings.dataset.load(0)
    place = Work(0, settings.hardware, tmp_path, tmp_path, 4, lambda row: None)
    loaded = settings.model.load(place, data)
    dense = copy.deepcopy(loaded.module)
    sparse = settings.method.apply(loaded.module, settings.method.fit(loaded, data, place), place)
    task, speedups = tasks.load("language"), {"as it is": [], "reversed": []}

    def backwards(contenders, *arguments):
        times, seconds = clock.interleaved(contenders[::-1], *arguments)
        return times[::-1], seconds

    for name, turns in [("as it is", clock.interleaved), ("reversed", backwards)] * 5:
        monkeypatch.setattr(latency, "interleaved", turns)
        actual = task.time(dense, sparse, data, settings).latency
        speedups[name].append(actual["decode"]["speedup"])
    if actual["noisy"]:
        pytest.skip(f"times mean nothing on this machine now: {'; '.join(actual['reasons'])}; seen {speedups}")
    one, other = (statistics.median(each) for each in speedups.values())
    assert abs(other / one - 1) < 0.05, speedups
